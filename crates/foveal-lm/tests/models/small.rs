//! The built-in model, glassllm's English one, against its own NumPy code in f64.

use foveal_lm::Model;
use foveal_lm::model::{Logits, Scratch, Step};
use foveal_lm::tokenizer::Tokenizer;
use foveal_lm::weights::{Description, Weights};

use crate::golden_case::{Case, argmax, difference};

pub(crate) fn weights() -> Weights {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/assets/glassllm-en.gguf");
    Weights::open(path.as_ref()).unwrap()
}

pub(crate) fn model() -> Model {
    Model::new(&weights()).unwrap()
}

pub(crate) fn tokenizer() -> Tokenizer {
    let weights = weights();
    let Description::Gguf(metadata) = weights.description() else { panic!("a GGUF file") };
    Tokenizer::from_gguf(metadata).unwrap()
}

#[test]
fn every_logit_is_that_of_the_original() {
    let model = model();
    for case in Case::all("glassllm") {
        let expected = case.doubles("logits");
        let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        let (mut state, mut scratch) = (model.state().unwrap(), Scratch::new());
        let step = Step { logits: Logits::All, ..Step::PROMPT };
        model.forward(&case.tokens("ids"), step, &mut state, &mut scratch).unwrap();
        let off = difference(scratch.logits(), &expected);
        assert!(off <= case.tolerance * (1.0 + largest), "{}: off by {off}", case.name);
    }
}

#[test]
fn greedy_tokens_are_those_of_the_original() {
    let model = model();
    for case in Case::all("glassllm") {
        let (mut state, mut scratch) = (model.state().unwrap(), Scratch::new());
        model.forward(&case.tokens("ids"), Step::PROMPT, &mut state, &mut scratch).unwrap();
        let (ids, margins) = (case.tokens("greedy_ids"), case.doubles("greedy_margin"));
        let mut compared = 0;
        for (&expected, margin) in ids.iter().zip(margins) {
            if margin < 1e-3 {
                break;
            }
            assert_eq!(argmax(scratch.logits()), expected, "{} step {compared}", case.name);
            model.forward(&[expected], Step::GENERATED, &mut state, &mut scratch).unwrap();
            compared += 1;
        }
        assert!(compared > 0, "{}", case.name);
    }
}
