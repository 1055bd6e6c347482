//! How a command keeps keys and values: options that all commands with a model share.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use foveal_lm::Model;
use foveal_lm::mixer::{CacheOptions, CacheStorage};
use foveal_lm::model::State;

use crate::{numbers, output};

/// Keys and values of the tokens seen.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Keys and values")]
pub(crate) struct KvArguments {
    /// Store keys and values as f32, f16 or bf16, or as codes of 8 or 4 bits (the newest 256 to 512 tokens are then bf16).
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = storages())]
    kv_cache: CacheStorage,

    /// Let each token see at most the N newest ones; the model's context if left out.
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    context: Option<usize>,
}

fn storages() -> impl TypedValueParser<Value = CacheStorage> {
    let names = PossibleValuesParser::new(CacheStorage::ALL.map(CacheStorage::name));
    names.map(|name| CacheStorage::named(&name).unwrap_or_default())
}

impl KvArguments {
    /// A state without tokens.
    pub(crate) fn state(&self, model: &Model) -> anyhow::Result<State> {
        let &KvArguments { kv_cache: storage, context } = self;
        Ok(model.state_with(&CacheOptions { storage, context })?)
    }

    /// Says what happens to a text of `tokens` tokens, if it is not what training had.
    pub(crate) fn warn(&self, model: &Model, tokens: usize) {
        let trained = model.config().context;
        let context = self.context.unwrap_or(trained);
        if context > trained && tokens > trained {
            output::note(&format!(
                "foveal: up to {tokens} tokens; the model was trained with a context of {trained}"
            ));
        } else if tokens > context {
            output::note(&format!(
                "foveal: up to {tokens} tokens with a context of {context}: each sees the newest {context}"
            ));
        }
    }
}
