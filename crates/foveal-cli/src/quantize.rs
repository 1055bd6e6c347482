//! `foveal quantize`: writes a model in another format.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use foveal::projection::Format;
use foveal_lm::quantize::{Written, quantize};

use crate::{numbers, output};

/// Write a model as a GGUF file in another format.
///
/// Norms and biases become f32, the embedding and the head Q6_K where 4 or 5 bits are asked for. A matrix whose rows are
/// no whole blocks of the format gets the next one that fits, as in llama.cpp: Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for
/// Q6_K, else F16. What was written goes to standard error.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A GGUF file, or a folder with config.json, safetensors and tokenizer.json.
    input: PathBuf,

    /// The GGUF file to write. It appears when all is done.
    output: PathBuf,

    /// The format of the matrices.
    #[arg(long = "type", short, value_name = "TYPE", value_parser = formats(), ignore_case = true)]
    format: Format,
}

fn formats() -> impl TypedValueParser<Value = Format> {
    let names = PossibleValuesParser::new(Format::ALL.map(Format::name));
    names.map(|name| {
        let named = |format: &Format| format.name().eq_ignore_ascii_case(&name);
        Format::ALL.into_iter().find(named).unwrap_or(Format::F32)
    })
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let start = Instant::now();
    let mut written = vec![];
    quantize(&arguments.input, &arguments.output, arguments.format, |tensor| {
        written.push(tensor.clone());
    })
    .with_context(|| format!("cannot quantise {}", arguments.input.display()))?;
    report(&written, start.elapsed().as_secs_f64());
    Ok(())
}

fn report(written: &[Written], seconds: f64) {
    let twice = written.iter().filter(|tensor| tensor.is_rounded_twice()).count();
    if twice > 0 {
        output::note(&format!(
            "foveal: {twice} tensors were rounded before and have been rounded again; start from the original weights \
             for better ones"
        ));
    }
    let mut fallbacks: BTreeMap<Format, Vec<&str>> = BTreeMap::new();
    for tensor in written.iter().filter(|tensor| tensor.fell_back) {
        fallbacks.entry(tensor.to).or_default().push(&tensor.name);
    }
    for (format, names) in fallbacks {
        let first = output::one_line(names[0]);
        output::note(&format!(
            "foveal: {} tensors are {format}, because their rows are no whole blocks; {first} is the first",
            names.len()
        ));
    }
    let mut formats: BTreeMap<Format, usize> = BTreeMap::new();
    written.iter().for_each(|tensor| *formats.entry(tensor.to).or_default() += 1);
    let formats: Vec<String> =
        formats.iter().map(|(format, count)| format!("{count} {format}")).collect();
    let bytes = |n: usize| written.iter().map(|tensor| tensor.bytes[n]).sum();
    output::note(&format!(
        "{} tensors ({}), {} from {} in {seconds:.1} s",
        written.len(),
        formats.join(", "),
        numbers::bytes(bytes(1)),
        numbers::bytes(bytes(0)),
    ));
}
