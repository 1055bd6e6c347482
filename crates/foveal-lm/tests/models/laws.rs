//! What must not change a result: how a prompt is cut, what else is computed, how many threads there are, the future.

use foveal::Phase;
use foveal_lm::model::{CHUNK, Logits, Scratch, State, Step};
use foveal_lm::{Error, Model};

use crate::golden_case::difference;
use crate::small;

pub(crate) const ALL: Step = Step { phase: Phase::Prompt, logits: Logits::All };
pub(crate) const ALL_GENERATED: Step = Step { phase: Phase::Generated, logits: Logits::All };

/// Tokens without a pattern.
pub(crate) fn tokens(count: usize, seed: u32) -> Vec<u32> {
    let next = |state: &u32| Some(state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::iter::successors(next(&seed), next).map(|state| (state >> 16) % 1020).take(count).collect()
}

pub(crate) fn run(model: &Model, state: &mut State, tokens: &[u32], step: Step) -> Vec<f32> {
    let mut scratch = Scratch::new();
    model.forward(tokens, step, state, &mut scratch).unwrap();
    scratch.logits().to_vec()
}

/// The logits of all of a prompt, which is read in calls that end at `cuts`.
pub(crate) fn prefill(model: &Model, tokens: &[u32], cuts: &[usize]) -> Vec<f32> {
    let mut state = model.state().unwrap();
    let mut logits = Vec::new();
    let mut start = 0;
    for &end in cuts.iter().chain([&tokens.len()]) {
        logits.extend(run(model, &mut state, &tokens[start..end], ALL));
        start = end;
    }
    assert_eq!(state.position(), tokens.len());
    logits
}

/// Equal to the last bit; NaN would be unequal.
#[track_caller]
pub(crate) fn assert_same(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let differ = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(differ, None, "{:?}", differ.map(|at| (found[at], expected[at])));
    assert!(found.iter().all(|x| x.is_finite()));
}

#[test]
fn cuts_of_a_prompt_change_no_bit() {
    let (model, tokens) = (small::model(), tokens(2 * CHUNK + 60, 1));
    let whole = prefill(&model, &tokens, &[]);
    for cut in [1, 5, 64, 127, 128, 129, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 59] {
        assert_same(&prefill(&model, &tokens, &[cut]), &whole);
    }
    assert_same(&prefill(&model, &tokens, &[3, 3, 40, 300, 301, 571]), &whole);
}

#[test]
fn every_cut_of_a_short_prompt_changes_no_bit() {
    let (model, tokens) = (small::model(), tokens(70, 2));
    let whole = prefill(&model, &tokens, &[]);
    for cut in 0..=tokens.len() {
        assert_same(&prefill(&model, &tokens, &[cut]), &whole);
    }
}

#[test]
fn the_last_logits_are_the_last_of_all() {
    let (model, tokens) = (small::model(), tokens(CHUNK + 9, 3));
    let all = prefill(&model, &tokens, &[]);
    let last = run(&model, &mut model.state().unwrap(), &tokens, Step::PROMPT);
    assert_same(&last, &all[all.len() - last.len()..]);
    let none = Step { logits: Logits::None, ..Step::PROMPT };
    assert!(run(&model, &mut model.state().unwrap(), &tokens, none).is_empty());
}

#[test]
fn generated_tokens_are_close_to_prompt_tokens() {
    // Beyond the context, too: 128 tokens.
    let (model, tokens) = (small::model(), tokens(200, 4));
    let prompt = prefill(&model, &tokens, &[]);
    let mut state = model.state().unwrap();
    let each = tokens.iter().flat_map(|token| run(&model, &mut state, &[*token], Step::GENERATED));
    let off = difference(&each.collect::<Vec<_>>(), &prompt);
    assert!(off < 1e-4, "off by {off}");
}

#[test]
fn generated_tokens_may_share_a_call() {
    let (model, tokens) = (small::model(), tokens(190, 5));
    let (prompt, rest) = tokens.split_at(100);
    let mut alone = model.state().unwrap();
    run(&model, &mut alone, prompt, Step::PROMPT);
    let expected: Vec<f32> =
        rest.iter().flat_map(|token| run(&model, &mut alone, &[*token], Step::GENERATED)).collect();
    for together in [2, 7, 64] {
        let mut state = model.state().unwrap();
        run(&model, &mut state, prompt, Step::PROMPT);
        let calls = rest.chunks(together);
        let found = calls.flat_map(|tokens| run(&model, &mut state, tokens, ALL_GENERATED));
        assert_same(&found.collect::<Vec<_>>(), &expected);
    }
}

#[test]
fn states_do_not_touch_each_other() {
    let model = small::model();
    let texts: Vec<Vec<u32>> = (10..14).map(|seed| tokens(150 + seed as usize, seed)).collect();
    let expected = texts.iter().map(|text| {
        let mut state = model.state().unwrap();
        text.chunks(40).flat_map(|part| run(&model, &mut state, part, Step::PROMPT)).collect()
    });
    let expected: Vec<Vec<f32>> = expected.collect();
    // In turns, through one scratch.
    let mut states: Vec<State> = texts.iter().map(|_| model.state().unwrap()).collect();
    let mut scratch = Scratch::new();
    let mut found = vec![Vec::new(); texts.len()];
    for turn in 0..5 {
        for (i, text) in texts.iter().enumerate() {
            let Some(part) = text.chunks(40).nth(turn) else { continue };
            model.forward(part, Step::PROMPT, &mut states[i], &mut scratch).unwrap();
            found[i].extend_from_slice(scratch.logits());
        }
    }
    for (found, expected) in found.iter().zip(&expected) {
        assert_same(found, expected);
    }
}

#[test]
fn a_reset_state_is_a_new_one() {
    let (model, tokens) = (small::model(), tokens(300, 6));
    let mut state = model.state().unwrap();
    run(&model, &mut state, &tokens, Step::PROMPT);
    state.reset();
    assert_eq!((state.position(), state.kv_bytes()), (0, 0));
    assert_same(&run(&model, &mut state, &tokens[..50], ALL), &prefill(&model, &tokens[..50], &[]));
}

#[test]
fn threads_change_no_bit() {
    let tokens = tokens(CHUNK + 20, 7);
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let model = small::model();
            let mut state = model.state().unwrap();
            let mut logits = run(&model, &mut state, &tokens, ALL);
            logits.extend(run(&model, &mut state, &tokens[..20], ALL_GENERATED));
            logits
        })
    };
    let one = on(1);
    for threads in [2, 3, 5] {
        assert_same(&on(threads), &one);
    }
}

#[test]
fn the_future_does_not_leak() {
    let (model, mut tokens) = (small::model(), tokens(140, 8));
    let before = prefill(&model, &tokens, &[]);
    for changed in [139, 100, 1] {
        tokens[changed] = (tokens[changed] + 1) % 1020;
        let after = prefill(&model, &tokens, &[]);
        let same = changed * model.config().vocab;
        assert_same(&after[..same], &before[..same]);
        assert_ne!(after[same..same + 8], before[same..same + 8]);
    }
}

#[test]
fn beyond_the_context_memory_stops_growing() {
    let (model, tokens) = (small::model(), tokens(6 * CHUNK, 9));
    let config = model.config();
    let mut state = model.state().unwrap();
    let mut most = 0;
    for call in tokens.chunks(CHUNK) {
        run(&model, &mut state, call, Step::PROMPT);
        most = most.max(state.kv_bytes());
    }
    for &token in &tokens[..CHUNK] {
        run(&model, &mut state, &[token], Step::GENERATED);
        most = most.max(state.kv_bytes());
    }
    assert_eq!(state.position(), 7 * CHUNK);
    assert!(most <= (config.context + 2 * CHUNK) * config.kv_bytes_per_token(), "{most}");
}

#[test]
fn tokens_far_behind_are_out_of_reach() {
    // Four layers reach four times as far as one: beyond that, a change changes nothing.
    let (model, mut tokens) = (small::model(), tokens(600, 10));
    let config = model.config();
    let reach = config.layers.len() * (config.context - 1);
    let before = run(&model, &mut model.state().unwrap(), &tokens, Step::PROMPT);
    tokens[599 - reach - 1] = 5;
    assert_same(&run(&model, &mut model.state().unwrap(), &tokens, Step::PROMPT), &before);
    tokens[599 - config.context + 1] = 5;
    assert_ne!(run(&model, &mut model.state().unwrap(), &tokens, Step::PROMPT), before);
}

#[test]
fn calls_that_make_no_sense_are_refused_and_change_nothing() {
    let (model, tokens) = (small::model(), tokens(65, 11));
    let mut state = model.state().unwrap();
    let mut scratch = Scratch::new();
    let vocab = model.config().vocab as u32;
    for bad in [vocab, u32::MAX] {
        let error = model.forward(&[1, bad], Step::PROMPT, &mut state, &mut scratch).unwrap_err();
        assert!(matches!(error, Error::Token { found, .. } if found == bad), "{error}");
    }
    let error = model.forward(&tokens, Step::GENERATED, &mut state, &mut scratch).unwrap_err();
    assert!(matches!(error, Error::TooManyTokens { found: 65, limit: 64 }), "{error}");
    assert_eq!((state.position(), state.kv_bytes()), (0, 0));
    model.forward(&[], Step::PROMPT, &mut state, &mut scratch).unwrap();
    assert!(scratch.logits().is_empty());
}
