//! The small model that the command carries, against its own golden vectors and against itself.

mod golden_case;

use foveal_lm::Model;
use foveal_lm::model::{Logits, Scratch, Step};
use golden_case::{Case, argmax, difference};
use std::path::Path;

fn model() -> Model {
    let file = "../foveal-cli/assets/glassllm-en.gguf";
    Model::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

const ALL: Step = Step { logits: Logits::All, ..Step::PROMPT };

#[test]
fn logits_of_every_position_and_the_greedy_text() {
    let model = model();
    let vocab = model.config().vocab;
    for case in Case::all("glassllm") {
        let (mut state, mut scratch) = (model.state(128).unwrap(), Scratch::new());
        model.forward(&case.tokens("ids"), ALL, &mut state, &mut scratch).unwrap();
        let expected = case.doubles("logits");
        let size = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let off = difference(scratch.logits(), &expected);
        assert!(off <= case.tolerance * (1.0 + size), "{}: off by {off}", case.name);
        let margins = case.doubles("greedy_margin");
        for (&token, margin) in case.tokens("greedy_ids").iter().zip(margins) {
            if margin < 2.0 * case.tolerance * (1.0 + size) {
                break;
            }
            let logits = scratch.logits();
            assert_eq!(argmax(&logits[logits.len() - vocab..]), token, "{}", case.name);
            model.forward(&[token], Step::GENERATED, &mut state, &mut scratch).unwrap();
        }
    }
}

fn text(model: &Model, length: usize) -> Vec<u32> {
    (0..length).map(|n| (n * 7919 % model.config().vocab) as u32).collect()
}

#[test]
fn a_prompt_may_be_cut_anywhere() {
    let model = model();
    let text = text(&model, 400);
    let run = |cuts: &[usize]| {
        let (mut state, mut scratch) = (model.state(usize::MAX).unwrap(), Scratch::new());
        let mut logits = vec![];
        for cut in cuts.windows(2) {
            model.forward(&text[cut[0]..cut[1]], ALL, &mut state, &mut scratch).unwrap();
            logits.extend_from_slice(scratch.logits());
        }
        logits
    };
    let whole = run(&[0, 400]);
    assert!(whole.iter().all(|logit| logit.is_finite()));
    assert_eq!(run(&[0, 1, 130, 131, 400]), whole);
    assert_eq!(run(&[0, 255, 257, 399, 400]), whole);
}

#[test]
fn generated_tokens_agree_with_a_prompt_of_the_same_tokens() {
    let model = model();
    let text = text(&model, 160);
    let (mut state, mut scratch) = (model.state(usize::MAX).unwrap(), Scratch::new());
    model.forward(&text, Step::PROMPT, &mut state, &mut scratch).unwrap();
    let prompt = scratch.logits().to_vec();
    state.reset();
    model.forward(&text[..100], Step::PROMPT, &mut state, &mut scratch).unwrap();
    for token in &text[100..] {
        model.forward(&[*token], Step::GENERATED, &mut state, &mut scratch).unwrap();
    }
    assert_eq!(state.position(), 160);
    let off = difference(scratch.logits(), &prompt);
    assert!(off <= 1e-3, "off by {off}");
}

#[test]
fn tokens_that_do_not_exist_change_nothing() {
    let model = model();
    let (mut state, mut scratch) = (model.state(16).unwrap(), Scratch::new());
    assert!(model.forward(&[1, 1024], Step::PROMPT, &mut state, &mut scratch).is_err());
    assert!(model.forward(&[1; 17], Step::PROMPT, &mut state, &mut scratch).is_err());
    assert_eq!(state.position(), 0);
    model.forward(&[1; 16], Step::PROMPT, &mut state, &mut scratch).unwrap();
}
