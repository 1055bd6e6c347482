//! Models with another attention: fewer key/value heads, or other mechanisms in some layers, from the weights that are there.
//!
//! ```text
//! gqa      K'ⱼ = mean of the group's K heads, V' likewise          (Ainslie et al. 2023, §2.1)
//! mqa      the same with one head
//! window   the weights as they are; tokens see the newest ones
//! infini   the weights as they are; gates that leave nearly all to the segment
//! gated_delta   queries, keys, values and outputs as they are, a key/value head for each query head; convolutions that pass
//!               their input on; gates, decays and strengths as a new model begins
//! ```
//!
//! What comes out is a beginning: it needs training on (Ainslie et al.: 5 % of the steps that made the model). Keys can be
//! pooled because they are rotated after their projection. Memory: the whole model in f32.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use foveal::projection::Format;
use serde_json::{Value, json};

use crate::Error;
use crate::config::{Architecture, ModelConfig, Reach};
use crate::folder::{self, Content, Folder, Numbers, Tensor};
use crate::quantize::quantize;
use crate::train::{Parameters, Vocabulary};
use crate::weights::{self, Weights};

/// What a model's attention becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Attention {
    /// So many key/value heads, in all layers.
    Grouped {
        /// They divide those of the model.
        kv_heads: usize,
        /// How a head comes from those of its group.
        pool: Pool,
    },
    /// The newest tokens.
    Window {
        /// How many, the query's own included.
        tokens: usize,
    },
    /// [`Mechanism::GatedDelta`](crate::config::Mechanism::GatedDelta) with convolutions of four taps.
    GatedDelta,
    /// [`Mechanism::Infini`](crate::config::Mechanism::Infini).
    Infini {
        /// Tokens of a segment.
        segment: usize,
    },
}

/// How the head of a group comes from the heads of the group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pool {
    /// Their mean, the best of these.
    #[default]
    Mean,
    /// The first of them.
    First,
    /// Random numbers, for comparison.
    Random,
}

/// A conversion.
#[derive(Clone, Debug)]
pub struct Conversion {
    /// What the attention becomes.
    pub attention: Attention,
    /// In which layers, counted from 0; in all of them for `None`.
    pub layers: Option<Vec<usize>>,
    /// What new parameters come from.
    pub seed: u64,
}

/// The gate of converted heads: 1.8 % from the memory.
const GATE: f32 = -4.0;

/// Writes the model in `input`, a GGUF file or a folder, with another attention to `output`: to a folder, or to a GGUF file if
/// it is called `….gguf`, in `format`. Numbers of a folder are f32, f16 or bf16.
///
/// # Errors
///
/// [`Error::Config`] for a conversion that the model does not allow, [`Error::UnsupportedConfig`] for what GGUF or
/// `config.json` has no key for, and those of [`Weights::open`] and [`quantize`].
pub fn convert(
    input: &Path,
    output: &Path,
    conversion: &Conversion,
    format: Format,
) -> Result<ModelConfig, Error> {
    let mut folder = Folder::of(&Weights::open(input)?)?;
    let before = ModelConfig::from_json(&folder.config)?;
    let fresh = change(&mut folder, &before, conversion)?;
    let model = ModelConfig::from_json(&folder.config)?;
    let is_file = output.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
    let parameters = assembled(&folder, &model, (conversion.seed, &fresh))?;
    if is_file {
        let temporary = Temporary(beside(output));
        save(&temporary.0, input, (&folder.config, Numbers::F32), &parameters)?;
        quantize(&temporary.0, output, format, |_| {})?;
    } else {
        save(output, input, (&folder.config, numbers(format)?), &parameters)?;
    }
    Ok(model)
}

fn numbers(format: Format) -> Result<Numbers, Error> {
    match format {
        Format::F32 => Ok(Numbers::F32),
        Format::F16 => Ok(Numbers::F16),
        Format::BF16 => Ok(Numbers::Bf16),
        _ => Err(Error::config("format in a folder", format, "F32, F16 or BF16, or a .gguf file")),
    }
}

/// Changes configuration and tensors; returns how the names of parameters end that the old model has no numbers for.
fn change(
    folder: &mut Folder,
    model: &ModelConfig,
    conversion: &Conversion,
) -> Result<Vec<&'static str>, Error> {
    if model.attention.latent.is_some() {
        let (key, found) = ("latent attention".to_owned(), model.architecture.to_string());
        return Err(Error::UnsupportedConfig { key, found });
    }
    let count = model.layers.len();
    let chosen: Vec<usize> = conversion.layers.clone().unwrap_or_else(|| (0..count).collect());
    if let Some(&layer) = chosen.iter().find(|&&layer| layer >= count) {
        return Err(Error::config("layer to convert", layer, format!("0 to {}", count - 1)));
    }
    match conversion.attention {
        Attention::Grouped { kv_heads, pool } => {
            if conversion.layers.is_some() {
                let expected = "all of them: key/value heads are as many in each layer";
                return Err(Error::config("list of layers", format!("{chosen:?}"), expected));
            }
            group(folder, model, kv_heads, pool)
        }
        Attention::Window { tokens } => window(folder, model, &chosen, tokens),
        Attention::Infini { segment } => {
            let mixer = json!({"name": "infini", "segment": segment});
            mix(folder, model, &chosen, &mixer).map(|()| vec![".gate"])
        }
        Attention::GatedDelta => {
            ungroup(folder, model);
            mix(folder, model, &chosen, &json!({"name": "gated_delta"}))?;
            Ok(vec!["_conv.weight", "_proj.weight", ".norm.weight", ".a_log", ".dt_bias"])
        }
    }
}

/// The tensors of a model's keys and values, biases too.
fn keys_and_values(folder: &mut Folder) -> impl Iterator<Item = &mut Tensor> {
    let names = ["k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"];
    folder.tensors.iter_mut().filter(move |tensor| {
        names.iter().any(|name| tensor.name.ends_with(&format!("self_attn.{name}")))
    })
}

/// Puts other heads into a tensor: `heads` of them, each made from some of the old ones.
fn reheaded(
    tensor: &mut Tensor,
    dim: usize,
    heads: usize,
    make: impl Fn(&[f32], usize) -> Vec<f32>,
) {
    let values = tensor.content.values();
    let size = dim * values.len() / tensor.shape[0].max(1);
    let made = (0..heads).flat_map(|head| make(&values, head * size));
    tensor.content = Content::Values(made.collect());
    tensor.shape[0] = heads * dim;
}

fn group(
    folder: &mut Folder,
    model: &ModelConfig,
    kv_heads: usize,
    pool: Pool,
) -> Result<Vec<&'static str>, Error> {
    let (old, dim) = (model.attention.kv_heads, model.attention.head_dim);
    if kv_heads == 0 || !old.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of the model's {old}");
        return Err(Error::config("number of key/value heads", kv_heads, expected));
    }
    if model.layers.iter().any(|layer| !layer.sections.is_empty()) {
        let (key, found) = ("mixers by name".to_owned(), folder.config["foveal"].to_string());
        return Err(Error::UnsupportedConfig { key, found });
    }
    folder.config["num_key_value_heads"] = kv_heads.into();
    if pool == Pool::Random {
        let pooled: Vec<String> =
            keys_and_values(folder).map(|tensor| tensor.name.clone()).collect();
        folder.tensors.retain(|tensor| !pooled.contains(&tensor.name));
        return Ok(vec!["k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"]);
    }
    let group = old / kv_heads;
    for tensor in keys_and_values(folder) {
        let size = tensor.shape.get(1).copied().unwrap_or(1) * dim;
        reheaded(tensor, dim, kv_heads, |values, at| {
            let heads = &values[at * group..][..group * size];
            match pool {
                Pool::First => heads[..size].to_vec(),
                _ => mean(heads, size),
            }
        });
    }
    Ok(vec![])
}

/// The mean of heads that lie one after the other.
fn mean(heads: &[f32], size: usize) -> Vec<f32> {
    let count = (heads.len() / size) as f64;
    let sum = |n: usize| heads.iter().skip(n).step_by(size).map(|&x| f64::from(x)).sum::<f64>();
    (0..size).map(|n| (sum(n) / count) as f32).collect()
}

/// A key/value head for each query head: the same function.
fn ungroup(folder: &mut Folder, model: &ModelConfig) {
    let attention = &model.attention;
    let group = attention.heads / attention.kv_heads;
    if group == 1 {
        return;
    }
    folder.config["num_key_value_heads"] = attention.heads.into();
    let dim = attention.head_dim;
    for tensor in keys_and_values(folder) {
        let size = tensor.shape.get(1).copied().unwrap_or(1) * dim;
        reheaded(tensor, dim, attention.heads, |values, at| {
            values[at / size / group * size..][..size].to_vec()
        });
    }
}

/// Windows, by the family's own keys where they can say it.
fn window(
    folder: &mut Folder,
    model: &ModelConfig,
    chosen: &[usize],
    tokens: usize,
) -> Result<Vec<&'static str>, Error> {
    let plain =
        model.layers.iter().all(|layer| layer.reach == Reach::Full && layer.sections.is_empty());
    let all = chosen.len() == model.layers.len();
    let config = &mut folder.config;
    match model.architecture {
        Architecture::Llama if plain && all && !model.attention.qkv_bias => {
            config["architectures"] = json!(["MistralForCausalLM"]);
            config["model_type"] = "mistral".into();
            config["sliding_window"] = tokens.into();
        }
        Architecture::Qwen2 | Architecture::Qwen3 if plain => {
            let kind = |layer: usize| match chosen.contains(&layer) {
                true => "sliding_attention",
                false => "full_attention",
            };
            let kinds: Vec<&str> = (0..model.layers.len()).map(kind).collect();
            config["layer_types"] = kinds.into();
            config["use_sliding_window"] = true.into();
            config["sliding_window"] = tokens.into();
        }
        _ => mix(folder, model, chosen, &json!({"name": "window", "tokens": tokens}))?,
    }
    Ok(vec![])
}

/// Names a mixer for some layers.
fn mix(
    folder: &mut Folder,
    model: &ModelConfig,
    chosen: &[usize],
    mixer: &Value,
) -> Result<(), Error> {
    let listed = folder.config.pointer("/foveal/mixer").cloned();
    let old = |n: usize| match (&listed, model.layers[n].reach) {
        (Some(Value::Array(layers)), _) => layers[n].clone(),
        (Some(one), _) => one.clone(),
        (None, Reach::Full) => json!({"name": "full"}),
        (None, Reach::Window(tokens)) => json!({"name": "window", "tokens": tokens}),
    };
    if let Some(&layer) = chosen.iter().find(|&&n| !model.layers[n].sections.is_empty()) {
        let (key, found) = (format!("mixer of layer {layer}"), old(layer).to_string());
        return Err(Error::config(&key, found, "a layer that has its family's attention"));
    }
    let layers = (0..model.layers.len()).map(|n| match chosen.contains(&n) {
        true => mixer.clone(),
        false => old(n),
    });
    folder.config["foveal"] = json!({"mixer": layers.collect::<Vec<Value>>()});
    Ok(())
}

/// All parameters of the new model.
fn assembled(
    folder: &Folder,
    model: &ModelConfig,
    (seed, fresh): (u64, &[&str]),
) -> Result<Parameters, Error> {
    let mut parameters = Parameters::initial(model, seed)?;
    let new = parameters.fill(folder, model)?;
    if let Some(name) = new.iter().find(|name| !fresh.iter().any(|end| name.ends_with(end))) {
        return Err(weights::Error::MissingTensor { name: name.clone() }.into());
    }
    let entries = parameters.entries().to_vec();
    for entry in entries.iter().filter(|entry| new.contains(&entry.name)) {
        let values = &mut parameters.values_mut()[entry.range.clone()];
        if entry.name.ends_with("_conv.weight") {
            // The newest input comes last.
            let taps = entry.shape.last().copied().unwrap_or(1).max(1);
            values.fill(0.0);
            values.chunks_mut(taps).for_each(|taps| taps[taps.len() - 1] = 1.0);
        } else if entry.name.ends_with(".gate") {
            values.fill(GATE);
        }
    }
    Ok(parameters)
}

/// Writes the folder of a model: its tokenizer as it is in `input`.
fn save(
    output: &Path,
    input: &Path,
    (config, numbers): (&Value, Numbers),
    parameters: &Parameters,
) -> Result<(), Error> {
    let failed = |path: &Path, source| {
        Error::Weights(weights::Error::Io { action: "write", path: path.to_owned(), source })
    };
    std::fs::create_dir_all(output).map_err(|source| failed(output, source))?;
    if input.is_dir() {
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
        ] {
            if let Ok(bytes) = std::fs::read(input.join(name)) {
                folder::save_bytes(&output.join(name), &bytes)?;
            }
        }
    } else {
        let vocabulary = Vocabulary::open(input)?;
        folder::save_bytes(&output.join("tokenizer.json"), &vocabulary.json)?;
        if let Some(config) = &vocabulary.config {
            folder::save_bytes(&output.join("tokenizer_config.json"), config)?;
        }
    }
    let entries = parameters.entries().iter();
    let shapes: Vec<(String, Vec<usize>)> =
        entries.map(|entry| (entry.name.clone(), entry.shape.clone())).collect();
    let values =
        |n: usize| Cow::Borrowed(&parameters.values()[parameters.entries()[n].range.clone()]);
    folder::write(output, config, numbers, (&shapes, &values))
}

/// A folder that is removed in the end.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn beside(output: &Path) -> PathBuf {
    let name = output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    output.with_file_name(format!(".{name}.{}", std::process::id()))
}
