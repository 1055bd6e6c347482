//! The same of a text that comes piece by piece: sums by position are all that is kept of it.

use std::ops::ControlFlow;

use foveal::{Cpu, nn};

use super::{Bucket, by_position};
use crate::Error;
use crate::model::{CHUNK, Model, Scratch, State, Step};

/// What was read of a text so far, and how well it was predicted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Running {
    /// The newest token, which the model reads with the next piece.
    pub pending: Option<u32>,
    /// Sums by position: see [`by_position`].
    pub buckets: Vec<Bucket>,
    /// Of all that were predicted, in the order of the text, each rounded to f32 by itself: as it is the same however a text
    /// was cut, it tells whether two readings are the same to the bit.
    pub digest: u64,
}

impl Running {
    /// Reads the next tokens of a text, on from where `state` is. `watch` is told how many of them have been read, and may
    /// break the reading off, after which [`Running`] and state go on to agree: some of the tokens are left out.
    ///
    /// # Errors
    ///
    /// [`Error::Interrupted`]; those of [`Model::forward`].
    pub fn push(
        &mut self,
        model: &Model,
        tokens: &[u32],
        (state, scratch): (&mut State, &mut Scratch),
        watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        model.check(tokens, Step::PROMPT, state.layers().len())?;
        let level = Cpu::detect()?.level;
        let all: Vec<u32> = self.pending.into_iter().chain(tokens.iter().copied()).collect();
        let (mut done, held) = (0, all.len() - tokens.len());
        while done + 1 < all.len() {
            let room = CHUNK - state.position() % CHUNK;
            let end = (done + room).min(all.len() - 1);
            let first = state.position() + 1;
            let mut nll = Vec::with_capacity(end - done);
            model.forward_each(&all[done..end], state, scratch, &mut |place, logits| {
                nn::log_softmax(logits, level);
                nll.push(-logits[all[done + place + 1] as usize]);
            })?;
            self.add(&nll, first);
            done = end;
            self.pending = Some(all[done]);
            if watch((done + 1).saturating_sub(held)).is_break() {
                return Err(Error::Interrupted);
            }
        }
        self.pending = all.last().copied().or(self.pending);
        Ok(())
    }

    fn add(&mut self, nll: &[f32], first: usize) {
        for &nll in nll {
            // FNV-1a, number by number.
            self.digest = (self.digest ^ u64::from(nll.to_bits())).wrapping_mul(0x0100_0000_01b3);
        }
        for new in by_position(nll, first) {
            match self.buckets.iter_mut().rfind(|bucket| bucket.positions == new.positions) {
                Some(bucket) => bucket.add(&new),
                None => self.buckets.push(new),
            }
        }
    }

    /// All buckets as one.
    pub fn total(&self) -> Bucket {
        let end = self.buckets.last().map_or(0, |bucket| bucket.positions.end);
        let mut total = Bucket { positions: 0..end, tokens: 0, nll: 0.0 };
        self.buckets.iter().for_each(|bucket| total.add(bucket));
        total
    }
}
