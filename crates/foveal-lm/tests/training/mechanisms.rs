//! Every name of a mixer, and every family: gradients agree with differences, losses with those of models that are run, and
//! one batch is learned by heart.

use foveal::Phase;
use foveal_lm::config::Mechanism;
use foveal_lm::model::{Logits, Scratch as ModelScratch, Step};
use foveal_lm::train::{IGNORED, Objective, Parameters, Scratch};
use foveal_lm::weights::Weights;
use foveal_lm::{Error, Model};
use serde_json::{Value, json};

use crate::setup::{Case, SEQUENCES, TOKENS, family, llama, noise};

/// Mechanisms that training refuses.
const UNTRAINED: &[&str] = &[];

/// Mixers of all names, some in several forms.
fn mixers() -> Vec<Value> {
    vec![
        json!({"name": "full"}),
        json!({"name": "window", "tokens": 6}),
        json!({"name": "longformer", "reach": 3, "gap": 2, "global": [0, 9]}),
        json!({"name": "longformer", "reach": 3, "global": [12, 4], "global_projections": true}),
        json!({"name": "bigbird", "block": 4, "random": 1}),
        json!({"name": "sparse_transformer", "pattern": "strided", "stride": 5}),
        json!({"name": "sparse_transformer", "pattern": "fixed", "stride": 5, "width": 2}),
        json!({"name": "sparse_transformer", "pattern": "fixed", "stride": 4, "num_verts": 2, "combine": "per_head"}),
        // All blocks: a choice that changes has no slope. The library's tests hold gradients to given choices.
        json!({"name": "moba", "block": 4, "top": 5}),
        json!({"name": "native_sparse", "length": 4, "stride": 2, "block": 4, "top": 5, "window": 5}),
        json!({"name": "lsh", "chunk": 3, "buckets": 2}),
        json!([[{"name": "lsh", "chunk": 2, "buckets": 2, "rounds": 1, "heads": 2}, {"name": "moba", "block": 3, "top": 7, "heads": 2}], {"name": "full"}]),
        json!({"name": "linear"}),
        json!({"name": "performer", "features": 16}),
        json!({"name": "efficient"}),
        json!({"name": "linformer", "rank": 4}),
        json!({"name": "retention"}),
        json!({"name": "scalar_decay", "conv": 3}),
        json!({"name": "gla", "rank": 3}),
        json!({"name": "delta"}),
        json!({"name": "gated_delta", "negative_eigenvalues": true}),
        json!({"name": "transformer_xl", "segment": 6, "memory": 9}),
        json!({"name": "infini", "segment": 6}),
        json!({"name": "infini", "segment": 7, "update": "delta", "rotated": false}),
        json!({"name": "memorizing", "segment": 24, "top": 4, "capacity": 20}),
        json!([{"name": "full"}, {"name": "linear"}]),
        json!([
            [{"name": "linear", "heads": 1}, {"name": "full", "heads": 3}],
            [{"name": "window", "tokens": 5, "heads": 2}, {"name": "bigbird", "block": 4, "random": 0, "heads": 2}],
        ]),
    ]
}

/// Models of all mixers that can be trained, and of all families.
fn cases() -> Vec<(String, Case)> {
    let mut cases = vec![];
    for mixer in mixers() {
        match Case::new(llama(&mixer), Objective::Causal) {
            Ok(case) => cases.push((mixer.to_string(), case)),
            Err(Error::UntrainedMechanism { name }) => assert!(UNTRAINED.contains(&name), "{name}"),
            // Trained without order alone: see `encoders`.
            Err(Error::UnsupportedConfig { .. }) => assert_eq!(mixer["name"], "linformer"),
            Err(other) => panic!("{mixer}: {other}"),
        }
    }
    for (name, more) in [
        ("llama", json!({"tie_word_embeddings": true})),
        ("mistral", json!({"sliding_window": 5})),
        ("qwen2", json!({})),
        ("qwen3", json!({"tie_word_embeddings": true})),
        (
            "gemma2",
            json!({"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5, "sliding_window": 5}),
        ),
        ("gemma3_text", json!({"sliding_window": 5})),
        ("gpt_oss", json!({"sliding_window": 5})),
    ] {
        let mut config = family(name);
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        cases.push((name.to_owned(), Case::new(config, Objective::Causal).unwrap()));
    }
    // Projections of global tokens meet the norms of queries and keys.
    let mut config = family("qwen3");
    let mixer =
        json!({"name": "longformer", "reach": 3, "global": [4], "global_projections": true});
    config["foveal"] = json!({"mixer": mixer});
    cases.push(("qwen3 longformer".to_owned(), Case::new(config, Objective::Causal).unwrap()));
    cases
}

#[test]
fn names_are_trained_or_refused() {
    let listed: Vec<String> = mixers().iter().map(Value::to_string).collect();
    for name in Mechanism::NAMES {
        let own = format!("\"name\":\"{name}\"");
        assert!(listed.iter().any(|mixer| mixer.contains(&own)), "{name}");
        let mixer = mixers().into_iter().find(|mixer| mixer["name"] == name).unwrap();
        let refused = matches!(
            Case::new(llama(&mixer), Objective::Causal),
            Err(Error::UntrainedMechanism { .. })
        );
        assert_eq!(refused, UNTRAINED.contains(&name), "{name}");
    }
}

/// The slope of the loss along a direction of some parameters whose gradient has a length, by differences of fourth order.
///
/// Along a steep direction the loss is bent as well (a norm behind a recurrence whose first outputs are near zero): steps
/// move it by a thousandth at most.
fn slope(
    case: &Case,
    at: &[f32],
    (along, length): (&[(usize, f32)], f64),
    scratch: &mut Scratch,
) -> f64 {
    let norm = along.iter().map(|(_, x)| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let step = (0.05 / (1.0 + 50.0 * length) / norm) as f32;
    let mut moved = at.to_vec();
    let mut loss = |by: f32| {
        along.iter().for_each(|&(n, x)| moved[n] = at[n] + by * step * x);
        case.loss_of(&moved, scratch)
    };
    let (near, far) = (loss(1.0) - loss(-1.0), loss(2.0) - loss(-2.0));
    (8.0 * near - far) / (12.0 * f64::from(step))
}

/// Whether a parameter moves what LSH attention hashes: a token that changes its bucket has no slope. The library's tests hold
/// gradients to given buckets.
fn before_a_hash(name: &str, entry: &str) -> bool {
    if !name.contains("lsh") {
        return false;
    }
    let last = usize::from(name.starts_with('{'));
    let place = entry.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    match place {
        None => entry.contains("embed"),
        Some((layer, part)) => {
            let behind = ["v_proj", "o_proj", "mlp", "post_attention"];
            let layer: usize = layer.parse().unwrap();
            layer < last || layer == last && !behind.iter().any(|own| part.contains(own))
        }
    }
}

/// Every number of every gradient: along the gradient itself, and along directions of random signs.
pub(crate) fn check_gradients(name: &str, case: &Case) {
    let (_, gradients) = case.gradients(None, |_| ());
    let values = case.parameters.values();
    let mut scratch = Scratch::new();
    let mut noise = noise(5);
    for entry in case.parameters.entries() {
        let own = &gradients[entry.range.clone()];
        let length = own.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        // Queries are keys.
        let unread = name.starts_with("{") && name.contains("lsh") && entry.name.contains("k_proj");
        assert!((length > 0.0) != unread, "{name}: {} has a gradient of {length}", entry.name);
        if before_a_hash(name, &entry.name) {
            continue;
        }
        // Without a gradient there is no direction along it.
        for direction in usize::from(unread)..4 {
            let along: Vec<(usize, f32)> = entry
                .range
                .clone()
                .map(|n| (n, if direction == 0 { gradients[n] } else { noise().signum() }))
                .collect();
            let norm = along.iter().map(|(_, x)| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let expected = slope(case, values, (&along, length), &mut scratch) / norm;
            let got =
                along.iter().map(|&(n, x)| f64::from(gradients[n]) * f64::from(x)).sum::<f64>();
            let (got, scale) = (got / norm, length.max(5e-3));
            let error = (got - expected).abs() / scale;
            assert!(
                error < 3e-3,
                "{name}: {} along {direction}: {got:e}, differences {expected:e}, length {length:e}",
                entry.name
            );
        }
    }
}

#[test]
fn gradients_agree_with_differences() {
    for (name, case) in cases() {
        check_gradients(&name, &case);
    }
}

#[test]
fn losses_are_those_of_models_that_are_run() {
    for (name, case) in cases() {
        let hash = name.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31) ^ u64::from(byte));
        let folder = case.save(&hash.to_string());
        let weights = Weights::open(&folder).unwrap();
        let (config, parameters) = Parameters::from_weights(&weights).unwrap();
        assert_eq!(parameters, case.parameters, "{name}");
        let model = Model::new(&weights).unwrap();
        let mut expected = 0.0;
        let mut count = 0;
        for n in 0..SEQUENCES {
            let own = n * TOKENS..(n + 1) * TOKENS;
            let mut scratch = ModelScratch::new();
            let step = Step { phase: Phase::Prompt, logits: Logits::All };
            let mut state = model.state().unwrap();
            model.forward(&case.tokens[own.clone()], step, &mut state, &mut scratch).unwrap();
            let rows = scratch.logits().chunks(config.vocab);
            for (row, &target) in rows.zip(&case.targets[own]).filter(|(_, t)| **t != IGNORED) {
                let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
                expected += sum.ln() - f64::from(row[target as usize] - most);
                count += 1;
            }
        }
        std::fs::remove_dir_all(folder).unwrap();
        let (loss, _) = case.gradients(None, |_| ());
        assert_eq!(loss.targets, count, "{name}");
        let error = (loss.sum - expected).abs() / expected.abs();
        assert!(error < 1e-5, "{name}: {} for {expected}", loss.sum);
        let evaluated = case.loss_of(case.parameters.values(), &mut Scratch::new());
        assert_eq!(evaluated, loss.mean(), "{name}");
    }
}

/// Adam by its formulas (Kingma and Ba 2014).
pub(crate) struct Adam {
    moments: Vec<[f32; 2]>,
    steps: i32,
}

impl Adam {
    pub(crate) fn new(numbers: usize) -> Adam {
        Adam { moments: vec![[0.0; 2]; numbers], steps: 0 }
    }

    pub(crate) fn step(&mut self, parameters: &mut Parameters, gradients: &[f32], rate: f32) {
        self.steps += 1;
        let [first, second] = [0.9f32, 0.99].map(|beta| 1.0 - beta.powi(self.steps));
        let numbers = parameters.values_mut().iter_mut().zip(gradients).zip(&mut self.moments);
        for ((x, &d), [m, v]) in numbers {
            *m = 0.9 * *m + 0.1 * d;
            *v = 0.99 * *v + 0.01 * d * d;
            *x -= rate * (*m / first) / ((*v / second).sqrt() + 1e-8);
        }
    }
}

/// Trains on one batch until it is known.
pub(crate) fn check_learning(name: &str, mut case: Case) {
    case.parameters = Parameters::initial(case.network.config(), 1).unwrap();
    // Capped logits reach no certainty.
    let good = if name == "gemma2" { 1.2 } else { 0.05 };
    let mut adam = Adam::new(case.parameters.values().len());
    let mut loss = f64::INFINITY;
    for _ in 0..300 {
        let (found, gradients) = case.gradients(None, |_| ());
        loss = found.mean();
        if loss < good {
            return;
        }
        adam.step(&mut case.parameters, &gradients, 0.01);
    }
    panic!("{name}: {loss} nats after {} steps", adam.steps);
}

#[test]
fn every_mechanism_learns_one_batch_by_heart() {
    cases().into_iter().for_each(|(name, case)| check_learning(&name, case));
}
