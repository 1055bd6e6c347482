//! How a command keeps keys and values: options that all commands with a model share.

use anyhow::Context;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use foveal::cache::Rolling;
use foveal_lm::Model;
use foveal_lm::mixer::{CacheOptions, CacheStorage, Keep, Retrieval};
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

    /// Keep the first tokens and the N newest, the current one included, for texts without an end: positions are counted
    /// within what is kept (StreamingLLM).
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    window: Option<usize>,

    /// With --window, keep so many of the first tokens.
    #[arg(long, value_name = "M", default_value_t = 4, requires = "window")]
    sinks: usize,

    /// Let each token see N tokens in all: the first ones, the newest, and the pieces of the text between them that suit it best.
    /// All of the text is kept (with --memory in files), so that a model can be asked about one longer than its context.
    #[arg(long, value_name = "N", conflicts_with_all = ["window", "evict"], value_parser = numbers::tokens)]
    retrieve: Option<usize>,

    /// Keep so many keys of each head, those that got most weight: h2o:BUDGET (as the text grows) or snapkv:BUDGET (when
    /// a prompt ends).
    #[arg(long, value_name = "POLICY:BUDGET", conflicts_with = "window", value_parser = eviction)]
    evict: Option<Keep>,
}

fn storages() -> impl TypedValueParser<Value = CacheStorage> {
    let names = PossibleValuesParser::new(CacheStorage::ALL.map(CacheStorage::name));
    names.map(|name| CacheStorage::named(&name).unwrap_or_default())
}

fn eviction(text: &str) -> Result<Keep, String> {
    let (policy, budget) = text.split_once(':').unwrap_or((text, ""));
    let keep: fn(usize) -> Keep = match policy {
        "h2o" => |budget| Keep::HeavyHitters { budget },
        "snapkv" => |budget| Keep::SnapKv { budget },
        _ => return Err("expected h2o:BUDGET or snapkv:BUDGET".to_owned()),
    };
    numbers::tokens(budget).map(keep).map_err(|expected| format!("the budget: {expected}"))
}

impl KvArguments {
    /// What they ask for.
    pub(crate) fn options(&self) -> anyhow::Result<CacheOptions> {
        let &KvArguments { kv_cache: storage, context, window, sinks, retrieve, evict } = self;
        let keep = match (window, retrieve) {
            (Some(window), _) => Keep::Rolling(Rolling::new(sinks, window)?),
            (None, Some(budget)) => Keep::Retrieve(Retrieval::within(budget)),
            (None, None) => evict.unwrap_or_default(),
        };
        Ok(CacheOptions { storage, context, keep })
    }

    /// A state without tokens.
    pub(crate) fn state(&self, model: &Model) -> anyhow::Result<State> {
        model.state_with(&self.options()?).context("cannot keep keys and values so")
    }

    /// Says what happens to a text of `tokens` tokens, if it is not what training had.
    pub(crate) fn warn(&self, model: &Model, tokens: usize) {
        let trained = model.config().context;
        let context = self.context.unwrap_or(trained);
        let beyond = format!("the model was trained with a context of {trained}");
        let what = match (self.window, self.evict) {
            // Each mechanism sees what it sees, and no other choice is taken.
            _ if model.config().has_named_mixers() => (tokens > trained).then_some(beyond),
            (Some(window), _) => (tokens > self.sinks.saturating_add(window))
                .then(|| format!("each sees the first {} and the newest {window}", self.sinks)),
            _ if self.retrieve.is_some() => None,
            (_, Some(_)) => (tokens > trained).then_some(beyond),
            _ if tokens > trained && context > trained => Some(beyond),
            _ => (tokens > context)
                .then(|| format!("with a context of {context}, each sees the newest {context}")),
        };
        if let Some(what) = what {
            output::note(&format!("foveal: up to {tokens} tokens; {what}"));
        }
    }
}
