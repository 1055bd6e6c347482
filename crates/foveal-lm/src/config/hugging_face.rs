//! The description of a model in a Hugging Face `config.json`.

use foveal::position::{Yarn, YarnAmplitude};
use serde_json::Value;

mod latent;
mod writer;

use super::{
    Activation, Architecture, AttentionConfig, LayerConfig, ModelConfig, Reach, RopeConfig,
    RopeLayout, RopeScaling,
};
use crate::Error;

pub(crate) use writer::to_json;

const FULL: &str = "full_attention";
const WINDOWED: &str = "sliding_attention";

pub(super) fn read(json: &Value) -> Result<ModelConfig, Error> {
    if json.get("is_encoder_decoder") == Some(&Value::Bool(true)) {
        return Err(Error::EncoderDecoder);
    }
    let class = json.pointer("/architectures/0").and_then(Value::as_str);
    let name = class.or_else(|| json.get("model_type")?.as_str()).unwrap_or_default();
    let architecture = match name {
        "LlamaForCausalLM" | "llama" => Architecture::Llama,
        "MistralForCausalLM" | "mistral" => Architecture::Mistral,
        "Qwen2ForCausalLM" | "qwen2" => Architecture::Qwen2,
        "Qwen3ForCausalLM" | "qwen3" => Architecture::Qwen3,
        "Gemma2ForCausalLM" | "gemma2" => Architecture::Gemma2,
        "Gemma3ForCausalLM" | "gemma3_text" => Architecture::Gemma3,
        "GptOssForCausalLM" | "gpt_oss" => Architecture::GptOss,
        "DeepseekV2ForCausalLM" | "deepseek_v2" => Architecture::DeepseekV2,
        "DeepseekV3ForCausalLM" | "deepseek_v3" => Architecture::DeepseekV3,
        _ => return Err(Error::Architecture { found: name.to_owned() }),
    };
    let fields = Fields { json, architecture };
    fields.refuse_unsupported()?;
    fields.model()
}

/// The fields of one `config.json`; `null` counts as absent.
#[derive(Clone, Copy)]
struct Fields<'a> {
    json: &'a Value,
    architecture: Architecture,
}

impl<'a> Fields<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn wrong(key: &str, found: &Value, expected: &str) -> Error {
        let mut found = found.to_string();
        found.truncate(found.floor_char_boundary(80));
        Error::config(&format!("config.json {key:?}"), found, expected)
    }

    fn missing(key: &str) -> Error {
        Error::config(&format!("config.json {key:?}"), "missing", "a value")
    }

    fn optional<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| Fields::wrong(key, value, expected))
    }

    fn count(&self, key: &str) -> Result<Option<usize>, Error> {
        self.optional(key, "a count", |value| usize::try_from(value.as_u64()?).ok())
    }

    fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.optional(key, "a number", Value::as_f64)
    }

    fn truth(&self, key: &str) -> Result<Option<bool>, Error> {
        self.optional(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.optional(key, "text", Value::as_str)
    }

    fn require_count(&self, key: &str) -> Result<usize, Error> {
        self.count(key)?.ok_or_else(|| Fields::missing(key))
    }

    fn refuse_unsupported(&self) -> Result<(), Error> {
        let caps = ["attn_logit_softcapping", "final_logit_softcapping"];
        let others = ["mlp_bias", "num_local_experts", "num_experts", "swiglu_limit"];
        let keys = caps.into_iter().filter(|_| !self.architecture.is_gemma()).chain(others);
        let set = |key: &str| {
            self.get(key).filter(|value| *value != &Value::Bool(false) && *value != &Value::from(0))
        };
        for key in keys {
            if let Some(found) = set(key) {
                let found = found.to_string();
                return Err(Error::UnsupportedConfig { key: key.to_owned(), found });
            }
        }
        self.refuse_partial_rotation()
    }

    fn refuse_partial_rotation(&self) -> Result<(), Error> {
        let key = "partial_rotary_factor";
        match self.get(key).filter(|factor| factor.as_f64() != Some(1.0)) {
            Some(found) => {
                let found = found.to_string();
                Err(Error::UnsupportedConfig { key: key.to_owned(), found })
            }
            None => Ok(()),
        }
    }

    fn model(&self) -> Result<ModelConfig, Error> {
        let gemma = self.architecture.is_gemma();
        let width = self.require_count("hidden_size")?;
        let layers = self.require_count("num_hidden_layers")?;
        // Before anything is allocated for them.
        super::positive("number of layers", layers as f64, 4096.0)?;
        let attention = match self.architecture.is_deepseek() {
            true => self.latent_attention(layers)?,
            false => self.attention(width)?,
        };
        let heads = [attention.heads, attention.kv_heads];
        let sections = super::sections::read(self.get("foveal"), layers, heads)?;
        let mut layers = self.layers(layers)?;
        for (layer, sections) in layers.iter_mut().zip(sections) {
            layer.sections = sections;
        }
        Ok(ModelConfig {
            architecture: self.architecture,
            vocab: self.require_count("vocab_size")?,
            context: self.require_count("max_position_embeddings")?,
            width,
            feed_forward: self.require_count("intermediate_size")?,
            attention,
            layers,
            activation: self.activation()?,
            norm_epsilon: self.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            norm_offset: if gemma { 1.0 } else { 0.0 },
            post_norms: gemma,
            embedding_scale: if gemma { (width as f32).sqrt() } else { 1.0 },
            logit_softcap: self.softcap("final_logit_softcapping", 30.0)?,
            tied_head: self.truth("tie_word_embeddings")?.unwrap_or(gemma),
        })
    }

    fn activation(&self) -> Result<Activation, Error> {
        let (key, default) = match self.architecture.is_gemma() {
            true => ("hidden_activation", "gelu_pytorch_tanh"),
            false => ("hidden_act", "silu"),
        };
        match self.text(key)?.unwrap_or(default) {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
            found => {
                let (key, found) = (key.to_owned(), format!("{found:?}"));
                Err(Error::UnsupportedConfig { key, found })
            }
        }
    }

    /// A cap; only Gemma 2 has one where the file is silent.
    fn softcap(&self, key: &str, usual: f32) -> Result<Option<f32>, Error> {
        let silent = self.json.get(key).is_none();
        let usual = (silent && self.architecture == Architecture::Gemma2).then_some(usual);
        Ok(self.number(key)?.map(|cap| cap as f32).or(usual))
    }

    fn attention(&self, width: usize) -> Result<AttentionConfig, Error> {
        let heads = self.require_count("num_attention_heads")?;
        if heads == 0 {
            return Err(Error::config("config.json \"num_attention_heads\"", heads, "at least 1"));
        }
        let head_dim = match (self.count("head_dim")?, self.architecture) {
            (Some(head_dim), _) => head_dim,
            (None, Architecture::Gemma2 | Architecture::Gemma3) => 256,
            (None, Architecture::GptOss) => 64,
            (None, Architecture::Qwen3) => 128,
            (None, _) => width / heads,
        };
        let scaled_dim = match self.architecture {
            Architecture::Gemma2 | Architecture::Gemma3 => {
                self.number("query_pre_attn_scalar")?.unwrap_or(256.0)
            }
            _ => head_dim as f64,
        };
        let qwen2 = self.architecture == Architecture::Qwen2;
        let gpt_oss = self.architecture == Architecture::GptOss;
        let bias = self.truth("attention_bias")?.unwrap_or(gpt_oss);
        Ok(AttentionConfig {
            heads,
            kv_heads: self.count("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            scale: (1.0 / scaled_dim.sqrt()) as f32,
            softcap: self.softcap("attn_logit_softcapping", 50.0)?,
            rope_layout: RopeLayout::HalfSplit,
            qk_norm: matches!(self.architecture, Architecture::Qwen3 | Architecture::Gemma3),
            qkv_bias: bias || qwen2,
            output_bias: bias,
            sinks: gpt_oss,
            latent: None,
        })
    }

    fn layers(&self, count: usize) -> Result<Vec<LayerConfig>, Error> {
        let full = LayerConfig { reach: Reach::Full, rope: self.rope(FULL)?, sections: vec![] };
        let kinds = self.layer_kinds(count)?;
        if kinds.iter().all(|&windowed| !windowed) {
            return Ok(vec![full; count]);
        }
        let window = self.require_count("sliding_window")?;
        let rope = self.rope(WINDOWED)?;
        let local = LayerConfig { reach: Reach::Window(window), rope, sections: vec![] };
        let pick = |windowed| if windowed { local.clone() } else { full.clone() };
        Ok(kinds.into_iter().map(pick).collect())
    }

    /// Whether each layer has a window.
    fn layer_kinds(&self, count: usize) -> Result<Vec<bool>, Error> {
        if let Some(listed) = self.get("layer_types") {
            let kinds = listed.as_array().map_or(&[][..], Vec::as_slice);
            if kinds.len() != count {
                return Err(Fields::wrong("layer_types", listed, "one entry for each layer"));
            }
            let windowed = |kind: &Value| match kind.as_str() {
                Some(FULL) => Ok(false),
                Some(WINDOWED) => Ok(true),
                _ => Err(Fields::wrong("layer_types", kind, "full_attention or sliding_attention")),
            };
            return kinds.iter().map(windowed).collect();
        }
        if let Some(period) = self.architecture.full_layer_period() {
            let period = match self.architecture {
                Architecture::Gemma3 => self.count("sliding_window_pattern")?.unwrap_or(period),
                _ => period,
            };
            return Ok((0..count).map(|layer| (layer + 1) % period.max(1) != 0).collect());
        }
        match self.architecture {
            Architecture::Mistral => Ok(vec![self.get("sliding_window").is_some(); count]),
            _ if self.truth("use_sliding_window")? == Some(true) => Err(Error::UnsupportedConfig {
                key: "use_sliding_window without layer_types".to_owned(),
                found: "true".to_owned(),
            }),
            _ => Ok(vec![false; count]),
        }
    }

    /// The positions of the layers of one kind, in the form of transformers 4 or 5.
    fn rope(&self, kind: &str) -> Result<RopeConfig, Error> {
        let gemma3 = self.architecture == Architecture::Gemma3;
        if let Some(parameters) = self.get("rope_parameters") {
            let own = parameters.get(kind).unwrap_or(parameters);
            let fields = Fields { json: own, ..*self };
            let base = fields.number("rope_theta")?.ok_or_else(|| Fields::missing("rope_theta"))?;
            return Ok(RopeConfig { base, scaling: fields.rope_scaling()? });
        }
        if gemma3 && kind == WINDOWED {
            let base = self.number("rope_local_base_freq")?.unwrap_or(10_000.0);
            return Ok(RopeConfig { base, scaling: RopeScaling::None });
        }
        let default = match self.architecture {
            Architecture::Gemma3 => 1_000_000.0,
            Architecture::GptOss => 150_000.0,
            _ => 10_000.0,
        };
        let base = self.number("rope_theta")?.unwrap_or(default);
        let scaling = match self.get("rope_scaling") {
            Some(json) => Fields { json, ..*self }.rope_scaling()?,
            None => RopeScaling::None,
        };
        Ok(RopeConfig { base, scaling })
    }

    /// The scaling that an object with a `rope_type` (once `type`) describes.
    fn rope_scaling(&self) -> Result<RopeScaling, Error> {
        let kind = self.text("rope_type")?.or(self.text("type")?).unwrap_or("default");
        let number = |key| self.number(key)?.ok_or_else(|| Fields::missing(key));
        let original = "original_max_position_embeddings";
        self.refuse_partial_rotation()?;
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original_context: self.require_count(original)?,
            }),
            "yarn" => self.yarn(),
            _ => {
                let (key, found) = ("rope_type".to_owned(), format!("{kind:?}"));
                Err(Error::UnsupportedConfig { key, found })
            }
        }
    }

    /// YaRN; what the file leaves out is as the paper has it.
    fn yarn(&self) -> Result<RopeScaling, Error> {
        let key = "original_max_position_embeddings";
        let factor = self.number("factor")?.ok_or_else(|| Fields::missing("factor"))?;
        let usual = Yarn::new(factor, self.require_count(key)? as f64);
        let fixed = self.number("attention_factor")?.map(YarnAmplitude::Fixed);
        let scaled = match (self.number("mscale")?, self.number("mscale_all_dim")?) {
            (Some(mscale), Some(mscale_all_dim)) if mscale != 0.0 && mscale_all_dim != 0.0 => {
                Some(YarnAmplitude::Mscale { mscale, mscale_all_dim })
            }
            _ => None,
        };
        Ok(RopeScaling::Yarn(Yarn {
            beta_fast: self.number("beta_fast")?.unwrap_or(usual.beta_fast),
            beta_slow: self.number("beta_slow")?.unwrap_or(usual.beta_slow),
            truncate: self.truth("truncate")?.unwrap_or(usual.truncate),
            amplitude: fixed.or(scaled).unwrap_or(usual.amplitude),
            ..usual
        }))
    }
}
