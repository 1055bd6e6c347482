//! Mixers that see across segments: what is carried is a constant, and what is trained is what is run.

use foveal::{Cpu, Phase};
use foveal_lm::Model;
use foveal_lm::config::ModelConfig;
use foveal_lm::model::{Logits, Scratch as ModelScratch, Step};
use foveal_lm::train::{Batch, Carried, Group, IGNORED, Objective, Scratch, StepOptions};
use foveal_lm::weights::Weights;
use serde_json::{Value, json};

use crate::setup::{Case, SEQUENCES, TOKENS, llama, noise, text};

/// Segments divide the tokens of a call, and everything is retrieved, so that the choice makes no steps.
fn mixers() -> Vec<Value> {
    vec![
        json!({"name": "transformer_xl", "segment": 10, "memory": 13}),
        json!({"name": "transformer_xl", "segment": 7, "memory": 5, "clamp": 3}),
        json!({"name": "transformer_xl", "segment": 5, "memory": 12, "same_length": true}),
        json!({"name": "infini", "segment": 10}),
        json!({"name": "infini", "segment": 5, "update": "delta", "rotated": false}),
        json!({"name": "memorizing", "segment": 20, "top": 50, "capacity": 40}),
        json!({"name": "memorizing", "segment": 20, "top": 50, "capacity": 40, "previous": true}),
        json!([
            {"name": "transformer_xl", "segment": 20, "memory": 20},
            [{"name": "infini", "segment": 20, "heads": 2}, {"name": "memorizing", "segment": 20, "top": 50, "capacity": 40, "heads": 2}],
        ]),
    ]
}

/// Case and what the first part of its texts left.
fn begun(mixer: &Value) -> (Case, Carried) {
    let case = Case::new(llama(mixer), Objective::Causal).unwrap();
    let mut carried = case.network.carried(SEQUENCES).unwrap();
    let (tokens, targets) = (text(SEQUENCES * TOKENS, 8), text(SEQUENCES * TOKENS, 9));
    let batch = Batch { sequences: SEQUENCES, tokens: &tokens, targets: &targets };
    let mut scratch = Scratch::new();
    let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
    let own = Some(&mut carried);
    case.network.loss(case.parameters.values(), &batch, own, &mut options).unwrap();
    (case, carried)
}

#[test]
fn gradients_behind_a_memory_agree_with_differences() {
    for mixer in mixers() {
        let (case, carried) = begun(&mixer);
        let (_, gradients) = case.gradients(Some(&mut carried.clone()), |_| ());
        let mut scratch = Scratch::new();
        let mut loss = |values: &[f32]| {
            let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
            let own = Some(&mut carried.clone());
            case.network.loss(values, &case.batch(), own, &mut options).unwrap().mean()
        };
        let values = case.parameters.values();
        let mut random = noise(5);
        for entry in case.parameters.entries() {
            let own = &gradients[entry.range.clone()];
            let length = own.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            assert!(length > 0.0, "{mixer}: {} has no gradient", entry.name);
            for direction in 0..2 {
                let sign = |x: f32| if direction == 0 { x } else { 1.0 };
                let along: Vec<f32> = own
                    .iter()
                    .map(|&x| sign(x) * if direction == 0 { 1.0 } else { random().signum() })
                    .collect();
                let norm = along.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                // Along steep directions the loss is far from a line sooner.
                let step = (0.01 / (1.0 + length) / norm) as f32;
                let mut at = |by: f32| {
                    let mut moved = values.to_vec();
                    let part = moved[entry.range.clone()].iter_mut();
                    part.zip(&along).for_each(|(x, along)| *x += by * step * along);
                    loss(&moved)
                };
                let (near, far) = (at(1.0) - at(-1.0), at(2.0) - at(-2.0));
                let expected = (8.0 * near - far) / (12.0 * f64::from(step)) / norm;
                let got = own.iter().zip(&along).map(|(d, x)| f64::from(d * x)).sum::<f64>() / norm;
                let error = (got - expected).abs() / length.max(1e-3);
                assert!(error < 3e-3, "{mixer}: {} {got:e} {expected:e} {length:e}", entry.name);
            }
        }
    }
}

#[test]
fn what_is_carried_is_what_a_model_keeps() {
    let several = [
        json!({"name": "memorizing", "segment": 5, "top": 4, "capacity": 12}),
        json!({"name": "memorizing", "segment": 10, "top": 3, "capacity": 100, "previous": true}),
    ];
    for (n, mixer) in mixers().into_iter().chain(several).enumerate() {
        let (case, mut carried) = begun(&mixer);
        let folder = case.save(&format!("across-{n}"));
        let model = Model::new(&Weights::open(&folder).unwrap()).unwrap();
        let vocab = ModelConfig::from_json(&case.config).unwrap().vocab;
        let before = text(SEQUENCES * TOKENS, 8);
        let mut expected = 0.0;
        for sequence in 0..SEQUENCES {
            let own = sequence * TOKENS..(sequence + 1) * TOKENS;
            let (mut state, mut scratch) = (model.state().unwrap(), ModelScratch::new());
            let step = Step { phase: Phase::Prompt, logits: Logits::All };
            model.forward(&before[own.clone()], step, &mut state, &mut scratch).unwrap();
            model.forward(&case.tokens[own.clone()], step, &mut state, &mut scratch).unwrap();
            let rows = scratch.logits().chunks(vocab).zip(&case.targets[own]);
            for (row, &target) in rows.filter(|(_, target)| **target != IGNORED) {
                let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                expected += sum.ln() - f64::from(row[target as usize]);
            }
        }
        std::fs::remove_dir_all(folder).unwrap();
        let bytes = carried.snapshot();
        let (loss, gradients) = case.gradients(Some(&mut carried), |_| ());
        let error = (loss.sum - expected).abs() / expected;
        assert!(error < 1e-5, "{mixer}: {} for {expected}", loss.sum);
        // The same from its bytes, to the bit, with layers computed again.
        let mut again = case.network.carried(SEQUENCES).unwrap();
        again.restore(&bytes).unwrap();
        let other = case.gradients(Some(&mut again), |options| options.recompute = true);
        assert!(other == (loss, gradients), "{mixer}");
        assert_eq!(again.snapshot(), carried.snapshot());
        assert_eq!(again.tokens(), 2 * TOKENS);
    }
}

#[test]
fn gates_of_memories_are_a_group_of_their_own() {
    for mixer in [&mixers()[3], &mixers()[5]] {
        let (case, _) = begun(mixer);
        let gates = case.parameters.entries().iter().filter(|entry| entry.group == Group::Gate);
        let names: Vec<&str> = gates.map(|entry| entry.name.as_str()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(names.iter().all(|name| name.ends_with("sections.0.gate")));
    }
}

#[test]
fn a_text_that_goes_on_within_a_segment_is_refused() {
    for mixer in [
        json!({"name": "infini", "segment": 6}),
        json!({"name": "memorizing", "segment": 6, "top": 1, "capacity": 9}),
    ] {
        let (case, mut carried) = begun(&mixer);
        let mut scratch = Scratch::new();
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        let own = Some(&mut carried);
        let refused = case.network.loss(case.parameters.values(), &case.batch(), own, &mut options);
        assert!(matches!(refused, Err(foveal_lm::Error::Config { .. })), "{mixer}: {refused:?}");
    }
}
