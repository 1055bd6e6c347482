use serde_json::{Value, json};

use super::{Activation, Architecture, ModelConfig, Reach, RopeLayout, RopeScaling, hugging_face};
use crate::Error;
use crate::weights::gguf::{Gguf, OwnedValue, Writer};
use crate::weights::{self, Weights};
use foveal::position::{Yarn, YarnAmplitude};
use foveal::projection::Format;

type Key = (&'static str, OwnedValue);

/// A GGUF file with these keys, less those without a value, and an embedding of 8 tokens.
fn gguf(base: &[Key], changes: &[(&'static str, Option<OwnedValue>)]) -> Weights {
    let mut writer = Writer::new();
    for (key, value) in base {
        if changes.iter().all(|(changed, _)| changed != key) {
            writer.metadata(key, value.clone()).unwrap();
        }
    }
    for (key, value) in changes {
        if let Some(value) = value {
            writer.metadata(key, value.clone()).unwrap();
        }
    }
    let embedding = vec![0; 8 * 96 * 4];
    writer.tensor("token_embd.weight", &[8, 96], Format::F32, &embedding).unwrap();
    Weights::from_gguf(Gguf::from_bytes(writer.to_bytes()).unwrap()).unwrap()
}

fn llama() -> Vec<Key> {
    vec![
        ("general.architecture", "llama".into()),
        ("llama.block_count", 3u32.into()),
        ("llama.context_length", 128u32.into()),
        ("llama.embedding_length", 96u32.into()),
        ("llama.feed_forward_length", 200u32.into()),
        ("llama.attention.head_count", 6u32.into()),
        ("llama.attention.head_count_kv", 2u32.into()),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5f32.into()),
        ("llama.rope.freq_base", 5e5f32.into()),
    ]
}

fn gemma() -> Vec<Key> {
    vec![
        ("general.architecture", "gemma3".into()),
        ("gemma3.block_count", 13u32.into()),
        ("gemma3.context_length", 1024u32.into()),
        ("gemma3.embedding_length", 96u32.into()),
        ("gemma3.feed_forward_length", 200u32.into()),
        ("gemma3.attention.head_count", 4u32.into()),
        ("gemma3.attention.head_count_kv", 1u32.into()),
        ("gemma3.attention.key_length", 64u32.into()),
        ("gemma3.attention.value_length", 64u32.into()),
        ("gemma3.attention.layer_norm_rms_epsilon", 1e-6f32.into()),
        ("gemma3.attention.sliding_window", 512u32.into()),
        ("gemma3.rope.freq_base", 1e6f32.into()),
    ]
}

fn read(
    base: &[Key],
    changes: &[(&'static str, Option<OwnedValue>)],
) -> Result<ModelConfig, Error> {
    ModelConfig::read(&gguf(base, changes))
}

#[test]
fn llama_in_gguf() {
    let config = read(&llama(), &[]).unwrap();
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.vocab, config.context, config.width), (8, 128, 96));
    assert_eq!((config.attention.heads, config.attention.kv_heads), (6, 2));
    assert_eq!(config.attention.head_dim, 16);
    assert_eq!(config.attention.scale, 0.25);
    assert_eq!(config.attention.rope_layout, RopeLayout::Interleaved);
    assert_eq!(config.activation, Activation::Silu);
    assert_eq!(config.embedding_scale, 1.0);
    assert!(config.tied_head && !config.post_norms && !config.attention.qk_norm);
    assert_eq!(config.layers.len(), 3);
    assert!(config.layers.iter().all(|layer| layer.reach == Reach::Full));
    assert_eq!(config.layers[0].rope.base, 5e5);
    assert_eq!(config.kv_bytes_per_token(), 3 * 2 * 2 * 16 * 4);
}

#[test]
fn gemma_in_gguf_has_a_full_layer_in_six() {
    let config = read(&gemma(), &[]).unwrap();
    for (i, layer) in config.layers.iter().enumerate() {
        let (reach, base) = match i {
            5 | 11 => (Reach::Full, 1e6),
            _ => (Reach::Window(512), 1e4),
        };
        assert_eq!((layer.reach, layer.rope.base), (reach, base), "layer {i}");
        assert_eq!(config.reach(layer), if i == 5 || i == 11 { 1024 } else { 512 });
    }
    assert_eq!(config.attention.scale, 0.125);
    assert_eq!(config.attention.rope_layout, RopeLayout::HalfSplit);
    assert_eq!(config.embedding_scale, 96f32.sqrt());
    assert_eq!(config.activation, Activation::GeluTanh);
    assert!(config.attention.qk_norm && config.post_norms);
}

#[test]
fn scaling_in_gguf() {
    let scaled = |kind: &str, extra: &[(&'static str, Option<OwnedValue>)]| {
        let mut changes = vec![("llama.rope.scaling.type", Some(kind.into()))];
        changes.extend_from_slice(extra);
        read(&llama(), &changes).map(|config| config.layers[0].rope.scaling.clone())
    };
    let factor = ("llama.rope.scaling.factor", Some(4f32.into()));
    let original = ("llama.rope.scaling.original_context_length", Some(64u32.into()));
    assert_eq!(scaled("none", &[]).unwrap(), RopeScaling::None);
    assert_eq!(
        scaled("linear", std::slice::from_ref(&factor)).unwrap(),
        RopeScaling::Linear { factor: 4.0 }
    );
    assert_eq!(
        scaled("yarn", &[factor, original]).unwrap(),
        RopeScaling::Yarn(Yarn::new(4.0, 64.0))
    );
    let error = scaled("longrope", &[]).unwrap_err().to_string();
    assert_eq!(
        error,
        "the model sets llama.rope.scaling.type to \"longrope\", which is not supported"
    );
}

#[test]
fn an_unknown_architecture_lists_the_known_ones() {
    let error = read(&llama(), &[("general.architecture", Some("mamba\n".into()))]).unwrap_err();
    let expected = "the architecture \"mamba\\n\" is not supported; supported are \
                    llama, mistral, qwen2, qwen3, gemma2, gemma3, gpt-oss, deepseek_v2, \
                    deepseek_v3";
    assert_eq!(error.to_string(), expected);
}

fn gemma2() -> Vec<Key> {
    let value = |key: &str, value: OwnedValue| match key {
        "general.architecture" => ("general.architecture", "gemma2".into()),
        _ => {
            let own: &'static str = key.replace("gemma3.", "gemma2.").leak();
            (own, value)
        }
    };
    gemma().into_iter().map(|(key, v)| value(key, v)).collect()
}

#[test]
fn gemma2_in_gguf_has_caps_and_every_other_layer_full() {
    let config = read(&gemma2(), &[]).unwrap();
    for (i, layer) in config.layers.iter().enumerate() {
        let reach = if i % 2 == 1 { Reach::Full } else { Reach::Window(512) };
        assert_eq!((layer.reach, layer.rope.base), (reach, 1e6), "layer {i}");
    }
    assert_eq!((config.attention.softcap, config.logit_softcap), (Some(50.0), Some(30.0)));
    assert!(!config.attention.qk_norm && config.post_norms);
    let cap = ("gemma2.attn_logit_softcapping", Some(OwnedValue::from(7f32)));
    assert_eq!(read(&gemma2(), &[cap]).unwrap().attention.softcap, Some(7.0));
    let none = ("gemma2.final_logit_softcapping", Some(OwnedValue::from(0f32)));
    assert_eq!(read(&gemma2(), &[none]).unwrap().logit_softcap, None);
    let bad = ("gemma2.final_logit_softcapping", Some(OwnedValue::from(f32::NAN)));
    assert!(matches!(read(&gemma2(), &[bad]), Err(Error::Config { .. })));
    let large = [
        ("gemma2.block_count", Some(OwnedValue::from(46u32))),
        ("gemma2.attention.sliding_window", None),
    ];
    let large = read(&gemma2(), &large).unwrap();
    assert_eq!(large.attention.scale, 1.0 / 24f32.sqrt());
    assert_eq!(large.layers[0].reach, Reach::Window(4096));
}

#[test]
fn windows_in_gguf_may_be_listed() {
    let key = "gemma3.attention.sliding_window_pattern";
    let listed: Vec<bool> = (0..13).map(|layer| layer == 4).collect();
    let config = read(&gemma(), &[(key, Some(listed.clone().into()))]).unwrap();
    assert!(config.layers.iter().map(|layer| layer.reach != Reach::Full).eq(listed));
    let config = read(&gemma(), &[(key, Some(2u32.into()))]).unwrap();
    assert_eq!(config.layers.iter().filter(|layer| layer.reach == Reach::Full).count(), 6);
    let error = read(&gemma(), &[(key, Some(vec![true; 3].into()))]).unwrap_err();
    assert!(matches!(error, Error::Config { .. }), "{error}");
    let mistral = ("llama.attention.sliding_window", Some(OwnedValue::from(16u32)));
    let config = read(&llama(), &[mistral]).unwrap();
    assert!(config.layers.iter().all(|layer| layer.reach == Reach::Window(16)));
}

#[test]
fn missing_and_mistyped_keys_are_named() {
    for (key, _) in llama().into_iter().filter(|(key, _)| {
        !["general.architecture", "llama.rope.freq_base", "llama.attention.head_count_kv"]
            .contains(key)
    }) {
        let error = read(&llama(), &[(key, None)]).unwrap_err().to_string();
        let word = key.rsplit(['.', '_']).nth(1).unwrap();
        assert!(error.contains(key) || error.contains(word), "{key}: {error}");
        let error = read(&llama(), &[(key, Some("x".into()))]).unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
}

#[test]
fn numbers_that_no_model_has_are_refused() {
    let changes: [(&'static str, OwnedValue); 14] = [
        ("llama.block_count", 0u32.into()),
        ("llama.block_count", u32::MAX.into()),
        ("llama.context_length", 0u32.into()),
        ("llama.context_length", u32::MAX.into()),
        ("llama.feed_forward_length", 0u32.into()),
        ("llama.attention.head_count", 0u32.into()),
        ("llama.attention.head_count", 7u32.into()),
        ("llama.attention.head_count_kv", 0u32.into()),
        ("llama.attention.head_count_kv", 4u32.into()),
        ("llama.attention.key_length", 0u32.into()),
        ("llama.attention.key_length", 15u32.into()),
        ("llama.attention.layer_norm_rms_epsilon", f32::NAN.into()),
        ("llama.rope.freq_base", 0f32.into()),
        ("llama.rope.freq_base", f32::INFINITY.into()),
    ];
    for (key, value) in changes {
        let found = format!("{value:?}");
        let error = read(&llama(), &[(key, Some(value))]).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{key} = {found}: {error}");
    }
    let error = read(&gemma(), &[("gemma3.attention.sliding_window", Some(0u32.into()))]);
    assert!(matches!(error, Err(Error::Config { .. })));
}

#[test]
fn what_is_not_computed_is_refused() {
    for (key, value) in [
        ("llama.expert_count", OwnedValue::from(8u32)),
        ("llama.attention.causal", false.into()),
        ("llama.attn_logit_softcapping", 50f32.into()),
        ("llama.final_logit_softcapping", 30f32.into()),
        ("llama.attention.value_length", 32u32.into()),
        ("llama.rope.dimension_count", 8u32.into()),
        ("llama.attention.head_count_kv", vec![2u32, 1, 2].into()),
    ] {
        let error = read(&llama(), &[(key, Some(value))]).unwrap_err();
        assert!(
            matches!(&error, Error::UnsupportedConfig { key: named, .. } if named == key),
            "{error}"
        );
    }
    let equal = ("llama.attention.head_count_kv", Some(vec![2u32, 2, 2].into()));
    assert_eq!(read(&llama(), &[equal]).unwrap().attention.kv_heads, 2);
    assert!(read(&llama(), &[("llama.expert_count", Some(0u32.into()))]).is_ok());
}

#[test]
fn a_model_without_an_embedding_is_refused() {
    let mut writer = Writer::new();
    llama().into_iter().for_each(|(key, value)| {
        writer.metadata(key, value).unwrap();
    });
    let weights = Weights::from_gguf(Gguf::from_bytes(writer.to_bytes()).unwrap()).unwrap();
    let error = ModelConfig::read(&weights).unwrap_err();
    assert!(matches!(error, Error::Weights(weights::Error::MissingTensor { .. })), "{error}");
}

fn read_json(base: &Value, changes: &[(&str, Value)]) -> Result<ModelConfig, Error> {
    let mut json = base.clone();
    changes.iter().for_each(|(key, value)| json[key] = value.clone());
    let config = hugging_face::read(&json)?;
    config.check()?;
    Ok(config)
}

fn llama_json() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "vocab_size": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "rope_scaling": null, "attention_bias": false, "tie_word_embeddings": true,
    })
}

/// The form of transformers 4 and that of transformers 5.
fn gemma_jsons() -> [Value; 2] {
    let base = json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 13,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
        "query_pre_attn_scalar": 64, "max_position_embeddings": 1024, "vocab_size": 8,
        "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 512,
        "attn_logit_softcapping": null, "final_logit_softcapping": null,
    });
    let (mut old, mut new) = (base.clone(), base);
    old["rope_theta"] = json!(1e6);
    old["rope_local_base_freq"] = json!(1e4);
    old["sliding_window_pattern"] = json!(6);
    let kind = |i| if i % 6 == 5 { "full_attention" } else { "sliding_attention" };
    new["layer_types"] = json!((0..13).map(kind).collect::<Vec<_>>());
    new["rope_parameters"] = json!({
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    });
    [old, new]
}

#[test]
fn hugging_face_and_gguf_describe_the_same_llama() {
    let mut expected = read(&llama(), &[]).unwrap();
    expected.attention.rope_layout = RopeLayout::HalfSplit;
    assert_eq!(read_json(&llama_json(), &[]).unwrap(), expected);
}

#[test]
fn hugging_face_and_gguf_describe_the_same_gemma() {
    let mut expected = read(&gemma(), &[]).unwrap();
    expected.norm_offset = 1.0;
    for json in gemma_jsons() {
        assert_eq!(read_json(&json, &[]).unwrap(), expected);
    }
}

#[test]
fn the_other_families_differ_from_llama_where_they_should() {
    let family = |class: &str, changes: &[(&str, Value)]| {
        let mut all = vec![("architectures", json!([class]))];
        all.extend_from_slice(changes);
        read_json(&llama_json(), &all).unwrap()
    };
    let qwen2 = family("Qwen2ForCausalLM", &[]);
    assert!(qwen2.attention.qkv_bias && !qwen2.attention.output_bias);
    let qwen3 = family("Qwen3ForCausalLM", &[("head_dim", json!(32))]);
    assert!(qwen3.attention.qk_norm && !qwen3.attention.qkv_bias);
    assert_eq!(qwen3.attention.head_dim, 32);
    let gemma2 = family("Gemma2ForCausalLM", &[("sliding_window", json!(16))]);
    assert_eq!((gemma2.attention.softcap, gemma2.logit_softcap), (Some(50.0), Some(30.0)));
    assert_eq!(gemma2.attention.scale, 0.0625);
    let reaches = [Reach::Window(16), Reach::Full, Reach::Window(16)];
    assert!(gemma2.layers.iter().map(|layer| layer.reach).eq(reaches));
    let without = [("sliding_window", json!(16)), ("final_logit_softcapping", json!(null))];
    assert_eq!(family("Gemma2ForCausalLM", &without).logit_softcap, None);
    let changes = [("sliding_window", json!(16)), ("attention_bias", json!(null))];
    let gpt_oss = family("GptOssForCausalLM", &changes);
    assert!(gpt_oss.attention.sinks && gpt_oss.attention.qkv_bias && gpt_oss.attention.output_bias);
    assert!(gpt_oss.layers.iter().map(|layer| layer.reach).eq(reaches));
    let mistral = family("MistralForCausalLM", &[("sliding_window", json!(16))]);
    assert!(mistral.layers.iter().all(|layer| layer.reach == Reach::Window(16)));
    let mistral = family("MistralForCausalLM", &[("sliding_window", json!(null))]);
    assert!(mistral.layers.iter().all(|layer| layer.reach == Reach::Full));
}

#[test]
fn scaling_in_hugging_face() {
    let scaling = |json: Value| {
        let config = read_json(&llama_json(), &[("rope_scaling", json)]);
        config.map(|config| config.layers[0].rope.scaling.clone())
    };
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let expected = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_context: 8192 };
    assert_eq!(scaling(llama3.clone()).unwrap(), expected);
    let mut yarn = json!({
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
    });
    let usual = Yarn::new(32.0, 4096.0);
    assert_eq!(scaling(yarn.clone()).unwrap(), RopeScaling::Yarn(usual));
    yarn["beta_fast"] = json!(16.0);
    yarn["truncate"] = json!(false);
    let other = Yarn { beta_fast: 16.0, truncate: false, ..usual };
    assert_eq!(scaling(yarn.clone()).unwrap(), RopeScaling::Yarn(other));
    yarn["mscale"] = json!(1.0);
    yarn["mscale_all_dim"] = json!(0.5);
    let amplitude = YarnAmplitude::Mscale { mscale: 1.0, mscale_all_dim: 0.5 };
    assert_eq!(scaling(yarn.clone()).unwrap(), RopeScaling::Yarn(Yarn { amplitude, ..other }));
    yarn["attention_factor"] = json!(1.25);
    let amplitude = YarnAmplitude::Fixed(1.25);
    assert_eq!(scaling(yarn.clone()).unwrap(), RopeScaling::Yarn(Yarn { amplitude, ..other }));
    for (key, value) in [("beta_fast", json!(0.5)), ("attention_factor", json!(-1.0))] {
        let mut bad = yarn.clone();
        bad[key] = value;
        assert!(matches!(scaling(bad), Err(Error::Config { .. })), "{key}");
    }
    let linear = json!({"type": "linear", "factor": 2.0});
    assert_eq!(scaling(linear).unwrap(), RopeScaling::Linear { factor: 2.0 });
    let mut bad = llama3;
    bad["low_freq_factor"] = json!(4.0);
    assert!(matches!(scaling(bad), Err(Error::Config { .. })));
    for unsupported in [
        json!({"rope_type": "dynamic", "factor": 2.0}),
        json!({"rope_type": "default", "partial_rotary_factor": 0.5}),
    ] {
        assert!(matches!(scaling(unsupported), Err(Error::UnsupportedConfig { .. })));
    }
}

#[test]
fn json_that_describes_no_model_is_refused() {
    for (key, value) in [
        ("hidden_size", json!("96")),
        ("hidden_size", json!(-1)),
        ("hidden_size", json!(1e30)),
        ("num_hidden_layers", json!(u64::MAX)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(4)),
        ("rms_norm_eps", json!("small")),
        ("tie_word_embeddings", json!(1)),
        ("layer_types", json!(["full_attention"])),
        ("layer_types", json!(["full_attention", "ring", "full_attention"])),
        ("rope_theta", json!(0)),
        ("vocab_size", json!(null)),
    ] {
        let error = read_json(&llama_json(), &[(key, value.clone())]).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{key} = {value}: {error}");
    }
    for (key, value) in [
        ("hidden_act", json!("relu")),
        ("mlp_bias", json!(true)),
        ("final_logit_softcapping", json!(30.0)),
        ("use_sliding_window", json!(true)),
        ("num_local_experts", json!(32)),
        ("partial_rotary_factor", json!(0.5)),
    ] {
        let error = read_json(&llama_json(), &[(key, value.clone())]).unwrap_err();
        assert!(matches!(error, Error::UnsupportedConfig { .. }), "{key} = {value}: {error}");
    }
    for json in [json!(null), json!([]), json!({}), json!({"architectures": ["GPT2LMHeadModel"]})] {
        assert!(matches!(hugging_face::read(&json), Err(Error::Architecture { .. })));
    }
}
