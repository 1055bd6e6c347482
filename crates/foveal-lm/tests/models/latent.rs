//! Models with latent attention, as DeepSeek has it, in dense form with random weights.

use foveal::Phase;
use foveal::cache::Rolling;
use foveal::projection::Format;
use foveal_lm::config::{Architecture, ModelConfig};
use foveal_lm::mixer::{Attended, CacheOptions, CacheStorage, Keep};
use foveal_lm::model::{Logits, Observer, Scratch, State, Step};
use foveal_lm::quantize::quantize;
use foveal_lm::testing::{Tiny, TinySizes, TinyTensor};
use foveal_lm::weights::Weights;
use foveal_lm::{Error, Model};
use serde_json::{Value, json};

use crate::batch::check_joining_and_leaving;
use crate::formats::Folder;
use crate::golden_case::difference;
use crate::reference;

const HEADS: usize = 3;
const LATENT: usize = 20;
const NOPE: usize = 10;
const ROPE: usize = 6;
const VALUE: usize = 7;
const LAYERS: usize = 2;
const VOCAB: usize = 50;

/// A small model of a class, whose queries have so low a rank.
pub(crate) fn tiny(class: &str, query_rank: Option<usize>) -> Tiny {
    let sizes = TinySizes {
        heads: HEADS,
        kv_heads: HEADS,
        layers: LAYERS,
        vocab: VOCAB,
        ..TinySizes::default()
    };
    let (width, query) = (sizes.width, HEADS * (NOPE + ROPE));
    let mut model = Tiny::new("llama", sizes);
    // The rest of a layer is Llama's.
    model.tensors.retain(|tensor| !tensor.hugging_face.contains("self_attn"));
    for layer in 0..LAYERS {
        let mut add = |part: &str, shape: &[usize]| model.tensors.push(tensor(layer, part, shape));
        match query_rank {
            None => add("q_proj", &[query, width]),
            Some(rank) => {
                add("q_a_proj", &[rank, width]);
                add("q_a_layernorm", &[rank]);
                add("q_b_proj", &[query, rank]);
            }
        }
        add("kv_a_proj_with_mqa", &[LATENT + ROPE, width]);
        add("kv_a_layernorm", &[LATENT]);
        add("kv_b_proj", &[HEADS * (NOPE + VALUE), LATENT]);
        add("o_proj", &[width, HEADS * VALUE]);
    }
    let config = &mut model.config;
    config["architectures"] = json!([class]);
    config["rope_theta"] = json!(100.0);
    config["rope_scaling"] = json!({
        "type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 0.7,
        "mscale_all_dim": 1.2, "original_max_position_embeddings": 64,
    });
    let own = json!({
        "q_lora_rank": query_rank, "kv_lora_rank": LATENT, "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "n_routed_experts": null,
        "max_position_embeddings": 4096,
    });
    for (key, value) in own.as_object().unwrap() {
        config[key] = value.clone();
    }
    model
}

pub(crate) fn tensor(layer: usize, part: &str, shape: &[usize]) -> TinyTensor {
    let name = format!("model.layers.{layer}.self_attn.{part}.weight");
    let mut state = name.bytes().fold(7u32, |hash, byte| hash.wrapping_mul(31) ^ u32::from(byte));
    let mean = if shape.len() == 1 { 1.0 } else { 0.0 };
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        mean + 0.8 * ((state >> 8) as f32 / (1u32 << 24) as f32 - 0.5)
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    TinyTensor {
        hugging_face: name,
        gguf: String::new(),
        shape: shape.to_vec(),
        gguf_values: values.clone(),
        values,
    }
}

pub(crate) fn load(model: &Tiny, name: &str) -> Result<Model, Error> {
    let folder = Folder::new(name);
    model.save_folder(&folder.0, Format::F32, 1).unwrap();
    Model::load(&folder.0)
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * i + 17 * i) as u32 % VOCAB as u32).collect()
}

/// The logits of all of a text that is read in calls that end at `cuts`.
pub(crate) fn logits(
    model: &Model,
    state: &mut State,
    phase: Phase,
    (text, cuts): (&[u32], &[usize]),
) -> Vec<f32> {
    let (mut scratch, mut all, mut start) = (Scratch::new(), vec![], 0);
    let step = Step { phase, logits: Logits::All };
    for &end in cuts.iter().chain([&text.len()]) {
        model.forward(&text[start..end], step, state, &mut scratch).unwrap();
        all.extend_from_slice(scratch.logits());
        start = end;
    }
    all
}

#[test]
fn every_logit_is_that_of_the_definition() {
    for (class, rank) in [("DeepseekV2ForCausalLM", None), ("DeepseekV3ForCausalLM", Some(12))] {
        let tiny = tiny(class, rank);
        let text = tokens(40);
        let rows = reference::logits(&tiny, &text);
        let expected: Vec<f32> = rows.into_iter().flatten().map(|x| x as f32).collect();
        assert!(expected.iter().any(|x| x.abs() > 0.5), "{class}");
        let model = load(&tiny, class).unwrap();
        let each: Vec<usize> = (1..40).collect();
        for (phase, cuts) in [
            (Phase::Prompt, &[][..]),
            (Phase::Prompt, &[7, 14, 33]),
            (Phase::Generated, &each),
            (Phase::Generated, &[1, 20]),
        ] {
            let mut state = model.state().unwrap();
            let off = difference(&logits(&model, &mut state, phase, (&text, cuts)), &expected);
            assert!(off < 1e-4, "{class} {phase:?} {cuts:?}: off by {off}");
        }
    }
}

#[test]
fn cuts_change_no_bit() {
    let model = load(&tiny("DeepseekV3ForCausalLM", Some(12)), "latent-cuts").unwrap();
    let text = tokens(600);
    let run =
        |phase, cuts: &[usize]| logits(&model, &mut model.state().unwrap(), phase, (&text, cuts));
    let whole = run(Phase::Prompt, &[]);
    for cuts in [&[1][..], &[255], &[256], &[3, 40, 300, 301, 571]] {
        assert!(run(Phase::Prompt, cuts) == whole, "{cuts:?}");
    }
    let by = |step: usize| run(Phase::Generated, &(step..600).step_by(step).collect::<Vec<_>>());
    assert!(by(7) == by(60));
}

#[test]
fn texts_of_a_batch_have_the_bits_of_texts_alone() {
    for (class, rank) in [("DeepseekV2ForCausalLM", None), ("DeepseekV3ForCausalLM", Some(12))] {
        let model = load(&tiny(class, rank), &format!("latent-batch-{class}")).unwrap();
        check_joining_and_leaving(&model, &[3, 40, 9, 300, 1]);
    }
}

#[test]
fn rows_lie_in_pages_that_texts_share() {
    let model = load(&tiny("DeepseekV3ForCausalLM", Some(12)), "latent-pages").unwrap();
    let text = tokens(300);
    let expected = logits(&model, &mut model.state().unwrap(), Phase::Prompt, (&text, &[3, 7]));
    let pages = model.pages(&CacheOptions::default(), 1024).unwrap();
    let mut state = model.state_in(&pages).unwrap();
    logits(&model, &mut state, Phase::Prompt, (&text[..290], &[]));
    let mut fork = state.fork(&model, 280).unwrap();
    let rest = logits(&model, &mut fork, Phase::Prompt, (&text[280..], &[3, 7]));
    assert!(expected[280 * model.config().vocab..] == rest[..]);
    drop(state);
    assert_eq!(pages.pages() - pages.free_pages(), 2 * LAYERS);
}

#[test]
fn a_token_takes_the_bytes_of_its_formula() {
    let model = load(&tiny("DeepseekV2ForCausalLM", None), "latent-bytes").unwrap();
    let formula = LAYERS * (LATENT + ROPE) * size_of::<f32>();
    assert_eq!(model.config().kv_bytes_per_token(), formula);
    // Heads with keys and values of their own would take more.
    assert!(formula < LAYERS * HEADS * (NOPE + ROPE + VALUE) * size_of::<f32>());
    let text = tokens(70);
    let expected = logits(&model, &mut model.state().unwrap(), Phase::Prompt, (&text, &[]));
    for (storage, size) in [(CacheStorage::F32, 4), (CacheStorage::F16, 2), (CacheStorage::Bf16, 2)]
    {
        let options = CacheOptions { storage, ..CacheOptions::default() };
        let mut state = model.state_with(&options).unwrap();
        let got = logits(&model, &mut state, Phase::Prompt, (&text, &[]));
        assert_eq!(state.kv_bytes(), text.len() * formula / 4 * size);
        assert!(difference(&got, &expected) < 0.1, "{storage:?}");
    }
    for options in [
        CacheOptions { storage: CacheStorage::Q8, ..CacheOptions::default() },
        CacheOptions { keep: Keep::HeavyHitters { budget: 9 }, ..CacheOptions::default() },
        CacheOptions { keep: Keep::SnapKv { budget: 9 }, ..CacheOptions::default() },
        CacheOptions {
            keep: Keep::Rolling(Rolling::new(4, 8).unwrap()),
            ..CacheOptions::default()
        },
    ] {
        assert!(matches!(model.state_with(&options), Err(Error::CacheOptions { .. })));
    }
}

/// The error of a description with some values changed.
fn refused(test: &str, changes: &[(&str, Value)]) -> Error {
    let mut model = tiny("DeepseekV3ForCausalLM", Some(12));
    for (key, value) in changes {
        match value {
            Value::String(gone) if gone == "absent" => {
                model.config.as_object_mut().unwrap().remove(*key);
            }
            _ => model.config[*key] = value.clone(),
        }
    }
    load(&model, test).unwrap_err()
}

#[test]
fn layers_with_experts_are_refused_by_name() {
    for changes in [
        // Files that say nothing have experts.
        &[("n_routed_experts", json!("absent"))][..],
        &[("n_routed_experts", json!(8))],
        &[("n_routed_experts", json!(8)), ("first_k_dense_replace", json!(1))],
    ] {
        let error = refused("latent-experts", changes);
        let Error::UnsupportedConfig { key, found } = &error else { panic!("{error}") };
        assert_eq!(key, "first_k_dense_replace", "{found}");
    }
    let mut model = tiny("DeepseekV2ForCausalLM", None);
    model.config["n_routed_experts"] = json!(8);
    model.config["first_k_dense_replace"] = json!(LAYERS);
    let folder = Folder::new("latent-dense");
    model.save_folder(&folder.0, Format::F32, 1).unwrap();
    let config = ModelConfig::read(&Weights::open(&folder.0).unwrap()).unwrap();
    assert_eq!(config.architecture, Architecture::DeepseekV2);
}

#[test]
fn descriptions_that_make_no_sense_are_refused() {
    for key in ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"] {
        for value in [json!("absent"), json!(0), json!(1_000_000), json!("x")] {
            let error = refused("latent-sizes", &[(key, value.clone())]);
            assert!(matches!(error, Error::Config { .. }), "{key} {value}: {error}");
        }
    }
    let error = refused("latent-sizes", &[("qk_rope_head_dim", json!(5))]);
    assert!(matches!(error, Error::Config { .. }), "{error}");
    let error = refused("latent-sizes", &[("kv_lora_rank", json!(21))]);
    assert!(matches!(error, Error::Weights(_)), "{error}");
}

#[test]
fn what_is_not_done_with_latent_attention_is_refused() {
    struct Nobody;
    impl Observer for Nobody {
        fn attention(&mut self, _: usize, _: &Attended<'_>) -> Result<(), Error> {
            panic!("nothing is shown")
        }
    }
    let tiny = tiny("DeepseekV3ForCausalLM", Some(12));
    let folder = Folder::new("latent-refused");
    tiny.save_folder(&folder.0, Format::F32, 1).unwrap();
    let model = Model::load(&folder.0).unwrap();
    let mut state = model.state().unwrap();
    let looked = model.forward_observed(&tokens(5), &mut state, &mut Scratch::new(), &mut Nobody);
    assert!(matches!(looked, Err(Error::ObservedMixer)), "{looked:?}");
    let out = folder.0.join("out.gguf");
    let error = quantize(&folder.0, &out, Format::F16, |_| {}).unwrap_err();
    assert!(matches!(error, Error::UnsupportedConfig { .. }), "{error}");
    assert!(error.to_string().contains("latent attention"), "{error}");
    assert!(!out.exists());
}
