//! Memory that kernels write their intermediate results to, kept between calls.

use crate::error::{Error, Result};

const ALIGNMENT: usize = 64;

/// Scratch memory for calls that do not allocate. Its contents mean nothing between calls.
#[derive(Debug, Default)]
pub struct Workspace {
    buffer: Vec<f32>,
}

impl Clone for Workspace {
    /// An empty one: there is nothing to copy.
    fn clone(&self) -> Workspace {
        Workspace::new()
    }
}

impl Workspace {
    /// An empty workspace; [`Workspace::reserve`] makes room.
    pub fn new() -> Workspace {
        Workspace::default()
    }

    /// Grows to at least `bytes`. Allocates only when it grows, and then forgets its contents.
    pub fn reserve(&mut self, bytes: usize) {
        let needed = bytes.div_ceil(4) + ALIGNMENT / 4;
        if self.buffer.len() < needed {
            // Freed first, so that the two never coexist.
            self.buffer = Vec::new();
            self.buffer = vec![0.0; needed];
        }
    }

    /// Like [`Workspace::reserve`], for callers that can go on where memory is short.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; the workspace is empty then.
    pub fn try_reserve(&mut self, bytes: usize) -> Result<()> {
        let needed = bytes.div_ceil(4) + ALIGNMENT / 4;
        if self.buffer.len() < needed {
            self.buffer = Vec::new();
            let what = "a workspace";
            let refused = self.buffer.try_reserve_exact(needed);
            refused.map_err(|_| Error::OutOfMemory { what, bytes })?;
            self.buffer.resize(needed, 0.0);
        }
        Ok(())
    }

    /// Bytes that a plan may use.
    pub fn bytes(&self) -> usize {
        self.buffer.len().saturating_sub(ALIGNMENT / 4) * 4
    }

    /// Fills it with NaN, so that a test sees what a kernel reads without having written it.
    #[doc(hidden)]
    pub fn poison(&mut self) {
        self.buffer.fill(f32::NAN);
    }

    /// The first `count` numbers, aligned to a cache line.
    pub(crate) fn floats(&mut self, count: usize) -> Result<&mut [f32]> {
        if count == 0 {
            return Ok(&mut []);
        }
        let got = self.bytes();
        let skip = self.buffer.as_ptr().align_offset(ALIGNMENT);
        let too_small = Error::WorkspaceTooSmall { expected: count * 4, got };
        self.buffer.get_mut(skip..).and_then(|rest| rest.get_mut(..count)).ok_or(too_small)
    }
}
