//! Who may ask, and what browsers are told.

use foveal_serve::{Error, Keys, Options};
use serde_json::json;

use crate::support::{Server, head, options};

const KEY: &str = "a-key-of-some-length";

fn with_key() -> Options {
    let mut keys = Keys::default();
    keys.add(KEY).unwrap();
    Options { keys, ..options() }
}

#[test]
fn others_need_a_key() {
    let server = Server::with(&with_key());
    let with = |value: &str| {
        server.raw(&head("GET", "/v1/models", &format!("authorization: {value}\r\n")))
    };
    for wrong in ["Bearer a-key-of-some-lengt", "Bearer ", KEY, "Basic abc"] {
        with(wrong).fails(401, "invalid_api_key");
    }
    server.get("/v1/models").fails(401, "invalid_api_key");
    server.get("/metrics").fails(401, "invalid_api_key");
    let refused = server.post("/v1/completions", &json!({"prompt": "a"}));
    assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    with(&format!("Bearer {KEY}")).good();
    // Load balancers have no key.
    server.get("/health").good();
    let foreign = String::from_utf8(head("GET", "/health", "")).unwrap();
    let foreign = foreign.replace("localhost", "models.example");
    server.raw(foreign.as_bytes()).good();
}

#[test]
fn an_address_that_others_reach_needs_a_key() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let options = Options { address: address.parse().unwrap(), ..options() };
        let (model, tokenizer) = crate::support::model();
        let served = foveal_serve::Served::new("x".into(), model, tokenizer, None);
        let error = foveal_serve::run(served, &options, &foveal_serve::Stop::new(), |_| ());
        assert!(matches!(error, Err(Error::NoKeys { .. })), "{error:?}");
    }
}

#[test]
fn pages_of_other_sites_can_not_ask() {
    let server = Server::new();
    let with = |more: &str| server.raw(&head("GET", "/v1/models", more));
    with("origin: http://evil.example\r\n").fails(403, "foreign_origin");
    with("origin: null\r\n").fails(403, "foreign_origin");
    with("origin: http://localhost\r\n").good();
    let rebound = String::from_utf8(head("GET", "/v1/models", "")).unwrap();
    let rebound = rebound.replace("localhost", "evil.example");
    server.raw(rebound.as_bytes()).fails(403, "foreign_host");
    let response = with("");
    assert!(response.headers.iter().all(|(name, _)| !name.starts_with("access-control-")));
}

#[test]
fn every_answer_tells_browsers_to_load_nothing_from_elsewhere() {
    let server = Server::new();
    for path in ["/v1/models", "/nothing", "/health"] {
        let response = server.get(path);
        let policy = response.header("content-security-policy").unwrap();
        assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"));
        assert!(!policy.contains("unsafe") && !policy.contains("http"));
        assert_eq!(response.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(response.header("cache-control"), Some("no-store"));
    }
}
