//! Clients that go, queues that are full, servers that stop.

use std::io::{Read, Write};
use std::time::Duration;

use serde_json::json;

use crate::support::{Response, Server, options, post};

/// A request that goes on for long.
fn long(stream: bool) -> Vec<u8> {
    let body = json!({"prompt": "a", "max_tokens": 3900, "stream": stream, "seed": 1});
    post("/v1/completions", &body.to_string())
}

#[test]
fn whoever_goes_frees_what_they_held() {
    let server = Server::new();
    for stream in [true, false] {
        let before = server.metric("foveal_abandoned_total");
        let mut client = server.connect();
        client.write_all(&long(stream)).unwrap();
        server.until(|server| server.metric("foveal_running") == 1.0);
        drop(client);
        server.until(|server| server.metric("foveal_abandoned_total") == before + 1.0);
        server.until(|server| server.metric("foveal_running") == 0.0);
        server.until(|server| server.metric("foveal_kv_bytes") == 0.0);
    }
    assert!(server.metric("foveal_made_tokens_total") < 2.0 * 3900.0);
}

#[test]
fn what_waits_is_limited_and_the_others_are_told_when_to_come_again() {
    let mut options = options();
    (options.batch.parallel, options.queue) = (1, 2);
    let server = Server::with(&options);
    let mut clients: Vec<_> = (0..3).map(|_| server.connect()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.write_all(&long(true)).unwrap();
        server.until(|server| {
            let state = ["foveal_running", "foveal_waiting"].map(|name| server.metric(name));
            state == [1.0, n as f64]
        });
    }
    assert_eq!(server.metric("foveal_waiting"), 2.0);
    let refused = server.raw(&long(false));
    refused.fails(429, "queue_full");
    let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));
    drop(clients);
    server.until(|server| server.metric("foveal_waiting") == 0.0);
    server.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 1})).good();
}

#[test]
fn a_server_that_is_told_to_stop_finishes_what_runs_and_takes_nothing_more() {
    let server = Server::new();
    let mut client = server.connect();
    let body = json!({"prompt": "a", "max_tokens": 600, "seed": 1});
    let request = post("/v1/completions", &body.to_string());
    client.write_all(&request).unwrap();
    server.until(|server| server.metric("foveal_running") == 1.0);
    let (address, stop) = (server.address, server.stop.clone());
    stop.stop();
    server.until(|server| server.get("/health").status == 503);
    let refused = server.raw(&request);
    assert!(refused.status == 503 && refused.header("retry-after").is_some());
    let mut answer = vec![];
    client.read_to_end(&mut answer).unwrap();
    let answer = Response::parse(&answer).good();
    assert_eq!(answer["usage"]["completion_tokens"], 600);
    server.end().unwrap();
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn a_server_that_is_told_twice_cuts_what_runs() {
    let server = Server::new();
    let mut client = server.connect();
    client.write_all(&long(true)).unwrap();
    server.until(|server| server.metric("foveal_running") == 1.0);
    server.stop.stop();
    server.until(|server| server.get("/health").status == 503);
    server.stop.stop();
    let mut answer = vec![];
    client.read_to_end(&mut answer).unwrap();
    let events = Response::parse(&answer).events();
    assert_eq!(events.last().unwrap()["error"]["code"], "stopped");
    server.end().unwrap();
}

#[test]
fn what_takes_too_long_is_ended() {
    let server = Server::with(&foveal_serve::Options { limit: Duration::ZERO, ..options() });
    server.raw(&long(false)).fails(504, "timeout");
    let events = server.raw(&long(true)).events();
    assert_eq!(events.last().unwrap()["error"]["code"], "timeout");
    server.until(|server| server.metric("foveal_running") == 0.0);
}
