//! Rows that are wanted next, asked for while a state goes through other tokens.
//!
//! ```text
//! for each pass over the rows of some columns, token t:   row t of every tensor → second level, if it is their turn
//! ```
//!
//! Sweeps of a state are bound by arithmetic and leave the memory idle; rows of one head lie between those of others, where
//! no prefetcher looks for them. Cost: an instruction for each line of 64 bytes. No bit of a result depends on it.

use super::Simd;

const LINE: usize = 64;
/// Tensors that a block reads and writes at most.
const TENSORS: usize = 12;

/// Rows of one tensor, by address.
#[derive(Debug, Clone, Copy)]
struct Lines {
    first: *const u8,
    stride: usize,
    bytes: usize,
}

/// Rows of several tensors, one of each for each token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Near {
    rows: [Lines; TENSORS],
    count: usize,
    tokens: usize,
}

impl Near {
    /// No rows.
    pub(crate) const fn nothing() -> Near {
        let none = Lines { first: std::ptr::null(), stride: 0, bytes: 0 };
        Near { rows: [none; TENSORS], count: 0, tokens: 0 }
    }

    /// No rows yet, of so many tokens.
    pub(crate) fn of(tokens: usize) -> Near {
        Near { tokens, ..Near::nothing() }
    }

    /// Adds rows of `width` elements, `stride` elements apart.
    ///
    /// # Panics
    /// If there are too many tensors.
    pub(crate) fn add<E>(&mut self, first: *const E, stride: usize, width: usize) {
        let size = size_of::<E>();
        self.rows[self.count] =
            Lines { first: first.cast(), stride: stride * size, bytes: width * size };
        self.count += 1;
    }

    /// These rows and others of the same tokens.
    pub(crate) fn with(&self, others: &Near) -> Near {
        let mut all = *self;
        for rows in &others.rows[..others.count] {
            all.rows[all.count] = *rows;
            all.count += 1;
        }
        all.tokens = all.tokens.max(others.tokens);
        all
    }

    /// Asks for a token's rows, if it is the turn of these columns.
    #[inline(always)]
    pub(super) fn ask<S: Simd>(&self, s: S, token: usize, turn: Turn) {
        if token >= self.tokens || token as u32 % turn.groups != turn.group {
            return;
        }
        for rows in &self.rows[..self.count] {
            let row = rows.first.wrapping_add(token * rows.stride);
            // Rows need not begin where lines do.
            let (end, skip) = (row.wrapping_add(rows.bytes), row.addr() % LINE);
            let mut line = row.wrapping_sub(skip);
            while line < end {
                s.prefetch(line);
                line = line.wrapping_add(LINE);
            }
        }
    }
}

/// Which of the groups of columns, each of which goes through all tokens, this is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    group: u32,
    groups: u32,
}

impl Turn {
    pub(super) fn new(first: usize, width: usize, columns: usize) -> Turn {
        Turn { group: (first / width) as u32, groups: (columns / width).max(1) as u32 }
    }
}
