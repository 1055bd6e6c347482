//! Why a server can't begin or go on.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use foveal_lm::model::MAX_TEXTS;

/// What was found, what was expected, and what to do where that helps.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each message says what its fields are")]
pub enum Error {
    /// Others could reach the server, and anyone could use it.
    #[error(
        "others can reach {address}, and there is no key; give one by --key-file or FOVEAL_API_KEY, or listen on 127.0.0.1"
    )]
    NoKeys { address: SocketAddr },
    /// A file of keys that can't be read.
    #[error("cannot read the keys in {}: {source}", path.display())]
    KeyFile { path: PathBuf, source: io::Error },
    /// A key that nobody could send, or that anyone could guess.
    #[error(
        "a key has {found} characters; expected {expected}, none of them a space or a control character"
    )]
    Key { found: usize, expected: &'static str },
    /// An address that can't be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    /// No thread or event loop.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// Too few or too many texts at once.
    #[error("{found} texts at once, expected 1 to {MAX_TEXTS}")]
    Parallel { found: usize },
    /// The model.
    #[error(transparent)]
    Model(#[from] foveal_lm::Error),
    /// A thread ended that should not have.
    #[error("the server's HTTP thread had a fault")]
    Fault,
}
