//! The section `[model]`, and the `config.json` that it stands for.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::{EncoderDecoderConfig, Error, NormPlace, PositionKind};

/// A model to begin with: one that exists, or sizes.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// A GGUF file or a folder, to train on from its weights. The sizes below are its own then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// The family of its layers.
    pub architecture: Family,
    /// Layers; of an encoder–decoder those of the decoder.
    pub layers: usize,
    /// Layers of the encoder; as many as those of the decoder where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_layers: Option<usize>,
    /// Numbers of a token between layers.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; as many as query heads where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Numbers of a head; width / heads where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Inner width of the feed-forward layers; 8/3 of the width where it is left out, of an encoder–decoder 4 times the width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feed_forward: Option<usize>,
    /// Tokens of context; those of a sequence where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
    /// θ of the rotary positions.
    pub rope_base: f64,
    /// ε of the norms.
    pub norm_epsilon: f64,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// Where the norms of an encoder–decoder are.
    #[serde(skip_serializing_if = "usual")]
    pub norms: NormPlace,
    /// What tells its positions apart.
    #[serde(skip_serializing_if = "usual")]
    pub positions: PositionKind,
    /// What mixes the tokens of the layers, as in `config.json` under `foveal`; attention to all where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixer: Option<toml::Value>,
    /// Layers of gated delta rules, counted from 0, that begin as copiers: what stood behind the same token before comes next.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub copying: Vec<usize>,
}

/// A family of layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Llama.
    #[default]
    Llama,
    /// Biases on queries, keys and values.
    Qwen2,
    /// Normalised queries and keys.
    Qwen3,
    /// The encoder–decoder of 2017, for pairs of texts.
    EncoderDecoder,
}

impl Default for ModelSection {
    fn default() -> ModelSection {
        ModelSection {
            from: None,
            architecture: Family::Llama,
            layers: 4,
            encoder_layers: None,
            width: 128,
            heads: 4,
            kv_heads: None,
            head_dim: None,
            feed_forward: None,
            context: None,
            rope_base: 10_000.0,
            norm_epsilon: 1e-5,
            tied_head: true,
            norms: NormPlace::default(),
            positions: PositionKind::default(),
            mixer: None,
            copying: vec![],
        }
    }
}

/// Whether a key has the value that it has where it is left out.
fn usual<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl ModelSection {
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.heads == 0 {
            return Err(Error::config("model.heads", 0, "1 or more"));
        }
        if self.head_dim.is_none() && !self.width.is_multiple_of(self.heads) {
            let expected = format!("a multiple of the {} heads, or a head_dim", self.heads);
            return Err(Error::config("model.width", self.width, expected));
        }
        if self.from.is_some() && !self.copying.is_empty() {
            let expected = "none beside model.from, whose layers began long ago";
            return Err(Error::config("model.copying", format!("{:?}", self.copying), expected));
        }
        // Written by itself in `train.toml`, from which a mixer beside a model would come back.
        match &self.mixer {
            Some(mixer) if self.from.is_some() => {
                let expected =
                    "none beside model.from; foveal convert changes the mixers of a model";
                Err(Error::config("model.mixer", mixer, expected))
            }
            _ => Ok(()),
        }
    }

    /// The `config.json` of a new model with `vocab` tokens, for sequences of `sequence`.
    ///
    /// # Errors
    ///
    /// [`Error::Toml`] for a mixer that JSON can't have.
    pub fn to_json(&self, vocab: usize, sequence: usize) -> Result<Value, Error> {
        let (class, kind) = match self.architecture {
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
            Family::EncoderDecoder => {
                return Ok(self.encoder_decoder(vocab, sequence).to_json());
            }
        };
        let inner = || (8 * self.width).div_ceil(3).next_multiple_of(32);
        let mut config = json!({
            "architectures": [class],
            "model_type": kind,
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward.unwrap_or_else(inner),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads.unwrap_or(self.heads),
            "head_dim": self.head_dim.unwrap_or(self.width / self.heads),
            "max_position_embeddings": self.context.unwrap_or(sequence),
            "vocab_size": vocab,
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": self.rope_base,
            "tie_word_embeddings": self.tied_head,
            "hidden_act": "silu",
            "torch_dtype": "float32",
        });
        if let Some(mixer) = &self.mixer {
            let mixer = serde_json::to_value(mixer)
                .map_err(|error| Error::Toml { reason: format!("model.mixer: {error}") })?;
            config["foveal"] = json!({"mixer": mixer});
        }
        Ok(config)
    }

    /// The sizes of an encoder–decoder with `vocab` tokens, for texts of `sequence`.
    pub fn encoder_decoder(&self, vocab: usize, sequence: usize) -> EncoderDecoderConfig {
        EncoderDecoderConfig {
            vocab,
            width: self.width,
            inner: self.feed_forward.unwrap_or(self.width.saturating_mul(4)),
            heads: self.heads,
            layers: [self.encoder_layers.unwrap_or(self.layers), self.layers],
            context: self.context.unwrap_or(sequence),
            norms: self.norms,
            positions: self.positions,
        }
    }
}
