//! What a model is made of: one description, read from GGUF metadata or from a Hugging Face `config.json`.
//!
//! Every number in a [`ModelConfig`] has been checked: counts are positive and bounded, heads divide, floats are
//! finite. What this crate doesn't compute is refused here, by name, and never ignored.

pub(crate) mod gguf;
mod hugging_face;
pub(crate) mod sections;

use foveal::plan;
use foveal::position::{Yarn, YarnAmplitude};

use crate::Error;
use crate::weights::{Description, Weights};

pub(crate) use hugging_face::to_json;
pub use sections::{
    CombineHeads, Factorised, KernelMap, Mechanism, MemoryIndex, MemoryUpdate, NearWindow,
    SectionConfig,
};

/// The families of models that can be assembled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// Llama and what shares its layers, such as SmolLM2 and Mistral in GGUF.
    Llama,
    /// Mistral: Llama with a window on every layer.
    Mistral,
    /// Qwen 2: Llama with biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: Llama with normalised queries and keys.
    Qwen3,
    /// Gemma 2: every other layer with a window, capped scores and logits, four norms a layer.
    Gemma2,
    /// Gemma 3: windows with every sixth layer full, four norms a layer.
    Gemma3,
    /// gpt-oss with one feed-forward network a layer instead of experts: every other layer with a window, a learned
    /// sink for each query head, biases, YaRN.
    GptOss,
    /// DeepSeek V2: latent attention; layers with experts are refused.
    DeepseekV2,
    /// DeepSeek V3, likewise.
    DeepseekV3,
}

impl Architecture {
    /// All families.
    pub const ALL: [Architecture; 9] = [
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Gemma2,
        Architecture::Gemma3,
        Architecture::GptOss,
        Architecture::DeepseekV2,
        Architecture::DeepseekV3,
    ];

    /// The name, as GGUF's `general.architecture` has it; of DeepSeek, which is read from Hugging Face folders only, as
    /// `model_type` of `config.json` has it.
    pub const fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Gemma2 => "gemma2",
            Architecture::Gemma3 => "gemma3",
            Architecture::GptOss => "gpt-oss",
            Architecture::DeepseekV2 => "deepseek_v2",
            Architecture::DeepseekV3 => "deepseek_v3",
        }
    }

    /// Gemma of any version.
    pub(crate) const fn is_gemma(self) -> bool {
        matches!(self, Architecture::Gemma2 | Architecture::Gemma3)
    }

    /// Those of latent attention.
    const fn is_deepseek(self) -> bool {
        matches!(self, Architecture::DeepseekV2 | Architecture::DeepseekV3)
    }

    /// Of how many layers the last is full, where the others have windows; `None` where all layers are alike.
    pub(crate) const fn full_layer_period(self) -> Option<usize> {
        match self {
            Architecture::Gemma2 | Architecture::GptOss => Some(2),
            Architecture::Gemma3 => Some(6),
            _ => None,
        }
    }
}

/// Whether a model is Gemma 2 27B or Gemma 3 27B, whose scale is that of `width / heads`; files don't say it.
pub(crate) fn is_gemma_27b(architecture: Architecture, layers: usize) -> bool {
    matches!((architecture, layers), (Architecture::Gemma2, 46) | (Architecture::Gemma3, 62))
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The nonlinearity of a feed-forward layer, `down(activation(gate(x)) · up(x))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU by its tanh form.
    GeluTanh,
}

/// Which numbers of a head a rotary embedding pairs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// `i` with `i + dim/2`.
    HalfSplit,
    /// `2i` with `2i + 1`.
    Interleaved,
}

/// How a rotary embedding's frequencies were stretched for longer contexts.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3's: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths longer than `original_context / low` are divided.
        low: f64,
        /// Wavelengths shorter than `original_context / high` are kept.
        high: f64,
        /// Tokens of context in training.
        original_context: usize,
    },
    /// YaRN.
    Yarn(Yarn),
    /// A divisor for each frequency, `rotary_dim / 2` of them, from GGUF's `rope_freqs.weight`.
    Divisors(Vec<f32>),
}

/// The rotary position embedding of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base θ: frequency `i` is `θ^(−2i / dim)`.
    pub base: f64,
    /// How the frequencies were stretched.
    pub scaling: RopeScaling,
}

/// Which earlier tokens a layer's attention reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// All of the context.
    Full,
    /// This many newest tokens, the query's own included.
    Window(usize),
}

impl std::fmt::Display for Reach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reach::Full => f.write_str("full"),
            Reach::Window(width) => write!(f, "window({width})"),
        }
    }
}

/// What differs between the layers of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// How far the attention reaches.
    pub reach: Reach,
    /// Its positions.
    pub rope: RopeConfig,
    /// The mechanisms that mix its tokens, where that is not its family's attention.
    pub sections: Vec<SectionConfig>,
}

/// The attention of every layer: query heads grouped over key/value heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; they divide the query heads.
    pub kv_heads: usize,
    /// Numbers in a head; even.
    pub head_dim: usize,
    /// The factor of a score.
    pub scale: f32,
    /// What scores are bent to: `c · tanh(score / c)`.
    pub softcap: Option<f32>,
    /// Which numbers are rotated together.
    pub rope_layout: RopeLayout,
    /// Whether queries and keys are normalised, head by head, before they are rotated.
    pub qk_norm: bool,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// Whether each query head has a logit of its own in its softmax, for no token.
    pub sinks: bool,
    /// Latent attention's sizes, where heads have no keys and values of their own.
    pub latent: Option<LatentConfig>,
}

/// The sizes of latent attention (DeepSeek). A head's query and key are `nope + rope` numbers: the head dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LatentConfig {
    /// Inner width of the query projection, or `None` where queries are projected directly.
    pub query_rank: Option<usize>,
    /// Compressed numbers of a token.
    pub latent: usize,
    /// Numbers of a head's query that are not rotated.
    pub nope: usize,
    /// Numbers that are rotated, those of the key shared by all heads; even.
    pub rope: usize,
    /// Numbers of a head's value.
    pub value: usize,
}

impl LatentConfig {
    /// Numbers that a layer keeps of a token.
    pub fn row(&self) -> usize {
        self.latent + self.rope
    }
}

impl AttentionConfig {
    /// Numbers that a layer keeps of a token: keys and values of all heads, or a latent row.
    pub fn kept(&self) -> usize {
        self.latent.map_or(2 * self.kv_dim(), |latent| latent.row())
    }

    /// Numbers of a query or key that are rotated.
    pub fn rotary_dim(&self) -> usize {
        self.latent.map_or(self.head_dim, |latent| latent.rope)
    }

    /// Numbers of a token's queries.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Numbers of a token's keys; of its values too.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// What a model is made of.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Tokens of context in training; attention reaches no further.
    pub context: usize,
    /// Numbers of a token between layers.
    pub width: usize,
    /// Inner width of the feed-forward layers.
    pub feed_forward: usize,
    /// The attention of every layer.
    pub attention: AttentionConfig,
    /// The layers, from the first.
    pub layers: Vec<LayerConfig>,
    /// The nonlinearity of the feed-forward layers.
    pub activation: Activation,
    /// What the norms add to the mean square.
    pub norm_epsilon: f32,
    /// What is added to every stored norm weight: 1 for Gemma in Hugging Face form, else 0.
    pub norm_offset: f32,
    /// Whether the outputs of attention and feed-forward are normalised before they are added.
    pub post_norms: bool,
    /// The factor of a token's embedding.
    pub embedding_scale: f32,
    /// What logits are bent to: `c · tanh(logit / c)`.
    pub logit_softcap: Option<f32>,
    /// Whether the output head is the embedding.
    pub tied_head: bool,
}

impl ModelConfig {
    /// Reads and checks the description in a model's file.
    ///
    /// # Errors
    ///
    /// [`Error::NoConfig`] for a lone safetensors file, [`Error::Architecture`] for a family that can't be assembled,
    /// [`Error::Config`] for a value that no model has, [`Error::UnsupportedConfig`] for a part that this crate
    /// doesn't compute, and [`Error::Weights`] for missing keys and keys of the wrong type.
    pub fn read(weights: &Weights) -> Result<ModelConfig, Error> {
        let config = match weights.description() {
            Description::Gguf(metadata) => gguf::read(metadata, weights)?,
            Description::Config(json) => return ModelConfig::from_json(json),
            Description::None => return Err(Error::NoConfig),
        };
        config.check()?;
        Ok(config)
    }

    /// Reads and checks a Hugging Face `config.json`.
    ///
    /// # Errors
    ///
    /// Those of [`ModelConfig::read`] that are about the description.
    pub fn from_json(json: &serde_json::Value) -> Result<ModelConfig, Error> {
        let config = hugging_face::read(json)?;
        config.check()?;
        Ok(config)
    }

    /// The same with other memories for all sections of Transformer-XL than they were trained with: tokens before a segment that its
    /// queries see, and the distance that those beyond it count as. What is `None` stays as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a model without such sections.
    pub fn with_xl_memory(
        mut self,
        tokens: Option<usize>,
        farthest: Option<usize>,
    ) -> Result<ModelConfig, Error> {
        let mut any = false;
        for section in self.layers.iter_mut().flat_map(|layer| &mut layer.sections) {
            let Mechanism::TransformerXl { memory, clamp, .. } = &mut section.mechanism else {
                continue;
            };
            any = true;
            *memory = tokens.unwrap_or(*memory);
            *clamp = farthest.or(*clamp);
        }
        match any {
            true => Ok(self),
            false => {
                let (what, found) =
                    ("model whose memory is to be another", "none of transformer_xl");
                Err(Error::config(what, found, "layers of transformer_xl"))
            }
        }
    }

    /// How many tokens a layer's attention reaches, its own included: its window, or the whole context.
    pub fn reach(&self, layer: &LayerConfig) -> usize {
        self.reach_within(layer, None)
    }

    /// The same with another context than the model's.
    pub(crate) fn reach_within(&self, layer: &LayerConfig, context: Option<usize>) -> usize {
        let context = context.unwrap_or(self.context);
        match layer.reach {
            Reach::Full => context,
            Reach::Window(width) => width.min(context),
        }
    }

    /// Whether the configuration [names the mechanisms](Mechanism) of its layers.
    pub fn has_named_mixers(&self) -> bool {
        self.layers.iter().any(|layer| !layer.sections.is_empty())
    }

    /// Bytes of keys and values that one more token adds, over all layers, in f32.
    pub fn kv_bytes_per_token(&self) -> usize {
        self.layers.len() * self.attention.kept() * size_of::<f32>()
    }

    fn check(&self) -> Result<(), Error> {
        let attention = &self.attention;
        for (key, found, limit) in [
            ("vocabulary size", self.vocab, 1 << 24),
            ("context length", self.context, 1 << 30),
            ("embedding length", self.width, 1 << 20),
            ("feed-forward length", self.feed_forward, 1 << 22),
            ("number of layers", self.layers.len(), 1 << 12),
            ("number of heads", attention.heads, 1 << 12),
            ("number of key/value heads", attention.kv_heads, 1 << 12),
            ("head dimension", attention.head_dim, 1 << 12),
        ] {
            if found == 0 || found > limit {
                return Err(Error::config(key, found, format!("1 to {limit}")));
            }
        }
        if !attention.heads.is_multiple_of(attention.kv_heads) {
            let expected = format!("a divisor of the {} heads", attention.heads);
            return Err(Error::config("number of key/value heads", attention.kv_heads, expected));
        }
        let rotated = attention.rotary_dim();
        if !rotated.is_multiple_of(2) {
            let what = if attention.latent.is_some() { "rotated part" } else { "dimension" };
            return Err(Error::config(&format!("head {what}"), rotated, "an even number"));
        }
        if let Some(latent) = attention.latent {
            latent.check()?;
        }
        self.check_numbers()
    }

    fn check_numbers(&self) -> Result<(), Error> {
        positive("norm epsilon", self.norm_epsilon.into(), 1.0)?;
        positive("attention scale", self.attention.scale.into(), 1e6)?;
        positive("embedding scale", self.embedding_scale.into(), 1e6)?;
        for (key, cap) in
            [("attention softcap", self.attention.softcap), ("logit softcap", self.logit_softcap)]
        {
            cap.map_or(Ok(()), |cap| positive(key, cap.into(), 1e6))?;
        }
        for layer in &self.layers {
            if layer.reach == Reach::Window(0) {
                return Err(Error::config("attention window", 0, "at least 1"));
            }
            layer.rope.check(self.attention.rotary_dim())?;
        }
        Ok(())
    }
}

impl LatentConfig {
    fn check(&self) -> Result<(), Error> {
        for (key, found) in [
            ("inner width of queries", self.query_rank.unwrap_or(1)),
            ("compressed numbers of a token", self.latent),
            ("numbers of a head that are not rotated", self.nope),
            ("numbers of a head that are rotated", self.rope),
            ("numbers of a head's value", self.value),
            ("numbers of a latent row", self.row()),
        ] {
            if !(1..=plan::MAX_DIM).contains(&found) {
                return Err(Error::config(key, found, format!("1 to {}", plan::MAX_DIM)));
            }
        }
        Ok(())
    }
}

impl RopeConfig {
    fn check(&self, rotary_dim: usize) -> Result<(), Error> {
        positive("rope base", self.base, 1e12)?;
        let factors = match &self.scaling {
            RopeScaling::None => vec![],
            RopeScaling::Linear { factor } => vec![*factor],
            RopeScaling::Llama3 { factor, low, high, original_context } => {
                if low >= high {
                    let expected = format!("below the high-frequency factor {high}");
                    return Err(Error::config("rope low-frequency factor", low, expected));
                }
                vec![*factor, *low, *high, *original_context as f64]
            }
            RopeScaling::Yarn(yarn) => {
                let Yarn { factor, original_context, beta_fast, beta_slow, .. } = *yarn;
                if beta_slow >= beta_fast {
                    let expected = format!("below beta_fast, {beta_fast}");
                    return Err(Error::config("rope beta_slow", beta_slow, expected));
                }
                let (least, most) = match yarn.amplitude {
                    YarnAmplitude::Fixed(amplitude) => (amplitude, amplitude),
                    YarnAmplitude::Mscale { mscale, mscale_all_dim } => (mscale, mscale_all_dim),
                    _ => (1.0, 1.0),
                };
                vec![factor, original_context, beta_fast, beta_slow, least, most]
            }
            RopeScaling::Divisors(divisors) => {
                if divisors.len() != rotary_dim / 2 {
                    let expected = (rotary_dim / 2).to_string();
                    return Err(Error::config(
                        "rope_freqs.weight length",
                        divisors.len(),
                        expected,
                    ));
                }
                divisors.iter().map(|&divisor| divisor.into()).collect()
            }
        };
        factors.into_iter().try_for_each(|factor| positive("rope scaling", factor, 1e12))
    }
}

fn positive(key: &str, found: f64, limit: f64) -> Result<(), Error> {
    if found > 0.0 && found <= limit {
        return Ok(());
    }
    Err(Error::config(key, found, format!("above 0 and at most {limit}")))
}

#[cfg(test)]
mod tests;
