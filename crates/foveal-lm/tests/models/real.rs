//! SmolLM2 and Gemma 3 against what transformers computes with the same, exactly dequantised weights.

use foveal_lm::Model;
use foveal_lm::model::{Logits, Scratch, State, Step};
use foveal_lm::testing::{self, fetch_model};

use crate::golden_case::{Case, argmax, difference, nll};

/// Tokens whose logits are asked for at once: a vocabulary of 262144 takes a megabyte each.
const SLICE: usize = 32;

/// Reads the prompt and compares what every position predicts; leaves the last logits in `scratch`.
fn check_prompt(case: &Case, model: &Model, state: &mut State, scratch: &mut Scratch) {
    let (ids, vocab) = (case.tokens("ids"), model.config().vocab);
    let (best, best_logits) = (case.tokens("argmax_ids"), case.floats("argmax_logits"));
    let token_nll = case.floats("token_nll");
    let step = Step { logits: Logits::All, ..Step::PROMPT };
    let mut position = 0;
    for slice in ids.chunks(SLICE) {
        model.forward(slice, step, state, scratch).unwrap();
        for logits in scratch.logits().chunks_exact(vocab) {
            let off = (logits[best[position] as usize] - best_logits[position]).abs();
            assert!(off <= case.tolerance, "{} logit at {position}: off by {off}", case.name);
            let found = argmax(logits);
            let lead = logits[found as usize] - logits[best[position] as usize];
            assert!(lead <= 2.0 * case.tolerance, "{} best at {position}: {found}", case.name);
            if let Some(&next) = ids.get(position + 1) {
                let off = (nll(logits, next) - token_nll[position]).abs();
                assert!(off <= case.tolerance, "{} nll at {position}: off by {off}", case.name);
            }
            position += 1;
        }
    }
    let last = &scratch.logits()[scratch.logits().len() - vocab..];
    let off = difference(last, &case.floats("last_logits"));
    assert!(off <= case.tolerance, "{} last logits: off by {off}", case.name);
}

/// Goes on greedily for as long as the reference's margins decide the token.
fn check_greedy(case: &Case, model: &Model, state: &mut State, scratch: &mut Scratch) {
    let (ids, margins) = (case.tokens("greedy_ids"), case.floats("greedy_margin"));
    let vocab = model.config().vocab;
    for (i, (&expected, margin)) in ids.iter().zip(margins).enumerate() {
        if margin < 2.0 * case.tolerance {
            return;
        }
        let logits = scratch.logits();
        assert_eq!(argmax(&logits[logits.len() - vocab..]), expected, "{} step {i}", case.name);
        model.forward(&[expected], Step::GENERATED, state, scratch).unwrap();
    }
}

fn check(file: testing::Model, prefix: &str) {
    let Some(path) = fetch_model(file) else { return };
    let model = Model::load(&path).unwrap();
    let mut state = model.state().unwrap();
    let mut scratch = Scratch::new();
    for case in Case::all(prefix) {
        state.reset();
        check_prompt(&case, &model, &mut state, &mut scratch);
        check_greedy(&case, &model, &mut state, &mut scratch);
    }
}

#[test]
fn smollm2_is_what_transformers_computes() {
    check(testing::Model::SmolLm2, "smollm2");
}

#[test]
fn gemma3_is_what_transformers_computes() {
    check(testing::Model::Gemma3, "gemma3_270m");
}
