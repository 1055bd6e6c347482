//! Clients that go, queues that are full, servers that stop. Whatever has to go on while a test looks at it is endless.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::json;

use crate::support::{Response, Server, endless, endless_options, endlessly, post};

fn server() -> Server {
    Server::of(&endless_options(), endless)
}

/// A client whose text goes on until one of both sides ends it.
fn client(server: &Server, stream: bool) -> TcpStream {
    let made = server.metric("foveal_made_tokens_total");
    let mut client = server.connect();
    client.write_all(&endlessly(stream)).unwrap();
    server.until(|server| server.metric("foveal_made_tokens_total") > made);
    client
}

#[test]
fn whoever_goes_frees_what_they_held() {
    let server = server();
    for (n, stream) in [true, false].into_iter().enumerate() {
        let client = client(&server, stream);
        server.until(|server| server.metric("foveal_running") == 1.0);
        drop(client);
        server.until(|server| server.metric("foveal_abandoned_total") == (n + 1) as f64);
        server.until(|server| server.metric("foveal_running") == 0.0);
        server.until(|server| server.metric("foveal_kv_bytes") == 0.0);
    }
    assert_eq!(server.metric("foveal_finished_total"), 0.0);
}

#[test]
fn what_waits_is_limited_and_the_others_are_told_when_to_come_again() {
    let mut options = endless_options();
    (options.batch.parallel, options.queue) = (1, 2);
    let server = Server::of(&options, endless);
    let mut clients = vec![client(&server, true)];
    for waiting in [1.0, 2.0] {
        let mut client = server.connect();
        client.write_all(&endlessly(true)).unwrap();
        server.until(|server| server.metric("foveal_waiting") == waiting);
        clients.push(client);
    }
    server.until(|server| server.metric("foveal_running") == 1.0);
    let refused = server.raw(&endlessly(false));
    refused.fails(429, "queue_full");
    let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));
    drop(clients);
    server.until(|server| server.metric("foveal_abandoned_total") == 3.0);
    server.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 1})).good();
}

#[test]
fn a_server_that_is_told_to_stop_finishes_what_runs_and_takes_nothing_more() {
    let server = server();
    // As long as this one goes on, the server does.
    let keeps = client(&server, true);
    let mut client = server.connect();
    let body = json!({"prompt": "b", "max_tokens": 600, "seed": 1});
    let request = post("/v1/completions", &body.to_string());
    client.write_all(&request).unwrap();
    // It runs, or has been made already.
    server.until(|server| {
        server.metric("foveal_running") + server.metric("foveal_finished_total") >= 2.0
    });
    let (address, stop) = (server.address, server.stop.clone());
    stop.stop();
    server.until(|server| server.get("/health").status == 503);
    let refused = server.raw(&request);
    assert!(refused.status == 503 && refused.header("retry-after").is_some());
    let mut answer = vec![];
    client.read_to_end(&mut answer).unwrap();
    let answer = Response::parse(&answer).good();
    assert_eq!(answer["usage"]["completion_tokens"], 600);
    drop(keeps);
    server.end().unwrap();
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_server_that_is_told_twice_cuts_what_runs() {
    let server = server();
    let mut client = client(&server, true);
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
    let options = foveal_serve::Options { limit: Duration::ZERO, ..endless_options() };
    let server = Server::of(&options, endless);
    server.raw(&endlessly(false)).fails(504, "timeout");
    let events = server.raw(&endlessly(true)).events();
    assert_eq!(events.last().unwrap()["error"]["code"], "timeout");
    server.until(|server| server.metric("foveal_abandoned_total") == 2.0);
    server.until(|server| server.metric("foveal_running") == 0.0);
}
