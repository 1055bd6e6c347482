//! Models from strangers: an error, or a model that reads tokens, the same in one call and in two.

use foveal_lm::model::{Model, Scratch, Step};
use foveal_lm::weights::{Gguf, Weights};

const TOKENS: usize = 5;

/// A GGUF file of a whole, small model.
pub fn model(bytes: &[u8]) {
    let Ok(file) = Gguf::from_bytes(bytes.to_vec()) else { return };
    let Ok(weights) = Weights::from_gguf(file) else { return };
    let Ok(model) = Model::new(&weights) else { return };
    let vocab = model.config().vocab;
    let tokens: Vec<u32> = (0..TOKENS).map(|n| (n * 7 % vocab) as u32).collect();
    let whole = logits(&model, &[(&tokens, Step::PROMPT)]);
    assert_eq!(whole.len(), vocab);
    let (first, rest) = tokens.split_at(2);
    let cut = logits(&model, &[(first, Step::PROMPT), (rest, Step::PROMPT)]);
    if whole.iter().all(|x| x.is_finite()) {
        let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&whole), bits(&cut));
    }
    let last = tokens.split_at(TOKENS - 1);
    assert_eq!(logits(&model, &[(last.0, Step::PROMPT), (last.1, Step::GENERATED)]).len(), vocab);
    refuses(&model, vocab);
}

/// The logits after the last of some calls.
fn logits(model: &Model, calls: &[(&[u32], Step)]) -> Vec<f32> {
    let mut state = model.state().expect("an empty state");
    let mut scratch = Scratch::new();
    for (tokens, step) in calls {
        model.forward(tokens, *step, &mut state, &mut scratch).expect("tokens of the vocabulary");
    }
    scratch.logits().to_vec()
}

/// Tokens that the vocabulary does not have.
fn refuses(model: &Model, vocab: usize) {
    let mut state = model.state().expect("an empty state");
    let refused = model.forward(&[vocab as u32], Step::PROMPT, &mut state, &mut Scratch::new());
    assert!(refused.is_err() && state.position() == 0);
}
