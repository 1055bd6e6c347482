//! Rows that are wanted next, asked for while a state goes through other tokens.
//!
//! ```text
//! for each pass over the rows of some columns, token t:   the same share of row t of every tensor → second level
//! ```
//!
//! Sweeps of a state are bound by arithmetic and leave the memory idle; rows of one head lie between those of others, where
//! no prefetcher looks for them. Cost: an instruction for each line of 64 bytes. No bit of a result depends on it.

use super::Simd;

const LINE: usize = 64;
/// Tensors that a block reads and writes at most.
const TENSORS: usize = 8;
/// Shares of a row are multiples of 2⁻¹⁶.
const ONE: usize = 1 << 16;

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

    /// Which share of each row a pass over `width` of `columns` columns asks for.
    pub(super) fn share(&self, first: usize, width: usize, columns: usize) -> Share {
        let of = |column: usize| if self.count == 0 { 0 } else { column * ONE / columns };
        Share { from: of(first), to: of(first + width) }
    }

    /// Asks for a share of a token's rows.
    #[inline(always)]
    pub(super) fn ask<S: Simd>(&self, s: S, token: usize, share: Share) {
        if token >= self.tokens {
            return;
        }
        for rows in &self.rows[..self.count] {
            let row = rows.first.wrapping_add(token * rows.stride);
            // Rows need not begin where lines do: a share goes on to the line of its last byte.
            let (from, to) = (rows.bytes * share.from / ONE, rows.bytes * share.to / ONE);
            let mut at = from / LINE * LINE;
            while at < to {
                s.prefetch(row.wrapping_add(at));
                at += LINE;
            }
            if share.to == ONE {
                s.prefetch(row.wrapping_add(rows.bytes - 1));
            }
        }
    }
}

/// A part of a row: where it begins and ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    from: usize,
    to: usize,
}
