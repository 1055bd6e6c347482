//! Encoders, trained with hidden tokens: mechanisms through which all tokens see all.

use foveal_lm::Error;
use foveal_lm::train::{IGNORED, Objective};
use serde_json::{Value, json};

use crate::mechanisms::{check_gradients, check_learning};
use crate::setup::{Case, TOKENS, family, llama, text};

fn mixers() -> Vec<Value> {
    vec![
        json!({"name": "full"}),
        json!({"name": "window", "tokens": 4}),
        json!({"name": "longformer", "reach": 3, "global": [0, 9]}),
        json!({"name": "longformer", "reach": 3, "global": [13, 5], "global_projections": true}),
        json!({"name": "bigbird", "block": 4, "random": 1}),
        json!({"name": "linear"}),
        json!({"name": "efficient"}),
        json!({"name": "linformer", "rank": 5}),
        json!({"name": "linformer", "rank": 6, "shared": true}),
        json!([{"name": "full"}, [{"name": "efficient", "heads": 2}, {"name": "bigbird", "block": 4, "random": 0, "heads": 2}]]),
    ]
}

fn cases() -> impl Iterator<Item = (String, Case)> {
    let family = ("qwen3".to_owned(), Case::new(family("qwen3"), Objective::Masked).unwrap());
    let named = mixers()
        .into_iter()
        .map(|mixer| (mixer.to_string(), Case::new(llama(&mixer), Objective::Masked).unwrap()));
    named.chain([family]).map(|(name, mut case)| {
        // Few tokens are hidden.
        for (n, target) in case.targets.iter_mut().enumerate() {
            if n % 4 != 1 {
                *target = IGNORED;
            }
        }
        (name, case)
    })
}

#[test]
fn gradients_agree_with_differences() {
    cases().for_each(|(name, case)| check_gradients(&name, &case));
}

#[test]
fn one_batch_is_learned_by_heart() {
    cases().for_each(|(name, case)| check_learning(&name, case));
}

#[test]
fn tokens_see_later_ones_and_layers_can_be_run_once_more() {
    for (name, mut case) in cases() {
        let before = case.gradients(None, |_| ());
        assert!(case.gradients(None, |options| options.recompute = true) == before, "{name}");
        // Targets at the beginning alone, and another token behind them, within reach of all.
        for (n, target) in case.targets.iter_mut().enumerate() {
            *target = if n % TOKENS == 1 { 3 } else { IGNORED };
        }
        let before = case.gradients(None, |_| ()).0;
        let other = text(case.tokens.len(), 99);
        case.tokens[3] = (case.tokens[3] + 1 + other[3] % 20) % 40;
        assert_ne!(case.gradients(None, |_| ()).0, before, "{name}");
    }
}

#[test]
fn what_has_an_order_is_refused() {
    for mixer in [json!({"name": "moba", "block": 4, "top": 2}), json!({"name": "retention"})] {
        let refused = Case::new(llama(&mixer), Objective::Masked).err();
        assert!(matches!(refused, Some(Error::MaskedMechanism { .. })), "{mixer}");
    }
    let refused = Case::new(llama(&json!({"name": "linformer", "rank": 4})), Objective::Causal);
    let words = refused.err().unwrap().to_string();
    assert!(words.contains("no causal form"), "{words}");
}
