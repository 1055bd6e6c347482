//! What a model is, in the keys of a GGUF file.

use foveal::position::{Rope, RopeConfig, RopeLayout as Layout, YarnAmplitude};
use foveal::projection::Format;

use super::rows::Change;
use crate::Error;
use crate::config::gguf::{MIXER, NAMED};
use crate::config::{
    Activation, Architecture, LayerConfig, ModelConfig, Reach, RopeScaling, sections,
};
use crate::ropes;
use crate::weights::gguf::{Metadata, OwnedValue};

type Keys = Vec<(String, OwnedValue)>;

/// Keys that speak of a file, not of its model.
const OF_THE_FILE: [&str; 2] = ["general.file_type", "general.quantization_version"];

/// The keys of a GGUF file that stay as they are.
pub(super) fn copied(metadata: &Metadata) -> Result<Keys, Error> {
    let kept = |key: &&str| !OF_THE_FILE.contains(key) && !key.starts_with("split.");
    let copy = |key: &str| {
        let value = metadata.require::<crate::weights::gguf::Value<'_>>(key)?;
        Ok((key.to_owned(), OwnedValue::try_from(value)?))
    };
    metadata.keys().filter(kept).map(copy).collect()
}

/// The numbers that llama.cpp has for the formats of most of a file's tensors.
pub(super) fn of_format(format: Format) -> Keys {
    let number: Option<u32> = match format {
        Format::F32 => Some(0),
        Format::F16 => Some(1),
        Format::Q4_0 => Some(2),
        Format::Q4_1 => Some(3),
        Format::Q8_0 => Some(7),
        Format::Q5_0 => Some(8),
        Format::Q5_1 => Some(9),
        Format::Q4_K => Some(14),
        Format::Q5_K => Some(16),
        Format::Q6_K => Some(18),
        Format::BF16 => Some(32),
        _ => None,
    };
    let [file_type, version] = OF_THE_FILE.map(str::to_owned);
    let mut keys = vec![(version, 2u32.into())];
    keys.extend(number.map(|number| (file_type, number.into())));
    keys
}

/// The family, of which GGUF has no Mistral.
fn architecture(config: &ModelConfig) -> Architecture {
    match config.architecture {
        Architecture::Mistral => Architecture::Llama,
        architecture => architecture,
    }
}

/// What GGUF stores otherwise in the tensor of this name.
pub(super) fn change(name: &str, config: &ModelConfig) -> Change {
    let rotated = name.contains("attn_q.") || name.contains("attn_k.");
    if architecture(config) == Architecture::Llama && rotated && !config.has_named_mixers() {
        return Change::Interleave(config.attention.head_dim);
    }
    let norm = name.ends_with("norm.weight");
    if norm && config.norm_offset == 1.0 { Change::AddOne } else { Change::None }
}

/// The keys of a model that came from a folder.
pub(super) fn described(config: &ModelConfig) -> Result<Keys, Error> {
    refuse(config)?;
    let named = if config.has_named_mixers() { NAMED } else { "" };
    let architecture = format!("{named}{}", architecture(config));
    let mut keys: Keys = vec![("general.architecture".to_owned(), (&*architecture).into())];
    if let Some(foveal) = sections::write(&config.layers)? {
        keys.push((MIXER.to_owned(), (&*foveal["mixer"].to_string()).into()));
    }
    let mut put = |name: &str, value: OwnedValue| {
        keys.push((format!("{architecture}.{name}"), value));
    };
    let attention = &config.attention;
    for (name, count) in [
        ("vocab_size", config.vocab),
        ("context_length", config.context),
        ("embedding_length", config.width),
        ("block_count", config.layers.len()),
        ("feed_forward_length", config.feed_forward),
        ("attention.head_count", attention.heads),
        ("attention.head_count_kv", attention.kv_heads),
        ("attention.key_length", attention.head_dim),
        ("attention.value_length", attention.head_dim),
        ("rope.dimension_count", attention.head_dim),
    ] {
        put(name, (count as u32).into());
    }
    put("attention.layer_norm_rms_epsilon", config.norm_epsilon.into());
    if attention.scale != usual_scale(config) {
        put("attention.scale", attention.scale.into());
    }
    let zero = (config.architecture == Architecture::Gemma2).then_some(0.0);
    for (name, cap) in [
        ("attn_logit_softcapping", attention.softcap),
        ("final_logit_softcapping", config.logit_softcap),
    ] {
        if let Some(cap) = cap.or(zero) {
            put(name, cap.into());
        }
    }
    windows(config, &mut put);
    positions(config, &mut put);
    Ok(keys)
}

/// Refuses what the keys can't say.
fn refuse(config: &ModelConfig) -> Result<(), Error> {
    let unsupported = |key: &str, found: String| {
        Err(Error::UnsupportedConfig { key: format!("{key}, for which GGUF has no key,"), found })
    };
    if config.attention.latent.is_some() {
        return unsupported("latent attention", config.architecture.to_string());
    }
    let usual = match config.architecture.is_gemma() {
        true => Activation::GeluTanh,
        false => Activation::Silu,
    };
    if config.activation != usual {
        return unsupported("the activation", format!("{:?}", config.activation));
    }
    let (full, local) = kinds(config);
    if let RopeScaling::Yarn(yarn) = &full.rope.scaling
        && yarn.truncate == (config.architecture == Architecture::GptOss)
    {
        return unsupported("YaRN's truncate", yarn.truncate.to_string());
    }
    let Some(local) = local else { return Ok(()) };
    let same = match config.architecture {
        Architecture::Gemma3 => local.rope.scaling == RopeScaling::None,
        _ => full.rope == local.rope,
    };
    if !same {
        return unsupported("the windowed layers' rope", format!("{:?}", local.rope));
    }
    for layer in &config.layers {
        let is = |other: &LayerConfig| layer.reach == other.reach && layer.rope == other.rope;
        if !is(full) && !is(local) {
            return unsupported("a layer", format!("{layer:?}"));
        }
    }
    Ok(())
}

/// A layer without a window, or the first, and a layer with one.
fn kinds(config: &ModelConfig) -> (&LayerConfig, Option<&LayerConfig>) {
    let full = config.layers.iter().find(|layer| layer.reach == Reach::Full);
    let local = config.layers.iter().find(|layer| layer.reach != Reach::Full);
    (full.unwrap_or(&config.layers[0]), local)
}

/// The scale that a file without a word about it has.
fn usual_scale(config: &ModelConfig) -> f32 {
    let large = crate::config::is_gemma_27b(config.architecture, config.layers.len());
    let attention = &config.attention;
    let dim = if large { config.width / attention.heads } else { attention.head_dim };
    1.0 / (dim as f32).sqrt()
}

fn windows(config: &ModelConfig, put: &mut impl FnMut(&str, OwnedValue)) {
    let (_, local) = kinds(config);
    if let Some(LayerConfig { reach: Reach::Window(window), .. }) = local {
        put("attention.sliding_window", (*window as u32).into());
    }
    let Some(period) = config.architecture.full_layer_period() else { return };
    let windowed: Vec<bool> =
        config.layers.iter().map(|layer| layer.reach != Reach::Full).collect();
    let usual = |(layer, windowed): (usize, &bool)| *windowed == ((layer + 1) % period != 0);
    if !windowed.iter().enumerate().all(usual) {
        put("attention.sliding_window_pattern", windowed.into());
    }
}

fn positions(config: &ModelConfig, put: &mut impl FnMut(&str, OwnedValue)) {
    let (full, local) = kinds(config);
    put("rope.freq_base", (full.rope.base as f32).into());
    if let Some(local) = local.filter(|local| local.rope.base != full.rope.base) {
        put("rope.freq_base_swa", (local.rope.base as f32).into());
    }
    match &full.rope.scaling {
        RopeScaling::Linear { factor } => {
            put("rope.scaling.type", "linear".into());
            put("rope.scaling.factor", (*factor as f32).into());
        }
        RopeScaling::Yarn(yarn) => {
            put("rope.scaling.type", "yarn".into());
            put("rope.scaling.factor", (yarn.factor as f32).into());
            put("rope.scaling.original_context_length", (yarn.original_context as u32).into());
            put("rope.scaling.yarn_beta_fast", (yarn.beta_fast as f32).into());
            put("rope.scaling.yarn_beta_slow", (yarn.beta_slow as f32).into());
            let scaled = |weight: f64| 1.0 + 0.1 * weight * yarn.factor.max(1.0).ln();
            let amplitude = match yarn.amplitude {
                YarnAmplitude::Fixed(amplitude) => amplitude,
                YarnAmplitude::Mscale { mscale, mscale_all_dim } => {
                    scaled(mscale) / scaled(mscale_all_dim)
                }
                _ => return,
            };
            put("rope.scaling.yarn_attn_factor", ((amplitude / scaled(1.0)) as f32).into());
        }
        _ => {}
    }
}

/// The divisors of Llama 3's frequencies, which GGUF stores as a tensor.
pub(super) fn divisors(config: &ModelConfig) -> Result<Option<Vec<f32>>, Error> {
    let (full, _) = kinds(config);
    let scaling @ RopeScaling::Llama3 { .. } = &full.rope.scaling else { return Ok(None) };
    let frequencies = |scaling| {
        let theta = full.rope.base;
        let base = RopeConfig::new(config.attention.head_dim, Layout::Interleaved);
        Ok::<_, Error>(Rope::new(RopeConfig { theta, scaling, ..base })?)
    };
    let plain = frequencies(foveal::position::RopeScaling::None)?;
    let scaled = frequencies(ropes::scaling(scaling))?;
    let pairs = plain.frequencies().iter().zip(scaled.frequencies());
    Ok(Some(pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect()))
}
