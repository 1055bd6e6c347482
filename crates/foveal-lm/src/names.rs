//! What a model's tensors are called, in GGUF and in Hugging Face form.

use crate::config::{Architecture, ModelConfig};
use crate::weights::{Description, Weights};
use crate::{Error, linear::Linear, norm::Norm};

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

    fn is_gguf(&self) -> bool {
        matches!(self.weights.description(), Description::Gguf(_))
    }

    fn name(&self, layer: usize, part: Part, kind: &str) -> String {
        if self.is_gguf() {
            return format!("blk.{layer}.{}.{kind}", part.gguf(self.config.architecture));
        }
        format!("model.layers.{layer}.{}.{kind}", part.hugging_face(self.config.post_norms))
    }

    fn global(&self, gguf: &'static str, hugging_face: &'static str) -> &'static str {
        if self.is_gguf() { gguf } else { hugging_face }
    }

    /// The embedding, `[vocab, width]`.
    pub(crate) fn embedding(&self) -> Result<Linear, Error> {
        let name = self.global("token_embd.weight", "model.embed_tokens.weight");
        let shape = [self.config.vocab, self.config.width];
        Ok(Linear::new(self.weights.tensor(name)?.with_shape(&shape)?, None))
    }

    /// The projection to logits, `[vocab, width]`.
    pub(crate) fn head(&self) -> Result<Linear, Error> {
        if self.config.tied_head {
            return self.embedding();
        }
        let name = self.global("output.weight", "lm_head.weight");
        let shape = [self.config.vocab, self.config.width];
        Ok(Linear::new(self.weights.tensor(name)?.with_shape(&shape)?, None))
    }

    /// The norm before the head.
    pub(crate) fn final_norm(&self) -> Result<Norm, Error> {
        self.norm_named(self.global("output_norm.weight", "model.norm.weight"), self.config.width)
    }

    /// The norm `part` of a layer, over `dim` numbers.
    pub(crate) fn norm(&self, layer: usize, part: Part, dim: usize) -> Result<Norm, Error> {
        self.norm_named(&self.name(layer, part, "weight"), dim)
    }

    fn norm_named(&self, name: &str, dim: usize) -> Result<Norm, Error> {
        let mut weight = self.weights.tensor(name)?.with_shape(&[dim])?.to_f32();
        weight.iter_mut().for_each(|weight| *weight += self.config.norm_offset);
        Ok(Norm::new(weight, self.config.norm_epsilon))
    }

    /// The logits of a layer's sinks, one for each of the query heads.
    pub(crate) fn sinks(&self, layer: usize) -> Result<Vec<f32>, Error> {
        let name = match self.is_gguf() {
            true => format!("blk.{layer}.attn_sinks.weight"),
            false => format!("model.layers.{layer}.self_attn.sinks"),
        };
        let shape = [self.config.attention.heads];
        Ok(self.weights.tensor(&name)?.with_shape(&shape)?.to_f32())
    }

    /// The projection `part` of a layer, of the shape `[out_features, in_features]`, with its bias or without.
    pub(crate) fn linear(
        &self,
        layer: usize,
        part: Part,
        shape: [usize; 2],
        biased: bool,
    ) -> Result<Linear, Error> {
        let weight = self.weights.tensor(&self.name(layer, part, "weight"))?.with_shape(&shape)?;
        let bias = if biased {
            let bias = self.weights.tensor(&self.name(layer, part, "bias"))?;
            Some(bias.with_shape(&shape[..1])?.to_f32())
        } else {
            None
        };
        Ok(Linear::new(weight, bias))
    }
}
