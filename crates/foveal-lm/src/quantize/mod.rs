//! Model files in another format: a GGUF file from a Hugging Face folder or from another GGUF file, tensor by tensor.
//!
//! | tensor | format |
//! |---|---|
//! | norms, biases, sinks, divisors of frequencies, taps of convolutions | f32 |
//! | embedding and head | the format asked for; Q6_K instead of 4 and 5 bits |
//! | other matrices | the format asked for |
//! | a matrix whose rows are no whole blocks of that | the next in Q4_K → Q5_0, Q5_K → Q5_1, Q6_K → Q8_0, all → f16 |
//!
//! The fallbacks are llama.cpp's. What has its format already is copied as it is. Rows are read, brought to f32, and
//! written some at a time, so memory does not grow with the model; the file appears whole or not at all; the same input
//! gives the same bytes. A folder's Llama gets its rows of queries and keys in GGUF's order, and Gemma's norms the one that
//! their definition adds. A model with mixers by name is `foveal-FAMILY` there, with the mixers in `foveal.mixer` as JSON: what does
//! not know them refuses the file. Its rows are in the folder's order.

mod describe;
mod rows;

use std::io;
use std::path::Path;

use foveal::projection::Format;

use crate::config::ModelConfig;
use crate::names::{self, Form};
use crate::tokenizer::{self, Tokenizer};
use crate::weights::gguf::{OwnedValue, Writer};
use crate::weights::{Description, TensorInfo, Weight, Weights};
use crate::{Error, Model, atomic_file};
use rows::Change;

/// A tensor that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Written {
    /// Its name in the new file.
    pub name: String,
    /// The lengths of its axes, the last one contiguous.
    pub shape: Vec<usize>,
    /// Its format in the old file.
    pub from: Format,
    /// Its format in the new file.
    pub to: Format,
    /// Whether its rows are no whole blocks of the format that it should have had.
    pub fell_back: bool,
    /// Bytes in the old and in the new file.
    pub bytes: [usize; 2],
}

impl Written {
    /// Whether rounded weights were rounded again: the result is worse than from the original weights.
    pub fn is_rounded_twice(&self) -> bool {
        self.from.block_len() > 1 && self.from != self.to
    }
}

/// A tensor on its way.
struct Source {
    name: String,
    weight: Weight,
    change: Change,
    plan: Written,
}

/// Writes the model in `input`, a GGUF file or a folder, to the GGUF file `output`. Calls `each` after every tensor.
///
/// # Errors
///
/// Those of [`Weights::open`] and [`Model::new`] for a model that can't be run, [`Error::Tokenizer`] for a folder's
/// tokenizer that GGUF can't describe, [`Error::UnsupportedConfig`] for what GGUF has no key for,
/// [`Error::Quantize`] for weights that are not finite or too large for the format, and [`Error::Weights`] when the file
/// can't be written. `output` is as it was then.
pub fn quantize(
    input: &Path,
    output: &Path,
    format: Format,
    mut each: impl FnMut(&Written),
) -> Result<(), Error> {
    let weights = Weights::open(input)?;
    let config = Model::new(&weights)?.config().clone();
    let mut keys = match weights.description() {
        Description::Gguf(metadata) => describe::copied(metadata)?,
        _ => {
            let mut keys = describe::described(&config)?;
            keys.extend(tokenizer_keys(input, &config)?);
            keys
        }
    };
    keys.extend(describe::of_format(format));
    let sources = sources(&weights, &config, format)?;
    let mut writer = Writer::new();
    for (key, value) in keys {
        writer.metadata(&key, value)?;
    }
    for source in &sources {
        writer.layout(&source.name, &source.plan.shape, source.plan.to)?;
    }
    // The cause goes past `atomic_file`, whose errors are those of the system.
    let mut failed = None;
    let written = atomic_file::write(output, |out| {
        writer.write_with(out, |index, out| {
            let source = &sources[index];
            let done = rows::write(&source.weight, source.change, source.plan.to, out);
            done.map_err(|error| match error {
                Error::Weights(crate::weights::Error::Io { source, .. }) => source,
                error => {
                    failed = Some(error);
                    io::Error::other("not finished")
                }
            })?;
            each(&source.plan);
            Ok(())
        })
    });
    match (failed, written) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(()),
        (None, Err(source)) => {
            Err(crate::weights::Error::Io { action: "write", path: output.to_owned(), source }
                .into())
        }
    }
}

/// The keys of a folder's tokenizer; none if it has no `tokenizer.json`.
fn tokenizer_keys(folder: &Path, config: &ModelConfig) -> Result<Vec<(String, OwnedValue)>, Error> {
    match Tokenizer::gguf_keys(folder, config.vocab) {
        Err(tokenizer::Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(vec![])
        }
        keys => Ok(keys?),
    }
}

/// All tensors of the new file, in the order of the old one's.
fn sources(weights: &Weights, config: &ModelConfig, format: Format) -> Result<Vec<Source>, Error> {
    let plain = |name: &str, weight: Weight| source(name, weight, Change::None, format);
    if let Description::Gguf(_) = weights.description() {
        let known = |info: &TensorInfo| Ok(plain(&info.name, weights.tensor(&info.name)?));
        return weights.tensors().iter().map(known).collect();
    }
    let mut all = vec![];
    for [gguf, hugging_face] in names::all(config)
        .map(|place| [Form::Gguf, Form::HuggingFace].map(|form| place.name(config, form)))
    {
        if !weights.contains(&hugging_face) {
            continue;
        }
        let change = describe::change(&gguf, config);
        all.push(source(&gguf, weights.tensor(&hugging_face)?, change, format));
    }
    let names = weights.tensors().iter().map(|info| &*info.name);
    for [hugging_face, gguf] in names::sections(names, config, [Form::HuggingFace, Form::Gguf]) {
        all.push(plain(&gguf, weights.tensor(&hugging_face)?));
    }
    if let Some(divisors) = describe::divisors(config)? {
        let bytes: Vec<u8> = divisors.iter().flat_map(|x| x.to_le_bytes()).collect();
        let name = "rope_freqs.weight";
        all.push(plain(name, Weight::new(name, &[divisors.len()], Format::F32, bytes)?));
    }
    Ok(all)
}

fn source(name: &str, weight: Weight, change: Change, format: Format) -> Source {
    let (to, fell_back) = choose(name, weight.shape(), format);
    let bytes = |format: Format| {
        let row = format.row_bytes(weight.in_features()).unwrap_or(0);
        row * weight.out_features()
    };
    let plan = Written {
        name: name.to_owned(),
        shape: weight.shape().to_vec(),
        from: weight.format(),
        to,
        fell_back,
        bytes: [weight.bytes().len(), bytes(to)],
    };
    Source { name: name.to_owned(), weight, change, plan }
}

/// The format of a tensor, and whether it is another than it should be.
fn choose(name: &str, shape: &[usize], format: Format) -> (Format, bool) {
    if shape.len() != 2 {
        return (Format::F32, false);
    }
    let outer = matches!(name, "token_embd.weight" | "output.weight");
    let coarse =
        !matches!(format, Format::F32 | Format::F16 | Format::BF16 | Format::Q8_0 | Format::Q6_K);
    let wanted = if outer && coarse { Format::Q6_K } else { format };
    let mut chosen = wanted;
    while !shape[shape.len() - 1].is_multiple_of(chosen.block_len()) {
        chosen = match chosen {
            Format::Q4_K => Format::Q5_0,
            Format::Q5_K => Format::Q5_1,
            Format::Q6_K => Format::Q8_0,
            _ => Format::F16,
        };
    }
    (chosen, chosen != wanted)
}
