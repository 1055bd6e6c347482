//! Text from a model in training: its parameters, given to [`Model`] as a folder's would be.

use foveal::projection::Activations;

use super::trainer::Trainer;
use super::{Error, config};
use crate::Model;
use crate::generate::{Generator, Options, prompt_tokens};
use crate::sample::Sampling;
use crate::weights::safetensors::writer::{self, Layout, Written};
use crate::weights::{Safetensors, Weights};

/// The prompt and what the model makes of it. Takes memory for another copy of the parameters.
pub(super) fn text(
    trainer: &Trainer,
    prompt: &str,
    (max_tokens, seed): (usize, u64),
) -> Result<String, Error> {
    if trainer.config().train.objective == config::Objective::Masked {
        // Nothing follows from what all tokens see.
        return Ok(String::new());
    }
    let model = Model::new(&weights(trainer)?)?.with_activations(Activations::F32);
    let tokenizer = &trainer.vocabulary().tokenizer;
    let tokens = prompt_tokens(tokenizer, prompt)?;
    let sampling = Sampling { seed, ..Sampling::default() };
    let options = Options { max_tokens, sampling, ..Options::default() };
    let mut state = model.state()?;
    let mut text = prompt.to_owned();
    for piece in Generator::new(&model, tokenizer, &mut state, &tokens, &options)? {
        text.push_str(&piece?.text);
    }
    Ok(text)
}

fn weights(trainer: &Trainer) -> Result<Weights, Error> {
    let layouts = trainer.shapes().into_iter();
    let layouts = layouts.map(|(name, shape)| Layout { name, shape, written: Written::F32 });
    let layouts: Vec<Layout> = layouts.collect();
    let mut bytes = Vec::with_capacity(4 * trainer.parameters().values().len() + (1 << 16));
    let written = writer::write(&mut bytes, &layouts, |n, out| {
        writer::numbers(trainer.entry_values(n), Written::F32, out)
    });
    written.map_err(|source| Error::Write { path: "a sample's model".into(), source })?;
    Ok(Safetensors::from_bytes(bytes)?.with_config(trainer.json().clone()).into())
}
