//! Every family, as a Hugging Face folder and as a GGUF file, against its definition in f64.

use std::path::{Path, PathBuf};

use foveal::Phase;
use foveal::projection::Format;
use foveal_lm::model::{Logits, Scratch, Step};
use foveal_lm::testing::{Tiny, TinySizes};
use foveal_lm::weights::Weights;
use foveal_lm::weights::gguf::{Gguf, OwnedValue};
use foveal_lm::{Error, Model};
use serde_json::json;

use crate::golden_case::difference;
use crate::reference;

/// A folder that is removed when it is done with.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Folder {
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

fn tiny(family: &str) -> Tiny {
    Tiny::new(family, TinySizes::default())
}

pub(crate) fn from_gguf(model: &Tiny) -> Result<Model, Error> {
    Model::new(&Weights::from_gguf(Gguf::from_bytes(model.to_gguf())?)?)
}

fn from_folder(model: &Tiny, name: &str, format: Format, shards: usize) -> Result<Model, Error> {
    let folder = Folder::new(name);
    model.save_folder(&folder.0, format, shards).unwrap();
    Model::load(&folder.0)
}

fn tokens() -> Vec<u32> {
    (0..40).map(|i| i * 17 % TinySizes::default().vocab as u32).collect()
}

/// All logits of a text that is read in calls of `length` tokens.
fn logits(model: &Model, phase: Phase, length: usize) -> Vec<f32> {
    let (mut state, mut scratch) = (model.state().unwrap(), Scratch::new());
    let mut all = vec![];
    for tokens in tokens().chunks(length) {
        model
            .forward(tokens, Step { phase, logits: Logits::All }, &mut state, &mut scratch)
            .unwrap();
        all.extend_from_slice(scratch.logits());
    }
    all
}

/// The largest difference from the definition.
fn off(model: &Model, expected: &[f32]) -> f32 {
    let ways = [(Phase::Prompt, 40), (Phase::Prompt, 7), (Phase::Generated, 1)];
    let each = ways.map(|(phase, length)| difference(&logits(model, phase, length), expected));
    each.into_iter().fold(0.0, f32::max)
}

#[test]
fn every_family_in_both_forms_is_its_definition() {
    for family in Tiny::FAMILIES {
        let model = tiny(family);
        let rows = reference::logits(&model, &tokens());
        let expected: Vec<f32> = rows.into_iter().flatten().map(|x| x as f32).collect();
        assert!(expected.iter().any(|x| x.abs() > 0.5), "{family}");
        let folder = from_folder(&model, family, Format::F32, 1).unwrap();
        let both = [off(&folder, &expected), off(&from_gguf(&model).unwrap(), &expected)];
        assert!(both.iter().all(|&off| off < 5e-5), "{family}: off by {both:?}");
    }
}

#[test]
fn what_makes_a_family_matters() {
    let expected = |model: &Tiny| {
        let rows = reference::logits(model, &tokens());
        rows.into_iter().flatten().map(|x| x as f32).collect::<Vec<_>>()
    };
    let matters = |family: &str, change: &dyn Fn(&mut Tiny)| {
        let mut model = tiny(family);
        let before = expected(&model);
        change(&mut model);
        assert!(difference(&expected(&model), &before) > 1e-2, "{family}");
    };
    let without = |key: &'static str| move |model: &mut Tiny| model.config[key] = json!(null);
    matters("llama3", &without("rope_scaling"));
    matters("llama-linear", &without("rope_scaling"));
    matters("qwen2-yarn", &without("rope_scaling"));
    matters("gemma2", &without("attn_logit_softcapping"));
    matters("gemma2", &without("final_logit_softcapping"));
    matters("gpt-oss", &|model| model.config["rope_scaling"]["truncate"] = json!(true));
    matters("gpt-oss", &|model| {
        model.tensors.retain(|tensor| !tensor.hugging_face.ends_with("sinks"));
    });
    for family in ["mistral", "gemma2", "gemma3", "gpt-oss"] {
        matters(family, &|model| model.config["sliding_window"] = json!(64));
    }
}

#[test]
fn shards_and_formats_of_sixteen_bits_change_nothing() {
    for (format, family) in
        [(Format::F32, "llama"), (Format::F16, "qwen3"), (Format::BF16, "gemma2")]
    {
        let model = tiny(family).round_to(format);
        let name = format!("shards-{family}");
        let whole = from_folder(&model, &name, format, 1).unwrap();
        let whole = logits(&whole, Phase::Prompt, 40);
        for shards in [2, 5] {
            let model = from_folder(&model, &name, format, shards).unwrap();
            assert_eq!(logits(&model, Phase::Prompt, 40), whole, "{family} in {shards} shards");
        }
        let rows = reference::logits(&model, &tokens());
        let expected: Vec<f32> = rows.into_iter().flatten().map(|x| x as f32).collect();
        assert!(difference(&whole, &expected) < 5e-5, "{family}");
    }
}

#[test]
fn a_tensor_of_another_shape_is_named() {
    let mut model = tiny("llama");
    let down = "blk.3.ffn_down.weight";
    model.tensors.iter_mut().find(|tensor| tensor.gguf == down).unwrap().shape.swap(0, 1);
    let error = from_gguf(&model).unwrap_err().to_string();
    let expected = "tensor \"blk.3.ffn_down.weight\" has the shape [40, 24], expected [24, 40]";
    assert_eq!(error, expected);
}

#[test]
fn missing_tensors_are_named() {
    for (family, name) in [("llama", "blk.6.attn_v.weight"), ("gpt-oss", "blk.2.attn_sinks.weight")]
    {
        let mut model = tiny(family);
        model.tensors.retain(|tensor| tensor.gguf != name);
        let error = from_gguf(&model).unwrap_err().to_string();
        assert_eq!(error, format!("the model has no tensor {name:?}"));
    }
    let mut model = tiny("gpt-oss");
    let name = "model.layers.1.self_attn.sinks";
    model.tensors.retain(|tensor| tensor.hugging_face != name);
    let error = from_folder(&model, "no-sinks", Format::F32, 3).unwrap_err().to_string();
    assert_eq!(error, format!("the model has no tensor {name:?}"));
}

#[test]
fn experts_are_refused_by_name() {
    let mut model = tiny("gpt-oss");
    model.keys.push(("gpt-oss.expert_count".into(), OwnedValue::from(32u32)));
    let error = from_gguf(&model).unwrap_err().to_string();
    assert_eq!(error, "the model sets gpt-oss.expert_count to 32, which is not supported");
    model.config["num_local_experts"] = json!(32);
    let error = from_folder(&model, "experts", Format::F32, 1).unwrap_err().to_string();
    assert_eq!(error, "the model sets num_local_experts to 32, which is not supported");
}
