//! What a run begins with: a new model or one that exists, and its tokenizer.

use serde_json::Value;

use super::config::{Config, Objective};
use super::trainer::{Learner, start_token};
use super::{EncoderDecoder, Error, Network, Parameters, Vocabulary, network};
use crate::config::ModelConfig;
use crate::folder::Folder;
use crate::weights::Weights;

/// A model to be trained.
pub(super) struct Model {
    /// Its `config.json`.
    pub(super) json: Value,
    pub(super) parameters: Parameters,
    pub(super) learner: Learner,
}

/// The tokenizer of a run: what the configuration names, else that of the model it begins with, else bytes.
pub(super) fn vocabulary(config: &Config, documents: &[String]) -> Result<Vocabulary, Error> {
    let mask = config.train.objective == Objective::Masked;
    let vocabulary = match (config.data.tokenizer.as_deref(), &config.model.from) {
        (Some(name), _) => Vocabulary::new(name, (config.data.vocab, mask), documents)?,
        (None, Some(model)) => Vocabulary::open(model)?,
        (None, None) => Vocabulary::new("bytes", (config.data.vocab, mask), documents)?,
    };
    if mask && vocabulary.mask().is_none() {
        let expected =
            "one with a token <|mask|>, [MASK] or <mask>, for train.objective = \"masked\"";
        return Err(Error::config("data.tokenizer", "without such a token", expected));
    }
    Ok(vocabulary)
}

/// The model of a run at the beginning. `known` is its `config.json` where a checkpoint has the numbers.
pub(super) fn model(
    config: &Config,
    vocabulary: &Vocabulary,
    known: Option<Value>,
) -> Result<Model, Error> {
    let objective = match config.train.objective {
        Objective::Causal => network::Objective::Causal,
        Objective::Masked => network::Objective::Masked,
        Objective::Translation => return encoder_decoder(config, vocabulary),
    };
    let (json, parameters) = decoder(config, vocabulary, known)?;
    let network = Network::new(&ModelConfig::from_json(&json)?, objective)?;
    Ok(Model { json, parameters, learner: Learner::One(Box::new(network)) })
}

fn encoder_decoder(config: &Config, vocabulary: &Vocabulary) -> Result<Model, Error> {
    let tokens = vocabulary.tokenizer.vocab_size();
    let sizes = config.model.encoder_decoder(tokens, config.data.sequence);
    if sizes.context < config.data.sequence {
        let expected = format!("{} at least, as data.sequence", config.data.sequence);
        return Err(Error::config("model.context", sizes.context, expected));
    }
    let network = EncoderDecoder::new(sizes)?;
    let mut json = sizes.to_json();
    let end = start_token(vocabulary)?;
    for key in ["bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"] {
        json[key] = end.into();
    }
    let parameters = network.initial(config.train.seed)?;
    Ok(Model { json, parameters, learner: Learner::Pairs(Box::new(network)) })
}

/// A model of one text.
fn decoder(
    config: &Config,
    vocabulary: &Vocabulary,
    known: Option<Value>,
) -> Result<(Value, Parameters), Error> {
    if let Some(json) = known {
        let parameters = Parameters::initial(&ModelConfig::from_json(&json)?, config.train.seed)?;
        return Ok((json, parameters));
    }
    let tokens = vocabulary.tokenizer.vocab_size();
    let Some(path) = &config.model.from else {
        let json = config.model.to_json(tokens, config.data.sequence)?;
        let (model, seed) = (ModelConfig::from_json(&json)?, config.train.seed);
        let mut parameters = Parameters::initial(&model, seed)?;
        parameters.copy_from_the_start(&model, &config.model.copying, seed)?;
        return Ok((json, parameters));
    };
    let folder = Folder::of(&Weights::open(path)?)?;
    let model = ModelConfig::from_json(&folder.config)?;
    if tokens > model.vocab {
        let expected = format!("{} tokens at most, as many as the model has", model.vocab);
        return Err(Error::config("data.tokenizer", format!("one with {tokens}"), expected));
    }
    let parameters = Parameters::from_folder(&folder, &model)?;
    Ok((folder.config, parameters))
}
