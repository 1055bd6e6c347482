//! The same model as a Hugging Face folder and as a GGUF file.

use std::collections::BTreeMap;
use std::path::Path;

use foveal::projection::Format;
use foveal_lm::Model;
use foveal_lm::model::{Logits, Scratch, Step};
use foveal_lm::weights::Weights;
use foveal_lm::weights::gguf::{Gguf, OwnedValue, Writer};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use crate::golden_case::difference;

const WIDTH: usize = 24;
const INNER: usize = 40;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const VOCAB: usize = 50;
const LAYERS: usize = 7;

/// A tensor under both of its names.
struct Tensor {
    hugging_face: String,
    gguf: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// Numbers around `mean`.
fn noise(count: usize, seed: &str, mean: f32) -> Vec<f32> {
    let mut state =
        seed.bytes().fold(1u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..count).map(|_| mean + 0.6 * next()).collect()
}

fn tensor(hugging_face: String, gguf: String, shape: &[usize], mean: f32) -> Tensor {
    let values = noise(shape.iter().product(), &hugging_face, mean);
    Tensor { hugging_face, gguf, shape: shape.to_vec(), values }
}

/// What a family has beyond Llama's tensors.
#[derive(Clone, Copy, Default)]
struct Family {
    qkv_bias: bool,
    qk_norm: bool,
    post_norms: bool,
    untied: bool,
}

fn tensors(family: Family) -> Vec<Tensor> {
    let global = |hf: &str, gguf: &str, shape: &[usize], mean| {
        tensor(format!("{hf}.weight"), format!("{gguf}.weight"), shape, mean)
    };
    let mut all = vec![
        global("model.embed_tokens", "token_embd", &[VOCAB, WIDTH], 0.0),
        global("model.norm", "output_norm", &[WIDTH], 1.0),
    ];
    if family.untied {
        all.push(global("lm_head", "output", &[VOCAB, WIDTH], 0.0));
    }
    for layer in 0..LAYERS {
        all.extend(layer_tensors(layer, family));
    }
    all
}

fn layer_tensors(layer: usize, family: Family) -> Vec<Tensor> {
    let (q_dim, kv_dim) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let named = |hf: &str, gguf: &str, kind: &str, shape: &[usize], mean| {
        let hf = format!("model.layers.{layer}.{hf}.{kind}");
        tensor(hf, format!("blk.{layer}.{gguf}.{kind}"), shape, mean)
    };
    let matrix = |hf, gguf, shape: [usize; 2]| named(hf, gguf, "weight", &shape, 0.0);
    let norm = |hf, gguf, dim: usize| named(hf, gguf, "weight", &[dim], 1.0);
    let mut all = vec![
        norm("input_layernorm", "attn_norm", WIDTH),
        matrix("self_attn.q_proj", "attn_q", [q_dim, WIDTH]),
        matrix("self_attn.k_proj", "attn_k", [kv_dim, WIDTH]),
        matrix("self_attn.v_proj", "attn_v", [kv_dim, WIDTH]),
        matrix("self_attn.o_proj", "attn_output", [WIDTH, q_dim]),
        matrix("mlp.gate_proj", "ffn_gate", [INNER, WIDTH]),
        matrix("mlp.up_proj", "ffn_up", [INNER, WIDTH]),
        matrix("mlp.down_proj", "ffn_down", [WIDTH, INNER]),
    ];
    if family.post_norms {
        all.push(norm("post_attention_layernorm", "post_attention_norm", WIDTH));
        all.push(norm("pre_feedforward_layernorm", "ffn_norm", WIDTH));
        all.push(norm("post_feedforward_layernorm", "post_ffw_norm", WIDTH));
    } else {
        all.push(norm("post_attention_layernorm", "ffn_norm", WIDTH));
    }
    if family.qk_norm {
        all.push(norm("self_attn.q_norm", "attn_q_norm", HEAD_DIM));
        all.push(norm("self_attn.k_norm", "attn_k_norm", HEAD_DIM));
    }
    if family.qkv_bias {
        for (part, dim) in [("q", q_dim), ("k", kv_dim), ("v", kv_dim)] {
            let hf = format!("self_attn.{part}_proj");
            all.push(named(&hf, &format!("attn_{part}"), "bias", &[dim], 0.0));
        }
    }
    all
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A folder that is removed when it is done with.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn save_folder(folder: &Path, config: &Value, tensors: &[Tensor]) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let data: Vec<Vec<u8>> = tensors.iter().map(|tensor| bytes(&tensor.values)).collect();
    let views = tensors.iter().zip(&data).map(|(tensor, data)| {
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), data).unwrap();
        (tensor.hugging_face.clone(), view)
    });
    let views: BTreeMap<_, _> = views.collect();
    let path = folder.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
}

fn gguf(architecture: &str, tensors: &[Tensor]) -> Weights {
    let mut writer = Writer::new();
    for (key, value) in keys(architecture) {
        writer.metadata(&key, value).unwrap();
    }
    let data: Vec<Vec<u8>> = tensors.iter().map(|tensor| bytes(&tensor.values)).collect();
    for (tensor, data) in tensors.iter().zip(&data) {
        writer.tensor(&tensor.gguf, &tensor.shape, Format::F32, data).unwrap();
    }
    Weights::from_gguf(Gguf::from_bytes(writer.to_bytes()).unwrap()).unwrap()
}

fn keys(architecture: &str) -> Vec<(String, OwnedValue)> {
    let own = |key: &str, value: OwnedValue| (format!("{architecture}.{key}"), value);
    let count = |n: usize| OwnedValue::from(n as u32);
    vec![
        ("general.architecture".to_owned(), architecture.into()),
        own("block_count", count(LAYERS)),
        own("context_length", count(64)),
        own("embedding_length", count(WIDTH)),
        own("feed_forward_length", count(INNER)),
        own("attention.head_count", count(HEADS)),
        own("attention.head_count_kv", count(KV_HEADS)),
        own("attention.key_length", count(HEAD_DIM)),
        own("attention.value_length", count(HEAD_DIM)),
        own("attention.layer_norm_rms_epsilon", 1e-6f32.into()),
        own("attention.sliding_window", count(5)),
        own("rope.freq_base", 1e6f32.into()),
    ]
}

fn config(class: &str, untied: bool) -> Value {
    json!({
        "architectures": [class], "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "max_position_embeddings": 64, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 5, "sliding_window_pattern": 6,
        "query_pre_attn_scalar": HEAD_DIM, "tie_word_embeddings": !untied,
    })
}

/// GGUF's Llama pairs neighbours where Hugging Face pairs halves: rows `i` and `i + dim/2` become `2i` and `2i + 1`.
fn permute(tensor: &mut Tensor) {
    let width = tensor.values.len() / tensor.shape[0];
    let heads = tensor.values.chunks(HEAD_DIM * width);
    let permuted = heads.flat_map(|head| {
        let row = |i: usize| head[i * width..(i + 1) * width].to_vec();
        (0..HEAD_DIM / 2).flat_map(move |i| [row(i), row(i + HEAD_DIM / 2)]).flatten()
    });
    tensor.values = permuted.collect();
}

fn logits(model: &Model) -> Vec<f32> {
    let tokens: Vec<u32> = (0..30).map(|i| i * 17 % VOCAB as u32).collect();
    let (mut state, mut scratch) = (model.state().unwrap(), Scratch::new());
    let step = Step { logits: Logits::All, ..Step::PROMPT };
    model.forward(&tokens, step, &mut state, &mut scratch).unwrap();
    scratch.logits().to_vec()
}

/// Compares a family in both forms; `adapt` turns its tensors from Hugging Face's into GGUF's.
fn check(names: (&str, &str), family: Family, adapt: impl Fn(&mut Tensor)) {
    let (class, architecture) = names;
    let mut tensors = tensors(family);
    let folder = Folder::new(architecture);
    save_folder(&folder.0, &config(class, family.untied), &tensors);
    let from_folder = logits(&Model::load(&folder.0).unwrap());
    tensors.iter_mut().for_each(adapt);
    let from_gguf = logits(&Model::new(&gguf(architecture, &tensors)).unwrap());
    let off = difference(&from_folder, &from_gguf);
    assert!(off < 1e-4, "{architecture}: off by {off}");
    assert!(from_folder.iter().any(|x| x.abs() > 0.1));
}

#[test]
fn llama_has_its_rows_permuted() {
    check(("LlamaForCausalLM", "llama"), Family::default(), |tensor| {
        if tensor.gguf.contains("attn_q.") || tensor.gguf.contains("attn_k.") {
            permute(tensor);
        }
    });
}

#[test]
fn qwen3_has_norms_of_queries_and_keys_and_may_have_a_head_of_its_own() {
    let family = Family { qk_norm: true, untied: true, ..Family::default() };
    check(("Qwen3ForCausalLM", "qwen3"), family, |_| {});
}

#[test]
fn qwen2_has_biases() {
    let family = Family { qkv_bias: true, ..Family::default() };
    check(("Qwen2ForCausalLM", "qwen2"), family, |_| {});
}

#[test]
fn gemma3_has_one_added_to_its_norms() {
    let family = Family { qk_norm: true, post_norms: true, ..Family::default() };
    check(("Gemma3ForCausalLM", "gemma3"), family, |tensor| {
        if tensor.gguf.contains("norm") {
            tensor.values.iter_mut().for_each(|weight| *weight += 1.0);
        }
    });
}

#[test]
fn a_tensor_of_another_shape_is_named() {
    let mut tensors = tensors(Family::default());
    let down = tensors.iter_mut().find(|tensor| tensor.gguf == "blk.3.ffn_down.weight").unwrap();
    down.shape.swap(0, 1);
    let error = Model::new(&gguf("llama", &tensors)).unwrap_err().to_string();
    let expected = "tensor \"blk.3.ffn_down.weight\" has the shape [40, 24], expected [24, 40]";
    assert_eq!(error, expected);
}

#[test]
fn a_missing_tensor_is_named() {
    let mut tensors = tensors(Family::default());
    tensors.retain(|tensor| tensor.gguf != "blk.6.attn_v.weight");
    let error = Model::new(&gguf("llama", &tensors)).unwrap_err().to_string();
    assert_eq!(error, "the model has no tensor \"blk.6.attn_v.weight\"");
}
