//! Mixers that a configuration names: against their definitions in f64, and against the laws of all models.

use foveal::projection::Format;
use foveal::{Phase, registry};
use foveal_lm::config::Mechanism;
use foveal_lm::generate::{BatchOptions, Batcher};
use foveal_lm::mixer::{Attended, CacheOptions, CacheStorage, Keep};
use foveal_lm::model::{Observer, Scratch, Step};
use foveal_lm::quantize::quantize;
use foveal_lm::testing::{Tiny, TinySizes};
use foveal_lm::train::Parameters;
use foveal_lm::weights::{Description, Weights};
use foveal_lm::{Error, Model};
use serde_json::{Value, json};

use crate::across;
use crate::batch::check_joining_and_leaving;
use crate::chosen;
use crate::formats::Folder;
use crate::golden_case::difference;
use crate::latent::{load, logits, tensor};
use crate::recurrent;
use crate::reference;
use crate::small;

/// Rows of numbers, one for each token.
pub(crate) type Rows = Vec<Vec<f64>>;

/// The sections of a layer, each with its heads and key/value heads; `None` without any.
pub(crate) fn of(config: &Value, layer: usize) -> Option<Vec<(Value, usize, usize)>> {
    let mixer = &config["foveal"]["mixer"];
    let layer = if mixer.is_array() { &mixer[layer] } else { mixer };
    let all =
        ["num_attention_heads", "num_key_value_heads"].map(|key| config[key].as_u64().unwrap());
    let one = |section: &Value| {
        let heads = section["heads"].as_u64().unwrap_or(all[0]);
        let kv_heads = section["kv_heads"].as_u64().unwrap_or(heads * all[1] / all[0]);
        (section.clone(), heads as usize, kv_heads as usize)
    };
    match layer {
        Value::Null => None,
        Value::Array(sections) => Some(sections.iter().map(one).collect()),
        section => Some(vec![one(section)]),
    }
}

/// What a layer mixes, and what it does so with: tensors of its mixer by the end of their names.
#[derive(Clone, Copy)]
pub(crate) struct Tensors<'a> {
    pub(crate) rotated: [&'a Rows; 2],
    pub(crate) plain: [&'a Rows; 2],
    pub(crate) v: &'a Rows,
    /// Whether values stand for themselves, and nothing is done behind the mixing.
    pub(crate) bare: bool,
    pub(crate) inputs: &'a Rows,
    pub(crate) project: &'a dyn Fn(&str, &Rows) -> Rows,
    /// By the layer's positions.
    pub(crate) rotate: &'a dyn Fn(Rows) -> Rows,
    pub(crate) vector: &'a dyn Fn(&str) -> Vec<f64>,
}

/// What all heads give: `[tokens][heads · dim]`.
pub(crate) fn mix(
    sections: &[(Value, usize, usize)],
    tensors: &Tensors<'_>,
    (dim, scale): (usize, f64),
    layer: usize,
) -> Rows {
    let ([q, k], v) = (tensors.rotated, tensors.v);
    let mut out = vec![vec![]; q.len()];
    let (mut first, mut first_kv) = (0, 0);
    for (n, (section, heads, kv_heads)) in sections.iter().enumerate() {
        let own = [(first, *heads), (first_kv, *kv_heads)];
        let rows = recurrent::mix(section, tensors, (n, first), (*heads, dim));
        let rows = rows.or_else(|| across::mix(section, tensors, (n, own), (dim, scale)));
        if let Some(rows) = rows.or_else(|| chosen::mix(section, tensors, own[0], dim)) {
            out.iter_mut().zip(rows).for_each(|(out, row)| out.extend(row));
            (first, first_kv) = (first + heads, first_kv + kv_heads);
            continue;
        }
        let gates = match section["name"] == "native_sparse" {
            true => (tensors.project)(&format!("sections.{n}.gate_proj"), tensors.inputs),
            false => vec![],
        };
        let global = chosen::global(section, tensors, n);
        for head in 0..*heads {
            let kv = first_kv + head * kv_heads / heads;
            let cut = |x: &Rows, head: usize| -> Rows {
                x.iter().map(|row| row[head * dim..(head + 1) * dim].to_vec()).collect()
            };
            let own = Head { q: cut(q, first + head), k: cut(k, kv), v: cut(v, kv), scale };
            let global = global.as_ref().map(|[q, k, v]| {
                let kv = head * kv_heads / heads;
                Head { q: cut(q, head), k: cut(k, kv), v: cut(v, kv), scale }
            });
            let is_global = |i| section["global"].as_array().is_some_and(|x| x.contains(&json!(i)));
            for (i, out) in out.iter_mut().enumerate() {
                out.extend(match section["name"].as_str().unwrap() {
                    "longformer" if global.is_some() && is_global(i) => {
                        global.as_ref().unwrap().attend(i, 0..=i)
                    }
                    "moba" => own.moba(section, i),
                    "native_sparse" => own.native_sparse(section, i, &gates[i][3 * head..][..3]),
                    _ => own.attend(i, (0..=i).filter(|&j| sees(section, (layer, head), i, j))),
                });
            }
        }
        (first, first_kv) = (first + heads, first_kv + kv_heads);
    }
    out
}

/// Whether a mechanism with a pattern that is known beforehand lets query `i` see key `j ≤ i`.
fn sees(section: &Value, (layer, head): (usize, usize), i: usize, j: usize) -> bool {
    let count = |key: &str| section[key].as_u64().map(|count| count as usize);
    let text = |key: &str| section[key].as_str();
    match section["name"].as_str().unwrap() {
        "full" => true,
        "window" => i - j < count("tokens").unwrap(),
        "longformer" => {
            let (reach, gap) = (count("reach").unwrap(), count("gap").unwrap_or(1));
            let global = section["global"].as_array().cloned().unwrap_or_default();
            let is_global = |x: usize| global.contains(&json!(x));
            let near = (i - j).is_multiple_of(gap) && i - j <= reach * gap;
            near || is_global(i) || is_global(j)
        }
        "bigbird" => {
            // No random blocks; the last block of the context is never reached.
            let (a, b) = (i / count("block").unwrap(), j / count("block").unwrap());
            a == 0 || b == 0 || a - b <= 1
        }
        "sparse_transformer" => {
            let stride = count("stride").unwrap();
            let width = count("width").unwrap_or(1);
            let (first, second) = if text("pattern") == Some("strided") {
                let near = if text("window") == Some("code") { stride } else { stride + 1 };
                (i - j < near, (i - j).is_multiple_of(stride))
            } else {
                let sub_block = count("num_verts").map_or(0, |count| head % count);
                let columns = stride - (sub_block + 1) * width..stride - sub_block * width;
                (i / stride == j / stride, columns.contains(&(j % stride)))
            };
            match text("combine").unwrap_or("merged") {
                "merged" => first || second,
                "per_head" => [first, second][head % 2],
                _ => [first, second][layer % 2],
            }
        }
        other => panic!("{other}"),
    }
}

/// One query head with its keys and values.
struct Head {
    q: Rows,
    k: Rows,
    v: Rows,
    scale: f64,
}

impl Head {
    fn attend(&self, i: usize, keys: impl Iterator<Item = usize>) -> Vec<f64> {
        let keys: Vec<usize> = keys.collect();
        let pick = |x: &Rows| keys.iter().map(|&j| x[j].clone()).collect::<Rows>();
        self.attend_rows(i, &pick(&self.k), &pick(&self.v))
    }

    fn attend_rows(&self, i: usize, k: &Rows, v: &Rows) -> Vec<f64> {
        let weights: Vec<f64> = k.iter().map(|k| (self.scale * dot(&self.q[i], k)).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut out = vec![0.0; self.q[i].len()];
        for (weight, v) in weights.iter().zip(v) {
            out.iter_mut().zip(v).for_each(|(out, v)| *out += weight / sum * v);
        }
        out
    }

    fn moba(&self, section: &Value, i: usize) -> Vec<f64> {
        let [block, top] = ["block", "top"].map(|key| section[key].as_u64().unwrap() as usize);
        let score = |b: &usize| dot(&self.q[i], &mean(&self.k[b * block..(b + 1) * block]));
        let mut before: Vec<usize> = (0..i / block).collect();
        before.sort_by(|a, b| score(b).total_cmp(&score(a)));
        before.truncate(top - 1);
        self.attend(i, (0..=i).filter(|j| j / block == i / block || before.contains(&(j / block))))
    }

    /// With so many selected blocks that all tokens are seen.
    fn native_sparse(&self, section: &Value, i: usize, gates: &[f64]) -> Vec<f64> {
        let [length, stride, window] =
            ["length", "stride", "window"].map(|key| section[key].as_u64().unwrap() as usize);
        let starts = (0..).map(|n| n * stride).take_while(|start| start + length <= i + 1);
        let means = |x: &Rows| starts.clone().map(|at| mean(&x[at..at + length])).collect::<Rows>();
        let branches = [
            self.attend_rows(i, &means(&self.k), &means(&self.v)),
            self.attend(i, 0..=i),
            self.attend(i, (i + 1).saturating_sub(window)..=i),
        ];
        let mut out = vec![0.0; self.q[i].len()];
        for (gate, branch) in gates.iter().zip(branches) {
            let gate = 1.0 / (1.0 + (-gate).exp());
            out.iter_mut().zip(branch).for_each(|(out, x)| *out += gate * x);
        }
        out
    }
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
    let sum = |d: usize| rows.iter().map(|row| row[d]).sum::<f64>();
    (0..rows[0].len()).map(|d| sum(d) / rows.len() as f64).collect()
}

const LAYERS: usize = 2;
pub(crate) const TOKENS: usize = 40;

/// A model of Llama's layers with these mixers.
pub(crate) fn tiny(mixer: &Value) -> Tiny {
    // Recurrences and LSH attention have a key for each query head.
    let alone = recurrent::among(mixer) || mixer.to_string().contains("lsh");
    let kv_heads = if alone { 4 } else { 2 };
    let sizes = TinySizes { layers: LAYERS, kv_heads, ..TinySizes::default() };
    let mut model = Tiny::new("llama", sizes);
    model.config["foveal"] = json!({"mixer": mixer});
    for layer in 0..LAYERS {
        let sections = of(&model.config, layer).unwrap();
        for (n, (section, heads, kv_heads)) in sections.iter().enumerate() {
            if section["name"] == "native_sparse" {
                let part = format!("sections.{n}.gate_proj");
                model.tensors.push(tensor(layer, &part, &[3 * heads, sizes.width]));
            }
            let more =
                recurrent::tensors(section, *heads, (layer, n), (sizes.width, sizes.head_dim));
            model.tensors.extend(more);
            let own = (*heads, *kv_heads);
            let more = chosen::tensors(section, own, (layer, n), (sizes.width, sizes.head_dim));
            model.tensors.extend(more);
            let more = across::tensors(section, *heads, (layer, n), (sizes.width, sizes.head_dim));
            model.tensors.extend(more);
        }
    }
    model
}

pub(crate) fn mixers() -> Vec<Value> {
    let sparse = |more: Value| {
        let mut section = json!({"name": "sparse_transformer", "stride": 5});
        section.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        section
    };
    let native = |top: usize| json!({"name": "native_sparse", "length": 4, "stride": 2, "block": 4, "top": top, "window": 7});
    vec![
        json!({"name": "full"}),
        json!({"name": "window", "tokens": 6}),
        json!({"name": "longformer", "reach": 4}),
        json!({"name": "longformer", "reach": 3, "gap": 2, "global": [0, 9]}),
        json!({"name": "longformer", "reach": 3, "global": [0, 9, 17], "global_projections": true}),
        json!({"name": "bigbird", "block": 4, "random": 0}),
        sparse(json!({"pattern": "strided"})),
        sparse(json!({"pattern": "strided", "window": "code", "combine": "per_head"})),
        sparse(json!({"pattern": "fixed", "width": 2})),
        sparse(json!({"pattern": "fixed", "num_verts": 3, "combine": "interleaved"})),
        json!({"name": "moba", "block": 4, "top": 3}),
        native(12),
        json!({"name": "lsh", "chunk": 2, "buckets": 4}),
        json!({"name": "lsh", "chunk": 5, "buckets": 2, "rounds": 3, "seed": 4}),
        json!([{"name": "moba", "block": 8, "top": 2}, {"name": "full"}]),
        json!({"name": "linear"}),
        json!({"name": "linear", "map": "relu"}),
        json!({"name": "efficient"}),
        json!({"name": "retention"}),
        json!({"name": "scalar_decay"}),
        json!({"name": "scalar_decay", "conv": 3}),
        json!({"name": "gla", "rank": 3}),
        json!({"name": "delta"}),
        json!({"name": "delta", "conv": 0, "negative_eigenvalues": true}),
        json!({"name": "gated_delta"}),
        json!([{"name": "gated_delta", "conv": 2}, {"name": "window", "tokens": 9}]),
        json!({"name": "transformer_xl", "segment": 6, "memory": 9}),
        json!({"name": "transformer_xl", "segment": 6, "memory": 7, "same_length": true, "clamp": 3}),
        json!({"name": "infini", "segment": 6}),
        json!({"name": "infini", "segment": 7, "update": "delta", "rotated": false}),
        json!({"name": "memorizing", "segment": 6, "top": 4, "capacity": 20}),
        json!({"name": "memorizing", "segment": 6, "top": 3, "capacity": 40, "index": {"lists": 1, "probes": 1}}),
        json!([{"name": "memorizing", "segment": 5, "top": 3, "capacity": 100, "previous": true}, {"name": "infini", "segment": 9}]),
        json!([
            {"name": "transformer_xl", "segment": 8, "memory": 8},
            [{"name": "infini", "segment": 6, "heads": 2}, {"name": "memorizing", "segment": 6, "top": 4, "capacity": 12, "heads": 2}],
        ]),
        json!([
            [{"name": "full", "heads": 1}, {"name": "retention", "heads": 3}],
            [{"name": "gla", "heads": 2}, {"name": "delta", "heads": 2}],
        ]),
        json!([
            [{"name": "full", "heads": 2}, {"name": "moba", "block": 4, "top": 2, "heads": 2}],
            [sparse(json!({"pattern": "fixed", "heads": 2})), {"name": "window", "tokens": 9, "heads": 2}],
        ]),
    ]
}

pub(crate) fn text() -> Vec<u32> {
    (0..TOKENS).map(|i| (i * i + 17 * i) as u32 % 50).collect()
}

pub(crate) fn name(mixer: &Value) -> String {
    let text = mixer.to_string();
    let hash = text.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31) ^ u64::from(byte));
    format!("sections-{hash}")
}

#[test]
fn names_are_those_of_the_registry() {
    let known: Vec<_> = registry::MECHANISMS.iter().map(|mechanism| mechanism.name).collect();
    assert!(Mechanism::NAMES.iter().all(|name| known.contains(name)));
    let tested = |name: &str| mixers().iter().any(|mixer| mixer.to_string().contains(name));
    // Random features have no definition without their draws: laws hold them. Linformer is for encoders.
    let others = ["performer", "linformer"];
    assert!(Mechanism::NAMES.iter().all(|name| others.contains(name) || tested(name)));
}

#[test]
fn every_logit_is_that_of_the_definition() {
    let mut all = vec![];
    for mixer in mixers() {
        let model = tiny(&mixer);
        let expected: Vec<f32> =
            reference::logits(&model, &text()).concat().iter().map(|&x| x as f32).collect();
        let model = load(&model, &name(&mixer)).unwrap();
        for (phase, cuts) in [
            (Phase::Prompt, vec![]),
            (Phase::Prompt, vec![1, 2, 17, 18]),
            (Phase::Generated, (1..TOKENS).collect()),
        ] {
            let got = logits(&model, &mut model.state().unwrap(), phase, (&text(), &cuts));
            let off = difference(&got, &expected);
            assert!(off < 5e-5, "{mixer}: off by {off}, {phase:?}");
        }
        all.push(expected);
    }
    // Each is another one than all others.
    for (n, a) in all.iter().enumerate() {
        assert!(all[..n].iter().all(|b| difference(a, b) > 1e-3), "{}", mixers()[n]);
    }
}

#[test]
fn cuts_and_company_change_no_bit() {
    let native = json!({"name": "native_sparse", "length": 4, "stride": 2, "block": 4, "top": 4, "window": 7});
    let performer = json!({"name": "performer", "features": 16});
    for mixer in mixers().into_iter().chain([native, performer]) {
        let model = load(&tiny(&mixer), &format!("{}-cuts", name(&mixer))).unwrap();
        let text = text();
        let whole = logits(&model, &mut model.state().unwrap(), Phase::Prompt, (&text, &[]));
        for cuts in [vec![1, 2, 3], vec![13, 29], (1..TOKENS).collect()] {
            let mut state = model.state().unwrap();
            let cut = logits(&model, &mut state, Phase::Prompt, (&text, &cuts));
            assert!(whole == cut, "{mixer} {cuts:?}");
        }
        check_joining_and_leaving(&model, &[3, 40, 9, 1]);
    }
}

#[test]
fn a_state_holds_what_later_queries_can_see() {
    let bytes = |mixer: &Value, tokens: usize| {
        let model = load(&tiny(mixer), &format!("{}-bytes", name(mixer))).unwrap();
        let mut state = model.state().unwrap();
        let text: Vec<u32> = text().into_iter().cycle().take(tokens).collect();
        logits(&model, &mut state, Phase::Prompt, (&text, &[]));
        let bytes = state.kv_bytes();
        state.reset();
        assert_eq!((state.kv_bytes(), state.position()), (0, 0));
        bytes
    };
    let TinySizes { kv_heads, head_dim, .. } = TinySizes::default();
    let entry = LAYERS * 2 * kv_heads * head_dim * size_of::<f32>();
    let fixed = json!({"name": "sparse_transformer", "pattern": "fixed", "stride": 5, "width": 2});
    // t mod l + 1 tokens of the own block, c · ⌊t / l⌋ summaries before it.
    for tokens in [1, 5, 6, 38, 400] {
        let t = tokens - 1;
        assert_eq!(bytes(&fixed, tokens), entry * (t % 5 + 1 + 2 * (t / 5)), "{tokens}");
    }
    assert_eq!(bytes(&json!({"name": "full"}), 38), entry * 38);
    // Whole tiles are given up.
    assert!(bytes(&json!({"name": "window", "tokens": 6}), 1500) <= entry * 512);
    assert_eq!(
        bytes(&json!({"name": "moba", "block": 4, "top": 3}), 38),
        entry * 38 + entry / 2 * 9
    );
    // Projections of global tokens are kept up to the last of them.
    let longformer =
        json!({"name": "longformer", "reach": 3, "global": [9, 0], "global_projections": true});
    assert_eq!([9, 10, 38].map(|n| bytes(&longformer, n)), [18, 10, 38].map(|n| entry * n));
    // At most 2 m − 1 tokens of a bucket, however long the text.
    let lsh = json!({"name": "lsh", "chunk": 3, "buckets": 4});
    let most = LAYERS * 4 * (2 * 4 * 5) * (2 * head_dim + 1) * size_of::<f32>();
    assert!(bytes(&lsh, 400) <= most);
}

#[test]
fn a_text_goes_on_in_batches_and_can_not_be_taken_back() {
    let mixer = json!({"name": "moba", "block": 4, "top": 3});
    let model = load(&tiny(&mixer), "sections-batch").unwrap();
    let mut state = model.state().unwrap();
    logits(&model, &mut state, Phase::Prompt, (&text(), &[]));
    assert!(model.rewind(&mut state, TOKENS) && !model.rewind(&mut state, TOKENS - 1));
    assert_eq!(state.position(), TOKENS);
    assert!(model.rewind(&mut state, 0));
    let error = model.pages(&CacheOptions::default(), 512).unwrap_err();
    assert!(matches!(error, Error::SectionPages), "{error}");
    let tokenizer = small::tokenizer();
    let batcher = Batcher::new(&model, &tokenizer, &BatchOptions::default()).unwrap();
    assert!(batcher.pages().is_none());
}

#[test]
fn other_storages_are_close() {
    let model =
        load(&tiny(&json!({"name": "longformer", "reach": 9})), "sections-storage").unwrap();
    let expected = logits(&model, &mut model.state().unwrap(), Phase::Prompt, (&text(), &[]));
    for storage in CacheStorage::ALL {
        let options = CacheOptions { storage, ..CacheOptions::default() };
        let mut state = model.state_with(&options).unwrap();
        let got = logits(&model, &mut state, Phase::Prompt, (&text(), &[]));
        assert!(difference(&got, &expected) < 0.1, "{storage:?}");
        assert!(storage.coded() || state.kv_bytes() > 0);
    }
}

fn refused(mixer: &Value) -> String {
    let mut model = Tiny::new("llama", TinySizes { layers: LAYERS, ..TinySizes::default() });
    model.config["foveal"] = json!({"mixer": mixer});
    let loaded = load(&model, &format!("{}-refused", name(mixer)));
    loaded.map_or_else(|error| error.to_string(), |_| "nothing was wrong".to_owned())
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    for (mixer, words) in [
        (json!({"name": "perfect"}), "a name among full, window"),
        (json!("full"), "an object with a name"),
        (json!({"name": "full", "tokens": 3}), "unknown field"),
        (json!({"name": "window"}), "missing field `tokens`"),
        (json!({"name": "window", "tokens": 0}), "at least 1 token"),
        (json!({"name": "sparse_transformer", "pattern": "fixed", "stride": 0}), "stride"),
        (
            json!({"name": "sparse_transformer", "pattern": "fixed", "stride": 3, "width": 4}),
            "summary",
        ),
        (json!({"name": "sparse_transformer", "pattern": "round", "stride": 3}), "unknown variant"),
        (json!({"name": "longformer", "reach": 3, "gap": 0}), "gap"),
        (json!({"name": "linformer", "rank": 8}), "not causal"),
        (json!({"name": "bigbird", "block": 0, "random": 1}), "block"),
        (json!({"name": "bigbird", "block": 16, "random": 99}), "random blocks"),
        (json!({"name": "transformer_xl", "segment": 0, "memory": 3}), "at least 1 token"),
        (json!({"name": "transformer_xl", "segment": 9, "memory": 9_999_999}), "at most 1048576"),
        (json!({"name": "infini", "segment": 0}), "segment"),
        (json!({"name": "delta"}), "a key and a value for each query head"),
        (json!({"name": "transformer_xl", "segment": 4, "memory": 4}), "r_proj"),
        (json!({"name": "lsh", "chunk": 4, "buckets": 4}), "as many as query heads"),
        (json!({"name": "longformer", "reach": 3, "global_projections": true}), "no global token"),
        (
            json!({"name": "longformer", "reach": 3, "global": [0], "global_projections": true}),
            "q_global",
        ),
        (json!({"name": "moba", "block": 0, "top": 1}), "block"),
        (json!({"name": "moba", "block": 4, "top": 0}), "blocks that a row sees"),
        (json!({"name": "full", "heads": 3}), "key/value heads that divide"),
        (json!({"name": "full", "heads": 0}), "1 to 4096"),
        (json!([{"name": "full"}]), "one for each of 2 layers"),
        (json!([[{"name": "full", "heads": 2}], {"name": "full"}]), "sections with 4 heads"),
        (
            json!({"name": "native_sparse", "length": 4, "stride": 2, "block": 4, "top": 4, "window": 7}),
            "gate_proj",
        ),
    ] {
        let message = refused(&mixer);
        assert!(message.contains(words), "{mixer}: {message}");
    }
    let mut model = Tiny::new("gpt-oss", TinySizes::default());
    model.config["foveal"] = json!({"mixer": {"name": "full"}});
    let error = load(&model, "sections-family").map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::UnsupportedConfig { .. }), "{error}");
    model.config["foveal"] = json!({"mixers": {"name": "full"}});
    let error = load(&model, "sections-key").map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("the key \"mixer\" alone"), "{error}");
}

#[test]
fn what_is_not_done_with_named_mixers_is_refused() {
    struct Nobody;
    impl Observer for Nobody {
        fn attention(&mut self, _: usize, _: &Attended<'_>) -> Result<(), Error> {
            Ok(())
        }
    }
    let tiny = tiny(&json!({"name": "full"}));
    let folder = Folder::new("sections-not-done");
    tiny.save_folder(&folder.0, Format::F32, 1).unwrap();
    let model = Model::load(&folder.0).unwrap();
    let keep = Keep::HeavyHitters { budget: 9 };
    let error = model.state_with(&CacheOptions { keep, ..CacheOptions::default() }).unwrap_err();
    assert!(matches!(error, Error::CacheOptions { .. }), "{error}");
    let (mut state, mut scratch) = (model.state().unwrap(), Scratch::new());
    let looked = model.forward_observed(&[1, 2], &mut state, &mut scratch, &mut Nobody);
    let error = looked.unwrap_err();
    assert!(matches!(error, Error::ObservedMixer), "{error}");
    let other =
        load(&crate::latent::tiny("DeepseekV2ForCausalLM", None), "sections-other").unwrap();
    let mut state = other.state().unwrap();
    let error = model.forward(&[1], Step::PROMPT, &mut state, &mut scratch).unwrap_err();
    assert!(matches!(error, Error::SectionState), "{error}");
}

#[test]
fn a_gguf_file_holds_named_mixers() {
    for mixer in mixers() {
        let folder = Folder::new(&format!("{}-gguf", name(&mixer)));
        tiny(&mixer).save_folder(&folder.0, Format::F32, 1).unwrap();
        let file = folder.0.join("out.gguf");
        quantize(&folder.0, &file, Format::F32, |_| {}).unwrap();
        let both = [&folder.0, &file].map(|path| Weights::open(path).unwrap());
        let all = both.each_ref().map(|weights| {
            let model = Model::new(weights).unwrap();
            logits(&model, &mut model.state().unwrap(), Phase::Prompt, (&text(), &[]))
        });
        assert!(all[0] == all[1], "{mixer}");
        // The way back, as training goes it.
        let [old, new] = both.each_ref().map(|weights| Parameters::from_weights(weights).unwrap());
        assert_eq!(old.0, new.0, "{mixer}");
        assert!(old.1.values() == new.1.values(), "{mixer}");
    }
    // A family whose norms the file stores otherwise, but not those of a mixer.
    let mut qwen = Tiny::new("qwen3", TinySizes { layers: LAYERS, ..TinySizes::default() });
    qwen.config["foveal"] = json!({"mixer": {"name": "window", "tokens": 5}});
    let folder = Folder::new("sections-qwen-gguf");
    qwen.save_folder(&folder.0, Format::F32, 1).unwrap();
    let file = folder.0.join("out.gguf");
    quantize(&folder.0, &file, Format::F32, |_| {}).unwrap();
    let weights = Weights::open(&file).unwrap();
    let Description::Gguf(metadata) = weights.description() else { panic!("a GGUF file") };
    // What knows nothing of mixers does not know the architecture.
    assert_eq!(metadata.require::<&str>("general.architecture").unwrap(), "foveal-qwen3");
    assert_eq!(metadata.require::<u32>("foveal-qwen3.block_count").unwrap(), LAYERS as u32);
    let [old, new] = [&folder.0, &file].map(|path| {
        let model = Model::load(path).unwrap();
        logits(&model, &mut model.state().unwrap(), Phase::Prompt, (&text(), &[]))
    });
    assert!(old == new);
}
