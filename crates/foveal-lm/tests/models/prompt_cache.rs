//! What was read of a text, on disk: resumed to the bit, and refused where it is not this model's.

use std::cell::Cell;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

use foveal::cache::Rolling;
use foveal::projection::{Activations, Format};
use foveal_lm::mixer::{CacheOptions, CacheStorage, Keep};
use foveal_lm::model::{CHUNK, Step};
use foveal_lm::prompt_cache::PromptCache;
use foveal_lm::testing::{Tiny, TinySizes};
use foveal_lm::weights::Weights;
use foveal_lm::{Error, Model};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use crate::formats::Folder;
use crate::laws::{ALL_GENERATED, assert_same, run, tokens};
use crate::{latent, small};

/// Every kind of state: whole texts, texts of which the first tokens are given up, rolling ones.
fn every_kind() -> Vec<CacheOptions> {
    let mut all = vec![];
    for storage in CacheStorage::ALL {
        for context in [None, Some(1100)] {
            all.push(CacheOptions { storage, context, ..CacheOptions::default() });
        }
    }
    for (storage, sinks, window) in
        [(CacheStorage::F32, 4, 60), (CacheStorage::F16, 0, 100), (CacheStorage::Q8, 9, 600)]
    {
        let keep = Keep::Rolling(Rolling::new(sinks, window).unwrap());
        all.push(CacheOptions { storage, context: Some(1100), keep });
    }
    all
}

/// A model's prompt cache in a folder of its own.
struct Fixture {
    model: Model,
    weights: Weights,
    _folder: Folder,
    path: PathBuf,
}

impl Fixture {
    fn new(name: &str) -> Fixture {
        Fixture::of(name, small::weights())
    }

    fn of(name: &str, weights: Weights) -> Fixture {
        let folder = Folder::new(name);
        let (model, path) = (Model::new(&weights).unwrap(), folder.0.join("cache"));
        Fixture { model, weights, _folder: folder, path }
    }

    fn cache(&self, options: CacheOptions) -> PromptCache<'_> {
        PromptCache::new(&self.model, &self.weights, options).unwrap()
    }

    /// Reads a prompt by way of the file and goes on; everything has the bits of a text that never met a file.
    #[track_caller]
    fn check(&self, options: CacheOptions, prompt: &[u32], held: usize) {
        let mut watch = |_| ControlFlow::Continue(());
        let mut resumed = self.cache(options).read(&self.path, prompt, &mut watch).unwrap();
        assert_eq!((resumed.held, resumed.state.position()), (held, prompt.len() - 1));
        let mut fresh = self.model.state_with(&options).unwrap();
        let expected = run(&self.model, &mut fresh, prompt, Step::PROMPT);
        let last = &prompt[prompt.len() - 1..];
        assert_same(&run(&self.model, &mut resumed.state, last, Step::PROMPT), &expected);
        // A call gives up what none of its tokens sees: less where it has more tokens.
        assert!(resumed.state.kv_bytes() <= fresh.kv_bytes());
        for token in [3, 500, 77] {
            let expected = run(&self.model, &mut fresh, &[token], ALL_GENERATED);
            assert_same(&run(&self.model, &mut resumed.state, &[token], ALL_GENERATED), &expected);
        }
    }

    fn remove(&self) {
        std::fs::remove_file(&self.path).unwrap();
    }
}

#[test]
fn a_prompt_goes_on_to_the_bit() {
    let fixture = Fixture::new("prompt-cache-bits");
    let text = tokens(4 * CHUNK + 30, 1);
    for options in every_kind() {
        let mut held = 0;
        for len in [1, 2, 300, 301, 2 * CHUNK, 2 * CHUNK + 1, 4 * CHUNK + 30] {
            fixture.check(options, &text[..len], held);
            held = len - 1;
            if len > 1 {
                fixture.check(options, &text[..len], held);
            }
        }
        fixture.remove();
    }
}

#[test]
fn latent_rows_go_on_to_the_bit() {
    let folder = Folder::new("prompt-cache-latent-model");
    let tiny = latent::tiny("DeepseekV3ForCausalLM", Some(12));
    tiny.save_folder(&folder.0, Format::F32, 1).unwrap();
    let fixture = Fixture::of("prompt-cache-latent", Weights::open(&folder.0).unwrap());
    let text: Vec<u32> = tokens(2 * CHUNK, 2).iter().map(|token| token % 50).collect();
    let mut state = fixture.model.state().unwrap();
    let read = &text[..CHUNK + 9];
    run(&fixture.model, &mut state, read, Step::PROMPT);
    let cache = fixture.cache(CacheOptions::default());
    cache.save(&fixture.path, read, &state).unwrap();
    let (tokens, mut found) = cache.open(&fixture.path).unwrap().unwrap();
    assert_eq!((&tokens[..], found.kv_bytes()), (read, state.kv_bytes()));
    let expected = run(&fixture.model, &mut state, &text[CHUNK + 9..], Step::PROMPT);
    let resumed = run(&fixture.model, &mut found, &text[CHUNK + 9..], Step::PROMPT);
    assert_same(&resumed, &expected);
}

#[test]
fn another_text_is_read_from_where_they_part() {
    let fixture = Fixture::new("prompt-cache-parting");
    let text = tokens(900, 3);
    for (options, common) in every_kind().into_iter().flat_map(|kind| [(kind, 700), (kind, 300)]) {
        let mut other = text[..common].to_vec();
        other.extend(tokens(100, 4).iter().map(|token| (token + 1) % 1020));
        fixture.check(options, &text, 0);
        // A context of 128 has left behind what the 300th token sees.
        let there = options.keep == Keep::All && (options.context.is_some() || common == 700);
        let held = if there && !options.storage.coded() { common } else { 0 };
        fixture.check(options, &other, held);
        fixture.remove();
    }
}

#[test]
fn a_prompt_that_is_held_leaves_the_file_as_it_is() {
    let fixture = Fixture::new("prompt-cache-shorter");
    let (options, text) = (CacheOptions::default(), tokens(100, 5));
    fixture.check(options, &text, 0);
    let before = std::fs::read(&fixture.path).unwrap();
    fixture.check(options, &text[..60], 59);
    assert!(std::fs::read(&fixture.path).unwrap() == before);
    let stopped = fixture
        .cache(options)
        .read(&fixture.path, &tokens(100, 6), &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert!(std::fs::read(&fixture.path).unwrap() == before);
}

#[test]
fn what_another_made_is_refused() {
    let fixture = Fixture::new("prompt-cache-others");
    let options = CacheOptions::default();
    fixture.check(options, &tokens(20, 7), 0);
    let refused = |fixture: &Fixture, model: &Model, options, words: &str| {
        let cache = PromptCache::new(model, &fixture.weights, options).unwrap();
        let error = cache.open(&fixture.path).unwrap_err();
        assert!(matches!(error, Error::PromptCache { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.to_string().contains("delete it or name another file"), "{error}");
    };
    for storage in [CacheStorage::F16, CacheStorage::Q8] {
        let other = CacheOptions { storage, ..options };
        refused(&fixture, &fixture.model, other, "keys and values f32");
    }
    let other = CacheOptions { context: Some(99), ..options };
    refused(&fixture, &fixture.model, other, "context 99");
    let rounded = small::model().with_activations(Activations::Int8);
    refused(&fixture, &rounded, options, "activations int8");

    let folder = Folder::new("prompt-cache-other-model");
    let sizes = TinySizes { heads: 4, kv_heads: 4, layers: 4, ..TinySizes::default() };
    Tiny::new("llama", sizes).save_folder(&folder.0, Format::F32, 1).unwrap();
    let weights = Weights::open(&folder.0).unwrap();
    let model = Model::new(&weights).unwrap();
    let context = CacheOptions { context: Some(small::model().config().context), ..options };
    let error = PromptCache::new(&model, &weights, context).unwrap().open(&fixture.path);
    assert!(error.unwrap_err().to_string().contains("by another model"));
}

#[test]
fn what_can_not_be_written_is_refused() {
    let fixture = Fixture::new("prompt-cache-unwritten");
    for keep in [Keep::HeavyHitters { budget: 9 }, Keep::SnapKv { budget: 9 }] {
        let options = CacheOptions { keep, ..CacheOptions::default() };
        let refused = PromptCache::new(&fixture.model, &fixture.weights, options);
        assert!(matches!(refused, Err(Error::CacheOptions { .. })), "{refused:?}");
    }
    let cache = fixture.cache(CacheOptions::default());
    let mut state = fixture.model.state().unwrap();
    run(&fixture.model, &mut state, &[1, 2, 3], Step::PROMPT);
    let error = cache.save(&fixture.path, &[1, 2], &state).unwrap_err();
    assert!(error.to_string().contains("has read 3 tokens, not 2"), "{error}");
    let half = CacheOptions { storage: CacheStorage::F16, ..CacheOptions::default() };
    let state = fixture.model.state_with(&half).unwrap();
    let error = cache.save(&fixture.path, &[], &state).unwrap_err();
    assert!(error.to_string().contains("with other options"), "{error}");
    let nowhere = fixture.path.join("nowhere");
    let error = cache.save(&nowhere, &[], &fixture.model.state().unwrap()).unwrap_err();
    assert!(matches!(error, Error::Weights(_)), "{error}");
    assert!(cache.open(&fixture.path).unwrap().is_none());
}

#[test]
fn damaged_files_are_refused() {
    let fixture = Fixture::new("prompt-cache-damaged");
    let cache = fixture.cache(CacheOptions::default());
    fixture.check(CacheOptions::default(), &tokens(40, 8), 0);
    let whole = std::fs::read(&fixture.path).unwrap();
    let refused = |bytes: &[u8], what: &str| {
        std::fs::write(&fixture.path, bytes).unwrap();
        let found = cache.open(&fixture.path).map(|found| found.is_some());
        assert!(matches!(found, Err(Error::PromptCache { .. })), "{what}: {found:?}");
    };
    for len in (0..whole.len()).step_by(whole.len() / 50).chain([1, 7, 8, 9, whole.len() - 1]) {
        refused(&whole[..len], &format!("{len} bytes"));
    }
    for at in (0..whole.len()).step_by(whole.len() / 200) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        refused(&bytes, &format!("byte {at}"));
    }
    refused(b"{}", "text");
    refused(&std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap(), "text");
}

/// The same file with other arrays, and the right checksum.
pub(crate) fn forged(
    whole: &[u8],
    change: impl Fn(&str, &mut Dtype, &mut Vec<usize>, &mut Vec<u8>),
) -> Vec<u8> {
    let file = SafeTensors::deserialize(whole).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(whole).unwrap();
    let mut said: HashMap<String, String> = metadata.metadata().clone().unwrap();
    let mut arrays: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = vec![];
    for (name, view) in file.tensors() {
        let (mut dtype, mut shape, mut data) =
            (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        change(&name, &mut dtype, &mut shape, &mut data);
        arrays.push((name, dtype, shape, data));
    }
    arrays.retain(|array| !array.2.is_empty());
    arrays.sort_by(|a, b| a.0.cmp(&b.0));
    let mut digest = Sha256::new();
    for (name, _, _, data) in &arrays {
        digest.update((name.len() as u64).to_le_bytes());
        digest.update(name);
        digest.update((data.len() as u64).to_le_bytes());
        digest.update(data);
    }
    let hex: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    said.insert("foveal.sha256".to_owned(), hex);
    let views = arrays.iter().map(|(name, dtype, shape, data)| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize(views, Some(said)).unwrap()
}

#[test]
fn forged_files_are_refused() {
    let fixture = Fixture::new("prompt-cache-forged");
    for options in every_kind() {
        fixture.check(options, &tokens(700, 9), 0);
        let whole = std::fs::read(&fixture.path).unwrap();
        let cache = fixture.cache(options);
        std::fs::write(&fixture.path, forged(&whole, |_, _, _, _| {})).unwrap();
        assert!(cache.open(&fixture.path).unwrap().is_some());
        let refused = |bytes: &[u8], what: &str| {
            std::fs::write(&fixture.path, bytes).unwrap();
            let found = cache.open(&fixture.path).map(|found| found.is_some());
            assert!(matches!(found, Err(Error::PromptCache { .. })), "{what}: {found:?}");
        };
        for (at, value) in
            (0..6).flat_map(|at| [0u64, 1, 256, 512, 768, 1 << 40, u64::MAX].map(|x| (at, x)))
        {
            let changed = Cell::new(false);
            let bytes = forged(&whole, |name, _, _, data| {
                if name == "spans" {
                    let number = &mut data[8 * at..8 * at + 8];
                    changed.set(*number != value.to_le_bytes());
                    number.copy_from_slice(&value.to_le_bytes());
                }
            });
            if changed.get() {
                refused(&bytes, &format!("{options:?}: position {value} at {at}"));
            }
        }
        for gone in ["spans", "tokens", "layer.0.keys", "layer.1.values"] {
            let bytes = forged(&whole, |name, _, shape, _| {
                if name == gone {
                    shape.clear();
                }
            });
            refused(&bytes, &format!("{options:?}: no {gone}"));
        }
        let token = forged(&whole, |name, _, _, data| {
            if name == "tokens" {
                data[2] = 1;
            }
        });
        refused(&token, "a token that is none");
        let fewer = forged(&whole, |name, _, shape, data| {
            if name == "tokens" {
                shape[0] -= 1;
                data.truncate(4 * shape[0]);
            }
        });
        refused(&fewer, "another number of tokens");
        fixture.remove();
    }
}
