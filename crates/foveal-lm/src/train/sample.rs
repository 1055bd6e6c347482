//! Text from a model in training: its parameters, given to [`Model`] as a folder's would be.

use foveal::projection::Activations;

use super::trainer::Trainer;
use super::{Error, config};
use crate::Model;
use crate::generate::{Generator, Options, prompt_tokens};
use crate::sample::Sampling;

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
    let weights = trainer.parameters().weights(trainer.json())?;
    let model = Model::new(&weights)?.with_activations(Activations::F32);
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
