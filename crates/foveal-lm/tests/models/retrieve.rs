//! Long texts behind a short attention: exact while all is seen, what was hidden is fetched, and what bits may not depend on.

use std::sync::atomic::{AtomicUsize, Ordering};

use foveal::Phase;
use foveal::cache::Rolling;
use foveal::projection::Format;
use foveal_lm::mixer::{CacheOptions, CacheStorage, Keep, Retrieval};
use foveal_lm::model::{MemoryFolder, Scratch, Step};
use foveal_lm::prompt_cache::PromptCache;
use foveal_lm::testing::{Tiny, TinySizes};
use foveal_lm::weights::Weights;
use foveal_lm::{Error, Model};

use crate::formats::Folder;
use crate::latent::logits;
use crate::laws::assert_same;

const SMALL: Retrieval = Retrieval { sinks: 3, fetched: 12, window: 9, piece: 4, near: 2 };

fn options(keep: Keep) -> CacheOptions {
    CacheOptions { keep, ..CacheOptions::default() }
}

fn model(family: &str) -> (Folder, Model, Weights) {
    // A folder for each: tests run side by side.
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let number = MADE.fetch_add(1, Ordering::Relaxed);
    let folder = Folder::new(&format!("retrieve-{family}-{number}"));
    let sizes = TinySizes { layers: 3, ..TinySizes::default() };
    Tiny::new(family, sizes).save_folder(&folder.0, Format::F32, 1).unwrap();
    let weights = Weights::open(&folder.0).unwrap();
    (folder, Model::new(&weights).unwrap(), weights)
}

fn text(len: usize) -> Vec<u32> {
    (0..len).map(|n| (n * n + 7 * n) as u32 % 50).collect()
}

fn close(got: &[f32], expected: &[f32], bound: f32) {
    assert_eq!(got.len(), expected.len());
    for (a, b) in got.iter().zip(expected) {
        assert!((a - b).abs() <= bound * (1.0 + b.abs()), "{a} {b}");
    }
}

#[test]
fn it_is_exact_while_all_is_seen() {
    for family in ["llama", "qwen3", "qwen2-yarn"] {
        let (_folder, model, _) = model(family);
        for len in [1, 3, 4, 15, 16, 20, 24] {
            for phase in [Phase::Prompt, Phase::Generated] {
                let own = &text(len)[..];
                let mut state = model.state_with(&options(Keep::Retrieve(SMALL))).unwrap();
                let got = logits(&model, &mut state, phase, (own, &[len / 2]));
                let mut all = model.state().unwrap();
                let expected = logits(&model, &mut all, phase, (own, &[len / 2]));
                close(&got, &expected, 1e-4);
                assert!(state.fetched().iter().all(Option::is_none));
            }
        }
    }
}

/// With nothing to fetch, it is the first tokens and the newest.
#[test]
fn with_nothing_to_fetch_it_rolls() {
    let (_folder, model, _) = model("llama");
    let text = text(60);
    let none = Retrieval { sinks: 4, fetched: 0, window: 9, piece: 4, near: 9 };
    let mut state = model.state_with(&options(Keep::Retrieve(none))).unwrap();
    let rolling = options(Keep::Rolling(Rolling::new(4, 9).unwrap()));
    let mut rolled = model.state_with(&rolling).unwrap();
    for phase in [Phase::Generated, Phase::Prompt] {
        let got = logits(&model, &mut state, phase, (&text, &[]));
        close(&got, &logits(&model, &mut rolled, phase, (&text, &[])), 1e-4);
    }
}

#[test]
fn pieces_are_fetched_behind_the_first_tokens_and_before_the_window() {
    let (folder, model, weights) = model("llama");
    let text = text(200);
    let mut first = None;
    for storage in [CacheStorage::F32, CacheStorage::F16, CacheStorage::Q8] {
        for disk in [false, true] {
            let options = CacheOptions { storage, ..options(Keep::Retrieve(SMALL)) };
            let mut state = model.state_with(&options).unwrap();
            if disk {
                let path = folder.0.join("text");
                let memories = MemoryFolder::new(&path, &model, &weights);
                // A file stores numbers of one type.
                let _ = std::fs::remove_dir_all(&path);
                assert_eq!(state.keep_memories_in(&memories).unwrap(), 0);
            }
            let got = logits(&model, &mut state, Phase::Prompt, (&text, &[]));
            for fetched in state.fetched() {
                let heads = fetched.unwrap();
                assert_eq!(heads.len(), 2);
                for pieces in heads {
                    assert_eq!(pieces.len(), 3);
                    // The last call began at 192.
                    assert!(pieces.iter().all(|piece| piece.start >= 4 && piece.end <= 184));
                    assert!(pieces.windows(2).all(|pair| pair[0].end <= pair[1].start));
                }
            }
            assert_eq!(state.memory_file_bytes() > 0, disk);
            if storage == CacheStorage::F32 {
                assert_same(&got, first.get_or_insert_with(|| got.clone()));
            }
            // A new text gives the same again.
            state.reset();
            assert_same(&logits(&model, &mut state, Phase::Prompt, (&text, &[])), &got);
        }
    }
}

#[test]
fn generated_tokens_do_not_depend_on_company() {
    let (_folder, model, _) = model("llama");
    let text = text(90);
    let run = |cuts: &[usize]| {
        let mut state = model.state_with(&options(Keep::Retrieve(SMALL))).unwrap();
        logits(&model, &mut state, Phase::Generated, (&text, cuts))
    };
    let every: Vec<usize> = (1..90).collect();
    assert_same(&run(&[5, 30, 31, 80]), &run(&every));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (_folder, model, weights) = model("llama");
    for retrieval in [
        Retrieval { piece: 0, ..SMALL },
        Retrieval { window: 0, ..SMALL },
        Retrieval { near: 0, ..SMALL },
        Retrieval { near: 10, ..SMALL },
        Retrieval { fetched: 13, ..SMALL },
        Retrieval { fetched: 400, ..SMALL },
    ] {
        let refused = model.state_with(&options(Keep::Retrieve(retrieval)));
        assert!(matches!(refused, Err(Error::CacheOptions { .. })), "{retrieval:?}");
    }
    let cache = PromptCache::new(&model, &weights, options(Keep::Retrieve(SMALL)));
    assert!(matches!(cache, Err(Error::CacheOptions { .. })));
    let mut state = model.state_with(&options(Keep::Retrieve(SMALL))).unwrap();
    model.forward(&text(30), Step::PROMPT, &mut state, &mut Scratch::new()).unwrap();
    assert!(!model.rewind(&mut state, 20));
}
