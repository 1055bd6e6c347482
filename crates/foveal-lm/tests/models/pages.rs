//! Texts in pages: what they begin with in common is read once and lies in memory once, and no bit tells.

use foveal::Error as KernelError;
use foveal_lm::generate::{BatchOptions, Batcher, Options, Request, StopReason, Text};
use foveal_lm::mixer::{CacheOptions, CacheStorage, Keep};
use foveal_lm::model::{Batch, CHUNK, Scratch, State, Step};
use foveal_lm::sample::Sampling;
use foveal_lm::testing::{Tiny, TinySizes};
use foveal_lm::{Error, Model};

use crate::batch::{bits, kept_as, tokens};
use crate::{formats, small};

const PAGED: [CacheStorage; 3] = [CacheStorage::F32, CacheStorage::F16, CacheStorage::Bf16];

/// All of a text is seen.
fn stored(storage: CacheStorage) -> CacheOptions {
    CacheOptions { storage, context: Some(4096), ..CacheOptions::default() }
}

/// Reads a prompt on from where the state is; the last token's logits, and those of two generated ones.
fn read_on(model: &Model, state: &mut State, prompt: &[u32]) -> Vec<u32> {
    let mut scratch = Scratch::new();
    model.forward(prompt, Step::PROMPT, state, &mut scratch).unwrap();
    let mut all = bits(scratch.logits());
    for token in [7, 3] {
        model.forward(&[token], Step::GENERATED, state, &mut scratch).unwrap();
        all.extend(bits(scratch.logits()));
    }
    all
}

fn out_of_pages(error: &Error) -> Option<(usize, usize)> {
    match error {
        Error::Kernel(KernelError::OutOfPages { needed, free }) => Some((*needed, *free)),
        _ => None,
    }
}

#[test]
fn a_fork_has_the_bits_of_a_text_of_its_own() {
    let model = small::model();
    let (prompt, other) = (tokens(2 * CHUNK + 90, 1, 1020), tokens(300, 2, 1020));
    for storage in PAGED {
        let pages = model.pages(&stored(storage), 16 * CHUNK).unwrap();
        let mut root = model.state_in(&pages).unwrap();
        model.forward(&prompt, Step::PROMPT, &mut root, &mut Scratch::new()).unwrap();
        for at in [1, 100, CHUNK, CHUNK + 1, 2 * CHUNK, prompt.len()] {
            let whole: Vec<u32> = prompt[..at].iter().chain(&other).copied().collect();
            let mut plain = model.state_with(&stored(storage)).unwrap();
            let expected = read_on(&model, &mut plain, &whole);
            let mut fork = root.fork(&model, at).unwrap();
            assert_eq!(
                (fork.position(), fork.kv_bytes()),
                (at, at * root.kv_bytes() / prompt.len())
            );
            assert!(read_on(&model, &mut fork, &other) == expected, "{storage:?} at {at}");
        }
        // Forks have left nothing behind, and the root is as it was.
        assert_eq!(pages.pages() - pages.free_pages(), 3 * model.config().layers.len());
        let mut plain = model.state_with(&stored(storage)).unwrap();
        model.forward(&prompt, Step::PROMPT, &mut plain, &mut Scratch::new()).unwrap();
        assert!(read_on(&model, &mut root, &other) == read_on(&model, &mut plain, &other));
    }
    assert!(model.state().unwrap().fork(&model, 0).is_none());
}

#[test]
fn every_family_goes_in_pages() {
    let prompt = tokens(40, 5, 50);
    for family in Tiny::FAMILIES {
        let model = formats::from_gguf(&Tiny::new(family, TinySizes::default())).unwrap();
        let pages = model.pages(&CacheOptions::default(), 4 * CHUNK).unwrap();
        let mut root = model.state_in(&pages).unwrap();
        model.forward(&prompt[..30], Step::PROMPT, &mut root, &mut Scratch::new()).unwrap();
        let mut fork = root.fork(&model, 20).unwrap();
        let expected = read_on(&model, &mut model.state().unwrap(), &prompt);
        assert!(read_on(&model, &mut fork, &prompt[20..]) == expected, "{family}");
    }
}

#[test]
fn a_window_leaves_pages_behind_and_can_not_be_forked_there() {
    let model = small::model();
    let options = CacheOptions { context: Some(100), ..CacheOptions::default() };
    let pages = model.pages(&options, 4 * CHUNK).unwrap();
    let mut state = model.state_in(&pages).unwrap();
    let prompt = tokens(5 * CHUNK, 1, 1020);
    model.forward(&prompt, Step::PROMPT, &mut state, &mut Scratch::new()).unwrap();
    assert!(pages.pages() - pages.free_pages() <= 2 * model.config().layers.len());
    assert!(state.fork(&model, CHUNK).is_none() && state.fork(&model, 5 * CHUNK + 1).is_none());
    assert!(state.fork(&model, 5 * CHUNK).is_some());
}

#[test]
fn without_pages_a_call_changes_nothing_and_goes_on_when_there_are_some() {
    let model = small::model();
    let pages = model.pages(&stored(CacheStorage::F32), 3 * CHUNK).unwrap();
    let layers = model.config().layers.len();
    let prompt = tokens(3 * CHUNK, 1, 1020);
    let mut scratch = Scratch::new();
    let mut other = model.state_in(&pages).unwrap();
    model.forward(&[1, 2, 3], Step::PROMPT, &mut other, &mut scratch).unwrap();
    let mut state = model.state_in(&pages).unwrap();
    let error = model.forward(&prompt, Step::PROMPT, &mut state, &mut scratch).unwrap_err();
    assert_eq!(out_of_pages(&error), Some((layers, 0)), "{error}");
    assert_eq!(state.position(), 2 * CHUNK);
    let mut batch = Batch::new();
    batch.join(other).unwrap();
    batch.join(state).unwrap();
    for _ in 0..3 {
        let error = model.forward_batch(&[5, 6], &mut batch, &mut scratch).unwrap_err();
        assert_eq!(out_of_pages(&error), Some((layers, 0)), "{error}");
        assert_eq!((batch.position(0), batch.position(1)), (Some(3), Some(2 * CHUNK)));
    }
    let mut state = batch.leave(1).unwrap();
    drop(batch);
    let mut plain = model.state_with(&stored(CacheStorage::F32)).unwrap();
    let expected = read_on(&model, &mut plain, &prompt[..3 * CHUNK - 2]);
    assert!(read_on(&model, &mut state, &prompt[2 * CHUNK..3 * CHUNK - 2]) == expected);
}

#[test]
fn what_pages_do_not_hold_is_refused() {
    let model = small::model();
    for storage in [CacheStorage::Q8, CacheStorage::Q4] {
        let error = model.pages(&stored(storage), CHUNK).unwrap_err();
        assert!(matches!(error, Error::CacheOptions { what: "storage of pages", .. }), "{error}");
    }
    let keep = Keep::SnapKv { budget: 9 };
    let error = model.pages(&CacheOptions { keep, ..CacheOptions::default() }, CHUNK).unwrap_err();
    assert!(matches!(error, Error::BatchKeep), "{error}");
    let options = CacheOptions::default();
    let pages = model.pages(&options, CHUNK).unwrap();
    let sizes = TinySizes { layers: 4, ..TinySizes::default() };
    for sizes in [sizes, TinySizes::default()] {
        let other = formats::from_gguf(&Tiny::new("llama", sizes)).unwrap();
        let error = other.state_in(&pages).unwrap_err();
        assert!(matches!(error, Error::PageSizes), "{error}");
    }
    let mut batch = Batch::new();
    batch.join(model.state_in(&pages).unwrap()).unwrap();
    let elsewhere = model.pages(&options, CHUNK).unwrap();
    for state in [model.state().unwrap(), model.state_in(&elsewhere).unwrap()] {
        let error = batch.join(state).unwrap_err();
        assert!(matches!(error, Error::BatchPages), "{error}");
    }
    batch.join(model.state_in(&pages).unwrap()).unwrap();
}

/// Prompts with beginnings in common, of all lengths.
fn requests() -> Vec<Request> {
    let common = tokens(700, 9, 1020);
    let request = |(n, &(shared, own)): (usize, &(usize, usize))| {
        let mut prompt = common[..shared].to_vec();
        prompt.extend(tokens(own, 50 + n as u32, 1020));
        let sampling = Sampling { seed: n as u64, temperature: 0.7, ..Sampling::default() };
        let options = Options { max_tokens: 3 + 9 * (n % 4), sampling, ..Options::default() };
        Request { prompt, options }
    };
    let lengths = [
        (300, 5),
        (300, 5),
        (0, 40),
        (600, 0),
        (600, 0),
        (512, 300),
        (20, 1),
        (700, 0),
        (256, 1),
        (1, 60),
    ];
    lengths.iter().enumerate().map(request).collect()
}

fn run(batcher: &mut Batcher<'_>, requests: &[Request]) -> Vec<Result<Text, Error>> {
    let first = requests.iter().map(|request| batcher.push(request.clone())).min().unwrap_or(0);
    let mut results = vec![];
    while !batcher.is_idle() {
        results.extend(batcher.step().unwrap());
    }
    results.sort_by_key(|finished| finished.id);
    assert!(results.iter().enumerate().all(|(n, finished)| finished.id == first + n));
    results.into_iter().map(|finished| finished.text).collect()
}

#[test]
fn what_prompts_begin_with_is_read_once() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let requests = requests();
    for storage in CacheStorage::ALL {
        let cache = stored(storage);
        let expected: Vec<_> = requests.iter().map(|r| kept_as(&model, &cache, r)).collect();
        assert!(expected.iter().all(|text| text.stopped == StopReason::MaxTokens));
        // With pages for all, and with hardly more than the longest takes.
        for pool in [None, Some(4 * CHUNK)] {
            let options = BatchOptions { parallel: 4, cache, pool };
            let mut batcher = Batcher::new(&model, &tokenizer, &options).unwrap();
            for round in 0..2 {
                let before = batcher.shared();
                let results = run(&mut batcher, &requests);
                for (n, (found, expected)) in results.iter().zip(&expected).enumerate() {
                    let found = found.as_ref().unwrap();
                    assert_eq!(found, expected, "{storage:?} {pool:?} {n}, round {round}");
                }
                let shared = batcher.shared() - before;
                match (storage.coded(), pool) {
                    (true, _) => assert_eq!(shared, 0),
                    // Of the second to fifth, eighth and ninth: more in the second round.
                    (false, None) => {
                        assert!(shared >= 300 + 300 + 599 + 512 + 20 + 256, "{shared}")
                    }
                    (false, Some(_)) => assert!(shared > 0),
                }
            }
            assert_eq!(batcher.kv_bytes(), 0);
            assert_eq!(batcher.pages().is_some(), !storage.coded());
        }
    }
}

#[test]
fn a_text_that_could_never_have_its_pages_is_refused_and_the_others_go_on() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let cache = stored(CacheStorage::F32);
    let options = BatchOptions { parallel: 8, cache, pool: Some(2 * CHUNK) };
    let mut batcher = Batcher::new(&model, &tokenizer, &options).unwrap();
    let layers = model.config().layers.len();
    let mut requests = requests();
    requests.retain(|request| request.prompt.len() < 2 * CHUNK - 40 || request.prompt.len() > 700);
    let long = requests.iter().position(|request| request.prompt.len() > 700);
    let results = run(&mut batcher, &requests);
    for (n, (result, request)) in results.iter().zip(&requests).enumerate() {
        match result {
            Ok(text) => assert_eq!(text, &kept_as(&model, &options.cache, request)),
            Err(error) => {
                assert_eq!(Some(n), long);
                assert_eq!(out_of_pages(error), Some((4 * layers, 2 * layers)), "{error}");
            }
        }
    }
    assert!(results.iter().filter(|result| result.is_ok()).count() > 3 && long.is_some());
}

/// Generated tokens of texts that share a prompt have the bits of texts that share nothing, though they read it once.
#[test]
fn a_batch_of_forks_has_the_bits_of_texts_alone() {
    let model = small::model();
    let options = stored(CacheStorage::F16);
    let pages = model.pages(&options, 32 * CHUNK).unwrap();
    let prompt = tokens(3 * CHUNK + 40, 1, 1020);
    let mut root = model.state_in(&pages).unwrap();
    let mut scratch = Scratch::new();
    model.forward(&prompt, Step::PROMPT, &mut root, &mut scratch).unwrap();
    let next = tokens(6, 2, 1020);
    let alone = |token: u32| {
        let mut state = model.state_with(&options).unwrap();
        let mut scratch = Scratch::new();
        model.forward(&prompt, Step::PROMPT, &mut state, &mut scratch).unwrap();
        model.forward(&[token], Step::GENERATED, &mut state, &mut scratch).unwrap();
        let first = bits(scratch.logits());
        model.forward(&[token], Step::GENERATED, &mut state, &mut scratch).unwrap();
        [first, bits(scratch.logits())]
    };
    let expected: Vec<_> = next.iter().map(|&token| alone(token)).collect();
    let mut batch = Batch::new();
    for _ in &next {
        batch.join(root.fork(&model, prompt.len()).unwrap()).unwrap();
    }
    for step in 0..2 {
        model.forward_batch(&next, &mut batch, &mut scratch).unwrap();
        let rows = scratch.logits().chunks(model.config().vocab);
        for (row, expected) in rows.zip(&expected) {
            assert!(bits(row) == expected[step]);
        }
    }
    // The whole pages of the prompt are held once, its broken end by each.
    let layers = model.config().layers.len();
    assert_eq!(pages.pages() - pages.free_pages(), layers * (3 + 1 + next.len()));
}
