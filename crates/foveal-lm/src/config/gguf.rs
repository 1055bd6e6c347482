//! The description of a model in GGUF metadata: keys `ARCH.*`, as llama.cpp writes them, and `foveal.mixer` where mixers are
//! named.

use super::{
    Activation, Architecture, AttentionConfig, LayerConfig, ModelConfig, Reach, RopeConfig,
    RopeLayout, RopeScaling,
};
use foveal::position::{Yarn, YarnAmplitude};
use serde_json::{Value, json};

use crate::Error;
use crate::weights::gguf::{FromValue, Metadata};
use crate::weights::{self, Weights};

/// What the architecture of a model with mixers by name begins with; the family follows.
pub(crate) const NAMED: &str = "foveal-";
/// The key that has its mixers, as JSON in the form of `config.json`.
pub(crate) const MIXER: &str = "foveal.mixer";
const LLAMA_ROPE_BASE: f64 = 10_000.0;
/// Gemma 3's windowed layers, where the metadata has nothing else.
const GEMMA_LOCAL_ROPE_BASE: f64 = 10_000.0;
/// Gemma 2's, where the metadata has nothing else.
const GEMMA2_WINDOW: usize = 4096;

pub(super) fn read(metadata: &Metadata, weights: &Weights) -> Result<ModelConfig, Error> {
    let name: &str = metadata.require("general.architecture")?;
    let family = name.strip_prefix(NAMED);
    let architecture = match family.unwrap_or(name) {
        "llama" => Architecture::Llama,
        "qwen2" => Architecture::Qwen2,
        "qwen3" => Architecture::Qwen3,
        "gemma2" => Architecture::Gemma2,
        "gemma3" => Architecture::Gemma3,
        "gpt-oss" => Architecture::GptOss,
        _ => return Err(Error::Architecture { found: name.to_owned() }),
    };
    let keys = Keys { metadata, weights, name, architecture };
    keys.refuse_unsupported()?;
    match family {
        Some(_) => keys.model_with_mixers(),
        None => keys.model(),
    }
}

/// The metadata of one model.
struct Keys<'a> {
    metadata: &'a Metadata,
    weights: &'a Weights,
    /// What keys begin with.
    name: &'a str,
    architecture: Architecture,
}

impl<'a> Keys<'a> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    fn get<T: FromValue<'a>>(&self, name: &str) -> Result<Option<T>, Error> {
        Ok(self.metadata.get(&self.key(name))?)
    }

    fn require<T: FromValue<'a>>(&self, name: &str) -> Result<T, Error> {
        Ok(self.metadata.require(&self.key(name))?)
    }

    /// A count that may be given layer by layer, if it is the same for all.
    fn uniform(&self, name: &str) -> Result<Option<usize>, Error> {
        let key = self.key(name);
        match self.metadata.get::<usize>(&key) {
            Err(weights::Error::WrongType { .. }) => {}
            number => return Ok(number?),
        }
        let each: Vec<usize> = self.metadata.require(&key)?;
        match each.split_first() {
            Some((first, rest)) if rest.iter().all(|count| count == first) => Ok(Some(*first)),
            _ => Err(Error::UnsupportedConfig { key, found: "different counts".to_owned() }),
        }
    }

    fn refuse_unsupported(&self) -> Result<(), Error> {
        for name in ["expert_count", "attention.causal"] {
            let key = self.key(name);
            let found = match name {
                "attention.causal" => {
                    (self.metadata.get(&key)? == Some(false)).then(|| "false".into())
                }
                _ => self.metadata.get::<u64>(&key)?.filter(|&n| n > 0).map(|n| n.to_string()),
            };
            if let Some(found) = found {
                return Err(Error::UnsupportedConfig { key, found });
            }
        }
        let caps = ["attn_logit_softcapping", "final_logit_softcapping"];
        for name in caps.into_iter().filter(|_| !self.architecture.is_gemma()) {
            if let Some(cap) = self.get::<f64>(name)?.filter(|&cap| cap != 0.0) {
                return Err(Error::UnsupportedConfig {
                    key: self.key(name),
                    found: cap.to_string(),
                });
            }
        }
        Ok(())
    }

    /// A model whose mixers are named, with its rows in the folder's order.
    fn model_with_mixers(&self) -> Result<ModelConfig, Error> {
        let mut model = self.model()?;
        model.attention.rope_layout = RopeLayout::HalfSplit;
        let text: &str = self.metadata.require(MIXER)?;
        let mixer: Value = serde_json::from_str(text)
            .map_err(|error| Error::config(MIXER, error, "mixers as in config.json, as JSON"))?;
        let heads = [model.attention.heads, model.attention.kv_heads];
        let foveal = json!({ "mixer": mixer });
        let sections = super::sections::read(Some(&foveal), model.layers.len(), heads)?;
        for (layer, sections) in model.layers.iter_mut().zip(sections) {
            layer.sections = sections;
        }
        Ok(model)
    }

    fn model(&self) -> Result<ModelConfig, Error> {
        let gemma = self.architecture.is_gemma();
        let width: usize = self.require("embedding_length")?;
        let layers: usize = self.require("block_count")?;
        // Before anything is allocated for them.
        super::positive("number of layers", layers as f64, 4096.0)?;
        Ok(ModelConfig {
            architecture: self.architecture,
            vocab: self.vocab()?,
            context: self.require("context_length")?,
            width,
            feed_forward: self.uniform("feed_forward_length")?.unwrap_or(0),
            attention: self.attention(width, layers)?,
            layers: self.layers(layers)?,
            activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
            norm_epsilon: self.require("attention.layer_norm_rms_epsilon")?,
            norm_offset: 0.0,
            post_norms: gemma,
            embedding_scale: if gemma { (width as f32).sqrt() } else { 1.0 },
            logit_softcap: self.softcap("final_logit_softcapping", 30.0)?,
            tied_head: !self.weights.contains("output.weight"),
        })
    }

    /// The rows of the embedding: the metadata's own count is optional and may be of another vocabulary.
    fn vocab(&self) -> Result<usize, Error> {
        Ok(self.weights.tensor("token_embd.weight")?.out_features())
    }

    fn attention(&self, width: usize, layers: usize) -> Result<AttentionConfig, Error> {
        let heads = self.uniform("attention.head_count")?.unwrap_or(0);
        if heads == 0 {
            return Err(Error::config(&self.key("attention.head_count"), heads, "at least 1"));
        }
        let head_dim = match self.get("attention.key_length")? {
            Some(head_dim) => head_dim,
            None if width.is_multiple_of(heads) => width / heads,
            None => {
                let expected = format!("a divisor of the embedding length {width}");
                return Err(Error::config(&self.key("attention.head_count"), heads, expected));
            }
        };
        self.same_as_head_dim("attention.value_length", head_dim)?;
        self.same_as_head_dim("rope.dimension_count", head_dim)?;
        let scaled_dim = match super::is_gemma_27b(self.architecture, layers) {
            true => width / heads,
            false => head_dim,
        };
        let scale: Option<f32> = self.get("attention.scale")?;
        Ok(AttentionConfig {
            heads,
            kv_heads: self.uniform("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            scale: scale.filter(|&x| x != 0.0).unwrap_or(1.0 / (scaled_dim as f32).sqrt()),
            softcap: self.softcap("attn_logit_softcapping", 50.0)?,
            rope_layout: match self.architecture {
                Architecture::Llama => RopeLayout::Interleaved,
                _ => RopeLayout::HalfSplit,
            },
            qk_norm: matches!(self.architecture, Architecture::Qwen3 | Architecture::Gemma3),
            qkv_bias: self.weights.contains("blk.0.attn_q.bias"),
            output_bias: self.weights.contains("blk.0.attn_output.bias"),
            sinks: self.architecture == Architecture::GptOss,
            latent: None,
        })
    }

    /// A cap; only Gemma 2 has one where the file is silent. Zero is none.
    fn softcap(&self, name: &str, usual: f32) -> Result<Option<f32>, Error> {
        let usual = (self.architecture == Architecture::Gemma2).then_some(usual);
        Ok(self.get(name)?.or(usual).filter(|&cap| cap != 0.0))
    }

    fn same_as_head_dim(&self, name: &str, head_dim: usize) -> Result<(), Error> {
        match self.get::<usize>(name)? {
            Some(found) if found != head_dim => Err(Error::UnsupportedConfig {
                key: self.key(name),
                found: format!("{found} (with heads of {head_dim})"),
            }),
            _ => Ok(()),
        }
    }

    fn layers(&self, count: usize) -> Result<Vec<LayerConfig>, Error> {
        let full = LayerConfig { reach: Reach::Full, rope: self.rope()?, sections: vec![] };
        let windowed = self.windowed(count)?;
        if !windowed.contains(&true) {
            return Ok(vec![full; count]);
        }
        let window = match self.get("attention.sliding_window")? {
            None if self.architecture == Architecture::Gemma2 => GEMMA2_WINDOW,
            None => self.require("attention.sliding_window")?,
            Some(window) => window,
        };
        let rope = match self.architecture {
            Architecture::Gemma3 => {
                let base = self.get("rope.freq_base_swa")?.unwrap_or(GEMMA_LOCAL_ROPE_BASE);
                RopeConfig { base, scaling: RopeScaling::None }
            }
            _ => full.rope.clone(),
        };
        let local = LayerConfig { reach: Reach::Window(window), rope, sections: vec![] };
        let pick = |windowed: bool| if windowed { local.clone() } else { full.clone() };
        Ok(windowed.into_iter().map(pick).collect())
    }

    /// Whether each layer has a window: as listed, or all but each last of a period, or as the family has it.
    fn windowed(&self, count: usize) -> Result<Vec<bool>, Error> {
        let name = "attention.sliding_window_pattern";
        let usual = match self.architecture.full_layer_period() {
            Some(period) => period,
            // Mistral, whose files call themselves Llama.
            None if self.architecture == Architecture::Llama => {
                let window: Option<usize> = self.get("attention.sliding_window")?;
                return Ok(vec![window.is_some_and(|window| window > 0); count]);
            }
            None => return Ok(vec![false; count]),
        };
        let period = match self.get::<usize>(name) {
            Ok(period) => period.unwrap_or(usual).max(1),
            Err(Error::Weights(weights::Error::WrongType { .. })) => {
                let listed: Vec<bool> = self.require(name)?;
                if listed.len() != count {
                    let expected = format!("one for each of the {count} layers");
                    return Err(Error::config(&self.key(name), listed.len(), expected));
                }
                return Ok(listed);
            }
            Err(error) => return Err(error),
        };
        Ok((0..count).map(|layer| (layer + 1) % period != 0).collect())
    }

    fn rope(&self) -> Result<RopeConfig, Error> {
        let base = self.get("rope.freq_base")?.unwrap_or(LLAMA_ROPE_BASE);
        Ok(RopeConfig { base, scaling: self.rope_scaling()? })
    }

    fn rope_scaling(&self) -> Result<RopeScaling, Error> {
        if self.weights.contains("rope_freqs.weight") {
            return Ok(RopeScaling::Divisors(self.weights.tensor("rope_freqs.weight")?.to_f32()));
        }
        match self.get::<&str>("rope.scaling.type")?.unwrap_or("none") {
            "none" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.require("rope.scaling.factor")? }),
            "yarn" => self.yarn(),
            found => Err(Error::UnsupportedConfig {
                key: self.key("rope.scaling.type"),
                found: format!("{found:?}"),
            }),
        }
    }
    /// YaRN; gpt-oss doesn't round the ends of its ramp.
    fn yarn(&self) -> Result<RopeScaling, Error> {
        let context: usize = self.require("rope.scaling.original_context_length")?;
        let usual = Yarn::new(self.require("rope.scaling.factor")?, context as f64);
        let name = "rope.scaling.yarn_ext_factor";
        if let Some(found) = self.get::<f64>(name)?.filter(|&factor| factor != 1.0) {
            let (key, found) = (self.key(name), found.to_string());
            return Err(Error::UnsupportedConfig { key, found });
        }
        let standard = 1.0 + 0.1 * usual.factor.max(1.0).ln();
        // A factor beside the standard amplitude.
        let beside = match self.get::<f64>("rope.scaling.yarn_attn_factor")? {
            None => self.get::<f64>("rope.scaling.attn_factor")?,
            given => given,
        };
        Ok(RopeScaling::Yarn(Yarn {
            beta_fast: self.get("rope.scaling.yarn_beta_fast")?.unwrap_or(usual.beta_fast),
            beta_slow: self.get("rope.scaling.yarn_beta_slow")?.unwrap_or(usual.beta_slow),
            truncate: self.architecture != Architecture::GptOss,
            amplitude: match beside.filter(|&factor| factor != 1.0) {
                Some(factor) => YarnAmplitude::Fixed(factor * standard),
                None => YarnAmplitude::Standard,
            },
            ..usual
        }))
    }
}
