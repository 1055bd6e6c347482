//! Models as Hugging Face folders: `config.json`, `model.safetensors`, `tokenizer.json`.
//!
//! A model of a GGUF file has its rows of queries and keys in another order there (Llama), or norms with the one that their
//! definition adds (Gemma); both become what folders have. Tensors are written one after the other, so memory grows with
//! the largest of them; each file appears whole or not at all, the weights last.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::{Architecture, ModelConfig, RopeLayout, to_json};
use crate::names::{self, Form};
use crate::weights::safetensors::writer::{self, Layout, Written};
use crate::weights::{self, Description, Weight, Weights};
use crate::{Error, atomic_file};

/// The format of the numbers in a folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Numbers {
    /// f32.
    #[default]
    F32,
    /// f16.
    F16,
    /// bf16.
    Bf16,
}

impl Numbers {
    const fn written(self) -> Written {
        match self {
            Numbers::F32 => Written::F32,
            Numbers::F16 => Written::F16,
            Numbers::Bf16 => Written::Bf16,
        }
    }

    /// The name that `config.json` has for it.
    pub const fn name(self) -> &'static str {
        match self {
            Numbers::F32 => "float32",
            Numbers::F16 => "float16",
            Numbers::Bf16 => "bfloat16",
        }
    }
}

/// A model in the form of a folder.
#[derive(Debug)]
pub(crate) struct Folder {
    /// `config.json`.
    pub(crate) config: Value,
    /// The tensors, in the order of their file.
    pub(crate) tensors: Vec<Tensor>,
}

/// A tensor in the form of a folder.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) content: Content,
}

/// Where a tensor's numbers come from.
#[derive(Debug)]
pub(crate) enum Content {
    /// A file.
    Stored(Weight, Change),
    /// Memory.
    Values(Vec<f32>),
}

/// What folders store otherwise than GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing.
    None,
    /// In each run of so many rows, rows `2i` and `2i + 1` become `i` and `i + half`.
    Deinterleave(usize),
    /// One is taken away.
    SubtractOne,
}

impl Content {
    /// All numbers, row by row.
    pub(crate) fn values(&self) -> Vec<f32> {
        let (weight, change) = match self {
            Content::Values(values) => return values.clone(),
            Content::Stored(weight, change) => (weight, *change),
        };
        let mut values = weight.to_f32();
        match change {
            Change::None => {}
            Change::SubtractOne => values.iter_mut().for_each(|x| *x -= 1.0),
            Change::Deinterleave(run) => {
                let rows = weight.shape().first().copied().unwrap_or(1).max(1);
                values = deinterleaved(&values, values.len() / rows, run);
            }
        }
        values
    }
}

fn deinterleaved(values: &[f32], width: usize, run: usize) -> Vec<f32> {
    let mut moved = Vec::with_capacity(values.len());
    for head in values.chunks(run * width) {
        for parity in 0..2 {
            for pair in head.chunks(2 * width) {
                moved.extend_from_slice(&pair[parity * width..(parity + 1) * width]);
            }
        }
    }
    moved
}

impl Folder {
    /// A model of any kind of file. Reads its header only.
    ///
    /// # Errors
    ///
    /// [`Error::NoConfig`], [`Error::UnsupportedConfig`] for what `config.json` has no key for, and [`Error::Weights`].
    pub(crate) fn of(weights: &Weights) -> Result<Folder, Error> {
        match weights.description() {
            Description::None => Err(Error::NoConfig),
            Description::Config(config) => {
                let tensors = weights.tensors().iter().map(|info| {
                    let weight = weights.tensor(&info.name)?;
                    Ok(Tensor::stored(info.name.to_string(), weight, Change::None))
                });
                Ok(Folder {
                    config: config.clone(),
                    tensors: tensors.collect::<Result<_, Error>>()?,
                })
            }
            Description::Gguf(_) => Folder::of_gguf(weights),
        }
    }

    fn of_gguf(weights: &Weights) -> Result<Folder, Error> {
        let config = ModelConfig::read(weights)?;
        let mut tensors = vec![];
        for place in names::all(&config) {
            let [gguf, name] =
                [Form::Gguf, Form::HuggingFace].map(|form| place.name(&config, form));
            if weights.contains(&gguf) {
                let weight = weights.tensor(&gguf)?;
                tensors.push(Tensor::stored(name, weight, change(&gguf, &config)));
            }
        }
        let names = weights.tensors().iter().map(|info| &*info.name);
        for [gguf, name] in names::sections(names, &config, [Form::Gguf, Form::HuggingFace]) {
            tensors.push(Tensor::stored(name, weights.tensor(&gguf)?, Change::None));
        }
        Ok(Folder { config: to_json(&config)?, tensors })
    }
}

/// The tensors of a model: names and shapes, and the numbers of each.
type Tensors<'a> = (&'a [(String, Vec<usize>)], &'a dyn Fn(usize) -> Cow<'a, [f32]>);

/// Writes `config.json` and `model.safetensors` into `folder`.
///
/// # Errors
///
/// [`Error::Weights`] with what the operating system said.
pub(crate) fn write(
    folder: &Path,
    config: &Value,
    numbers: Numbers,
    (shapes, values): Tensors<'_>,
) -> Result<(), Error> {
    let mut config = config.clone();
    config["torch_dtype"] = numbers.name().into();
    let written = numbers.written();
    let layouts = shapes.iter().map(|(name, shape)| {
        let (name, shape) = (name.clone(), shape.clone());
        Layout { name, shape, written }
    });
    let layouts: Vec<Layout> = layouts.collect();
    save_bytes(&folder.join("config.json"), format!("{config:#}\n").as_bytes())?;
    save(&folder.join("model.safetensors"), |out| {
        writer::write(out, &layouts, |n, out| writer::numbers(&values(n), written, out))
    })
}

impl Tensor {
    fn stored(name: String, weight: Weight, change: Change) -> Tensor {
        let shape = weight.shape().to_vec();
        Tensor { name, shape, content: Content::Stored(weight, change) }
    }
}

/// What a folder stores otherwise in the tensor that GGUF calls `name`.
fn change(name: &str, config: &ModelConfig) -> Change {
    let rotated = name.contains("attn_q.") || name.contains("attn_k.");
    if config.attention.rope_layout == RopeLayout::Interleaved && rotated {
        return Change::Deinterleave(config.attention.head_dim);
    }
    let gemma = matches!(config.architecture, Architecture::Gemma2 | Architecture::Gemma3);
    let norm = name.ends_with("norm.weight") && config.norm_offset == 0.0;
    if gemma && norm { Change::SubtractOne } else { Change::None }
}

/// Writes a file that appears whole or not at all.
pub(crate) fn save_bytes(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    save(path, |out| io::Write::write_all(out, bytes))
}

fn save(
    path: &Path,
    fill: impl FnOnce(&mut io::BufWriter<std::fs::File>) -> io::Result<()>,
) -> Result<(), Error> {
    atomic_file::write(path, fill).map_err(|source| failed(path.to_owned(), source))
}

fn failed(path: PathBuf, source: io::Error) -> Error {
    weights::Error::Io { action: "write", path, source }.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Tiny, TinySizes};
    use crate::weights::Gguf;

    /// Models of every family that GGUF has, back to the folders that they came from.
    #[test]
    fn a_gguf_file_becomes_the_folder_that_it_was() {
        for name in Tiny::FAMILIES {
            let tiny = Tiny::new(name, TinySizes::default());
            let weights = Weights::from_gguf(Gguf::from_bytes(tiny.to_gguf()).unwrap()).unwrap();
            let folder = Folder::of(&weights);
            if name == "llama3" {
                // Its frequencies are numbers there, from which its parameters can't be told.
                assert!(folder.unwrap_err().to_string().contains("divisors"));
                continue;
            }
            let folder = folder.unwrap();
            assert_eq!(folder.tensors.len(), tiny.tensors.len(), "{name}");
            for tensor in &folder.tensors {
                let expected = tiny.values(&tensor.name).unwrap();
                let values = tensor.content.values();
                assert_eq!(values.len(), expected.len(), "{name} {}", tensor.name);
                // One was added, and is taken away again.
                let same = |(&a, &b): (&f32, &f32)| (a - b).abs() <= 1e-6;
                assert!(values.iter().zip(expected).all(same), "{name} {}", tensor.name);
            }
        }
    }
}
