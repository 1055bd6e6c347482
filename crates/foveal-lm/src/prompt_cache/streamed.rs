//! The same of a text that comes piece by piece: in the place of its tokens, how far it was read and how well it was predicted.
//!
//! ```text
//! stream [6 + 4 buckets], u64:  offset, tokens, bytes, position, newest token + 1 or 0, digest
//!                               of each bucket its positions, tokens and the bits of its sum
//! ```

use std::path::Path;

use safetensors::Dtype;

use super::{Data, Numbers, PromptCache, numbers};
use crate::Error;
use crate::evaluate::{Bucket, Running};
use crate::model::State;

/// How far a text was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Streamed {
    /// How well it was predicted.
    pub running: Running,
    /// Where the next piece begins: [`TextStream::offset`](crate::text_stream::TextStream::offset).
    pub offset: u64,
    /// Tokens that were read.
    pub tokens: usize,
    /// Bytes of those that were predicted.
    pub bytes: usize,
}

/// Numbers before those of buckets.
const FIRST: usize = 6;

impl Streamed {
    fn numbers(&self, position: usize) -> Vec<u64> {
        let pending = self.running.pending.map_or(0, |token| u64::from(token) + 1);
        let counts = [self.tokens, self.bytes, position].map(|n| n as u64);
        let mut all = vec![self.offset];
        all.extend(counts);
        all.extend([pending, self.running.digest]);
        for bucket in &self.running.buckets {
            let (positions, tokens) = (&bucket.positions, bucket.tokens);
            all.extend([positions.start, positions.end, tokens].map(|n| n as u64));
            all.push(bucket.nll.to_bits());
        }
        all
    }

    /// With the position of the state; `None` for what no text has left.
    fn read(numbers: &[u64], vocab: usize) -> Option<(Streamed, usize)> {
        let (first, rest) = numbers.split_at_checked(FIRST)?;
        let count = |n: u64| usize::try_from(n).ok();
        let pending = match first[4] {
            0 => None,
            n => Some(u32::try_from(n - 1).ok().filter(|&token| (token as usize) < vocab)?),
        };
        let (buckets, []) = rest.as_chunks::<4>() else { return None };
        let bucket = |&[start, end, tokens, nll]: &[u64; 4]| {
            let (positions, nll) = (count(start)?..count(end)?, f64::from_bits(nll));
            Some(Bucket { positions, tokens: count(tokens)?, nll })
        };
        let buckets = buckets.iter().map(bucket).collect::<Option<Vec<_>>>()?;
        let running = Running { pending, buckets, digest: first[5] };
        let (tokens, bytes) = (count(first[1])?, count(first[2])?);
        Some((Streamed { running, offset: first[0], tokens, bytes }, count(first[3])?))
    }
}

impl PromptCache<'_> {
    /// Writes `state`, and how far its text was read, to a file, which appears whole or not at all.
    ///
    /// # Errors
    ///
    /// Those of [`PromptCache::save`].
    pub fn save_streamed(
        &self,
        path: &Path,
        streamed: &Streamed,
        state: &State,
    ) -> Result<(), Error> {
        let all = streamed.numbers(state.position());
        let shape = vec![all.len()];
        let data = Data::Bytes(all.into_iter().flat_map(u64::to_le_bytes).collect());
        self.write(path, ("stream", Numbers { dtype: Dtype::U64, shape, data }), state)
    }

    /// What such a file has; `None` if there is no file.
    ///
    /// # Errors
    ///
    /// Those of [`PromptCache::open`].
    pub fn open_streamed(&self, path: &Path) -> Result<Option<(Streamed, State)>, Error> {
        self.found(path, |bytes| {
            let file = self.whole(bytes)?;
            let all = numbers(&file, "stream", Dtype::U64, u64::from_le_bytes)?;
            let read = Streamed::read(&all, self.model.config().vocab);
            let (streamed, position) =
                read.ok_or_else(|| "it is damaged: its text makes no sense".to_owned())?;
            Ok((streamed, self.state_of(&file, position)?))
        })
    }
}
