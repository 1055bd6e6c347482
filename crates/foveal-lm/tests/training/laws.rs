//! What no gradient may depend on, and what a network refuses.

use std::num::NonZeroUsize;

use foveal::{Cpu, Dropout, Level, Threads};
use foveal_lm::Error;
use foveal_lm::config::ModelConfig;
use foveal_lm::train::{
    Batch, IGNORED, Network, Objective, Parameters, Precision, Scratch, StepOptions,
};
use serde_json::json;

use crate::setup::{Case, SEQUENCES, TOKENS, family, llama, text};

/// Models with all that a frame has: sections of several kinds, norms, biases, caps.
fn cases() -> Vec<Case> {
    let mixer = json!([
        [{"name": "linear", "heads": 2}, {"name": "full", "heads": 2}],
        {"name": "window", "tokens": 7},
    ]);
    let configs = [llama(&mixer), family("qwen3"), family("gemma2"), family("gpt_oss")];
    let with = |mut config: serde_json::Value| {
        config["sliding_window"] = 9.into();
        Case::new(config, Objective::Causal).unwrap()
    };
    configs.into_iter().map(with).collect()
}

#[test]
fn threads_levels_and_recomputation_change_nothing() {
    let dropout = Some(Dropout { rate: 0.2, seed: 5 });
    for case in cases() {
        for level in Level::available() {
            let mut first = None;
            for (threads, recompute) in [(1, false), (2, false), (3, true), (1, true)] {
                let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
                let got = case.gradients(None, |options| {
                    options.cpu = Cpu { level, threads };
                    options.recompute = recompute;
                    options.dropout = dropout;
                });
                let (loss, gradients) = first.get_or_insert_with(|| got.clone());
                assert!(*loss == got.0 && *gradients == got.1, "{level} {threads:?} {recompute}");
            }
        }
    }
}

#[test]
fn later_tokens_reach_no_earlier_loss() {
    for mut case in cases() {
        let cut = 11;
        for (n, target) in case.targets.iter_mut().enumerate() {
            if n % TOKENS >= cut {
                *target = IGNORED;
            }
        }
        let before = case.gradients(None, |_| ());
        let other = text(SEQUENCES * TOKENS, 77);
        for (n, token) in case.tokens.iter_mut().enumerate() {
            if n % TOKENS >= cut {
                *token = other[n];
            }
        }
        assert!(case.gradients(None, |_| ()) == before);
    }
}

#[test]
fn sequences_do_not_see_each_other() {
    for case in cases() {
        let mut scratch = Scratch::new();
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        let values = case.parameters.values();
        let mut both = |range: std::ops::Range<usize>, sequences| {
            let (tokens, targets) = (&case.tokens[range.clone()], &case.targets[range]);
            let batch = Batch { sequences, tokens, targets };
            case.network.loss(values, &batch, None, &mut options).unwrap().sum
        };
        let whole = both(0..2 * TOKENS, 2);
        let parts = both(0..TOKENS, 1) + both(TOKENS..2 * TOKENS, 1);
        assert!((whole - parts).abs() < 1e-9 * whole, "{whole} {parts}");
    }
}

#[test]
fn parts_of_a_batch_add_up() {
    let case = &cases()[0];
    let (loss, whole) = case.gradients(None, |options| options.scale = 0.5);
    let mut sum = case.parameters.zeros();
    let mut scratch = Scratch::new();
    for n in 0..SEQUENCES {
        let own = n * TOKENS..(n + 1) * TOKENS;
        let targets = &case.targets[own.clone()];
        let batch = Batch { sequences: 1, tokens: &case.tokens[own], targets };
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        let count = targets.iter().filter(|target| **target != IGNORED).count();
        options.scale = 0.5 * count as f32 / loss.targets as f32;
        let values = case.parameters.values();
        case.network.gradients(values, &batch, None, &mut sum, &mut options).unwrap();
    }
    let most = whole.iter().fold(0f32, |most, x| most.max(x.abs()));
    let error = whole.iter().zip(&sum).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(error < 1e-5 * most, "{error} of {most}");
}

#[test]
fn texts_go_on_from_segment_to_segment() {
    let case = Case::new(llama(&json!({"name": "linear"})), Objective::Causal).unwrap();
    let mut scratch = Scratch::new();
    let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
    let values = case.parameters.values();
    let whole = case.network.loss(values, &case.batch(), None, &mut options).unwrap();
    let cut = 8;
    let part = |x: &[u32], range: std::ops::Range<usize>| -> Vec<u32> {
        x.chunks(TOKENS).flat_map(|text| &text[range.clone()]).copied().collect()
    };
    for recompute in [false, true] {
        let mut carried = case.network.carried(SEQUENCES).unwrap();
        let mut sum = 0.0;
        for range in [0..cut, cut..TOKENS] {
            let (tokens, targets) = (part(&case.tokens, range.clone()), part(&case.targets, range));
            let batch = Batch { sequences: SEQUENCES, tokens: &tokens, targets: &targets };
            options.recompute = recompute;
            let before = carried.snapshot();
            let mut twice = [case.parameters.zeros(), case.parameters.zeros()];
            for gradients in &mut twice {
                carried.restore(&before).unwrap();
                let own = Some(&mut carried);
                let loss = case.network.gradients(values, &batch, own, gradients, &mut options);
                sum += loss.unwrap().sum / 2.0;
            }
            assert!(twice[0] == twice[1]);
            assert!(twice[0].iter().all(|x| x.is_finite()));
        }
        assert_eq!(carried.tokens(), TOKENS);
        assert!((sum - whole.sum).abs() < 1e-5 * whole.sum, "{sum} for {}", whole.sum);
        // Without what is carried, the second segment reads nothing of the first.
        carried.clear();
        assert_eq!(carried.snapshot(), case.network.carried(SEQUENCES).unwrap().snapshot());
    }
}

#[test]
fn recomputation_holds_the_activations_of_one_layer() {
    let mut config = family("llama");
    config["num_hidden_layers"] = 6.into();
    let case = Case::new(config, Objective::Causal).unwrap();
    let peak = |recompute| {
        let mut scratch = Scratch::new();
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        options.recompute = recompute;
        let mut gradients = case.parameters.zeros();
        let values = case.parameters.values();
        case.network.gradients(values, &case.batch(), None, &mut gradients, &mut options).unwrap();
        scratch.peak_bytes()
    };
    let (kept, made_again) = (peak(false), peak(true));
    // A token of a layer: x, m, q, k, v, heads, gate and up; of five layers more, x alone is kept.
    let width = 24 + 32 + 16 + 16 + 32 + 2 * 28;
    assert!(kept - made_again > 4 * SEQUENCES * TOKENS * 4 * width, "{kept} {made_again}");
    assert!(made_again * 2 < kept, "{kept} {made_again}");
}

#[test]
fn dropout_is_even_and_that_of_the_seed() {
    let case = &cases()[0];
    let with =
        |rate, seed| case.gradients(None, |options| options.dropout = Some(Dropout { rate, seed }));
    let (plain, _) = case.gradients(None, |_| ());
    let none = with(0.0, 1).0;
    assert!((none.sum - plain.sum).abs() < 1e-5 * plain.sum, "{none:?} {plain:?}");
    assert!(with(0.3, 1) == with(0.3, 1));
    assert_ne!(with(0.3, 1).0, with(0.3, 2).0);
    // The gradient is that of the loss with the same zeros.
    let (loss, gradients) = with(0.3, 1);
    let length = gradients.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>();
    let mut moved = Case {
        parameters: case.parameters.clone(),
        ..Case::new(case.config.clone(), Objective::Causal).unwrap()
    };
    let step = 2e-3 / length.sqrt();
    let mut at = |by: f64| {
        let numbers = moved.parameters.values_mut().iter_mut().zip(case.parameters.values());
        numbers.zip(&gradients).for_each(|((x, from), d)| *x = from + (by * step) as f32 * d);
        moved
            .gradients(None, |options| options.dropout = Some(Dropout { rate: 0.3, seed: 1 }))
            .0
            .mean()
    };
    let slope = (at(1.0) - at(-1.0)) / (2.0 * step);
    assert!((slope / length - 1.0).abs() < 0.02, "{slope} for {length}, loss {loss:?}");
}

#[test]
fn a_loss_that_is_not_finite_says_where_it_arose() {
    let place = |change: &dyn Fn(&mut Parameters)| {
        let mut case = Case::new(family("llama"), Objective::Causal).unwrap();
        change(&mut case.parameters);
        let mut scratch = Scratch::new();
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        let mut gradients = case.parameters.zeros();
        let values = case.parameters.values();
        let loss =
            case.network.gradients(values, &case.batch(), None, &mut gradients, &mut options);
        loss.unwrap_err().to_string()
    };
    let set = |name: &'static str, to: f32| {
        move |parameters: &mut Parameters| {
            let entries = parameters.entries().to_vec();
            let entry = entries.iter().find(|entry| entry.name == name).unwrap();
            parameters.values_mut()[entry.range.clone()].fill(to);
        }
    };
    let key = "model.layers.1.self_attn.k_proj.weight";
    let found = place(&set(key, f32::NAN));
    assert!(found.contains(&format!("the parameter {key}")), "{found}");
    let found = place(&set("model.layers.1.self_attn.v_proj.weight", 3e38));
    assert!(found.contains("layer 1: values"), "{found}");
    let found = place(&set("model.layers.0.mlp.up_proj.weight", 3e38));
    assert!(found.contains("layer 0: gate and up"), "{found}");
    let found = place(&set("lm_head.weight", 3e38));
    assert!(found.contains("the logits"), "{found}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = &cases()[0];
    let mut scratch = Scratch::new();
    let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
    let values = case.parameters.values();
    let mut run = |tokens: &[u32], targets: &[u32], sequences, values: &[f32]| {
        let batch = Batch { sequences, tokens, targets };
        case.network.loss(values, &batch, None, &mut options).map(|loss| loss.targets)
    };
    assert!(matches!(run(&[1, 40], &[1, 1], 1, values), Err(Error::Token { found: 40, .. })));
    assert!(matches!(run(&[1, 2], &[1, 40], 1, values), Err(Error::Token { found: 40, .. })));
    assert!(matches!(run(&[1, 2], &[1], 1, values), Err(Error::Kernel(_))));
    assert!(matches!(run(&[1, 2, 3], &[1, 2, 3], 2, values), Err(Error::Kernel(_))));
    assert!(matches!(run(&[1, 2], &[1, 2], 2, &values[1..]), Err(Error::Kernel(_))));
    assert_eq!(run(&[1, 2], &[IGNORED; 2], 1, values).unwrap(), 0);
    assert_eq!(run(&[], &[], 0, values).unwrap(), 0);
    let mut carried = case.network.carried(3).unwrap();
    let loss = case.network.loss(values, &case.batch(), Some(&mut carried), &mut options);
    assert!(matches!(loss, Err(Error::Kernel(_))));
    let latent = json!({
        "model_type": "deepseek_v2", "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 28, "max_position_embeddings": 64,
        "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1,
    });
    let config = ModelConfig::from_json(&latent).unwrap();
    let refused = Network::new(&config, Objective::Causal).unwrap_err();
    assert!(matches!(refused, Error::UnsupportedConfig { .. }), "{refused}");
}

#[test]
fn steps_in_bf16_are_close_to_those_in_f32_and_no_thread_changes_them() {
    for case in cases() {
        for level in Level::available() {
            let run = |precision, threads, recompute| {
                case.gradients(None, |options| {
                    let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
                    options.cpu = Cpu { level, threads };
                    options.recompute = recompute;
                    options.precision = precision;
                })
            };
            let (exact, rounded) = (run(Precision::F32, 1, false), run(Precision::Bf16, 1, false));
            assert!(run(Precision::Bf16, 2, true) == rounded, "{level}");
            assert_eq!(exact != rounded, level.multiplies_bf16(), "{level}");
            let off = (exact.0.sum - rounded.0.sum).abs() / exact.0.sum;
            assert!(off < 0.02, "{level}: {off}");
            let pairs =
                || exact.1.iter().zip(&rounded.1).map(|(a, b)| (f64::from(*a), f64::from(*b)));
            let product: f64 = pairs().map(|(a, b)| a * b).sum();
            let lengths: f64 =
                pairs().map(|(a, _)| a * a).sum::<f64>() * pairs().map(|(_, b)| b * b).sum::<f64>();
            let cosine = product / lengths.sqrt();
            assert!(cosine > 0.99, "{level}: {cosine}");
        }
    }
}

#[test]
fn the_likeliest_token_is_the_one_with_the_least_loss() {
    for case in cases() {
        let mut scratch = Scratch::new();
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        let (values, batch) = (case.parameters.values(), case.batch());
        let found = case.network.likeliest(values, &batch, None, &mut options).unwrap();
        let places: Vec<usize> =
            (0..batch.targets.len()).filter(|&n| batch.targets[n] != IGNORED).collect();
        assert_eq!(found.len(), places.len());
        for (&place, &found) in places.iter().zip(&found).step_by(5) {
            let mut loss = |token: u32| {
                let mut targets = vec![IGNORED; batch.targets.len()];
                targets[place] = token;
                let batch = Batch { targets: &targets, ..batch };
                case.network.loss(values, &batch, None, &mut options).unwrap().sum
            };
            let least = loss(found);
            assert!((0..40).all(|token| loss(token) >= least), "{place}");
        }
    }
}
