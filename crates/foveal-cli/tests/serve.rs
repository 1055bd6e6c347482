//! `foveal serve`: it begins, answers, and ends when it is told to.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use support::{Folder, assert_fails, foveal, stdout};

/// A server that is killed if a test fails.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server of the built-in model on a free port, and its address.
fn serve(arguments: &[&str]) -> (Server, String) {
    let mut command = foveal(&["serve", "--port", "0", "--threads", "1"]);
    command.args(arguments).stderr(Stdio::piped()).env_remove("FOVEAL_API_KEY");
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().split_once("http://").unwrap().1.to_owned();
    (Server(child), address)
}

fn get(address: &str, path: &str, more: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{more}\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
#[cfg(unix)]
fn it_answers_until_it_is_told_to_stop() {
    let (mut server, address) = serve(&["--name", "mine"]);
    assert!(get(&address, "/v1/models", "").contains("\"id\":\"mine\""));
    let page = get(&address, "/", "");
    assert!(page.contains("text/html") && page.contains("<title>Foveal</title>"));
    assert!(get(&address, "/page/main.js", "").contains("text/javascript"));
    let id = server.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    assert!(server.0.wait().unwrap().success());
}

#[test]
fn a_key_from_a_file_lets_in_and_its_absence_does_not() {
    let folder = Folder::new("serve-key");
    let file = folder.write("keys", b"a-key-of-some-length\n");
    let (_server, address) = serve(&["--key-file", &file]);
    assert!(get(&address, "/v1/models", "").starts_with("HTTP/1.1 401"));
    let with = "authorization: Bearer a-key-of-some-length\r\n";
    assert!(get(&address, "/v1/models", with).starts_with("HTTP/1.1 200"));
}

#[test]
fn what_others_reach_needs_a_key_and_keys_must_be_some() {
    let run = |arguments: &[&str], key: &str| {
        let mut command = foveal(&["serve", "--port", "0"]);
        command.args(arguments).env("FOVEAL_API_KEY", key).output().unwrap()
    };
    assert_fails(&run(&["--host", "0.0.0.0"], ""), 1, &["0.0.0.0", "--key-file", "FOVEAL_API_KEY"]);
    assert_fails(&run(&[], "short"), 1, &["FOVEAL_API_KEY", "5 characters", "16 to 512"]);
    assert_fails(&run(&["--key-file", "/no/such/file"], ""), 1, &["/no/such/file"]);
    assert_fails(&run(&["--parallel", "65"], ""), 2, &["1 to 64"]);
    let help = foveal(&["serve", "--help"]).output().unwrap();
    assert!(stdout(&help).contains("--max-body"));
}
