//! `foveal convert`: gives a model another attention.

use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;
use foveal::projection::Format;
use foveal_lm::convert::{Attention, Conversion, Pool, convert};

use crate::{numbers, output};

/// Give a model another attention, as a beginning for training.
///
/// gqa and mqa pool key/value heads, window lets tokens see the newest ones only; gated_delta and infini put another mechanism
/// in place of attention. The result needs training on: foveal train --set model.from=OUT.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A GGUF file, or a folder with config.json, safetensors and tokenizer.json.
    input: PathBuf,

    /// The folder to write, or a GGUF file if it ends with .gguf.
    output: PathBuf,

    /// What the attention becomes.
    #[arg(long, value_name = "NAME")]
    attention: Name,

    /// Key/value heads, of gqa.
    #[arg(long, value_name = "N", required_if_eq("attention", "gqa"))]
    kv_heads: Option<usize>,

    /// How the head of a group comes from the heads of the group, of gqa and mqa.
    #[arg(long, value_name = "HOW", default_value = "mean")]
    pool: How,

    /// The newest tokens that are seen, of window.
    #[arg(long, value_name = "N", value_parser = numbers::tokens, default_value = "256")]
    tokens: usize,

    /// Tokens of a segment, of infini.
    #[arg(long, value_name = "N", value_parser = numbers::tokens, default_value = "256")]
    segment: usize,

    /// The layers, such as 0,2,4-7; all if left out. Not of gqa and mqa.
    #[arg(long, value_name = "LIST")]
    layers: Option<String>,

    /// The format of the numbers: f32, f16 or bf16 in a folder, any that quantize has in a GGUF file [default: f32 in a
    /// folder, f16 in a GGUF file]
    #[arg(long = "type", value_name = "TYPE")]
    format: Option<String>,

    /// What new parameters come from.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Name {
    Gqa,
    Mqa,
    Window,
    GatedDelta,
    Infini,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum How {
    Mean,
    First,
    Random,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let pool = match arguments.pool {
        How::Mean => Pool::Mean,
        How::First => Pool::First,
        How::Random => Pool::Random,
    };
    let attention = match arguments.attention {
        Name::Gqa => Attention::Grouped { kv_heads: arguments.kv_heads.unwrap_or(1), pool },
        Name::Mqa => Attention::Grouped { kv_heads: 1, pool },
        Name::Window => Attention::Window { tokens: arguments.tokens },
        Name::GatedDelta => Attention::GatedDelta,
        Name::Infini => Attention::Infini { segment: arguments.segment },
    };
    let layers = arguments.layers.as_deref().map(list).transpose()?;
    let conversion = Conversion { attention, layers, seed: arguments.seed };
    let format = format(arguments)?;
    let model = convert(&arguments.input, &arguments.output, &conversion, format)
        .with_context(|| format!("cannot convert {}", arguments.input.display()))?;
    output::note(&format!(
        "{}: {} layers, {} heads, {} key/value heads",
        arguments.output.display(),
        model.layers.len(),
        model.attention.heads,
        model.attention.kv_heads
    ));
    Ok(())
}

fn format(arguments: &Arguments) -> anyhow::Result<Format> {
    let Some(name) = &arguments.format else {
        let ending = arguments.output.extension();
        let file = ending.is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
        return Ok(if file { Format::F16 } else { Format::F32 });
    };
    let format = Format::ALL.into_iter().find(|format| format.name().eq_ignore_ascii_case(name));
    format.with_context(|| {
        let names = Format::ALL.map(Format::name).join(", ");
        format!("{name:?} is no format; there are {names}")
    })
}

/// Layers: numbers and ranges, with commas between.
fn list(text: &str) -> anyhow::Result<Vec<usize>> {
    let mut layers = vec![];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number =
            |text: &str| {
                text.trim().parse::<usize>().ok().filter(|&layer| layer < 4096).with_context(|| {
                    format!("--layers {text:?} is no list of layers such as 0,2,4-7")
                })
            };
        layers.extend(number(first)?..=number(last)?);
    }
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::list;

    #[test]
    fn lists_have_numbers_and_ranges() {
        assert_eq!(list("3, 0,5-7,6").unwrap(), [0, 3, 5, 6, 7]);
        for wrong in ["", "a", "1-", "-1", "1--2", "99999"] {
            assert!(list(wrong).is_err(), "{wrong}");
        }
    }
}
