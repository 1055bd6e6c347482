//! How tokens are chosen: options that commands share.

use foveal_lm::sample::Sampling;

use crate::numbers;

/// The choice of tokens.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Choice of tokens")]
pub(crate) struct SamplingArguments {
    /// Above 1 flattens the probabilities, below 1 sharpens them; 0 always takes the most probable token.
    #[arg(long, short, default_value_t = 0.8, value_parser = numbers::temperature)]
    temperature: f32,

    /// Keep so many of the most probable tokens; 0 keeps all.
    #[arg(long, value_name = "N", default_value_t = 40)]
    top_k: usize,

    /// Keep the most probable tokens that together have this probability; 1 keeps all.
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = numbers::top_p)]
    top_p: f32,

    /// Keep tokens with at least this share of the greatest probability; 0 keeps all.
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = numbers::min_p)]
    min_p: f32,

    /// Divide the positive logits of the last 64 tokens by this, and multiply the others; 1 changes nothing.
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = numbers::repeat_penalty)]
    repeat_penalty: f32,

    /// The beginning of the random numbers: the same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingArguments {
    pub(crate) fn sampling(&self) -> Sampling {
        let &SamplingArguments { temperature, top_k, top_p, min_p, repeat_penalty, seed } = self;
        Sampling { temperature, top_k, top_p, min_p, repeat_penalty, seed, ..Sampling::default() }
    }
}
