//! Log-likelihoods of a text: against f64, against transformers, and whatever the cut.

use std::ops::ControlFlow;

use foveal_lm::evaluate::token_nll;
use foveal_lm::model::{Logits, Scratch, Step};
use foveal_lm::testing::{self, fetch_model};
use foveal_lm::{Error, Model};

use crate::golden_case::{Case, nll};
use crate::small;

fn all(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let mut state = model.state().unwrap();
    token_nll(model, tokens, &mut state, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn numbers_are_those_of_the_logits() {
    let model = small::model();
    let tokens: Vec<u32> = (0..700).map(|n| (n * n * 7 + n) % 1024).collect();
    let found = all(&model, &tokens);
    assert_eq!(found.len(), 699);
    let (mut state, mut scratch) = (model.state().unwrap(), Scratch::new());
    let step = Step { logits: Logits::All, ..Step::PROMPT };
    model.forward(&tokens, step, &mut state, &mut scratch).unwrap();
    let rows = scratch.logits().chunks_exact(model.config().vocab);
    for ((n, row), (&next, &found)) in rows.enumerate().zip(tokens[1..].iter().zip(&found)) {
        let largest = row.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
        let expected = sum.ln() + f64::from(largest) - f64::from(row[next as usize]);
        let off = (expected - f64::from(found)).abs();
        assert!(off <= 5e-6 * (1.0 + expected), "{n}: off by {off}");
    }
}

#[test]
fn cuts_change_no_bit_and_can_be_broken_off() {
    let model = small::model();
    let tokens: Vec<u32> = (0..600).map(|n| (n * 31 + 5) % 1024).collect();
    let whole = all(&model, &tokens);
    let mut state = model.state().unwrap();
    let mut seen = Vec::new();
    let error = token_nll(&model, &tokens, &mut state, &mut |done| {
        seen.push(done);
        if done >= 512 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(error, Err(Error::Interrupted)));
    assert_eq!((seen, state.position()), (vec![256, 512], 512));
    // From the middle on, as the state holds what comes before.
    let rest = token_nll(&model, &tokens[512..], &mut state, &mut |_| ControlFlow::Continue(()));
    assert_eq!(rest.unwrap(), whole[512..]);
    assert!(all(&model, &tokens[..1]).is_empty() && all(&model, &[]).is_empty());
}

#[test]
fn tokens_that_the_model_does_not_have_are_refused_wherever_they_are() {
    let model = small::model();
    for bad in [0, 1, 255, 256, 257, 299] {
        let mut tokens = vec![7; 300];
        tokens[bad] = 1024;
        let mut state = model.state().unwrap();
        let refused = token_nll(&model, &tokens, &mut state, &mut |_| ControlFlow::Continue(()));
        assert!(matches!(refused, Err(Error::Token { found: 1024, .. })), "{bad}: {refused:?}");
        assert_eq!(state.position(), 0);
    }
}

#[test]
fn smollm2_predicts_as_transformers_says() {
    let Some(path) = fetch_model(testing::Model::SmolLm2) else { return };
    let model = Model::load(&path).unwrap();
    for case in Case::all("smollm2") {
        let (ids, expected) = (case.tokens("ids"), case.floats("token_nll"));
        let found = all(&model, &ids);
        assert_eq!(found.len(), expected.len());
        for (n, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let off = (found - expected).abs();
            assert!(off <= case.tolerance, "{} at {n}: off by {off}", case.name);
        }
    }
}

/// The helper of other tests agrees, so that they measure the same.
#[test]
fn a_single_token_is_what_the_helper_says() {
    let model = small::model();
    let (mut state, mut scratch) = (model.state().unwrap(), Scratch::new());
    model.forward(&[5], Step::PROMPT, &mut state, &mut scratch).unwrap();
    let off = (all(&model, &[5, 9])[0] - nll(scratch.logits(), 9)).abs();
    assert!(off < 1e-5, "off by {off}");
}
