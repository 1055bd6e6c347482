//! Activations that are rounded before they meet the weights: the laws of f32 hold, and little is lost.

use foveal::Phase;
use foveal::projection::Activations;
use foveal_lm::Model;
use foveal_lm::model::{CHUNK, Step};
use foveal_lm::testing::{self, fetch_model};

use crate::caches::losses;
use crate::golden_case::{Case, difference};
use crate::laws::{ALL, ALL_GENERATED, assert_same, prefill, run, tokens};
use crate::small;

fn rounding() -> [Activations; 2] {
    [Activations::Bf16, Activations::Int8]
}

fn rounded(activations: Activations) -> Model {
    small::model().with_activations(activations)
}

#[test]
fn cuts_of_a_prompt_change_no_bit() {
    let tokens = tokens(CHUNK + 60, 1);
    for model in rounding().map(rounded) {
        let whole = prefill(&model, &tokens, &[]);
        for cut in [1, 5, 64, 129, CHUNK, CHUNK + 59] {
            assert_same(&prefill(&model, &tokens, &[cut]), &whole);
        }
    }
}

#[test]
fn generated_tokens_may_share_a_call() {
    let tokens = tokens(30, 2);
    for model in rounding().map(rounded) {
        let mut state = model.state().unwrap();
        let together = run(&model, &mut state, &tokens, ALL_GENERATED);
        let mut state = model.state().unwrap();
        let alone = tokens.iter().flat_map(|token| {
            run(&model, &mut state, std::slice::from_ref(token), Step::GENERATED)
        });
        assert_same(&alone.collect::<Vec<_>>(), &together);
    }
}

#[test]
fn threads_change_no_bit() {
    let tokens = tokens(70, 3);
    for activations in rounding() {
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| prefill(&rounded(activations), &tokens, &[]))
        };
        assert_same(&on(2), &on(1));
    }
}

#[test]
fn logits_stay_close() {
    let tokens = tokens(60, 4);
    let exact = small::model();
    for activations in rounding() {
        for step in [ALL, ALL_GENERATED] {
            let logits = |model: &Model| run(model, &mut model.state().unwrap(), &tokens, step);
            let off = difference(&logits(&rounded(activations)), &logits(&exact));
            let limit = if step.phase == Phase::Prompt { 0.2 } else { 0.4 };
            assert!(off < limit, "{activations:?} {step:?}: {off}");
        }
    }
}

/// Mean loss of the longest golden prompt, read as a prompt in bf16 and as generated rows in 8-bit integers.
fn check_losses(file: testing::Model, prefix: &str) {
    let Some(path) = fetch_model(file) else { return };
    let case = Case::all(prefix).into_iter().max_by_key(|case| case.tokens("ids").len()).unwrap();
    let mean = |activations, step| {
        let model = Model::load(&path).unwrap().with_activations(activations);
        let losses = losses(&model, &mut model.state().unwrap(), &case.tokens("ids"), step);
        losses.iter().sum::<f32>() / losses.len() as f32
    };
    let exact = mean(Activations::F32, ALL);
    let bf16 = (mean(Activations::Bf16, ALL) / exact - 1.0).abs();
    assert!(bf16 < 3e-3, "{prefix}: {bf16}");
    let int8 = (mean(Activations::Int8, ALL_GENERATED) / exact - 1.0).abs();
    assert!(int8 < 1e-2, "{prefix}: {int8}");
}

#[test]
fn smollm2_loses_little() {
    check_losses(testing::Model::SmolLm2, "smollm2");
}

#[test]
fn gemma3_loses_little() {
    check_losses(testing::Model::Gemma3, "gemma3_270m");
}
