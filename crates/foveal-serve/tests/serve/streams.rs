//! Answers piece by piece: together they are the whole answer.

use serde_json::{Value, json};

use crate::support::Server;

/// The texts and the ends of all choices of a stream.
fn joined(events: &[Value], text: impl Fn(&Value) -> &Value) -> Vec<(String, Value)> {
    let mut all = vec![];
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let n = choice["index"].as_u64().unwrap() as usize;
        all.resize(all.len().max(n + 1), (String::new(), Value::Null));
        assert!(all[n].1.is_null(), "nothing comes after the end");
        all[n].0 += text(choice).as_str().unwrap_or_default();
        all[n].1 = choice["finish_reason"].clone();
    }
    all
}

#[test]
fn pieces_make_up_the_answer() {
    let server = Server::new();
    let mut body =
        json!({"prompt": ["The sun", "It was"], "n": 2, "seed": 4, "max_tokens": 25, "stop": "s "});
    let whole = server.post("/v1/completions", &body).good();
    body["stream"] = true.into();
    let events = server.post("/v1/completions", &body).events();
    let pieces = joined(&events, |choice| &choice["text"]);
    for (n, (text, reason)) in pieces.iter().enumerate() {
        let choice = &whole["choices"][n];
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), reason));
    }
    assert_eq!(pieces.len(), 4);
    assert!(
        events.iter().all(|event| event["id"] == events[0]["id"] && event.get("usage").is_none())
    );
}

#[test]
fn a_chat_streams_a_role_then_pieces_then_an_end_then_its_usage() {
    let server = Server::new();
    let messages = json!([{"role": "user", "content": "Hello"}]);
    let mut body = json!({"messages": messages, "seed": 4, "max_tokens": 15});
    let whole = server.post("/v1/chat/completions", &body).good();
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let response = server.post("/v1/chat/completions", &body);
    assert_eq!(response.header("x-accel-buffering"), Some("no"));
    let events = response.events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let (last, events) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    assert!(events.iter().all(|event| event["usage"].is_null()));
    let pieces = joined(events, |choice| &choice["delta"]["content"]);
    assert_eq!(pieces[0].0, whole["choices"][0]["message"]["content"].as_str().unwrap());
    assert_eq!(pieces[0].1, whole["choices"][0]["finish_reason"]);
}

#[test]
fn probabilities_stream_too() {
    let server = Server::new();
    let mut body = json!({"prompt": "The sun", "max_tokens": 6, "logprobs": 1, "temperature": 0});
    let whole = server.post("/v1/completions", &body).good();
    body["stream"] = true.into();
    let events = server.post("/v1/completions", &body).events();
    let of = |key: &str| -> Vec<Value> {
        let lists =
            events.iter().filter_map(|event| event["choices"][0]["logprobs"][key].as_array());
        lists.flatten().cloned().collect()
    };
    let expected = &whole["choices"][0]["logprobs"];
    for key in ["tokens", "token_logprobs", "text_offset"] {
        assert_eq!(&json!(of(key)), &expected[key], "{key}");
    }
}
