//! What can go wrong between processes.

/// Why processes can't go on together: what was found, what was expected, and what to do where that helps.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each message says what its fields are")]
pub enum Error {
    /// Another process has ended.
    #[error("process {rank} has ended before the work was done; its own message says why")]
    Gone { rank: usize },
    /// A message of another length than the one that was waited for.
    #[error(
        "process {rank} sent {got} numbers, expected {expected}; start all processes with the same arguments"
    )]
    MessageLength { rank: usize, expected: usize, got: usize },
    /// Processes that were started with different things.
    #[error(
        "process {rank} has {other} for {what}, this one {own}; start all with the same program, arguments and files"
    )]
    Differs { what: String, rank: usize, own: String, other: String },
    /// Something that can't be shared out evenly.
    #[error("{found} {what} can't be shared out: expected a multiple of {multiple}")]
    Uneven { what: &'static str, found: usize, multiple: usize },
    /// What starts processes does not support what is needed.
    #[error("the processes can't talk to each other: {reason}")]
    Transport { reason: String },
    /// A kernel's refusal.
    #[error(transparent)]
    Kernel(#[from] foveal::Error),
}

impl Error {
    /// Whether a message has the length that was waited for.
    ///
    /// # Errors
    /// [`Error::MessageLength`] if not.
    pub fn check_length(rank: usize, expected: usize, got: usize) -> Result<(), Error> {
        if got == expected { Ok(()) } else { Err(Error::MessageLength { rank, expected, got }) }
    }
}
