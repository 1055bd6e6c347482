//! States that give up keys: rolling ones, and those that keep what got most weight.

use foveal::cache::Rolling;
use foveal_lm::mixer::{CacheOptions, CacheStorage, Keep};
use foveal_lm::model::{CHUNK, Scratch, State, Step};
use foveal_lm::testing::{self, fetch_model};
use foveal_lm::{Error, Model};

use crate::golden_case::{Case, difference, nll};
use crate::laws::{ALL, ALL_GENERATED, assert_same, run, tokens};
use crate::small;

fn rolling(sinks: usize, window: usize) -> CacheOptions {
    let keep = Keep::Rolling(Rolling::new(sinks, window).unwrap());
    CacheOptions { keep, ..CacheOptions::default() }
}

fn keeping(keep: Keep) -> CacheOptions {
    CacheOptions { keep, ..CacheOptions::default() }
}

/// Every way of giving up keys that a model with a context of 128 takes.
fn ways() -> Vec<CacheOptions> {
    let heavy = Keep::HeavyHitters { budget: 40 };
    let snap = Keep::SnapKv { budget: 50 };
    let half = |keep| CacheOptions { storage: CacheStorage::F16, ..keeping(keep) };
    let wide = |keep| CacheOptions { context: Some(1000), ..keeping(keep) };
    let coded = CacheOptions { storage: CacheStorage::Q8, context: Some(1000), ..rolling(4, 600) };
    vec![
        rolling(4, 60),
        rolling(0, 1),
        rolling(100, 28),
        coded,
        keeping(heavy),
        half(heavy),
        wide(Keep::HeavyHitters { budget: 300 }),
        keeping(snap),
        half(snap),
        wide(Keep::SnapKv { budget: 300 }),
    ]
}

/// A prompt in calls that end at `cuts`, then generated tokens in calls of `together`: all logits.
fn read(
    model: &Model,
    options: &CacheOptions,
    (prompt, cuts): (&[u32], &[usize]),
    (generated, together): (&[u32], usize),
) -> (Vec<f32>, State) {
    let mut state = model.state_with(options).unwrap();
    let (mut logits, mut start) = (vec![], 0);
    for &end in cuts.iter().chain([&prompt.len()]) {
        logits.extend(run(model, &mut state, &prompt[start..end], ALL));
        start = end;
    }
    for call in generated.chunks(together) {
        logits.extend(run(model, &mut state, call, ALL_GENERATED));
    }
    (logits, state)
}

#[test]
fn cuts_and_calls_change_no_bit() {
    let (model, tokens) = (small::model(), tokens(3 * CHUNK, 1));
    let (prompt, generated) = tokens.split_at(3 * CHUNK - 70);
    for options in ways() {
        let (whole, _) = read(&model, &options, (prompt, &[]), (generated, 1));
        for (cuts, together) in
            [(&[1][..], 64), (&[255, 256, 257], 2), (&[100, 300, 301, 600], 7), (&[512], 70)]
        {
            let generated = (generated, together.min(64));
            let (cut, _) = read(&model, &options, (prompt, cuts), generated);
            assert_same(&cut, &whole);
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let tokens = tokens(2 * CHUNK, 2);
    let (prompt, generated) = tokens.split_at(2 * CHUNK - 40);
    for options in ways() {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| read(&small::model(), &options, (prompt, &[]), (generated, 1)).0)
        };
        assert_same(&on(3), &on(1));
    }
}

#[test]
fn as_long_as_nothing_is_given_up_nothing_changes() {
    let (model, tokens) = (small::model(), tokens(60, 3));
    let (prompt, generated) = tokens.split_at(40);
    let none = CacheOptions::default();
    let (plain, _) = read(&model, &none, (prompt, &[]), (generated, 1));
    for keep in [Keep::HeavyHitters { budget: 60 }, Keep::SnapKv { budget: 40 }] {
        let (kept, _) = read(&model, &keeping(keep), (prompt, &[]), (generated, 1));
        assert_same(&kept, &plain);
    }
    for options in [rolling(4, 56), rolling(0, 60), rolling(60, 1)] {
        // The same keys in two parts.
        let (kept, _) = read(&model, &options, (prompt, &[]), (generated, 1));
        let off = difference(&kept, &plain);
        assert!(off < 1e-4, "{options:?}: {off}");
    }
}

#[test]
fn a_rolling_window_without_first_tokens_is_a_context() {
    let (model, tokens) = (small::model(), tokens(400, 4));
    for window in [1, 30, 128] {
        let context = CacheOptions { context: Some(window), ..CacheOptions::default() };
        let (expected, _) = read(&model, &context, (&tokens, &[]), (&[], 1));
        let (found, _) = read(&model, &rolling(0, window), (&tokens, &[]), (&[], 1));
        let off = difference(&found, &expected);
        assert!(off < 1e-4, "{window}: {off}");
    }
}

#[test]
fn first_tokens_stay_in_sight() {
    let (model, tokens) = (small::model(), tokens(500, 5));
    let last = |options: &CacheOptions, changed: usize| {
        let mut text = tokens.clone();
        text[changed] = (text[changed] + 1) % 1020;
        let mut state = model.state_with(options).unwrap();
        run(&model, &mut state, &text, Step::PROMPT)
    };
    // Four layers of 20 tokens reach 77 back: neither of the changed tokens is that near.
    assert_same(&last(&rolling(3, 20), 50), &last(&rolling(3, 20), 3));
    assert_ne!(last(&rolling(3, 20), 50), last(&rolling(3, 20), 2));
    assert_same(&last(&rolling(0, 20), 50), &last(&rolling(0, 20), 2));
}

#[test]
fn what_is_held_is_bounded() {
    let (model, tokens) = (small::model(), tokens(6 * CHUNK, 6));
    let each = model.config().kv_bytes_per_token();
    for (options, most, left) in [
        (rolling(4, 60), 4 + 60 + 2 * CHUNK, None),
        (keeping(Keep::HeavyHitters { budget: 40 }), 40 + CHUNK, Some(41)),
        (keeping(Keep::SnapKv { budget: 50 }), 6 * CHUNK, Some(50 + 100)),
    ] {
        let mut state = model.state_with(&options).unwrap();
        let (prompt, generated) = tokens.split_at(6 * CHUNK - 100);
        for call in prompt.chunks(100) {
            run(&model, &mut state, call, Step::PROMPT);
            assert!(state.kv_bytes() <= most * each, "{options:?}: {}", state.kv_bytes());
        }
        generated.iter().for_each(|&token| {
            run(&model, &mut state, &[token], Step::GENERATED);
        });
        assert_eq!(state.position(), 6 * CHUNK);
        assert!(state.kv_bytes() <= most * each);
        if let Some(left) = left {
            assert_eq!(state.kv_bytes(), left * each, "{options:?}");
        }
        state.reset();
        assert_eq!((state.position(), state.kv_bytes()), (0, 0));
        let again = run(&model, &mut state, &tokens[..300], ALL);
        let (expected, _) = read(&model, &options, (&tokens[..300], &[]), (&[], 1));
        assert_same(&again, &expected);
    }
}

#[test]
fn snapkv_asks_at_the_end_of_each_prompt() {
    let (model, tokens) = (small::model(), tokens(300, 7));
    let each = model.config().kv_bytes_per_token();
    let mut state = model.state_with(&keeping(Keep::SnapKv { budget: 50 })).unwrap();
    let mut held = |text: &[u32], step| {
        run(&model, &mut state, text, step);
        state.kv_bytes() / each
    };
    assert_eq!(held(&tokens[..90], Step::PROMPT), 90);
    assert_eq!(held(&tokens[90..100], Step::GENERATED), 60);
    assert_eq!(held(&tokens[100..101], Step::GENERATED), 61);
    assert_eq!(held(&tokens[101..104], Step::PROMPT), 64);
    assert_eq!(held(&tokens[104..105], Step::GENERATED), 51);
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let model = small::model();
    let evicting = Keep::HeavyHitters { budget: 10 };
    for (options, found) in [
        (rolling(100, 29), "129"),
        (CacheOptions { context: Some(20), ..rolling(1, 20) }, "21"),
        (keeping(Keep::HeavyHitters { budget: 0 }), "0"),
        (keeping(Keep::SnapKv { budget: 129 }), "129"),
        (CacheOptions { storage: CacheStorage::Q8, ..keeping(evicting) }, "q8"),
    ] {
        let error = model.state_with(&options).unwrap_err();
        assert!(matches!(error, Error::CacheOptions { .. }), "{error}");
        assert!(error.to_string().contains(found), "{error}");
    }
}

/// Mean loss of tokens in the second half of SmolLM2's longest golden prompt, read as generated ones after the first half.
#[test]
fn smollm2_loses_little_with_half_of_its_keys() {
    let Some(path) = fetch_model(testing::Model::SmolLm2) else { return };
    let model = Model::load(&path).unwrap();
    let case = Case::all("smollm2").into_iter().max_by_key(|case| case.tokens("ids").len());
    let ids = case.unwrap().tokens("ids");
    let (prompt, rest) = ids.split_at(ids.len() / 2);
    let rest = &rest[..150];
    let mean = |options: &CacheOptions| {
        let mut state = model.state_with(options).unwrap();
        let mut scratch = Scratch::new();
        model.forward(prompt, Step::PROMPT, &mut state, &mut scratch).unwrap();
        let mut sum = 0.0;
        for &next in rest {
            sum += nll(scratch.logits(), next);
            model.forward(&[next], Step::GENERATED, &mut state, &mut scratch).unwrap();
        }
        sum / rest.len() as f32
    };
    let whole = mean(&CacheOptions::default());
    let budget = prompt.len() / 2;
    // The newest alone lose the first tokens, on which much of the weight lies; all others keep them.
    let newest = mean(&CacheOptions { context: Some(budget), ..CacheOptions::default() });
    for (options, limit) in [
        (rolling(4, budget - 4), 1.05),
        (keeping(Keep::HeavyHitters { budget }), 1.05),
        (keeping(Keep::SnapKv { budget }), 1.05),
    ] {
        let found = mean(&options);
        assert!(found < whole * limit && found < newest, "{:?}: {found} {whole}", options.keep);
    }
}
