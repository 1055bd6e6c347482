//! A run on several processes: each has all parameters and computes the gradients of some pieces of every step.
//!
//! ```text
//! a step's sequences     in P equal pieces, in order; process r of W has pieces r P/W … (r + 1) P/W − 1
//! g = g₀ + … + g_{P−1}   one chain of additions, whatever W is (foveal_processes::sum_parts)
//! ```
//!
//! The bits of a run depend on P and not on W. All processes read the same texts and move the same parameters in the same way;
//! the first one writes. Whatever fails on one process ends the run on all: no one waits for who is gone.

use std::ops::Range;

use foveal::nn;
use foveal_processes::{Processes, all_gather, first_failure, same_everywhere, sum_parts};
use sha2::{Digest, Sha256};

use super::Trainer;
use crate::train::config::Config;
use crate::train::data::Sequences;
use crate::train::{Carried, Error};

/// In how many pieces steps are computed as long as no one asks for others.
const USUAL_PIECES: usize = 2;
/// Numbers that are added at a time.
const PIECE: usize = 1 << 16;

/// Gives `own`, unless another process has failed.
pub(super) fn together<T>(processes: &dyn Processes, own: Result<T, Error>) -> Result<T, Error> {
    if processes.count() == 1 {
        return own;
    }
    let reason = own.as_ref().err().map(ToString::to_string);
    match (own, first_failure(processes, reason.as_deref())?) {
        (Ok(_), Some((rank, reason))) => Err(Error::Elsewhere { rank, reason }),
        (own, _) => own,
    }
}

/// The pieces of a step.
pub(super) fn pieces(config: &Config, processes: &dyn Processes) -> Result<usize, Error> {
    let count = processes.count();
    let sequences = config.data.batch * config.train.accumulate;
    let pieces = config.train.pieces.unwrap_or_else(|| usual_pieces(sequences, count));
    if !pieces.is_multiple_of(count) {
        let expected = format!("a multiple of the {count} processes");
        return Err(Error::config("train.pieces", pieces, expected));
    }
    if !sequences.is_multiple_of(pieces) {
        let expected = format!("a multiple of the {pieces} pieces of a step (train.pieces)");
        return Err(Error::config("data.batch · train.accumulate", sequences, expected));
    }
    Ok(pieces)
}

/// The pieces of a step where the configuration does not say: the same for any number of processes that divides them.
fn usual_pieces(sequences: usize, processes: usize) -> usize {
    let pieces = if sequences.is_multiple_of(USUAL_PIECES) { USUAL_PIECES } else { 1 };
    if pieces.is_multiple_of(processes) { pieces } else { processes }
}

/// The largest number of sequences, at most `most`, in which those of a piece can be cut.
pub(super) fn sequences_per_call(piece: usize, most: usize) -> usize {
    (1..=most.min(piece)).rev().find(|n| piece.is_multiple_of(*n)).unwrap_or(1)
}

impl Trainer {
    /// This process's number, and how many there are.
    pub fn place(&self) -> (usize, usize) {
        (self.processes.rank(), self.processes.count())
    }

    /// Whether this process writes the run's files.
    pub fn writes(&self) -> bool {
        self.processes.rank() == 0
    }

    /// Gives `own`, unless another process has failed: the same on all of them.
    pub(in crate::train) fn together<T>(&self, own: Result<T, Error>) -> Result<T, Error> {
        together(&*self.processes, own)
    }

    /// Whether any process wants to stop.
    pub(in crate::train) fn any_stops(&self, own: Result<bool, Error>) -> Result<bool, Error> {
        let own = self.together(own)?;
        let all = all_gather(&*self.processes, &[own.into()])?;
        Ok(all.iter().any(|flag| flag.contains(&1)))
    }

    /// All that processes have to have in common before a run begins.
    pub(super) fn check_same(&self) -> Result<(), Error> {
        if self.processes.count() == 1 {
            return Ok(());
        }
        let mut config = self.config.clone();
        // Where files lie may differ; what is in them may not.
        config.data.train.clear();
        config.data.validation.clear();
        config.data.tokenizer = None;
        config.model.from = None;
        let mut hash = Sha256::new();
        for x in self.parameters.values() {
            hash.update(x.to_le_bytes());
        }
        let validation = self.validation.as_ref().map(|text| text.digest());
        let all = [
            ("the version of foveal", env!("CARGO_PKG_VERSION").to_owned()),
            ("the configuration", config.to_text()?),
            ("the texts", self.state.digest.clone()),
            ("the texts to evaluate on", validation.unwrap_or_default()),
            ("steps that are done", self.state.step.to_string()),
            ("the parameters", format!("{:x}", hash.finalize())),
            ("the instructions (FOVEAL_SIMD)", self.cpu.level.name().to_owned()),
        ];
        Ok(same_everywhere(&*self.processes, &all)?)
    }

    /// The calls of piece `n`.
    fn calls(&self, n: usize) -> Range<usize> {
        let sequences = self.config.data.batch * self.config.train.accumulate;
        let calls = sequences / self.pieces / self.per_call(&self.train);
        n * calls..(n + 1) * calls
    }

    /// The pieces that are this process's.
    fn own_pieces(&self) -> Range<usize> {
        let (rank, count) = self.place();
        let each = self.pieces / count;
        rank * each..(rank + 1) * each
    }

    /// Leaves the gradient of a step in `gradients`; the sum of the losses of its calls.
    pub(super) fn gradients_of(
        &mut self,
        pieces: &[Vec<Sequences>],
        step: u64,
        targets: usize,
    ) -> Result<f64, Error> {
        let mut parts = vec![];
        let mut losses = vec![];
        let mut own = Ok(());
        for piece in self.own_pieces() {
            let mut part = match parts.len() {
                0 => std::mem::take(&mut self.gradients),
                _ => self.spare.pop().unwrap_or_else(|| self.parameters.zeros()),
            };
            part.fill(0.0);
            let first = pieces.iter().take(piece).map(Vec::len).sum();
            let calls = pieces.get(piece).map_or(&[][..], |calls| calls);
            own = self.piece((first, calls), (step, targets), (&mut part, &mut losses));
            self.keep(part, &mut parts)?;
            if own.is_err() {
                break;
            }
        }
        let summed = self
            .together(own)
            .and_then(|()| Ok(sum_parts(&*self.processes, &mut parts, self.cpu)?));
        let mut parts = parts.into_iter();
        self.gradients = parts.next().unwrap_or_default();
        self.spare.extend(parts);
        summed?;
        self.all_losses(&losses)
    }

    /// Adds the gradients of one piece to `part`.
    fn piece(
        &mut self,
        (first, calls): (usize, &[Sequences]),
        (step, targets): (u64, usize),
        (part, losses): (&mut [f32], &mut Vec<f64>),
    ) -> Result<(), Error> {
        for (n, batch) in calls.iter().enumerate() {
            losses.push(self.add_gradients(batch, (first + n, step), targets, part)?);
        }
        Ok(())
    }

    /// One process adds a piece at once; several keep theirs until all are there.
    fn keep(&mut self, part: Vec<f32>, parts: &mut Vec<Vec<f32>>) -> Result<(), Error> {
        match parts.first_mut() {
            Some(sum) if self.processes.count() == 1 => {
                let level = self.cpu.level;
                self.cpu.for_each(sum.chunks_mut(PIECE).zip(part.chunks(PIECE)), |(sum, part)| {
                    nn::add(sum, part, level).expect("parts of one length");
                });
                self.spare.push(part);
            }
            _ => parts.push(part),
        }
        Ok(())
    }

    /// The sum of numbers of all processes, in their order.
    fn all_losses(&self, own: &[f64]) -> Result<f64, Error> {
        Ok(self.all_numbers(own)?.into_iter().flatten().sum())
    }

    /// Numbers of all processes, in their order.
    pub(super) fn all_numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, Error> {
        let bytes: Vec<u8> = own.iter().flat_map(|x| x.to_le_bytes()).collect();
        let all = all_gather(&*self.processes, &bytes)?;
        let numbers = |bytes: Vec<u8>| {
            let (numbers, _) = bytes.as_chunks::<8>();
            numbers.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()
        };
        Ok(all.into_iter().map(numbers).collect())
    }

    /// Which calls of a step are this process's.
    pub(super) fn own_calls(&self) -> Range<usize> {
        let own = self.own_pieces();
        self.calls(own.start).start..self.calls(own.end).start
    }

    /// What layers carry of the calls of all processes.
    pub(super) fn all_carried(&self) -> Result<Vec<Vec<u8>>, Error> {
        if self.processes.count() == 1 {
            return Ok(self.carried.iter().map(Carried::snapshot).collect());
        }
        let calls = self.own_calls();
        let mut own = vec![];
        for carried in self.carried.get(calls).unwrap_or(&[]) {
            let snapshot = carried.snapshot();
            own.extend((snapshot.len() as u64).to_le_bytes());
            own.extend(snapshot);
        }
        let mut carried = vec![];
        for bytes in all_gather(&*self.processes, &own)? {
            let mut rest = &bytes[..];
            while let Some((len, after)) = rest.split_first_chunk::<8>() {
                let len = (u64::from_le_bytes(*len) as usize).min(after.len());
                carried.push(after[..len].to_vec());
                rest = &after[len..];
            }
        }
        Ok(carried)
    }
}
