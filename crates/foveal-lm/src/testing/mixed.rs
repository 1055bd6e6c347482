//! Models with random weights whose configuration names mixers, and a tokenizer whose tokens are the bytes: enough to run the
//! command on.

use serde_json::{Map, Value, json};

use super::tiny::{Tiny, TinySizes, TinyTensor, noise};

impl Tiny {
    /// Llama's layers with mixers that see across segments, or that have no tensors of their own: one for all layers, or a list
    /// with one for each, as in `config.json`. Matrices are as large as training would begin with; texts may have `context` tokens.
    ///
    /// # Panics
    /// If `mixer` has no form that a configuration may have.
    pub fn mixed(sizes: TinySizes, mixer: &Value, context: usize) -> Tiny {
        let mut model = Tiny::new("llama", sizes);
        for tensor in model.tensors.iter_mut().filter(|tensor| tensor.shape.len() == 2) {
            // Uniform numbers of this spread have a variance of 1 / inputs.
            let spread = (12.0 / tensor.shape[1] as f32).sqrt() / 0.6;
            let both = tensor.values.iter_mut().chain(&mut tensor.gguf_values);
            both.for_each(|x| *x *= spread);
        }
        model.config["foveal"] = json!({"mixer": mixer});
        model.config["max_position_embeddings"] = context.into();
        for layer in 0..sizes.layers {
            let own = if mixer.is_array() { &mixer[layer] } else { mixer };
            let sections = own.as_array().map_or(std::slice::from_ref(own), Vec::as_slice);
            for (n, section) in sections.iter().enumerate() {
                let heads = section["heads"].as_u64().map_or(sizes.heads, |heads| heads as usize);
                model.tensors.extend(tensors(section, (layer, n), heads, sizes));
            }
        }
        model
    }
}

/// What a section has beyond its layer's tensors.
fn tensors(
    section: &Value,
    (layer, n): (usize, usize),
    heads: usize,
    sizes: TinySizes,
) -> Vec<TinyTensor> {
    let TinySizes { width, head_dim, .. } = sizes;
    let named = |part: &str, shape: &[usize], mean: f32| {
        let name = format!("model.layers.{layer}.self_attn.sections.{n}.{part}");
        let values = noise(shape.iter().product(), &name, mean);
        let (shape, gguf) = (shape.to_vec(), format!("blk.{layer}.sections.{n}.{part}"));
        TinyTensor { hugging_face: name, gguf, shape, gguf_values: values.clone(), values }
    };
    match section["name"].as_str() {
        Some("transformer_xl") => vec![
            named("r_proj.weight", &[heads * head_dim, width], 0.0),
            named("content_bias", &[heads * head_dim], 0.0),
            named("position_bias", &[heads * head_dim], 0.0),
        ],
        Some("infini") => vec![named("gate", &[heads], 0.0)],
        Some("memorizing") => vec![named("gate", &[heads], 0.0), named("scale", &[heads], 10.0)],
        _ => vec![],
    }
}

/// A `tokenizer.json` with a token for each byte, of that number.
pub fn byte_tokenizer() -> Value {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256..;
    let mut vocab = Map::new();
    for byte in 0..256 {
        let code = if printable(byte) { byte } else { others.next().unwrap_or(byte) };
        let character = char::from_u32(code).unwrap_or('\0');
        vocab.insert(character.to_string(), byte.into());
    }
    let level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}
