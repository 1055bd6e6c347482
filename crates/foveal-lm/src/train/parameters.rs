//! Everything that is learned, as one arena of numbers.
//!
//! Entries have the names and shapes of `model.safetensors`. Matrices that read the same rows lie side by side, so that
//! kernels may take them for one: gate and up. Gradients and the moments of an optimizer have the same layout.
//!
//! **Initial values** depend on the seed and an entry's name, on nothing else. Matrices: normal with deviation 0.02, those
//! that write to the residual stream (`o_proj`, `down_proj`) divided by √(2 · layers) (Radford et al. 2019, §2.3). Norms: what
//! multiplies by 1. Biases, sinks and gates of memories: 0. Convolutions: uniform within ±1/√taps. Decays (`a_log`,
//! `dt_bias`): logarithms of rates uniform in 1 to 16, and steps log-uniform in 0.001 to 0.1 through the inverse of softplus
//! (Dao and Gu 2024). Mixtures of Linformer: normal with variance 1 / rank. Scales of Memorizing Transformers: √dim, which weighs
//! as attention with normalised queries and keys does (published: 1, with another optimizer). Layers that are to copy from the first
//! step on: [`Parameters::copy_from_the_start`].

mod initial;
mod layout;
mod mimetic;
mod sections;

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::Value;

use crate::Error;
use crate::config::ModelConfig;
use crate::folder::Folder;
use crate::weights::safetensors::writer::{self, Layout, Written};
use crate::weights::{self, Safetensors, Weights};

pub(crate) use initial::Initial;
pub(crate) use layout::Declared;

/// What kind of parameter an entry is: what an optimizer does with it follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// Matrices, embeddings too: weight decay.
    Matrix,
    /// Norms, biases, sinks, scales and decays: none.
    Vector,
    /// Gates of memories: none, and a learning rate of their own.
    Gate,
}

/// One tensor of the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name in `model.safetensors`.
    pub name: String,
    /// The lengths of its axes.
    pub shape: Vec<usize>,
    /// Where its numbers are.
    pub range: Range<usize>,
    /// What kind it is.
    pub group: Group,
}

/// The parameters of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    entries: Vec<Entry>,
    values: Vec<f32>,
}

impl Parameters {
    /// Initial values; see the [module](self).
    ///
    /// # Errors
    /// [`Error::UnsupportedConfig`] for a model that can't be trained; [`Error::Config`] for one too large to address.
    pub fn initial(config: &ModelConfig, seed: u64) -> Result<Parameters, Error> {
        Parameters::of(&layout::declared(config)?, seed)
    }

    /// Initial values of what is declared.
    pub(crate) fn of(declared: &[Declared], seed: u64) -> Result<Parameters, Error> {
        let entries = entries(declared)?;
        let mut values = vec![0.0; entries.last().map_or(0, |last| last.range.end)];
        for (entry, declared) in entries.iter().zip(declared) {
            declared.initial.fill(&mut values[entry.range.clone()], seed, &entry.name);
        }
        Ok(Parameters { entries, values })
    }

    /// The numbers of a model's file, in whatever format it stores them, and its configuration: both as a Hugging Face folder has
    /// them, in whose arrangement of rows and norms the names promise them.
    ///
    /// # Errors
    /// Those of [`Parameters::initial`]; [`Error::Weights`] for a tensor that is missing or has another shape;
    /// [`Error::ForeignTensor`] for one that the model does not have.
    pub fn from_weights(weights: &Weights) -> Result<(ModelConfig, Parameters), Error> {
        let folder = Folder::of(weights)?;
        let config = ModelConfig::from_json(&folder.config)?;
        let parameters = Parameters::from_folder(&folder, &config)?;
        Ok((config, parameters))
    }

    /// The numbers of a folder, all of them.
    pub(crate) fn from_folder(folder: &Folder, config: &ModelConfig) -> Result<Parameters, Error> {
        let entries = entries(&layout::declared(config)?)?;
        let values = vec![0.0; entries.last().map_or(0, |last| last.range.end)];
        let mut parameters = Parameters { entries, values };
        match parameters.fill(folder, config)?.into_iter().next() {
            Some(name) => Err(weights::Error::MissingTensor { name }.into()),
            None => Ok(parameters),
        }
    }

    /// Puts the numbers of a folder's tensors to their places; returns the names of parameters that it has none for.
    ///
    /// # Errors
    /// For a tensor of another shape, and one that the model does not have.
    pub(crate) fn fill(
        &mut self,
        folder: &Folder,
        config: &ModelConfig,
    ) -> Result<Vec<String>, Error> {
        let mut missing: BTreeMap<&str, &Entry> =
            self.entries.iter().map(|entry| (&*entry.name, entry)).collect();
        for tensor in &folder.tensors {
            let Some(entry) = missing.remove(&*tensor.name) else {
                let tied = config.tied_head && tensor.name == "lm_head.weight";
                if tied || tensor.name.ends_with(".rotary_emb.inv_freq") {
                    continue;
                }
                return Err(Error::ForeignTensor { name: tensor.name.clone() });
            };
            if tensor.shape != entry.shape {
                let (name, expected, found) =
                    (tensor.name.clone(), entry.shape.clone(), tensor.shape.clone());
                return Err(weights::Error::WrongShape { name, expected, found }.into());
            }
            self.values[entry.range.clone()].copy_from_slice(&tensor.content.values());
        }
        Ok(missing.into_keys().map(str::to_owned).collect())
    }

    /// What there is, in the order of the numbers.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// All numbers.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All numbers, to be changed.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// As many zeros: a place for gradients. Allocates it.
    pub fn zeros(&self) -> Vec<f32> {
        vec![0.0; self.values.len()]
    }

    /// The numbers of one entry.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        let entry = self.entries.iter().find(|entry| entry.name == name)?;
        self.values.get(entry.range.clone())
    }

    /// A model of these numbers, as its folder would have it; `config` is its `config.json`. Takes memory for another copy.
    ///
    /// # Errors
    /// [`Error::Weights`], which does not happen to numbers that fit into memory.
    pub fn weights(&self, config: &Value) -> Result<Weights, Error> {
        let layout = |entry: &Entry| Layout {
            name: entry.name.clone(),
            shape: entry.shape.clone(),
            written: Written::F32,
        };
        let layouts: Vec<Layout> = self.entries.iter().map(layout).collect();
        let mut bytes = Vec::with_capacity(4 * self.values.len() + (1 << 16));
        let written = writer::write(&mut bytes, &layouts, |n, out| {
            writer::numbers(&self.values[self.entries[n].range.clone()], Written::F32, out)
        });
        written.map_err(|source| weights::Error::Io {
            action: "write",
            path: "a model in memory".into(),
            source,
        })?;
        Ok(Safetensors::from_bytes(bytes)?.with_config(config.clone()).into())
    }

    /// The first entry with a number in `numbers`, laid out as the parameters are, that is not finite: of gradients, where
    /// something went wrong.
    pub fn not_finite(&self, numbers: &[f32]) -> Option<&Entry> {
        self.entries.iter().find(|entry| {
            numbers.get(entry.range.clone()).is_some_and(|own| own.iter().any(|x| !x.is_finite()))
        })
    }
}

/// Where each tensor lies.
pub(crate) fn entries(declared: &[Declared]) -> Result<Vec<Entry>, Error> {
    let mut start = 0usize;
    let place = |declared: &Declared| {
        let count = declared.shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
        let end = count.and_then(|count| start.checked_add(count));
        let end = end.filter(|&end| end <= isize::MAX as usize / size_of::<f32>());
        let end = end.ok_or_else(|| {
            let expected = "fewer than the address space has";
            Error::config("number of parameters", "more than can be counted", expected)
        })?;
        let range = start..end;
        start = end;
        let Declared { name, shape, group, .. } = declared.clone();
        Ok(Entry { name, shape, range, group })
    };
    declared.iter().map(place).collect()
}

/// The ranges of a model's parameters, by name.
pub(crate) fn ranges(config: &ModelConfig) -> Result<BTreeMap<String, Range<usize>>, Error> {
    let entries = entries(&layout::declared(config)?)?;
    Ok(entries.into_iter().map(|entry| (entry.name, entry.range)).collect())
}
