//! An encoder–decoder as a folder: `config.json`, and what `model.safetensors` has besides what is learned.
//!
//! With norms behind the sums it is a Marian model (Junczys-Dowmunt et al. 2018) of Hugging Face's transformers: the same
//! layers, with the positions as a table, be they learned or sinusoids. No architecture there has norms before the sums
//! and nothing else that differs: such a folder is Foveal's own.

use serde_json::{Value, json};

use super::run::sinusoids;
use super::{EncoderDecoder, EncoderDecoderConfig, HALVES, NormPlace, PositionKind};

impl EncoderDecoderConfig {
    /// Its `config.json`, without the tokens that end texts.
    pub(crate) fn to_json(&self) -> Value {
        let (class, kind) = match self.norms {
            NormPlace::Post => ("MarianMTModel", "marian"),
            NormPlace::Pre => ("FovealEncoderDecoder", "foveal_encoder_decoder"),
        };
        json!({
            "architectures": [class],
            "model_type": kind,
            "is_encoder_decoder": true,
            "vocab_size": self.vocab,
            "decoder_vocab_size": self.vocab,
            "d_model": self.width,
            "encoder_layers": self.layers[0],
            "decoder_layers": self.layers[1],
            "encoder_attention_heads": self.heads,
            "decoder_attention_heads": self.heads,
            "encoder_ffn_dim": self.inner,
            "decoder_ffn_dim": self.inner,
            "max_position_embeddings": self.context,
            "activation_function": "relu",
            "scale_embedding": true,
            "share_encoder_decoder_embeddings": true,
            "tie_word_embeddings": true,
            "dropout": 0.0,
            "torch_dtype": "float32",
            "foveal": {"norms": self.norms, "positions": self.positions},
        })
    }
}

impl EncoderDecoder {
    /// Tensors of a folder that are not learned: names, shapes and numbers.
    pub(crate) fn fixed_tensors(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let EncoderDecoderConfig { vocab, width, context, .. } = self.config;
        let mut all = vec![("final_logits_bias".to_owned(), vec![1, vocab], vec![0.0; vocab])];
        if self.config.positions == PositionKind::Sinusoidal {
            let table = sinusoids(context, width);
            let name = |half: &str| format!("model.{half}.embed_positions.weight");
            all.extend(HALVES.map(|half| (name(half), vec![context, width], table.clone())));
        }
        all
    }
}
