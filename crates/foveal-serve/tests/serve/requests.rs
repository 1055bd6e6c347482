//! Completions, chats, tokens: what comes back, and that it is what the model makes alone.

use foveal_lm::generate::Options as TextOptions;
use foveal_lm::sample::Sampling;
use serde_json::{Value, json};

use crate::support::{Server, alone, options};

/// What the server samples by when it is told nothing but a seed.
fn plain(seed: u64, max_tokens: usize) -> TextOptions {
    let sampling =
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Sampling::default() };
    let sampling = Sampling { seed, ..sampling };
    TextOptions { max_tokens, sampling, ..TextOptions::default() }
}

#[test]
fn a_completion_is_what_the_model_makes_alone() {
    let server = Server::new();
    let body = json!({"model": "small", "prompt": "Once upon a time", "max_tokens": 20, "seed": 7});
    let answer = server.post("/v1/completions", &body).good();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], alone("Once upon a time", &plain(7, 20)));
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!((&answer["object"], &answer["model"]), (&json!("text_completion"), &json!("small")));
    assert_eq!(answer["usage"]["completion_tokens"], 20);
    let prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(answer["usage"]["total_tokens"], prompt + 20);
    // Sixteen tokens where nothing is said; a seed of the server's own.
    let body = json!({"prompt": "Once upon a time"});
    let texts: Vec<Value> = (0..2).map(|_| server.post("/v1/completions", &body).good()).collect();
    assert_eq!(texts[0]["usage"]["completion_tokens"], 16);
    assert_ne!(texts[0]["choices"][0]["text"], texts[1]["choices"][0]["text"]);
    assert_ne!(texts[0]["id"], texts[1]["id"]);
}

#[test]
fn every_parameter_counts() {
    let server = Server::new();
    let body = json!({"prompt": "The dog", "max_tokens": 30, "seed": 3, "temperature": 0.7, "top_k": 20, "top_p": 0.9,
                      "min_p": 0.02, "repeat_penalty": 1.2, "stop": ["the", " a "]});
    let sampling = Sampling {
        temperature: 0.7,
        top_k: 20,
        top_p: 0.9,
        min_p: 0.02,
        repeat_penalty: 1.2,
        seed: 3,
        ..Sampling::default()
    };
    let stop = vec!["the".to_owned(), " a ".to_owned()];
    let expected =
        alone("The dog", &TextOptions { max_tokens: 30, stop, sampling, logprobs: None });
    let answer = server.post("/v1/completions", &body).good();
    assert_eq!(answer["choices"][0]["text"], expected);
    let body = json!({"prompt": "The dog", "max_tokens": 30, "temperature": 0});
    let greedy = server.post("/v1/completions", &body).good();
    let options =
        TextOptions { max_tokens: 30, sampling: Sampling::greedy(), ..TextOptions::default() };
    assert_eq!(greedy["choices"][0]["text"], alone("The dog", &options));
}

#[test]
fn several_prompts_and_answers_come_in_order_and_share_what_was_read() {
    let server = Server::new();
    let body = json!({"prompt": ["The sun", "A cat sat"], "n": 3, "seed": 5, "max_tokens": 8});
    let answer = server.post("/v1/completions", &body).good();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 6);
    for (n, choice) in choices.iter().enumerate() {
        let prompt = ["The sun", "A cat sat"][n / 3];
        assert_eq!(choice["index"], n);
        assert_eq!(choice["text"], alone(prompt, &plain(5 + n as u64, 8)), "{n}");
    }
    let tokens = server.post("/tokenize", &json!({"content": "A cat sat"})).good();
    let body = json!({"prompt": tokens["tokens"], "seed": 8, "max_tokens": 8});
    let by_tokens = server.post("/v1/completions", &body).good();
    assert_eq!(by_tokens["choices"][0]["text"], choices[3]["text"]);
    let body = json!({"prompt": "The sun ".repeat(40), "n": 4, "max_tokens": 2});
    let answer = server.post("/v1/completions", &body).good();
    assert!(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 200);
}

#[test]
fn probabilities_come_in_both_forms() {
    let server = Server::new();
    let body = json!({"prompt": "The sun", "max_tokens": 5, "logprobs": 2, "temperature": 0});
    let answer = server.post("/v1/completions", &body).good();
    let choice = &answer["choices"][0];
    let logprobs = &choice["logprobs"];
    let list = |key: &str| logprobs[key].as_array().unwrap().clone();
    let names: String = list("tokens").iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(names, choice["text"].as_str().unwrap());
    for (n, (chosen, top)) in list("token_logprobs").iter().zip(list("top_logprobs")).enumerate() {
        assert_eq!(top.as_object().unwrap().len(), 2);
        assert_eq!(&top[list("tokens")[n].as_str().unwrap()], chosen);
    }
    assert_eq!(list("text_offset")[0], 0);
    let messages = json!([{"role": "user", "content": "Hello"}]);
    let body = json!({"messages": messages, "max_tokens": 4, "logprobs": true, "top_logprobs": 3, "temperature": 0});
    let answer = server.post("/v1/chat/completions", &body).good();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert!(!content.is_empty());
    for token in &content {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(token["top_logprobs"][0]["logprob"], token["logprob"]);
        assert!(token["bytes"].is_array() && token["logprob"].as_f64().unwrap() <= 0.0);
    }
    let silent = server.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 1})).good();
    assert!(silent["choices"][0]["logprobs"].is_null());
}

#[test]
fn a_chat_is_its_template_filled_in() {
    let server = Server::new();
    let messages = json!([
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " you"}]},
    ]);
    let prompt = "Be kind.\n\nUser: Hello you\nAssistant:";
    let body = json!({"messages": messages, "max_completion_tokens": 12, "seed": 1});
    let answer = server.post("/v1/chat/completions", &body).good();
    let choice = &answer["choices"][0];
    let options = TextOptions { stop: vec!["\nUser:".to_owned()], ..plain(1, 12) };
    assert_eq!(choice["message"]["content"], alone(prompt, &options));
    assert_eq!(
        (&choice["message"]["role"], &answer["object"]),
        (&json!("assistant"), &json!("chat.completion"))
    );
    let tokens = server.post("/tokenize", &json!({"messages": messages})).good();
    assert_eq!(answer["usage"]["prompt_tokens"], tokens["count"]);
    let text = server.post("/detokenize", &json!({"tokens": tokens["tokens"]})).good();
    assert_eq!(text["content"], prompt);
}

#[test]
fn what_can_not_be_done_is_said_and_by_which_field() {
    let server = Server::new();
    let fails = |path: &str, body: Value, status: u16, code: &str, field: &str| {
        let response = server.post(path, &body);
        response.fails(status, code);
        assert_eq!(response.json()["error"]["param"], field, "{body}");
    };
    let (complete, chat) = ("/v1/completions", "/v1/chat/completions");
    let hello = json!([{"role": "user", "content": "Hi"}]);
    fails(complete, json!({"prompt": "a", "model": "other"}), 404, "model_not_found", "model");
    for (field, value) in [
        ("temperature", json!(-1)),
        ("top_p", json!(0)),
        ("min_p", json!(1)),
        ("n", json!(0)),
        ("n", json!(65)),
        ("logprobs", json!(99)),
    ] {
        fails(complete, json!({"prompt": "a", field: value}), 400, "invalid_value", field);
    }
    fails(complete, json!({"prompt": []}), 400, "invalid_value", "prompt");
    fails(complete, json!({"prompt": [70_000]}), 400, "invalid_value", "prompt");
    fails(
        complete,
        json!({"prompt": "word ".repeat(9000)}),
        400,
        "context_length_exceeded",
        "prompt",
    );
    fails(complete, json!({"prompt": "a", "echo": true}), 400, "unsupported", "echo");
    fails(complete, json!({"prompt": "a", "stop": vec!["x"; 17]}), 400, "invalid_value", "stop");
    fails(
        complete,
        json!({"prompt": "a", "stream_options": {}}),
        400,
        "invalid_value",
        "stream_options",
    );
    fails(chat, json!({"messages": []}), 400, "invalid_value", "messages");
    fails(
        chat,
        json!({"messages": [{"role": "tool", "content": "x"}]}),
        400,
        "unsupported",
        "messages",
    );
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
    fails(chat, json!({"messages": image}), 400, "unsupported", "messages");
    fails(
        chat,
        json!({"messages": hello, "tools": [{"type": "function"}]}),
        400,
        "unsupported",
        "tools",
    );
    fails(
        chat,
        json!({"messages": hello, "top_logprobs": 3}),
        400,
        "invalid_value",
        "top_logprobs",
    );
    fails("/v1/embeddings", json!({"input": "x"}), 400, "unsupported", "model");
    fails("/tokenize", json!({}), 400, "invalid_value", "content");
    assert_eq!(server.post("/detokenize", &json!({"tokens": [70_000]})).status, 400);
    server.get("/v1/nothing").fails(404, "unknown_url");
    server.get("/v1/completions").fails(405, "method_not_allowed");
    // Nothing of all this was begun.
    assert_eq!(server.metric("foveal_made_tokens_total"), 0.0);
    // What asks for nothing is no reason to refuse.
    let body = json!({"messages": hello, "max_tokens": 1, "tools": null, "user": "me", "presence_penalty": 0, "store": true});
    server.post(chat, &body).good();
}

#[test]
fn a_text_that_no_pool_could_hold_is_refused() {
    let mut options = options();
    options.batch.pool = Some(512);
    let server = Server::with(&options);
    let body = json!({"prompt": "a", "max_tokens": 3000});
    server.post("/v1/completions", &body).fails(400, "pool_exceeded");
    server.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 30})).good();
}

#[test]
fn the_server_says_what_it_is_and_how_it_is() {
    let server = Server::new();
    let models = server.get("/v1/models").good();
    assert_eq!((&models["data"][0]["id"], &models["object"]), (&json!("small"), &json!("list")));
    assert_eq!(models["data"][0]["context_length"], 4000);
    assert_eq!(server.get("/v1/models/small").good()["id"], "small");
    server.get("/v1/models/large").fails(404, "model_not_found");
    assert_eq!(server.get("/health").good()["status"], "ok");
    let body = json!({"prompt": "a", "max_tokens": 3});
    server.post("/v1/completions", &body).good();
    assert_eq!(server.metric("foveal_made_tokens_total"), 3.0);
    assert_eq!(server.metric("foveal_finished_total"), 1.0);
    assert_eq!(server.metric("foveal_first_token_seconds_count"), 1.0);
    assert_eq!((server.metric("foveal_running"), server.metric("foveal_kv_bytes")), (0.0, 0.0));
    let document = server.get("/openapi.json").good();
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/health", "/metrics"] {
        assert!(document["paths"][path].is_object(), "{path}");
    }
    let schema = &document["components"]["schemas"]["ChatRequest"];
    assert!(schema.to_string().contains("top_logprobs"), "{schema}");
}
