//! Models with another attention: pooled heads as published, and functions that have to stay what they were.

use std::path::PathBuf;

use foveal::projection::Format;
use foveal_lm::Model;
use foveal_lm::convert::{Attention, Conversion, Pool, convert};
use foveal_lm::model::{Logits, Scratch, Step};
use foveal_lm::testing::{Tiny, TinySizes};
use foveal_lm::weights::Weights;
use safetensors::SafeTensors;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let folder =
            std::env::temp_dir().join(format!("foveal-convert-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    /// A model's folder within it.
    fn save(&self, name: &str, model: &Tiny) -> PathBuf {
        let folder = self.0.join(name);
        model.save_folder(&folder, Format::F32, 1).unwrap();
        folder
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn conversion(attention: Attention) -> Conversion {
    Conversion { attention, layers: None, seed: 1 }
}

fn logits(path: &std::path::Path) -> Vec<f32> {
    let model = Model::load(path).unwrap();
    let (mut state, mut scratch) = (model.state().unwrap(), Scratch::new());
    let step = Step { logits: Logits::All, ..Step::PROMPT };
    let tokens: Vec<u32> = (0..20).map(|n| n * 7 % 50).collect();
    model.forward(&tokens, step, &mut state, &mut scratch).unwrap();
    scratch.logits().to_vec()
}

#[track_caller]
fn assert_same(a: &[f32], b: &[f32], bound: f32) {
    assert_eq!(a.len(), b.len());
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= bound, "{worst}");
}

#[test]
fn heads_are_pooled_as_published() {
    let golden = [
        (
            "4to1",
            "llama",
            TinySizes {
                width: 8,
                heads: 4,
                kv_heads: 4,
                head_dim: 6,
                layers: 1,
                ..TinySizes::default()
            },
            1,
        ),
        (
            "4to2",
            "llama",
            TinySizes {
                width: 12,
                heads: 4,
                kv_heads: 4,
                head_dim: 6,
                layers: 1,
                ..TinySizes::default()
            },
            2,
        ),
        (
            "6to3_bias",
            "qwen2",
            TinySizes {
                width: 10,
                heads: 6,
                kv_heads: 6,
                head_dim: 4,
                layers: 1,
                ..TinySizes::default()
            },
            3,
        ),
    ];
    for (name, family, sizes, kv_heads) in golden {
        let file =
            format!("{}/tests/golden/gqa_meanpool_{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(file).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let data = golden.tensor(name).unwrap().data().as_chunks().0;
            data.iter().map(|bytes| f64::from_le_bytes(*bytes) as f32).collect()
        };
        let mut model = Tiny::new(family, sizes);
        for tensor in &mut model.tensors {
            let (kind, part) = match tensor.hugging_face.rsplit_once("self_attn.") {
                Some((_, "k_proj.weight")) => ("w", "k"),
                Some((_, "v_proj.weight")) => ("w", "v"),
                Some((_, "k_proj.bias")) => ("b", "k"),
                Some((_, "v_proj.bias")) => ("b", "v"),
                _ => continue,
            };
            tensor.values = floats(&format!("{kind}_{part}"));
        }
        let folder = Folder::new(name);
        let input = folder.save("in", &model);
        let output = folder.0.join("out");
        let pool = Pool::Mean;
        convert(&input, &output, &conversion(Attention::Grouped { kv_heads, pool }), Format::F32)
            .unwrap();
        let weights = Weights::open(&output).unwrap();
        for (part, pooled) in [
            ("k_proj.weight", "pooled_w_k"),
            ("v_proj.weight", "pooled_w_v"),
            ("k_proj.bias", "pooled_b_k"),
            ("v_proj.bias", "pooled_b_v"),
        ] {
            if golden.tensor(pooled).is_err() {
                continue;
            }
            let found =
                weights.tensor(&format!("model.layers.0.self_attn.{part}")).unwrap().to_f32();
            assert_same(&found, &floats(pooled), 1e-6);
        }
        assert!(logits(&output).iter().all(|x| x.is_finite()));
    }
}

#[test]
fn what_changes_nothing_gives_the_same_logits() {
    let folder = Folder::new("same");
    let sizes = TinySizes::default();
    let input = folder.save("in", &Tiny::new("llama", sizes));
    let gguf = folder.0.join("in.gguf");
    std::fs::write(&gguf, Tiny::new("llama", sizes).to_gguf()).unwrap();
    let expected = logits(&input);
    let output = |name: &str| folder.0.join(name);
    let wide = Attention::Window { tokens: 64 };
    let all = Attention::Grouped { kv_heads: 2, pool: Pool::Mean };
    for (name, attention, bound) in [("wide", wide, 0.0), ("all", all, 0.0)] {
        convert(&input, &output(name), &conversion(attention), Format::F32).unwrap();
        assert_same(&logits(&output(name)), &expected, bound);
    }
    // A segment that holds all of the text has nothing to remember, and its gate is nearly shut.
    let infini =
        Conversion { layers: Some(vec![1]), ..conversion(Attention::Infini { segment: 32 }) };
    convert(&input, &output("infini"), &infini, Format::F32).unwrap();
    assert_same(&logits(&output("infini")), &expected, 0.1);
    // Keys and values of a group are repeated where a layer of the model needs one for each query head.
    let one = Conversion { layers: Some(vec![2]), ..conversion(Attention::GatedDelta) };
    let model = convert(&input, &output("delta"), &one, Format::F32).unwrap();
    assert_eq!(model.attention.kv_heads, 4);
    assert!(logits(&output("delta")).iter().all(|x| x.is_finite()));
    let none = Conversion { layers: Some(vec![]), ..one };
    convert(&input, &output("none"), &none, Format::F32).unwrap();
    assert_same(&logits(&output("none")), &expected, 1e-4);
}

#[test]
fn only_one_file_appears_and_refusals_name_the_cause() {
    let folder = Folder::new("refused");
    let input = folder.save("in", &Tiny::new("llama", TinySizes::default()));
    let refused = |attention, layers: Option<Vec<usize>>, format| {
        let output = folder.0.join("out.gguf");
        let conversion = Conversion { layers, ..conversion(attention) };
        let error = convert(&input, &output, &conversion, format).unwrap_err().to_string();
        assert!(!output.exists());
        error
    };
    let grouped = |kv_heads| Attention::Grouped { kv_heads, pool: Pool::First };
    assert!(refused(grouped(3), None, Format::F16).contains("divisor"));
    assert!(refused(grouped(0), None, Format::F16).contains("divisor"));
    assert!(refused(grouped(1), Some(vec![0]), Format::F16).contains("all of them"));
    assert!(refused(Attention::GatedDelta, Some(vec![9]), Format::F16).contains("0 to 6"));
    let file = folder.0.join("mqa.gguf");
    // Without a tokenizer there is none in the file either.
    convert(&input, &file, &conversion(grouped(1)), Format::F32).unwrap();
    let names: Vec<_> =
        std::fs::read_dir(&folder.0).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert_eq!(Model::load(&file).unwrap().config().attention.kv_heads, 1);
    let folder_of = folder.0.join("mqa");
    convert(&input, &folder_of, &conversion(grouped(1)), Format::F32).unwrap();
    assert_same(&logits(&file), &logits(&folder_of), 1e-4);
    let random = Attention::Grouped { kv_heads: 1, pool: Pool::Random };
    convert(&input, &folder_of, &conversion(random), Format::F32).unwrap();
    assert!(logits(&file) != logits(&folder_of));
    // Mixers by name, in both kinds of files.
    let named = conversion(Attention::Infini { segment: 8 });
    for output in [&file, &folder_of] {
        let model = convert(&input, output, &named, Format::F32).unwrap();
        assert!(model.layers.iter().all(|layer| layer.sections.len() == 1));
    }
    assert_same(&logits(&file), &logits(&folder_of), 1e-4);
}
