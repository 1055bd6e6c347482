//! Connections: how many there may be, how long each may take, and how all of them end.
//!
//! HTTP/1.1 only; whoever wants more puts a proxy in front. Headers have ten seconds and 32 KiB, a client that reads nothing
//! for a minute is cut off, and of connections beyond the limit none is accepted until another ends.

mod patient;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::api::App;
use crate::engine::Engine;
use crate::{Error, Stop};
use patient::Patient;

/// The most connections at once.
const CONNECTIONS: usize = 256;
const HEADER_TIME: Duration = Duration::from_secs(10);
const HEADER_BYTES: usize = 32 << 10;
const HEADERS: usize = 64;
/// How long a client may read nothing of what is written.
const WRITE_TIME: Duration = Duration::from_secs(60);
/// What responses have once the texts are done.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Listens on an address; it and the port that was found for port 0.
pub(crate) fn bind(address: SocketAddr) -> Result<(std::net::TcpListener, SocketAddr), Error> {
    let listen = |source| Error::Listen { address, source };
    let listener = std::net::TcpListener::bind(address).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    let found = listener.local_addr().map_err(listen)?;
    Ok((listener, found))
}

/// What answers connections.
pub(crate) struct Server {
    pub(crate) listener: std::net::TcpListener,
    pub(crate) app: App,
    pub(crate) engine: Engine,
    pub(crate) drain: Duration,
}

impl Server {
    /// Answers until it is told to stop.
    pub(crate) fn run(self, stop: &Stop) -> Result<(), Error> {
        // However this ends, the engine ends with it.
        let _guard = CutLater(self.engine.clone());
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().max_blocking_threads(4).build();
        runtime.map_err(Error::Thread)?.block_on(self.serve(stop))
    }

    async fn serve(self, stop: &Stop) -> Result<(), Error> {
        let Server { listener, app, engine, drain } = self;
        let listener = TcpListener::from_std(listener).map_err(Error::Thread)?;
        let (ending, end) = watch::channel(false);
        let service = app.router();
        let mut connections = JoinSet::new();
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        let mut ended = Box::pin(drained(&engine, drain, stop));
        loop {
            let place = places.clone().acquire_owned();
            let accepted = async {
                let place = place.await;
                (listener.accept().await, place)
            };
            tokio::select! {
                // In this order: whoever has had an answer can rely on signals being heard.
                biased;
                () = &mut ended => break,
                Some(_) = connections.join_next() => {}
                (accepted, place) = accepted => match accepted {
                    Ok((stream, _)) => {
                        let service = TowerToHyperService::new(service.clone());
                        let end = end.clone();
                        connections.spawn(async move {
                            let _place = place;
                            answer(stream, service, end).await;
                        });
                    }
                    // Out of descriptors, or a client that was gone at once: there are others.
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                },
            }
        }
        drop(listener);
        let _ = ending.send(true);
        let all = async { while connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(LAST_WORDS, all).await;
        Ok(())
    }
}

/// Answers a connection's requests, one after the other; after `end` no further one.
async fn answer(
    stream: TcpStream,
    service: TowerToHyperService<axum::Router>,
    mut end: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME);
    builder.max_buf_size(HEADER_BYTES).max_headers(HEADERS);
    let stream = TokioIo::new(Patient::new(stream, WRITE_TIME));
    let connection = builder.serve_connection(stream, service);
    tokio::pin!(connection);
    tokio::select! {
        // What goes wrong with a connection is the client's.
        _ = &mut connection => return,
        _ = end.changed() => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

/// Comes back when the server was told to stop and the texts are done, or their time is over.
async fn drained(engine: &Engine, drain: Duration, stop: &Stop) {
    told(stop, engine).await;
    engine.close();
    let mut deadline = Box::pin(tokio::time::sleep(drain));
    let again = async { told(stop, engine).await };
    tokio::pin!(again);
    loop {
        tokio::select! {
            () = &mut deadline => break,
            () = &mut again => break,
            () = tokio::time::sleep(Duration::from_millis(20)) => {
                if engine.has_ended() {
                    return;
                }
            }
        }
    }
    engine.cut();
}

/// Waits for someone who tells the server to stop, or for the engine's own end.
async fn told(stop: &Stop, engine: &Engine) {
    let fault = async {
        while !engine.has_ended() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::select! {
        () = stop.told() => {}
        () = signal() => {}
        () = fault, if !engine.is_closing() => {}
    }
}

#[cfg(unix)]
async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

#[cfg(not(unix))]
async fn signal() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending().await
    }
}

struct CutLater(Engine);

impl Drop for CutLater {
    fn drop(&mut self) {
        self.0.cut();
    }
}
