//! Models of every family that are small enough to be computed by hand, with random weights: as a Hugging Face folder,
//! whole or in shards, and as a GGUF file.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use foveal::projection::Format;
use half::{bf16, f16};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use crate::weights::gguf::{OwnedValue, Writer};

/// The sizes of a model.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub struct TinySizes {
    pub width: usize,
    pub inner: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub layers: usize,
}

impl Default for TinySizes {
    fn default() -> TinySizes {
        TinySizes { width: 24, inner: 40, heads: 4, kv_heads: 2, head_dim: 8, vocab: 50, layers: 7 }
    }
}

/// A tensor under both of its names, with the numbers of both forms.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub struct TinyTensor {
    pub hugging_face: String,
    pub gguf: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
    pub gguf_values: Vec<f32>,
}

/// A model.
#[derive(Clone, Debug)]
pub struct Tiny {
    /// `config.json`.
    pub config: Value,
    /// The metadata of the GGUF file.
    pub keys: Vec<(String, OwnedValue)>,
    /// All tensors that both forms have.
    pub tensors: Vec<TinyTensor>,
    /// The divisors of rotary frequencies, which only the GGUF file has as a tensor.
    pub rope_factors: Option<Vec<f32>>,
    sizes: TinySizes,
}

/// What a family has beyond Llama's tensors.
#[derive(Clone, Copy, Debug, Default)]
struct Family {
    class: &'static str,
    architecture: &'static str,
    qkv_bias: bool,
    output_bias: bool,
    qk_norm: bool,
    post_norms: bool,
    sinks: bool,
    untied: bool,
}

/// The window of the layers that have one; in most families fewer than the tokens of a test.
const WINDOW: usize = 5;
const CONTEXT: usize = 64;
/// Tokens of context before Llama 3's frequencies were stretched.
const ORIGINAL: usize = 16;

impl Tiny {
    /// The names that [`Tiny::new`] knows.
    pub const FAMILIES: [&str; 10] = [
        "llama",
        "llama-linear",
        "llama3",
        "mistral",
        "qwen2",
        "qwen2-yarn",
        "qwen3",
        "gemma2",
        "gemma3",
        "gpt-oss",
    ];

    /// A model of a family.
    ///
    /// # Panics
    /// If `name` is not in [`Tiny::FAMILIES`].
    pub fn new(name: &str, sizes: TinySizes) -> Tiny {
        let family = family(name);
        let mut tensors = tensors(family, sizes);
        tensors.iter_mut().for_each(|tensor| to_gguf(tensor, family, sizes.head_dim));
        let mut model = Tiny {
            config: config(family, sizes),
            keys: keys(family, sizes),
            tensors,
            rope_factors: None,
            sizes,
        };
        model.adapt(name);
        model
    }

    /// What only one family has in its descriptions.
    fn adapt(&mut self, name: &str) {
        let architecture = family(name).architecture;
        let mut key = |name: &str, value: OwnedValue| {
            let name = format!("{architecture}.{name}");
            self.keys.retain(|(known, _)| *known != name);
            self.keys.push((name, value));
        };
        let config = &mut self.config;
        match name {
            "llama-linear" => {
                config["rope_scaling"] = json!({"type": "linear", "factor": 4.0});
                key("rope.scaling.type", "linear".into());
                key("rope.scaling.factor", 4f32.into());
            }
            "llama3" => {
                config["rope_scaling"] = json!({
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL,
                });
                self.rope_factors = Some(llama3_divisors(self.sizes.head_dim));
            }
            "qwen2-yarn" | "gpt-oss" => {
                config["rope_scaling"] = json!({
                    "rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
                    "original_max_position_embeddings": CONTEXT,
                });
                // A ramp over several pairs, whose ends are no whole pairs.
                config["rope_theta"] = json!(100.0);
                key("rope.freq_base", 100f32.into());
                if name == "gpt-oss" {
                    config["rope_scaling"]["truncate"] = false.into();
                    key("attention.sliding_window", (WINDOW as u32).into());
                }
                key("rope.scaling.type", "yarn".into());
                key("rope.scaling.factor", 4f32.into());
                key("rope.scaling.original_context_length", (CONTEXT as u32).into());
                key("rope.scaling.yarn_beta_fast", 4f32.into());
            }
            "mistral" | "gemma3" => key("attention.sliding_window", (WINDOW as u32).into()),
            "gemma2" => {
                // Small, so that they bend what there is.
                config["attn_logit_softcapping"] = json!(1.5);
                config["final_logit_softcapping"] = json!(2.5);
                key("attn_logit_softcapping", 1.5f32.into());
                key("final_logit_softcapping", 2.5f32.into());
                key("attention.sliding_window", (WINDOW as u32).into());
            }
            _ => {}
        }
    }

    /// The numbers of a tensor by its Hugging Face name.
    pub fn values(&self, name: &str) -> Option<&[f32]> {
        let tensor = self.tensors.iter().find(|tensor| tensor.hugging_face == name)?;
        Some(&tensor.values)
    }

    /// Rounds all numbers to a format of 16 bits, so that a file in that format holds them exactly.
    pub fn round_to(mut self, format: Format) -> Tiny {
        for tensor in &mut self.tensors {
            for values in [&mut tensor.values, &mut tensor.gguf_values] {
                for x in values.iter_mut() {
                    *x = match format {
                        Format::F16 => f16::from_f32(*x).to_f32(),
                        Format::BF16 => bf16::from_f32(*x).to_f32(),
                        _ => *x,
                    };
                }
            }
        }
        self
    }

    /// Writes the model as a folder with so many shards, or with one file and no index for one.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn save_folder(&self, folder: &Path, format: Format, shards: usize) -> io::Result<()> {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join("config.json"), self.config.to_string())?;
        let mut map = BTreeMap::new();
        for (n, tensors) in self.tensors.chunks(self.tensors.len().div_ceil(shards)).enumerate() {
            let name = match shards {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{shards:05}.safetensors", n + 1),
            };
            save_shard(&folder.join(&name), tensors, format)?;
            map.extend(tensors.iter().map(|tensor| (tensor.hugging_face.clone(), name.clone())));
        }
        if shards > 1 {
            let index = json!({"metadata": {}, "weight_map": map}).to_string();
            std::fs::write(folder.join("model.safetensors.index.json"), index)?;
        }
        Ok(())
    }

    /// The model as a GGUF file.
    ///
    /// # Panics
    /// If the sizes make no file.
    pub fn to_gguf(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        for (key, value) in &self.keys {
            writer.metadata(key, value.clone()).expect("keys differ");
        }
        let stored = |values: &[f32]| bytes(values, Format::F32);
        let factors = self.rope_factors.as_ref().map(|factors| (factors.len(), stored(factors)));
        if let Some((len, factors)) = &factors {
            let written = writer.tensor("rope_freqs.weight", &[*len], Format::F32, factors);
            written.expect("a vector");
        }
        let data: Vec<_> = self.tensors.iter().map(|tensor| stored(&tensor.gguf_values)).collect();
        for (tensor, data) in self.tensors.iter().zip(&data) {
            let written = writer.tensor(&tensor.gguf, &tensor.shape, Format::F32, data);
            written.expect("shape and data fit");
        }
        writer.to_bytes()
    }
}

fn family(name: &str) -> Family {
    let llama = Family { class: "LlamaForCausalLM", architecture: "llama", ..Family::default() };
    let qwen2 = Family {
        class: "Qwen2ForCausalLM",
        architecture: "qwen2",
        qkv_bias: true,
        ..Family::default()
    };
    match name {
        "llama" | "llama-linear" | "llama3" => llama,
        "mistral" => Family { class: "MistralForCausalLM", untied: true, ..llama },
        "qwen2" | "qwen2-yarn" => qwen2,
        "qwen3" => Family {
            class: "Qwen3ForCausalLM",
            architecture: "qwen3",
            qk_norm: true,
            untied: true,
            ..Family::default()
        },
        "gemma2" => Family {
            class: "Gemma2ForCausalLM",
            architecture: "gemma2",
            post_norms: true,
            ..Family::default()
        },
        "gemma3" => Family {
            class: "Gemma3ForCausalLM",
            architecture: "gemma3",
            post_norms: true,
            qk_norm: true,
            ..Family::default()
        },
        "gpt-oss" => Family {
            class: "GptOssForCausalLM",
            architecture: "gpt-oss",
            output_bias: true,
            sinks: true,
            untied: true,
            ..qwen2
        },
        _ => panic!("no family {name}"),
    }
}

/// Numbers around `mean` that depend on `seed` alone.
pub(super) fn noise(count: usize, seed: &str, mean: f32) -> Vec<f32> {
    let mut state =
        seed.bytes().fold(1u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..count).map(|_| mean + 0.6 * next()).collect()
}

fn tensor(hugging_face: String, gguf: String, shape: &[usize], mean: f32) -> TinyTensor {
    let values = noise(shape.iter().product(), &hugging_face, mean);
    let gguf_values = values.clone();
    TinyTensor { hugging_face, gguf, shape: shape.to_vec(), values, gguf_values }
}

fn tensors(family: Family, sizes: TinySizes) -> Vec<TinyTensor> {
    let TinySizes { width, vocab, layers, .. } = sizes;
    let global = |hf: &str, gguf: &str, shape: &[usize], mean| {
        tensor(format!("{hf}.weight"), format!("{gguf}.weight"), shape, mean)
    };
    let mut all = vec![
        global("model.embed_tokens", "token_embd", &[vocab, width], 0.0),
        global("model.norm", "output_norm", &[width], 1.0),
    ];
    if family.untied {
        all.push(global("lm_head", "output", &[vocab, width], 0.0));
    }
    for layer in 0..layers {
        all.extend(layer_tensors(layer, family, sizes));
    }
    all
}

fn layer_tensors(layer: usize, family: Family, sizes: TinySizes) -> Vec<TinyTensor> {
    let TinySizes { width, inner, heads, kv_heads, head_dim, .. } = sizes;
    let (q_dim, kv_dim) = (heads * head_dim, kv_heads * head_dim);
    let named = |hf: &str, gguf: &str, kind: &str, shape: &[usize], mean| {
        let hf = format!("model.layers.{layer}.{hf}.{kind}");
        tensor(hf, format!("blk.{layer}.{gguf}.{kind}"), shape, mean)
    };
    let matrix = |hf, gguf, shape: [usize; 2]| named(hf, gguf, "weight", &shape, 0.0);
    let norm = |hf, gguf, dim: usize| named(hf, gguf, "weight", &[dim], 1.0);
    let mut all = vec![
        norm("input_layernorm", "attn_norm", width),
        matrix("self_attn.q_proj", "attn_q", [q_dim, width]),
        matrix("self_attn.k_proj", "attn_k", [kv_dim, width]),
        matrix("self_attn.v_proj", "attn_v", [kv_dim, width]),
        matrix("self_attn.o_proj", "attn_output", [width, q_dim]),
        matrix("mlp.gate_proj", "ffn_gate", [inner, width]),
        matrix("mlp.up_proj", "ffn_up", [inner, width]),
        matrix("mlp.down_proj", "ffn_down", [width, inner]),
    ];
    if family.post_norms {
        all.push(norm("post_attention_layernorm", "post_attention_norm", width));
        all.push(norm("pre_feedforward_layernorm", "ffn_norm", width));
        all.push(norm("post_feedforward_layernorm", "post_ffw_norm", width));
    } else if family.architecture == "gpt-oss" {
        all.push(norm("post_attention_layernorm", "post_attention_norm", width));
    } else {
        all.push(norm("post_attention_layernorm", "ffn_norm", width));
    }
    if family.qk_norm {
        all.push(norm("self_attn.q_norm", "attn_q_norm", head_dim));
        all.push(norm("self_attn.k_norm", "attn_k_norm", head_dim));
    }
    if family.qkv_bias {
        for (part, dim) in [("q", q_dim), ("k", kv_dim), ("v", kv_dim)] {
            let hf = format!("self_attn.{part}_proj");
            all.push(named(&hf, &format!("attn_{part}"), "bias", &[dim], 0.0));
        }
    }
    if family.output_bias {
        all.push(named("self_attn.o_proj", "attn_output", "bias", &[width], 0.0));
    }
    if family.sinks {
        let hf = format!("model.layers.{layer}.self_attn.sinks");
        all.push(tensor(hf, format!("blk.{layer}.attn_sinks.weight"), &[heads], 0.5));
    }
    all
}

/// What GGUF stores otherwise: Llama's queries and keys, Gemma's norms.
fn to_gguf(tensor: &mut TinyTensor, family: Family, head_dim: usize) {
    let rotated = tensor.gguf.contains("attn_q.") || tensor.gguf.contains("attn_k.");
    if family.architecture == "llama" && rotated {
        tensor.gguf_values = permuted(&tensor.values, tensor.shape[0], head_dim);
    }
    if family.architecture.starts_with("gemma") && tensor.gguf.contains("norm") {
        tensor.gguf_values.iter_mut().for_each(|weight| *weight += 1.0);
    }
}

/// GGUF's Llama pairs neighbours where Hugging Face pairs halves: rows `i` and `i + dim/2` become `2i` and `2i + 1`.
fn permuted(values: &[f32], rows: usize, head_dim: usize) -> Vec<f32> {
    let width = values.len() / rows;
    let heads = values.chunks(head_dim * width);
    let permuted = heads.flat_map(|head| {
        let row = |i: usize| head[i * width..(i + 1) * width].to_vec();
        (0..head_dim / 2).flat_map(move |i| [row(i), row(i + head_dim / 2)]).flatten()
    });
    permuted.collect()
}

fn config(family: Family, sizes: TinySizes) -> Value {
    let mut config = json!({
        "architectures": [family.class], "hidden_size": sizes.width,
        "intermediate_size": sizes.inner, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim, "max_position_embeddings": CONTEXT,
        "vocab_size": sizes.vocab, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "sliding_window": WINDOW, "sliding_window_pattern": 6,
        "tie_word_embeddings": !family.untied,
    });
    if family.architecture.starts_with("gemma") {
        config["query_pre_attn_scalar"] = json!(sizes.head_dim);
    }
    config
}

fn keys(family: Family, sizes: TinySizes) -> Vec<(String, OwnedValue)> {
    let architecture = family.architecture;
    let own = |key: &str, value: OwnedValue| (format!("{architecture}.{key}"), value);
    let count = |n: usize| OwnedValue::from(n as u32);
    vec![
        ("general.architecture".to_owned(), architecture.into()),
        own("block_count", count(sizes.layers)),
        own("context_length", count(CONTEXT)),
        own("embedding_length", count(sizes.width)),
        own("feed_forward_length", count(sizes.inner)),
        own("attention.head_count", count(sizes.heads)),
        own("attention.head_count_kv", count(sizes.kv_heads)),
        own("attention.key_length", count(sizes.head_dim)),
        own("attention.value_length", count(sizes.head_dim)),
        own("attention.layer_norm_rms_epsilon", 1e-6f32.into()),
        own("rope.freq_base", 1e6f32.into()),
    ]
}

/// What Llama 3 divides its frequencies by, with the numbers of [`Tiny::adapt`].
fn llama3_divisors(head_dim: usize) -> Vec<f32> {
    let divisor = |pair: usize| {
        let frequency = 1e6f64.powf(-2.0 * pair as f64 / head_dim as f64);
        let length = std::f64::consts::TAU / frequency;
        let original = ORIGINAL as f64;
        if length < original / 4.0 {
            1.0
        } else if length > original {
            8.0
        } else {
            let smooth = (original / length - 1.0) / 3.0;
            1.0 / ((1.0 - smooth) / 8.0 + smooth)
        }
    };
    (0..head_dim / 2).map(|pair| divisor(pair) as f32).collect()
}

fn bytes(values: &[f32], format: Format) -> Vec<u8> {
    match format {
        Format::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        Format::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn save_shard(path: &Path, tensors: &[TinyTensor], format: Format) -> io::Result<()> {
    let dtype = match format {
        Format::F16 => Dtype::F16,
        Format::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    };
    let data: Vec<_> = tensors.iter().map(|tensor| bytes(&tensor.values, format)).collect();
    let views = tensors.iter().zip(&data).map(|(tensor, data)| {
        let view = TensorView::new(dtype, tensor.shape.clone(), data);
        Ok((tensor.hugging_face.clone(), view.map_err(io::Error::other)?))
    });
    let views = views.collect::<io::Result<BTreeMap<_, _>>>()?;
    safetensors::serialize_to_file(views, None, path).map_err(io::Error::other)
}
