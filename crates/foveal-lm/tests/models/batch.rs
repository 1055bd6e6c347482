//! Many texts in one call: each as if it were alone, to the last bit.

use foveal::cache::Rolling;
use foveal_lm::generate::{BatchOptions, Batcher, Generator, Options, Request, StopReason, Text};
use foveal_lm::mixer::{CacheOptions, Keep};
use foveal_lm::model::{Batch, CHUNK, MAX_TEXTS, Scratch, State, Step};
use foveal_lm::sample::Sampling;
use foveal_lm::testing::{Tiny, TinySizes};
use foveal_lm::tokenizer::Tokenizer;
use foveal_lm::{Error, Model};

use crate::{formats, small};

pub(crate) fn tokens(count: usize, seed: u32, vocab: u32) -> Vec<u32> {
    let next = |state: &u32| Some(state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    let states = std::iter::successors(next(&seed), next);
    states.map(|state| (state >> 16) % vocab).take(count).collect()
}

pub(crate) fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// A text's state after its prompt.
fn read(model: &Model, prompt: &[u32]) -> State {
    let mut state = model.state().unwrap();
    model.forward(prompt, Step::PROMPT, &mut state, &mut Scratch::new()).unwrap();
    state
}

/// The logits of each token that is generated after a prompt.
fn alone(model: &Model, prompt: &[u32], rest: &[u32]) -> Vec<Vec<u32>> {
    let (mut state, mut scratch) = (read(model, prompt), Scratch::new());
    let step = |&token: &u32| {
        model.forward(&[token], Step::GENERATED, &mut state, &mut scratch).unwrap();
        bits(scratch.logits())
    };
    rest.iter().map(step).collect()
}

/// Texts of several lengths join one after the other and leave in another order.
pub(crate) fn check_joining_and_leaving(model: &Model, lengths: &[usize]) {
    let vocab = model.config().vocab as u32;
    let text = |(n, &length): (usize, &usize)| {
        (tokens(length, n as u32, vocab), tokens(12 + 5 * (n % 3), 90 + n as u32, vocab))
    };
    let texts: Vec<_> = lengths.iter().enumerate().map(text).collect();
    let expected: Vec<_> = texts.iter().map(|(prompt, rest)| alone(model, prompt, rest)).collect();
    let (mut batch, mut scratch) = (Batch::new(), Scratch::new());
    // Which text, and how many of its tokens were read.
    let mut places: Vec<(usize, usize)> = vec![];
    let (mut joined, mut compared) = (0, 0);
    while joined < texts.len() || !batch.is_empty() {
        for _ in 0..2 {
            if joined < texts.len() {
                batch.join(read(model, &texts[joined].0)).unwrap();
                places.push((joined, 0));
                joined += 1;
            }
        }
        let next: Vec<u32> = places.iter().map(|&(text, at)| texts[text].1[at]).collect();
        model.forward_batch(&next, &mut batch, &mut scratch).unwrap();
        let rows = scratch.logits().chunks(vocab as usize);
        for (&(text, at), logits) in places.iter().zip(rows) {
            assert!(bits(logits) == expected[text][at], "text {text}, token {at}");
            compared += 1;
        }
        places.iter_mut().for_each(|(_, at)| *at += 1);
        for n in (0..places.len()).rev() {
            let (text, at) = places[n];
            if at == texts[text].1.len() {
                let state = batch.leave(n).unwrap();
                assert_eq!(state.position(), texts[text].0.len() + at);
                places.swap_remove(n);
            }
        }
    }
    assert_eq!(compared, texts.iter().map(|(_, rest)| rest.len()).sum::<usize>());
    assert_eq!(batch.kv_bytes(), 0);
}

#[test]
fn a_text_has_the_same_bits_in_any_company() {
    check_joining_and_leaving(&small::model(), &[5, 130, 1, 60, 300, 7, 20, 90, 2]);
}

#[test]
fn every_family_goes_in_batches() {
    for family in Tiny::FAMILIES {
        let model = formats::from_gguf(&Tiny::new(family, TinySizes::default())).unwrap();
        check_joining_and_leaving(&model, &[3, 40, 9, 1]);
    }
}

#[test]
fn the_largest_batch_is_like_the_smallest() {
    let model = small::model();
    let prompts: Vec<_> = (0..MAX_TEXTS as u32 + 1).map(|n| tokens(8, n, 1020)).collect();
    let mut batch = Batch::new();
    for prompt in &prompts[..MAX_TEXTS] {
        batch.join(read(&model, prompt)).unwrap();
    }
    let mut scratch = Scratch::new();
    let next = tokens(MAX_TEXTS + 1, 7, 1020);
    model.forward_batch(&next[..MAX_TEXTS], &mut batch, &mut scratch).unwrap();
    let rows = scratch.logits().chunks(model.config().vocab);
    for ((prompt, &token), row) in prompts.iter().zip(&next).zip(rows) {
        assert_eq!(alone(&model, prompt, &[token]), [bits(row)]);
    }
    batch.join(read(&model, &prompts[MAX_TEXTS])).unwrap();
    let error = model.forward_batch(&next, &mut batch, &mut scratch).unwrap_err();
    assert!(matches!(error, Error::TooManyTokens { found: 65, limit: 64 }), "{error}");
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let model = small::model();
    let (mut batch, mut scratch) = (Batch::new(), Scratch::new());
    model.forward_batch(&[], &mut batch, &mut scratch).unwrap();
    assert!(scratch.logits().is_empty());
    batch.join(read(&model, &[1, 2, 3])).unwrap();
    let error = model.forward_batch(&[1, 2], &mut batch, &mut scratch).unwrap_err();
    assert!(matches!(error, Error::BatchTokens { found: 2, expected: 1 }), "{error}");
    let error = model.forward_batch(&[5000], &mut batch, &mut scratch).unwrap_err();
    assert!(matches!(error, Error::Token { found: 5000, .. }), "{error}");
    let sizes = TinySizes { layers: 2, ..TinySizes::default() };
    let other = formats::from_gguf(&Tiny::new("llama", sizes)).unwrap();
    let error = batch.join(other.state().unwrap()).unwrap_err();
    assert!(matches!(error, Error::State { expected: 4, found: 2 }), "{error}");
    assert_eq!((batch.len(), batch.position(0), batch.position(1)), (1, Some(3), None));
    assert!(batch.leave(1).is_none());
    let mut strange = Batch::new();
    strange.join(other.state().unwrap()).unwrap();
    let error = model.forward_batch(&[1], &mut strange, &mut scratch).unwrap_err();
    assert!(matches!(error, Error::State { expected: 4, found: 2 }), "{error}");
}

#[test]
fn states_that_see_otherwise_are_refused() {
    let model = small::model();
    let mut batch = Batch::new();
    batch.join(model.state().unwrap()).unwrap();
    let options = CacheOptions { context: Some(7), ..CacheOptions::default() };
    let error = batch.join(model.state_with(&options).unwrap()).unwrap_err();
    assert!(matches!(error, Error::BatchReach { found: Some(7), expected: None }), "{error}");
    let rolling = Keep::Rolling(Rolling::new(2, 20).unwrap());
    for keep in [rolling, Keep::HeavyHitters { budget: 9 }, Keep::SnapKv { budget: 9 }] {
        let options = CacheOptions { keep, ..CacheOptions::default() };
        let error = batch.join(model.state_with(&options).unwrap()).unwrap_err();
        assert!(matches!(error, Error::BatchKeep), "{error}");
    }
    assert_eq!(batch.len(), 1);
}

fn request(n: usize, max_tokens: usize) -> Request {
    let seed = n as u64 / 2;
    let sampling = Sampling { seed, temperature: 0.4 * (n % 3) as f32, ..Sampling::default() };
    let stop = if n % 4 == 1 { vec!["e".to_owned()] } else { vec![] };
    let prompt = tokens(1 + 37 * n % 290, n as u32, 1020);
    Request { prompt, options: Options { max_tokens, stop, sampling, logprobs: None } }
}

fn up_to<'a>(model: &'a Model, tokenizer: &'a Tokenizer, parallel: usize) -> Batcher<'a> {
    Batcher::new(model, tokenizer, &BatchOptions { parallel, ..BatchOptions::default() }).unwrap()
}

fn by_itself(model: &Model, request: &Request) -> Text {
    kept_as(model, &CacheOptions::default(), request)
}

/// The text that a request gives alone, with keys and values kept as `cache` says.
pub(crate) fn kept_as(model: &Model, cache: &CacheOptions, request: &Request) -> Text {
    let tokenizer = small::tokenizer();
    let mut state = model.state_with(cache).unwrap();
    let Request { prompt, options } = request;
    let mut generator = Generator::new(model, &tokenizer, &mut state, prompt, options).unwrap();
    let pieces = generator.by_ref().collect::<Result<Vec<_>, _>>().unwrap();
    Text {
        tokens: pieces.iter().map(|piece| piece.token).collect(),
        text: pieces.iter().map(|piece| &*piece.text).collect(),
        stopped: generator.stopped().unwrap(),
    }
}

#[test]
fn texts_are_those_that_they_are_alone() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let requests: Vec<_> = (0..14).map(|n| request(n, 10 * (n % 5))).collect();
    let expected: Vec<_> = requests.iter().map(|request| by_itself(&model, request)).collect();
    let reasons = |reason| expected.iter().filter(|text| text.stopped == reason).count();
    assert!(reasons(StopReason::MaxTokens) > 3 && reasons(StopReason::StopString) > 0);
    for limit in [1, 3, 64] {
        let mut batcher = up_to(&model, &tokenizer, limit);
        let mut results: Vec<Option<Text>> = vec![None; requests.len()];
        for (n, request) in requests.iter().enumerate() {
            assert_eq!(batcher.push(request.clone()), n);
        }
        let mut most = 0;
        while !batcher.is_idle() {
            for finished in batcher.step().unwrap() {
                let place = &mut results[finished.id];
                assert!(place.replace(finished.text.unwrap()).is_none());
            }
            most = most.max(batcher.running());
        }
        assert!(most <= limit && (limit == 1 || most > 1), "{most} of {limit}");
        for (n, (found, expected)) in results.iter().zip(&expected).enumerate() {
            assert_eq!(found.as_ref(), Some(expected), "text {n}, {limit} at once");
        }
        assert_eq!(batcher.kv_bytes(), 0);
    }
}

#[test]
fn a_long_prompt_does_not_hold_the_others_up() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let mut batcher = up_to(&model, &tokenizer, 4);
    batcher.push(request(0, 4));
    batcher.step().unwrap();
    assert_eq!(batcher.running(), 1);
    let prompt = tokens(20 * CHUNK, 3, 1020);
    let long = batcher.push(Request { prompt, options: request(0, 1).options });
    let mut order = vec![];
    while !batcher.is_idle() {
        order.extend(batcher.step().unwrap().into_iter().map(|finished| finished.id));
    }
    assert_eq!(order, [0, long]);
    // One chunk a step, after the first step.
    let prompt = tokens(3 * CHUNK, 4, 1020);
    batcher.push(Request { prompt, options: request(0, 1).options });
    let steps = (0..).take_while(|_| batcher.step().unwrap().is_empty()).count();
    assert_eq!(steps, 2);
}

#[test]
fn a_bad_request_is_its_own_failure() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let good = request(2, 5);
    let sampling = Sampling { top_p: 7.0, ..Sampling::default() };
    let bad = [
        Request { prompt: vec![], ..good.clone() },
        Request { prompt: vec![70_000], ..good.clone() },
        Request { options: Options { sampling, ..good.options.clone() }, ..good.clone() },
    ];
    let mut batcher = up_to(&model, &tokenizer, 2);
    let expected = by_itself(&model, &good);
    for request in &bad {
        batcher.push(good.clone());
        batcher.push(request.clone());
    }
    let mut results = vec![];
    while !batcher.is_idle() {
        results.extend(batcher.step().unwrap());
    }
    results.sort_by_key(|finished| finished.id);
    assert_eq!(results.len(), 6);
    for pair in results.chunks(2) {
        assert_eq!(pair[0].text.as_ref().unwrap(), &expected);
        assert!(pair[1].text.is_err());
    }
    assert!(matches!(results[1].text, Err(Error::EmptyPrompt)));
    assert!(matches!(results[3].text, Err(Error::Token { found: 70_000, .. })));
    assert!(matches!(results[5].text, Err(Error::Sampling { name: "top-p", .. })));
}

/// Finished texts, and all pieces that were seen, with their numbers.
type Watched = (Vec<(usize, Text)>, Vec<(usize, String)>);

/// Runs a batch to its end, taking back what `cancel` says after so many steps.
fn watched(batcher: &mut Batcher<'_>, cancel: &[(usize, usize)]) -> Watched {
    let (mut results, mut seen, mut step) = (vec![], vec![], 0);
    while !batcher.is_idle() {
        for (_, id) in cancel.iter().filter(|(at, _)| *at == step) {
            assert!(batcher.cancel(*id));
            assert!(!batcher.cancel(*id));
        }
        let finished = batcher.step_with(&mut |id, piece| seen.push((id, piece.text.clone())));
        results.extend(finished.unwrap().into_iter().map(|done| (done.id, done.text.unwrap())));
        step += 1;
    }
    results.sort_by_key(|(id, _)| *id);
    (results, seen)
}

#[test]
fn pieces_come_as_they_are_made_and_make_up_the_texts() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let mut batcher = up_to(&model, &tokenizer, 3);
    let requests: Vec<_> = (0..7).map(|n| request(n, 12)).collect();
    for request in &requests {
        batcher.push(request.clone());
    }
    let (results, seen) = watched(&mut batcher, &[]);
    assert_eq!(results.len(), 7);
    for (id, text) in results {
        assert_eq!(text, by_itself(&model, &requests[id]));
        let pieces = seen.iter().filter(|(of, _)| *of == id);
        assert_eq!(pieces.map(|(_, piece)| &**piece).collect::<String>(), text.text);
    }
}

#[test]
fn what_is_taken_back_leaves_the_others_as_they_are_and_frees_its_pages() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let mut batcher = up_to(&model, &tokenizer, 4);
    let mut requests: Vec<_> = (0..8).map(|n| request(n, 40)).collect();
    // The sixth is still being read when it is taken back.
    requests[3].prompt = tokens(9 * CHUNK, 5, 1020);
    for request in &requests {
        batcher.push(request.clone());
    }
    // One that runs, one that is read, one that waits, and one that would be the last of a batch.
    let (results, seen) = watched(&mut batcher, &[(3, 0), (4, 3), (3, 7), (9, 2)]);
    let ids: Vec<usize> = results.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [1, 4, 5, 6]);
    for (id, text) in results {
        assert_eq!(text, by_itself(&model, &requests[id]), "text {id}");
    }
    assert!(seen.iter().all(|(id, _)| ![3, 7].contains(id)) && !batcher.cancel(99));
    assert_eq!(batcher.kv_bytes(), 0);
    let pages = batcher.pages().unwrap();
    // Only what prompts begin with is kept; pages for all texts are free for promises.
    assert!(pages.free_pages() > pages.pages() / 2);
}

#[test]
fn a_short_prompt_passes_a_long_one_which_goes_on() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let mut batcher = up_to(&model, &tokenizer, 4);
    let long = Request { prompt: tokens(20 * CHUNK, 3, 1020), ..request(0, 2) };
    batcher.push(long.clone());
    batcher.step().unwrap();
    let short = request(2, 3);
    let ids: Vec<usize> = (0..3).map(|_| batcher.push(short.clone())).collect();
    let mut first = vec![];
    batcher.step_with(&mut |id, _| first.push(id)).unwrap();
    // All of them in one step, beside a piece of the long one.
    assert_eq!((&first, batcher.reading()), (&ids, 1));
    let (results, _) = watched(&mut batcher, &[]);
    assert_eq!(results.len(), 4);
    for (id, text) in results {
        let request = if ids.contains(&id) { &short } else { &long };
        assert_eq!(text, by_itself(&model, request), "text {id}");
    }
}

#[test]
fn what_another_prompt_is_about_to_read_is_waited_for() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let mut batcher = up_to(&model, &tokenizer, 8);
    let prompt = tokens(3 * CHUNK + 17, 8, 1020);
    let options = request(0, 6).options;
    let requests: Vec<_> = (0..6)
        .map(|n| {
            let own = tokens(n, n as u32, 1020);
            Request { prompt: [&*prompt, &own].concat(), options: options.clone() }
        })
        .collect();
    for request in &requests {
        batcher.push(request.clone());
    }
    let (results, _) = watched(&mut batcher, &[]);
    assert_eq!(results.len(), 6);
    assert_eq!(batcher.shared(), 5 * prompt.len());
    for (id, text) in results {
        assert_eq!(text, by_itself(&model, &requests[id]), "text {id}");
    }
}

#[test]
fn tokens_come_with_their_probabilities_where_asked() {
    let (model, tokenizer) = (small::model(), small::tokenizer());
    let mut batcher = up_to(&model, &tokenizer, 3);
    let mut asked = request(2, 9);
    asked.options.logprobs = Some(3);
    let ids = [batcher.push(request(3, 9)), batcher.push(asked.clone())];
    let mut found = vec![];
    while !batcher.is_idle() {
        let watch = &mut |id, piece: &foveal_lm::generate::Piece| {
            assert_eq!(piece.logprobs.is_some(), id == ids[1]);
            found.extend(piece.logprobs.clone());
        };
        batcher.step_with(watch).unwrap();
    }
    let mut state = model.state().unwrap();
    let mut alone =
        Generator::new(&model, &tokenizer, &mut state, &asked.prompt, &asked.options).unwrap();
    let alone: Vec<_> = alone.by_ref().map(|piece| piece.unwrap().logprobs.unwrap()).collect();
    assert_eq!(found, alone);
    for logprobs in &found {
        assert!(logprobs.chosen <= 0.0 && logprobs.top.len() == 3);
        assert!(logprobs.top[0].1 >= logprobs.top[1].1 && logprobs.chosen <= logprobs.top[0].1);
    }
}
