//! Text from a model in training.

use foveal::Cpu;
use foveal::projection::Activations;

use super::data::Text;
use super::network::{EncoderDecoder, Scratch, StepOptions};
use super::trainer::{Learner, Trainer, start_token};
use super::{Error, config};
use crate::Model;
use crate::generate::{Generator, Options, prompt_tokens};
use crate::sample::Sampling;
use crate::tokenizer::Encode;

/// Pairs that are shown where there is no prompt.
const PAIRS: usize = 3;

/// What the model of a run makes. Takes memory for another copy of the parameters.
pub(super) fn text(trainer: &Trainer, how: (usize, u64)) -> Result<String, Error> {
    let prompt = &trainer.config().train.prompt;
    match (trainer.learner(), trainer.config().train.objective) {
        (Learner::Pairs(network), _) => translated(trainer, network, prompt),
        // Nothing follows from what all tokens see.
        (_, config::Objective::Masked) => Ok(String::new()),
        _ => continued(trainer, prompt, how),
    }
}

/// The prompt and what follows it: the parameters are given to [`Model`] as a folder's would be.
fn continued(
    trainer: &Trainer,
    prompt: &str,
    (max_tokens, seed): (usize, u64),
) -> Result<String, Error> {
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

/// What becomes of the prompt, or of the first pairs that are kept back, where there are some: source, what the model says,
/// and what it should say if that is something else.
fn translated(trainer: &Trainer, network: &EncoderDecoder, prompt: &str) -> Result<String, Error> {
    let tokenizer = &trainer.vocabulary().tokenizer;
    let say = |source: &[u32]| -> Result<String, Error> {
        let mut scratch = Scratch::new();
        let mut options = StepOptions::new(Cpu::detect()?, &mut scratch);
        let (values, end) = (trainer.parameters().values(), start_token(trainer.vocabulary())?);
        let said = network.greedy(values, source, end, &mut options)?;
        Ok(tokenizer.decode(&said)?)
    };
    if !prompt.is_empty() {
        let said = say(&tokenizer.encode(prompt, Encode::TEXT)?)?;
        return Ok(format!("{prompt} → {said}"));
    }
    let Text::Pairs(text) = trainer.kept_back() else { return Ok(String::new()) };
    let one = |[source, target]: &[Vec<u32>; 2]| {
        let (said, wanted) = (say(source)?, tokenizer.decode(target)?);
        let source = tokenizer.decode(source)?;
        Ok(match said == wanted {
            true => format!("{source} → {said}"),
            false => format!("{source} → {said} ({wanted})"),
        })
    };
    let lines = text.pairs().iter().take(PAIRS).map(one);
    Ok(lines.collect::<Result<Vec<String>, Error>>()?.join("\n"))
}
