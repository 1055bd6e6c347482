//! Latent attention: DeepSeek V2 and V3.

use serde_json::Value;

use super::Fields;
use crate::Error;
use crate::config::{AttentionConfig, LatentConfig, RopeLayout, RopeScaling};

impl Fields<'_> {
    /// The attention of a model whose layers are all dense.
    pub(super) fn latent_attention(&self, layers: usize) -> Result<AttentionConfig, Error> {
        self.refuse_experts(layers)?;
        let heads = self.require_count("num_attention_heads")?;
        let latent = LatentConfig {
            query_rank: self.count("q_lora_rank")?,
            latent: self.require_count("kv_lora_rank")?,
            nope: self.require_count("qk_nope_head_dim")?,
            rope: self.require_count("qk_rope_head_dim")?,
            value: self.require_count("v_head_dim")?,
        };
        let head_dim = latent.nope.saturating_add(latent.rope);
        let bias = self.truth("attention_bias")?.unwrap_or(false);
        Ok(AttentionConfig {
            heads,
            kv_heads: heads,
            head_dim,
            scale: (self.mscale()?.powi(2) / (head_dim as f64).sqrt()) as f32,
            softcap: None,
            rope_layout: match self.truth("rope_interleave")?.unwrap_or(true) {
                true => RopeLayout::Interleaved,
                false => RopeLayout::HalfSplit,
            },
            qk_norm: false,
            qkv_bias: bias,
            output_bias: bias,
            sinks: false,
            latent: Some(latent),
        })
    }

    /// Refuses layers with experts, which are there where the file is silent.
    fn refuse_experts(&self, layers: usize) -> Result<(), Error> {
        let experts = self.json.get("n_routed_experts");
        if experts.is_some_and(|experts| experts.is_null() || experts == &Value::from(0)) {
            return Ok(());
        }
        let key = "first_k_dense_replace";
        let dense = self.count(key)?.unwrap_or(0);
        if dense >= layers {
            return Ok(());
        }
        let found = format!("{dense} dense layers of {layers}; the others have experts");
        Err(Error::UnsupportedConfig { key: key.to_owned(), found })
    }

    /// YaRN's factor of scores, `0.1 · mscale_all_dim · ln factor + 1`, whose square goes into the scale. Cosines and
    /// sines have an amplitude of their own.
    fn mscale(&self) -> Result<f64, Error> {
        let Some(json) = self.get("rope_parameters").or_else(|| self.get("rope_scaling")) else {
            return Ok(1.0);
        };
        let fields = Fields { json, ..*self };
        match fields.rope_scaling()? {
            RopeScaling::Yarn(yarn) => {
                let weight = fields.number("mscale_all_dim")?.unwrap_or(0.0);
                Ok(1.0 + 0.1 * weight * yarn.factor.max(1.0).ln())
            }
            _ => Ok(1.0),
        }
    }
}
