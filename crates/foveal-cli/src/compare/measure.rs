//! What a trained model does: how well it predicts by position, how fast it reads and goes on, and what it keeps.

use std::path::Path;
use std::time::Instant;

use foveal_lm::Model;
use foveal_lm::evaluate::{by_position, token_nll};
use foveal_lm::mixer::{CacheOptions, CacheStorage};
use foveal_lm::model::{Scratch, State, Step};
use foveal_lm::tokenizer::{Encode, Tokenizer};

use super::figures::{AtLength, AtPositions};
use crate::interrupt;

/// Tokens whose prediction is measured, at most.
const TOKENS: usize = 1 << 16;
/// Tokens that are made.
const MADE: usize = 32;
const ROUNDS: usize = 3;

/// How well the tokens of `text` are predicted, cut into texts of at most `longest` tokens, by position.
pub(super) fn quality(
    model: &Model,
    folder: &Path,
    (text, longest): (&str, usize),
) -> anyhow::Result<Vec<AtPositions>> {
    let tokenizer = Tokenizer::from_folder(folder)?;
    let mut tokens = tokenizer.encode(text, Encode::TEXT)?;
    tokens.truncate(TOKENS);
    let mut all: Vec<AtPositions> = vec![];
    let mut state = model.state()?;
    for part in tokens.chunks(longest) {
        state.reset();
        let nll = token_nll(model, part, &mut state, &mut |_| interrupt::flow())?;
        let bytes: Vec<usize> =
            part.iter().map(|&token| tokenizer.token_bytes(token).map_or(0, <[u8]>::len)).collect();
        for bucket in by_position(&nll, 1) {
            let (from, to) = (bucket.positions.start, bucket.positions.end);
            let own = bytes[from.max(1)..to.min(bytes.len())].iter().sum::<usize>();
            let bits = bucket.nll / std::f64::consts::LN_2;
            match all.iter_mut().find(|known| known.from == from) {
                Some(known) => {
                    known.bytes += own;
                    known.bits += bits;
                }
                None => all.push(AtPositions { from, to, bytes: own, bits }),
            }
        }
    }
    Ok(all)
}

/// How fast texts of a quarter, of one and of four times `longest` tokens are read and gone on with, and what they leave. Where a text is longer than
/// what training had, attention to all sees all of it.
pub(super) fn speed(model: &Model, longest: usize) -> anyhow::Result<Vec<AtLength>> {
    let trained = model.config().context;
    let lengths = match longest > trained {
        true => vec![longest / 4, longest, 4 * longest],
        false => vec![longest / 4, longest / 2, longest - MADE],
    };
    let context = (longest > trained).then_some(4 * longest + MADE);
    let options = CacheOptions { storage: CacheStorage::F16, context, ..CacheOptions::default() };
    let mut all = vec![];
    for tokens in lengths {
        let mut state = model.state_with(&options)?;
        let mut best = AtLength { tokens, read: 0.0, made: 0.0, state_bytes: 0 };
        for _ in 0..ROUNDS {
            round(model, &mut state, &mut best)?;
        }
        all.push(best);
    }
    Ok(all)
}

fn round(model: &Model, state: &mut State, best: &mut AtLength) -> anyhow::Result<()> {
    // Speed does not depend on what the tokens are.
    let vocab = model.config().vocab as u32;
    let text: Vec<u32> = (0..best.tokens as u32).map(|n| n * 7919 % vocab).collect();
    state.reset();
    let mut scratch = Scratch::new();
    let start = Instant::now();
    model.forward(&text, Step::PROMPT, state, &mut scratch)?;
    best.read = best.read.max(best.tokens as f64 / start.elapsed().as_secs_f64());
    best.state_bytes = state.kv_bytes();
    let start = Instant::now();
    for &token in text.iter().cycle().take(MADE) {
        model.forward(&[token], Step::GENERATED, state, &mut scratch)?;
    }
    best.made = best.made.max(MADE as f64 / start.elapsed().as_secs_f64());
    if interrupt::asked() {
        return Err(foveal_lm::Error::Interrupted.into());
    }
    Ok(())
}
