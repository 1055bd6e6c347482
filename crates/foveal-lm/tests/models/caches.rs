//! States that store keys and values otherwise than as f32: the laws of all states, and how far results move.

use foveal_lm::mixer::{CacheOptions, CacheStorage};
use foveal_lm::model::{CHUNK, Logits, Scratch, State, Step};
use foveal_lm::testing::{self, fetch_model};
use foveal_lm::{Error, Model};

use crate::golden_case::{Case, difference, nll};
use crate::laws::{ALL, ALL_GENERATED, assert_same, run, tokens};
use crate::small;

/// Far enough for codes to be seen: those of tokens more than 256 to 512 behind.
const CONTEXT: usize = 1100;

fn every_storage() -> impl Iterator<Item = CacheOptions> {
    let options =
        |storage| CacheOptions { storage, context: Some(CONTEXT), ..CacheOptions::default() };
    CacheStorage::ALL.into_iter().map(options)
}

fn prefill(model: &Model, options: &CacheOptions, tokens: &[u32], cuts: &[usize]) -> Vec<f32> {
    let mut state = model.state_with(options).unwrap();
    let mut logits = vec![];
    let mut start = 0;
    for &end in cuts.iter().chain([&tokens.len()]) {
        logits.extend(run(model, &mut state, &tokens[start..end], ALL));
        start = end;
    }
    logits
}

#[test]
fn names_are_read_back() {
    for storage in CacheStorage::ALL {
        assert_eq!(CacheStorage::named(storage.name()), Some(storage));
    }
    assert_eq!(CacheStorage::named("q2"), None);
}

#[test]
fn cuts_of_a_prompt_change_no_bit_in_any_storage() {
    let (model, tokens) = (small::model(), tokens(4 * CHUNK + 30, 1));
    for options in every_storage() {
        let whole = prefill(&model, &options, &tokens, &[]);
        for cuts in [&[1][..], &[255, 256, 257], &[3, 700, 800, 1053], &[512, 768], &[767, 1000]] {
            assert_same(&prefill(&model, &options, &tokens, cuts), &whole);
        }
    }
}

#[test]
fn threads_change_no_bit_in_any_storage() {
    let tokens = tokens(3 * CHUNK, 2);
    for options in every_storage() {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let model = small::model();
                let mut state = model.state_with(&options).unwrap();
                let mut logits = run(&model, &mut state, &tokens, Step::PROMPT);
                logits.extend(run(&model, &mut state, &tokens[..20], ALL_GENERATED));
                logits
            })
        };
        assert_same(&on(3), &on(1));
    }
}

#[test]
fn generated_tokens_may_share_a_call_in_any_storage() {
    let (model, tokens) = (small::model(), tokens(3 * CHUNK + 100, 3));
    let (prompt, rest) = tokens.split_at(3 * CHUNK - 20);
    for options in every_storage() {
        let generate = |together: usize| {
            let mut state = model.state_with(&options).unwrap();
            run(&model, &mut state, prompt, Step::PROMPT);
            let calls = rest.chunks(together);
            calls.flat_map(|call| run(&model, &mut state, call, ALL_GENERATED)).collect::<Vec<_>>()
        };
        let alone = generate(1);
        for together in [3, 64] {
            assert_same(&generate(together), &alone);
        }
    }
}

#[test]
fn generated_tokens_are_close_to_prompt_tokens_in_any_storage() {
    // All of a prompt's tokens see the same stored numbers as generated ones do, from the same distance.
    let (model, tokens) = (small::model(), tokens(3 * CHUNK, 4));
    for options in every_storage() {
        let prompt = prefill(&model, &options, &tokens, &[]);
        let mut state = model.state_with(&options).unwrap();
        let each =
            tokens.iter().flat_map(|token| run(&model, &mut state, &[*token], Step::GENERATED));
        let off = difference(&each.collect::<Vec<_>>(), &prompt);
        // Where a rounding falls the other way for a last bit, it moves what is stored by a step.
        let limit = match options.storage {
            CacheStorage::F32 => 1e-4,
            CacheStorage::F16 => 1e-2,
            CacheStorage::Bf16 | CacheStorage::Q8 => 6e-2,
            _ => 0.3,
        };
        assert!(off < limit, "{}: off by {off}", options.storage.name());
    }
}

#[test]
fn what_is_stored_moves_results_as_far_as_it_is_rounded() {
    let (model, tokens) = (small::model(), tokens(4 * CHUNK, 5));
    let exact = CacheOptions {
        storage: CacheStorage::F32,
        context: Some(CONTEXT),
        ..CacheOptions::default()
    };
    let exact = prefill(&model, &exact, &tokens, &[]);
    let far = 3 * CHUNK * model.config().vocab;
    let mut last = 0.0;
    for (storage, limit) in [
        (CacheStorage::F16, 0.01),
        (CacheStorage::Q8, 0.1),
        (CacheStorage::Bf16, 0.1),
        (CacheStorage::Q4, 1.0),
    ] {
        let options = CacheOptions { storage, context: Some(CONTEXT), ..CacheOptions::default() };
        let found = prefill(&model, &options, &tokens, &[]);
        let off = difference(&found[far..], &exact[far..]);
        assert!(last < off && off < limit, "{}: off by {off}", storage.name());
        last = off * 0.5;
    }
}

#[test]
fn bytes_are_those_of_the_storage() {
    let (model, tokens) = (small::model(), tokens(5 * CHUNK + 7, 6));
    let bytes = |storage, count: usize| {
        let options =
            CacheOptions { storage, context: Some(4 * CONTEXT), ..CacheOptions::default() };
        let mut state = model.state_with(&options).unwrap();
        run(&model, &mut state, &tokens[..count], Step { logits: Logits::None, ..Step::PROMPT });
        state.kv_bytes()
    };
    let (all, each) = (tokens.len(), model.config().kv_bytes_per_token());
    for (storage, size) in [(CacheStorage::F32, 4), (CacheStorage::F16, 2), (CacheStorage::Bf16, 2)]
    {
        assert_eq!(bytes(storage, all), all * each / 4 * size);
    }
    // Heads of 32: a row of values is padded to 64 codes and has a scale and a minimum of its own; keys take b + 0.5 bits.
    for (storage, bits) in [(CacheStorage::Q8, 8), (CacheStorage::Q4, 4)] {
        assert_eq!(bytes(storage, 2 * CHUNK), 2 * CHUNK * each / 2);
        let recent = (CHUNK + 7) * each / 2;
        let heads = each / 4 / 32 / 2;
        let row = 32 * (2 * bits + 1) / 16 + 64 * bits / 8 + 4;
        assert_eq!(bytes(storage, all), 4 * CHUNK * heads * row + recent);
    }
}

#[test]
fn a_shorter_context_bounds_what_is_held_in_any_storage() {
    let (model, tokens) = (small::model(), tokens(6 * CHUNK, 7));
    for storage in CacheStorage::ALL {
        let options = CacheOptions { storage, context: Some(70), ..CacheOptions::default() };
        let mut state = model.state_with(&options).unwrap();
        let mut most = 0;
        for call in tokens.chunks(50) {
            run(&model, &mut state, call, Step::PROMPT);
            most = most.max(state.kv_bytes());
        }
        assert!(most <= (70 + 2 * CHUNK) * model.config().kv_bytes_per_token(), "{most}");
        // A context that is the model's is no other option.
        let own = CacheOptions {
            storage,
            context: Some(model.config().context),
            ..CacheOptions::default()
        };
        let none = CacheOptions { storage, context: None, ..CacheOptions::default() };
        let short = &tokens[..400];
        let expected = prefill(&model, &none, short, &[]);
        assert_same(&prefill(&model, &own, short, &[]), &expected);
        assert_ne!(prefill(&model, &options, short, &[]), expected);
    }
}

#[test]
fn a_context_beyond_the_model_is_seen_as_a_whole() {
    let (model, tokens) = (small::model(), tokens(600, 8));
    let options = CacheOptions { context: Some(CONTEXT), ..CacheOptions::default() };
    let mut changed = tokens.clone();
    changed[0] = 77;
    let last = |text: &[u32]| {
        let mut state = model.state_with(&options).unwrap();
        run(&model, &mut state, text, Step::PROMPT)
    };
    assert_ne!(last(&tokens), last(&changed));
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let model = small::model();
    for context in [0, (1 << 30) + 1, usize::MAX] {
        let options = CacheOptions { context: Some(context), ..CacheOptions::default() };
        let error = model.state_with(&options).unwrap_err();
        assert!(matches!(error, Error::CacheOptions { .. }), "{error}");
        assert!(error.to_string().contains(&context.to_string()), "{error}");
    }
}

/// Negative log-likelihoods of a text's tokens after the first.
pub(crate) fn losses(model: &Model, state: &mut State, ids: &[u32], step: Step) -> Vec<f32> {
    let mut scratch = Scratch::new();
    let mut losses = vec![];
    for (n, call) in ids.chunks(32).enumerate() {
        model.forward(call, step, state, &mut scratch).unwrap();
        let rows = scratch.logits().chunks_exact(model.config().vocab);
        let next = ids[n * 32 + 1..].iter();
        losses.extend(rows.zip(next).map(|(logits, &next)| nll(logits, next)));
    }
    losses
}

/// Mean loss of the longest golden prompt in each storage, against that in f32.
fn check_losses(file: testing::Model, prefix: &str) {
    let Some(path) = fetch_model(file) else { return };
    let model = Model::load(&path).unwrap();
    let case = Case::all(prefix).into_iter().max_by_key(|case| case.tokens("ids").len()).unwrap();
    let mean = |storage| {
        let options = CacheOptions { storage, ..CacheOptions::default() };
        let mut state = model.state_with(&options).unwrap();
        let losses = losses(&model, &mut state, &case.tokens("ids"), ALL);
        losses.iter().sum::<f32>() / losses.len() as f32
    };
    let exact = mean(CacheStorage::F32);
    for (storage, limit) in [
        (CacheStorage::F16, 3e-4),
        (CacheStorage::Bf16, 3e-3),
        (CacheStorage::Q8, 3e-3),
        (CacheStorage::Q4, 1.5e-2),
    ] {
        let off = (mean(storage) / exact - 1.0).abs();
        assert!(off < limit, "{prefix} {}: {off}", storage.name());
    }
}

#[test]
fn smollm2_loses_little_in_any_storage() {
    check_losses(testing::Model::SmolLm2, "smollm2");
}

#[test]
fn gemma3_loses_little_in_any_storage() {
    check_losses(testing::Model::Gemma3, "gemma3_270m");
}
