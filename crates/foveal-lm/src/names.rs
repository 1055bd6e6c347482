//! What a model's tensors are called, in GGUF and in Hugging Face form.

use crate::config::{Architecture, ModelConfig};
use crate::weights::{Description, Weights};
use crate::{Error, linear::Linear, norm::Norm};

/// Which names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Gguf,
    HuggingFace,
}

/// A place for a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Embedding,
    FinalNorm,
    Head,
    Layer(usize, Part, &'static str),
    Sinks(usize),
}

impl Place {
    pub(crate) fn name(self, config: &ModelConfig, form: Form) -> String {
        let global = |gguf: &str, hugging_face: &str| match form {
            Form::Gguf => gguf.to_owned(),
            Form::HuggingFace => hugging_face.to_owned(),
        };
        match (self, form) {
            (Place::Embedding, _) => global("token_embd.weight", "model.embed_tokens.weight"),
            (Place::FinalNorm, _) => global("output_norm.weight", "model.norm.weight"),
            (Place::Head, _) => global("output.weight", "lm_head.weight"),
            (Place::Layer(layer, part, kind), Form::Gguf) => {
                format!("blk.{layer}.{}.{kind}", part.gguf(config.architecture))
            }
            (Place::Layer(layer, part, kind), Form::HuggingFace) => {
                format!("model.layers.{layer}.{}.{kind}", part.hugging_face(config.post_norms))
            }
            (Place::Sinks(layer), Form::Gguf) => format!("blk.{layer}.attn_sinks.weight"),
            (Place::Sinks(layer), Form::HuggingFace) => {
                format!("model.layers.{layer}.self_attn.sinks")
            }
        }
    }
}

/// The places of a model, those included that its family leaves empty.
pub(crate) fn all(config: &ModelConfig) -> impl Iterator<Item = Place> {
    let layer = |layer| {
        let kinds = ["weight", "bias"].into_iter();
        let parts = Part::ALL.into_iter();
        let places = parts.filter(|part| config.post_norms || !part.is_post_norm());
        let places = places
            .flat_map(move |part| kinds.clone().map(move |kind| Place::Layer(layer, part, kind)));
        places.chain([Place::Sinks(layer)])
    };
    let head = (!config.tied_head).then_some(Place::Head);
    let global = [Place::Embedding, Place::FinalNorm].into_iter().chain(head);
    global.chain((0..config.layers.len()).flat_map(layer))
}

/// The name of a tensor of one of a layer's sections: `gate_proj.weight`, `a_log`.
pub(crate) fn section(layer: usize, section: usize, part: &str, form: Form) -> String {
    match form {
        Form::Gguf => format!("blk.{layer}.sections.{section}.{part}"),
        Form::HuggingFace => format!("model.layers.{layer}.self_attn.sections.{section}.{part}"),
    }
}

/// The tensors of sections among names in one form, and their names in the other.
pub(crate) fn sections<'a>(
    names: impl Iterator<Item = &'a str>,
    config: &ModelConfig,
    [from, to]: [Form; 2],
) -> Vec<[String; 2]> {
    let names: Vec<&str> = names.collect();
    let mut all = vec![];
    for (layer, sections) in config.layers.iter().map(|layer| layer.sections.len()).enumerate() {
        for n in 0..sections {
            let prefix = section(layer, n, "", from);
            let parts = names.iter().filter_map(|name| name.strip_prefix(&*prefix));
            all.extend(parts.map(|part| [from, to].map(|form| section(layer, n, part, form))));
        }
    }
    all
}

/// A tensor that every layer has, or may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    AttentionNorm,
    Query,
    Key,
    Value,
    AttentionOutput,
    QueryNorm,
    KeyNorm,
    PostAttentionNorm,
    FeedForwardNorm,
    Gate,
    Up,
    Down,
    PostFeedForwardNorm,
    QueryDown,
    QueryDownNorm,
    QueryUp,
    LatentDown,
    LatentNorm,
    LatentUp,
}

impl Part {
    const ALL: [Part; 13] = [
        Part::AttentionNorm,
        Part::Query,
        Part::Key,
        Part::Value,
        Part::AttentionOutput,
        Part::QueryNorm,
        Part::KeyNorm,
        Part::PostAttentionNorm,
        Part::FeedForwardNorm,
        Part::Gate,
        Part::Up,
        Part::Down,
        Part::PostFeedForwardNorm,
    ];

    const fn is_post_norm(self) -> bool {
        matches!(self, Part::PostAttentionNorm | Part::PostFeedForwardNorm)
    }

    /// gpt-oss names the norm before the feed-forward layer after what precedes it.
    const fn gguf(self, architecture: Architecture) -> &'static str {
        match self {
            Part::FeedForwardNorm if matches!(architecture, Architecture::GptOss) => {
                "post_attention_norm"
            }
            Part::AttentionNorm => "attn_norm",
            Part::Query => "attn_q",
            Part::Key => "attn_k",
            Part::Value => "attn_v",
            Part::AttentionOutput => "attn_output",
            Part::QueryNorm => "attn_q_norm",
            Part::KeyNorm => "attn_k_norm",
            Part::PostAttentionNorm => "post_attention_norm",
            Part::FeedForwardNorm => "ffn_norm",
            Part::Gate => "ffn_gate",
            Part::Up => "ffn_up",
            Part::Down => "ffn_down",
            Part::PostFeedForwardNorm => "post_ffw_norm",
            Part::QueryDown => "attn_q_a",
            Part::QueryDownNorm => "attn_q_a_norm",
            Part::QueryUp => "attn_q_b",
            Part::LatentDown => "attn_kv_a_mqa",
            Part::LatentNorm => "attn_kv_a_norm",
            Part::LatentUp => "attn_kv_b",
        }
    }

    /// Hugging Face names the norm before the feed-forward layer after what precedes it, unless there are post-norms.
    const fn hugging_face(self, post_norms: bool) -> &'static str {
        match self {
            Part::AttentionNorm => "input_layernorm",
            Part::Query => "self_attn.q_proj",
            Part::Key => "self_attn.k_proj",
            Part::Value => "self_attn.v_proj",
            Part::AttentionOutput => "self_attn.o_proj",
            Part::QueryNorm => "self_attn.q_norm",
            Part::KeyNorm => "self_attn.k_norm",
            Part::FeedForwardNorm if post_norms => "pre_feedforward_layernorm",
            Part::PostAttentionNorm | Part::FeedForwardNorm => "post_attention_layernorm",
            Part::Gate => "mlp.gate_proj",
            Part::Up => "mlp.up_proj",
            Part::Down => "mlp.down_proj",
            Part::PostFeedForwardNorm => "post_feedforward_layernorm",
            Part::QueryDown => "self_attn.q_a_proj",
            Part::QueryDownNorm => "self_attn.q_a_layernorm",
            Part::QueryUp => "self_attn.q_b_proj",
            Part::LatentDown => "self_attn.kv_a_proj_with_mqa",
            Part::LatentNorm => "self_attn.kv_a_layernorm",
            Part::LatentUp => "self_attn.kv_b_proj",
        }
    }
}

/// The tensors of a model by what they are for, each checked against the shape that the configuration implies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts<'a> {
    weights: &'a Weights,
    config: &'a ModelConfig,
}

impl<'a> Parts<'a> {
    pub(crate) fn new(weights: &'a Weights, config: &'a ModelConfig) -> Parts<'a> {
        Parts { weights, config }
    }

    pub(crate) fn config(&self) -> &'a ModelConfig {
        self.config
    }

    fn form(&self) -> Form {
        match self.weights.description() {
            Description::Gguf(_) => Form::Gguf,
            _ => Form::HuggingFace,
        }
    }

    fn name(&self, place: Place) -> String {
        place.name(self.config, self.form())
    }

    fn table(&self, place: Place) -> Result<Linear, Error> {
        let shape = [self.config.vocab, self.config.width];
        let weight = self.weights.tensor(&self.name(place))?;
        Ok(Linear::new(weight.with_shape(&shape)?, None))
    }

    /// The embedding, `[vocab, width]`.
    pub(crate) fn embedding(&self) -> Result<Linear, Error> {
        self.table(Place::Embedding)
    }

    /// The projection to logits, `[vocab, width]`.
    pub(crate) fn head(&self) -> Result<Linear, Error> {
        self.table(if self.config.tied_head { Place::Embedding } else { Place::Head })
    }

    /// The norm before the head.
    pub(crate) fn final_norm(&self) -> Result<Norm, Error> {
        self.norm_named(&self.name(Place::FinalNorm), self.config.width)
    }

    /// The norm `part` of a layer, over `dim` numbers.
    pub(crate) fn norm(&self, layer: usize, part: Part, dim: usize) -> Result<Norm, Error> {
        self.norm_named(&self.name(Place::Layer(layer, part, "weight")), dim)
    }

    fn norm_named(&self, name: &str, dim: usize) -> Result<Norm, Error> {
        let mut weight = self.weights.tensor(name)?.with_shape(&[dim])?.to_f32();
        weight.iter_mut().for_each(|weight| *weight += self.config.norm_offset);
        Ok(Norm::new(weight, self.config.norm_epsilon))
    }

    /// The logits of a layer's sinks, one for each of the query heads.
    pub(crate) fn sinks(&self, layer: usize) -> Result<Vec<f32>, Error> {
        let shape = [self.config.attention.heads];
        Ok(self.weights.tensor(&self.name(Place::Sinks(layer)))?.with_shape(&shape)?.to_f32())
    }

    /// A projection of one of a layer's sections, of the shape `[out_features, in_features]`, without bias.
    pub(crate) fn section(
        &self,
        layer: usize,
        section: usize,
        part: &str,
        shape: [usize; 2],
    ) -> Result<Linear, Error> {
        let name = self::section(layer, section, &format!("{part}.weight"), self.form());
        Ok(Linear::new(self.weights.tensor(&name)?.with_shape(&shape)?, None))
    }

    /// So many numbers of one of a layer's sections.
    pub(crate) fn section_vector(
        &self,
        layer: usize,
        section: usize,
        part: &str,
        len: usize,
    ) -> Result<Vec<f32>, Error> {
        let name = self::section(layer, section, part, self.form());
        Ok(self.weights.tensor(&name)?.with_shape(&[len])?.to_f32())
    }

    /// The taps of a convolution of one of a layer's sections, `[channels, 1, taps]`.
    pub(crate) fn section_taps(
        &self,
        layer: usize,
        section: usize,
        part: &str,
        [channels, taps]: [usize; 2],
    ) -> Result<Vec<f32>, Error> {
        let name = self::section(layer, section, &format!("{part}.weight"), self.form());
        Ok(self.weights.tensor(&name)?.with_shape(&[channels, 1, taps])?.to_f32())
    }

    /// The projection `part` of a layer, of the shape `[out_features, in_features]`, with its bias or without.
    pub(crate) fn linear(
        &self,
        layer: usize,
        part: Part,
        shape: [usize; 2],
        biased: bool,
    ) -> Result<Linear, Error> {
        let weight = self.weights.tensor(&self.name(Place::Layer(layer, part, "weight")))?;
        let weight = weight.with_shape(&shape)?;
        let bias = if biased {
            let bias = self.weights.tensor(&self.name(Place::Layer(layer, part, "bias")))?;
            Some(bias.with_shape(&shape[..1])?.to_f32())
        } else {
            None
        };
        Ok(Linear::new(weight, bias))
    }
}
