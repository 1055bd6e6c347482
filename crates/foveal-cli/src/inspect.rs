//! `foveal inspect`: what is in a model's file.

use std::fmt::Write;
use std::path::PathBuf;

use foveal_lm::config::{
    AttentionConfig, LatentConfig, LayerConfig, Mechanism, ModelConfig, Reach, SectionConfig,
};
use foveal_lm::weights::{TensorInfo, Weights};
use serde_json::{Value, json};

use crate::{numbers, output, source};

/// Show what is in a model's file: its architecture, its attention layer by layer, and its tensors.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A GGUF file, a safetensors file, or a folder with config.json; the built-in model if left out.
    file: Option<PathBuf>,

    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let weights = source::open(arguments.file.as_deref())?;
    let config = ModelConfig::read(&weights).map_err(|error| output::sentence(&error.into()));
    if arguments.json {
        return Ok(output::print_json(&as_json(&weights, config.as_ref()))?);
    }
    let mut text = match &config {
        Ok(config) => describe(config),
        Err(problem) => format!("can't be run      {problem}\n"),
    };
    let parameters: usize = weights.tensors().iter().map(TensorInfo::elements).sum();
    let bytes: usize = weights.tensors().iter().filter_map(|tensor| tensor.bytes).sum();
    writeln!(text, "parameters        {parameters} in {}", numbers::bytes(bytes))?;
    writeln!(text, "tensors           {}\n", weights.tensors().len())?;
    weights.tensors().iter().for_each(|tensor| text += &line(tensor));
    Ok(output::print(&text)?)
}

fn describe(config: &ModelConfig) -> String {
    let attention = &config.attention;
    let mut text = format!(
        "architecture      {}\n\
         layers            {}, width {}, feed-forward {}\n\
         attention         {}\n\
         layer by layer    {}\n\
         context           {} tokens\n\
         vocabulary        {} tokens\n",
        config.architecture,
        config.layers.len(),
        config.width,
        config.feed_forward,
        heads(attention),
        mixers(config),
        config.context,
        config.vocab,
    );
    if let Some(bytes) = kv_bytes_per_token(config) {
        let [f32, f16] = [bytes, bytes / 2].map(numbers::bytes);
        text += &format!("KV per token      {f32} as f32, {f16} as f16\n");
    }
    text
}

/// What a token leaves in every layer; with named mixers there is no such number.
fn kv_bytes_per_token(config: &ModelConfig) -> Option<usize> {
    (!config.has_named_mixers()).then(|| config.kv_bytes_per_token())
}

/// The heads of every layer, and what they read.
fn heads(attention: &AttentionConfig) -> String {
    let AttentionConfig { heads, kv_heads, head_dim, latent, .. } = attention;
    match latent {
        None => format!("{heads} heads, {kv_heads} key/value heads, head dimension {head_dim}"),
        Some(LatentConfig { latent, rope, nope, value, .. }) => format!(
            "{heads} heads of {nope} + {rope} for keys and {value} for values, latent rows of {latent} + {rope}"
        ),
    }
}

/// What mixes the tokens of each layer, equal neighbours together: `5 × window(512), full, …`.
fn mixers(config: &ModelConfig) -> String {
    let names: Vec<String> = config.layers.iter().map(mixer).collect();
    let runs = names.chunk_by(|a, b| a == b).map(|run| match run.len() {
        1 => run[0].clone(),
        len => format!("{len} × {}", run[0]),
    });
    runs.collect::<Vec<_>>().join(", ")
}

/// A layer's reach, or its mechanisms by name: `window(256) + moba`.
fn mixer(layer: &LayerConfig) -> String {
    let name = |section: &SectionConfig| match section.mechanism {
        Mechanism::Window { tokens } => Reach::Window(tokens).to_string(),
        ref other => other.name().to_owned(),
    };
    match &layer.sections[..] {
        [] => layer.reach.to_string(),
        sections => sections.iter().map(name).collect::<Vec<_>>().join(" + "),
    }
}

fn line(tensor: &TensorInfo) -> String {
    let name = output::one_line(&tensor.name);
    let (shape, element) = (format!("{:?}", tensor.shape), tensor.element.to_string());
    let bytes = tensor.bytes.map_or_else(|| "?".to_owned(), |bytes| bytes.to_string());
    format!("{name:<40} {shape:>16} {element:<6} {bytes:>12}\n")
}

fn as_json(weights: &Weights, config: Result<&ModelConfig, &String>) -> Value {
    let tensors = weights.tensors().iter().map(|tensor| {
        json!({
            "name": &*tensor.name,
            "shape": tensor.shape,
            "format": tensor.element.to_string(),
            "bytes": tensor.bytes,
        })
    });
    json!({
        "config": config.ok().map(config_json),
        "problem": config.err(),
        "parameters": weights.tensors().iter().map(TensorInfo::elements).sum::<usize>(),
        "bytes": weights.tensors().iter().filter_map(|tensor| tensor.bytes).sum::<usize>(),
        "tensors": tensors.collect::<Vec<_>>(),
    })
}

fn config_json(config: &ModelConfig) -> Value {
    json!({
        "architecture": config.architecture.name(),
        "layers": config.layers.iter().map(mixer).collect::<Vec<_>>(),
        "width": config.width,
        "feed_forward": config.feed_forward,
        "heads": config.attention.heads,
        "kv_heads": config.attention.kv_heads,
        "head_dim": config.attention.head_dim,
        "latent": config.attention.latent.map(|latent| json!({
            "compressed": latent.latent,
            "rotated": latent.rope,
            "not_rotated": latent.nope,
            "value": latent.value,
            "query_rank": latent.query_rank,
        })),
        "context": config.context,
        "vocab": config.vocab,
        "kv_bytes_per_token": kv_bytes_per_token(config),
    })
}
