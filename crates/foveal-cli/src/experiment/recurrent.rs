//! A recurrent network with as many parameters as a model with attention, on the same batches of a text.

use std::time::Instant;

use foveal_lm::train::data::{Batches, Tokens};
use foveal_lm::train::{IGNORED, Vocabulary};

use super::cell::Cell;
use super::language::{HELD_OUT, config};
use super::learner::{Examples, Learner, Mixing};
use crate::train;

/// Trains as the models of a cell are trained; bits of `tokens` in texts of a sequence, and tokens a second of training.
pub(super) fn trained(cell: &Cell, tokens: &[u32]) -> anyhow::Result<[f64; 2]> {
    let config = config(cell, (cell.count("heads")?, None))?;
    let vocabulary = Vocabulary::new("bytes", (0, false), &[])?;
    let mut text = Tokens::encode(&[train::TEXT.to_owned()], &vocabulary.tokenizer)?;
    let _held_out = text.split_off((text.len() as f64 * HELD_OUT) as usize);
    let (data, seed) = (&config.data, config.train.seed);
    let mut batches = Batches::new(text, data, seed, data.batch, "text to train on")?;
    let mut learner = Learner::new(cell, &Mixing::Lstm, vocabulary.tokenizer.vocab_size())?;
    let start = Instant::now();
    learner.train(|| {
        let batch = batches.next(0..data.batch);
        let batch = batch.view();
        Examples {
            sequences: batch.sequences,
            tokens: batch.tokens.to_vec(),
            targets: batch.targets.to_vec(),
        }
    })?;
    let seen = config.schedule.steps as usize * data.batch * data.sequence;
    let pace = seen as f64 / start.elapsed().as_secs_f64();
    Ok([learner.bits(&texts(tokens, data.sequence))?, pace])
}

/// Whole texts of `length` tokens, and what each token is to predict.
fn texts(tokens: &[u32], length: usize) -> Examples {
    let own = tokens[..tokens.len() / length * length].to_vec();
    let next = |text: &[u32]| [&text[1..], &[IGNORED]].concat();
    let targets = own.chunks_exact(length).flat_map(next).collect();
    Examples { sequences: own.len() / length, tokens: own, targets }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_whole() {
        let texts = texts(&[1, 2, 3, 4, 5], 2);
        assert_eq!((texts.sequences, texts.tokens), (2, vec![1, 2, 3, 4]));
        assert_eq!(texts.targets, [2, IGNORED, 4, IGNORED]);
    }
}
