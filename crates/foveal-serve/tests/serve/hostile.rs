//! Bodies and heads that no client means: each gets an answer, and the server goes on.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use serde_json::{Value, json};

use crate::support::{Server, head, options, post};

const PATHS: [&str; 5] =
    ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/embeddings"];

#[test]
fn bodies_that_are_none_are_refused() {
    let server = Server::new();
    let deep = "[".repeat(100_000);
    for body in
        ["", "{", "null", "[]", "\u{0}", "{\"prompt\": 1e999}", "{\"prompt\": \"\\ud800\"}", &deep]
    {
        for path in &PATHS[..4] {
            server.raw(&post(path, body)).fails(400, "invalid_json");
        }
    }
    let mut broken = post("/tokenize", "{\"content\": \"xx\"}");
    let at = broken.len() - 4;
    broken[at] = 0xff;
    server.raw(&broken).fails(400, "invalid_json");
    server.get("/health").good();
}

#[test]
fn bodies_that_are_too_large_are_not_read() {
    let server = Server::with(&foveal_serve::Options { body: 1000, ..options() });
    let long = json!({"content": "x".repeat(2000)}).to_string();
    server.raw(&post("/tokenize", &long)).fails(413, "body_too_large");
    let claimed = head("POST", "/tokenize", "content-length: 99999999999\r\n");
    server.raw(&claimed).fails(413, "body_too_large");
    let chunks = format!("7d0\r\n{}\r\n", "x".repeat(2000));
    let chunked = head("POST", "/tokenize", "transfer-encoding: chunked\r\n");
    server.raw(&[chunked, chunks.into_bytes()].concat()).fails(413, "body_too_large");
    server.get("/health").good();
}

#[test]
fn heads_that_are_too_long_or_no_http_are_refused() {
    let server = Server::new();
    let long = head("GET", "/health", &format!("x: {}\r\n", "y".repeat(100_000)));
    let many = head("GET", "/health", &"x: y\r\n".repeat(500));
    let path = head("GET", &"/x".repeat(50_000), "");
    for request in [&long[..], &many, &path, b"\x16\x03\x01\x02", b"GET\r\n\r\n"] {
        let response = server.raw(request);
        assert!(response.status == 0 || response.status >= 400, "{}", response.status);
    }
    server.get("/health").good();
}

/// Bodies that look like requests, with any value anywhere.
fn bodies() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..70).prop_map(Value::from),
        any::<f64>().prop_map(|x| json!(x)),
        ".{0,12}".prop_map(Value::from),
        Just(json!("user")),
        Just(json!("text")),
    ];
    let value = leaf.prop_recursive(3, 12, 4, |inner| {
        let key = prop_oneof![
            Just("role"),
            Just("content"),
            Just("type"),
            Just("text"),
            Just("include_usage")
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..4).prop_map(|pairs| {
                Value::Object(
                    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
                )
            }),
        ]
    });
    let field = prop::sample::select(vec![
        "prompt",
        "messages",
        "n",
        "stop",
        "seed",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "logprobs",
        "top_logprobs",
        "max_tokens",
        "stream",
        "stream_options",
        "content",
        "tokens",
        "tools",
        "echo",
    ]);
    let fields = prop::collection::vec((field, value), 0..6);
    let good = prop_oneof![
        Just(json!({})),
        Just(json!({"prompt": "a", "max_tokens": 2})),
        Just(json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}))
    ];
    (good, fields).prop_map(|(mut body, fields)| {
        for (field, value) in fields {
            body[field] = value;
        }
        // So that a test is over soon.
        if body["max_tokens"].as_u64().is_none_or(|tokens| tokens > 3) {
            body["max_tokens"] = 2.into();
        }
        body
    })
}

#[test]
fn whatever_the_body_there_is_an_answer() {
    let server = Server::new();
    let config = Config {
        cases: 300,
        rng_seed: RngSeed::Fixed(11),
        failure_persistence: None,
        ..Config::default()
    };
    let mut good = std::cell::Cell::new(0);
    TestRunner::new(config)
        .run(&(prop::sample::select(PATHS.to_vec()), bodies()), |(path, body)| {
            let response = server.post(path, &body);
            prop_assert!(
                response.status == 200 || (400..500).contains(&response.status),
                "{} {}",
                response.status,
                response.text()
            );
            if response.status == 200 {
                good.set(good.get() + 1);
            } else {
                prop_assert!(response.json()["error"]["message"].is_string());
            }
            Ok(())
        })
        .unwrap();
    assert!(*good.get_mut() > 5, "{}", good.get());
    server.get("/health").good();
}
