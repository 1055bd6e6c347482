//! A server with the small model, and a client that speaks plain HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use foveal::projection::Format;
use foveal_lm::Model;
use foveal_lm::chat::ChatTemplate;
use foveal_lm::generate::{BatchOptions, Generator, Options as TextOptions, prompt_tokens};
use foveal_lm::mixer::CacheOptions;
use foveal_lm::testing::{Tiny, TinySizes, byte_tokenizer};
use foveal_lm::tokenizer::Tokenizer;
use foveal_lm::weights::{Description, Weights};
use foveal_serve::{Error, Options, Served, Stop};
use serde_json::{Value, json};

pub(crate) fn model() -> (Model, Tokenizer) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../foveal-lm/tests/assets/glassllm-en.gguf");
    let weights = Weights::open(Path::new(path)).unwrap();
    let Description::Gguf(metadata) = weights.description() else { panic!("a GGUF file") };
    let tokenizer = Tokenizer::from_gguf(metadata).unwrap();
    (Model::new(&weights).unwrap(), tokenizer)
}

/// A model of random weights, with a token for each byte.
pub(crate) fn built(tiny: &Tiny) -> (Model, Tokenizer) {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let (process, n) = (std::process::id(), COUNT.fetch_add(1, Relaxed));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("built-{process}-{n}"));
    std::fs::create_dir_all(&folder).unwrap();
    tiny.save_folder(&folder, Format::F32, 1).unwrap();
    std::fs::write(folder.join("tokenizer.json"), byte_tokenizer().to_string()).unwrap();
    let loaded = (Model::load(&folder).unwrap(), Tokenizer::from_folder(&folder).unwrap());
    let _ = std::fs::remove_dir_all(&folder);
    loaded
}

/// How many tokens a text of [`endless`] may have: more than any test waits for.
const ENDLESS: usize = 1 << 20;

/// A model whose texts end by their length alone, as no token ends them.
pub(crate) fn endless() -> (Model, Tokenizer) {
    built(&Tiny::new("llama", TinySizes { layers: 2, vocab: 256, ..TinySizes::default() }))
}

/// For a server of [`endless`]: what happens to a text that goes on does not depend on how fast it is made.
pub(crate) fn endless_options() -> Options {
    let cache = CacheOptions { context: Some(ENDLESS), ..CacheOptions::default() };
    let batch = BatchOptions { parallel: 4, cache, pool: Some(4 * ENDLESS) };
    Options { batch, drain: Duration::from_secs(600), ..options() }
}

/// A request for such a text.
pub(crate) fn endlessly(stream: bool) -> Vec<u8> {
    let body = json!({"prompt": "a", "max_tokens": ENDLESS - 1, "stream": stream, "seed": 1});
    post("/v1/completions", &body.to_string())
}

/// How keys and values are kept; more of them than the model was trained with, so that texts can be long.
pub(crate) fn cache() -> CacheOptions {
    CacheOptions { context: Some(4000), ..CacheOptions::default() }
}

pub(crate) fn options() -> Options {
    let batch = BatchOptions { parallel: 4, cache: cache(), pool: Some(20_000) };
    Options { batch, ..Options::new(SocketAddr::from(([127, 0, 0, 1], 0))) }
}

/// A server; dropping it stops it.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) stop: Stop,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Server {
    pub(crate) fn new() -> Server {
        Server::with(&options())
    }

    pub(crate) fn with(options: &Options) -> Server {
        Server::of(options, model)
    }

    /// A server of another model.
    pub(crate) fn of(options: &Options, model: fn() -> (Model, Tokenizer)) -> Server {
        let (sender, receiver) = mpsc::channel();
        let (stop, options) = (Stop::new(), options.clone());
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
            pool.install(|| {
                let (model, tokenizer) = model();
                let template = Some(ChatTemplate::plain().unwrap());
                let served = Served::new("small".to_owned(), model, tokenizer, template);
                foveal_serve::run(served, &options, &told, |address| sender.send(address).unwrap())
            })
        });
        Server { address: receiver.recv().unwrap(), stop, thread: Some(thread) }
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends a request as it is and reads all that comes back.
    pub(crate) fn raw(&self, request: &[u8]) -> Response {
        let mut stream = self.connect();
        // A server that has heard enough may close before all is sent.
        let _ = stream.write_all(request);
        let mut bytes = vec![];
        let _ = stream.read_to_end(&mut bytes);
        Response::parse(&bytes)
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.raw(&head("GET", path, ""))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        self.raw(&post(path, &body.to_string()))
    }

    /// The number of this name that `/metrics` has.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text.lines().find(|line| line.split(' ').next() == Some(name)).unwrap();
        line.split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// Asks again and again until something holds.
    pub(crate) fn until(&self, holds: impl Fn(&Server) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < Duration::from_secs(60), "it never came to hold");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What the server ended with.
    pub(crate) fn end(mut self) -> Result<(), Error> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.stop.stop();
        let ended = thread.join().unwrap();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// The lines before a body.
pub(crate) fn head(method: &str, path: &str, more: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{more}\r\n").into()
}

pub(crate) fn post(path: &str, body: &str) -> Vec<u8> {
    let more = format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
    [head("POST", path, &more), body.into()].concat()
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn parse(bytes: &[u8]) -> Response {
        let mut reader = BufReader::new(bytes);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).map_or(0, |status| status.parse().unwrap());
        let mut headers = vec![];
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((name.to_owned(), value.to_owned()));
        }
        let mut body = vec![];
        reader.read_to_end(&mut body).unwrap();
        let mut response = Response { status, headers, body };
        if response.header("transfer-encoding") == Some("chunked") {
            response.body = unchunked(&response.body);
        }
        response
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(found, _)| found == name);
        found.map(|(_, value)| &**value)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{:?}", self.text()))
    }

    /// A good response's body.
    #[track_caller]
    pub(crate) fn good(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// An error of this status and code, in the form that clients read.
    #[track_caller]
    pub(crate) fn fails(&self, status: u16, code: &str) {
        assert_eq!(self.status, status, "{}", self.text());
        let error = &self.json()["error"];
        assert_eq!(error["code"], code, "{error}");
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
    }

    /// The events of a stream, without the last one's `[DONE]`.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"), "{}", self.text());
        let text = self.text();
        let mut data: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = vec![];
    loop {
        let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") else { return body };
        let length = std::str::from_utf8(&bytes[..end]).unwrap();
        let length = usize::from_str_radix(length, 16).unwrap();
        let Some(chunk) = bytes.get(end + 2..end + 2 + length) else { return body };
        body.extend_from_slice(chunk);
        bytes = bytes.get(end + 4 + length..).unwrap_or_default();
    }
}

/// The text that the model makes of a prompt alone.
pub(crate) fn alone(prompt: &str, options: &TextOptions) -> String {
    let (model, tokenizer) = model();
    let prompt = prompt_tokens(&tokenizer, prompt).unwrap();
    let mut state = model.state_with(&cache()).unwrap();
    let pieces = Generator::new(&model, &tokenizer, &mut state, &prompt, options).unwrap();
    pieces.map(|piece| piece.unwrap().text).collect()
}
