//! Texts in pieces: the tokens of the whole, wherever it is cut, and predictions to the bit.

use std::ops::ControlFlow;
use std::path::PathBuf;

use foveal::projection::Format;
use foveal_lm::evaluate::{Running, by_position, token_nll};
use foveal_lm::mixer::{CacheOptions, CacheStorage};
use foveal_lm::model::{MemoryFolder, Scratch};
use foveal_lm::prompt_cache::{PromptCache, Streamed};
use foveal_lm::testing::{Tiny, TinySizes, byte_tokenizer};
use foveal_lm::text_stream::TextStream;
use foveal_lm::tokenizer::{Encode, GgufVocabulary, Tokenizer};
use foveal_lm::weights::Weights;
use foveal_lm::{Error, Model};
use serde_json::{Value, json};

/// A folder of its own, removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path =
            std::env::temp_dir().join(format!("foveal-stream-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn bytes() -> Tokenizer {
    Tokenizer::from_hugging_face(byte_tokenizer().to_string().as_bytes(), None).unwrap()
}

/// Merges by score, a space before a text, and a token that begins it.
fn sentence_piece() -> Tokenizer {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    tokens
        .extend(["▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc", "abc", "\n", "é"].map(str::to_owned));
    let texts: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let scores: Vec<f32> = (0..texts.len()).map(|n| -(n as f32)).collect();
    let kinds = (0..texts.len()).map(|n| {
        if n < 3 {
            3
        } else if n < 259 {
            6
        } else {
            1
        }
    });
    let vocabulary = GgufVocabulary {
        model: "llama",
        tokens: texts.clone(),
        scores: Some(scores),
        token_types: Some(kinds.collect()),
        ..GgufVocabulary::default()
    };
    Tokenizer::from_vocabulary(&vocabulary).unwrap()
}

const TEXT: &str = "ab cab\n\n  abc\nabc ab\r\nab é\n cab\n\nb\na bc ab  \n ab\né abc\n\n\nabc";

fn all(tokenizer: &Tokenizer, text: &str, piece: usize) -> Vec<u32> {
    let mut stream = TextStream::new(tokenizer, text.as_bytes()).unwrap().pieces_of(piece);
    let mut tokens = vec![];
    while let Some(piece) = stream.next_piece().unwrap() {
        tokens.extend(piece);
    }
    assert_eq!(stream.offset(), text.len() as u64);
    tokens
}

#[test]
fn tokens_are_those_of_the_whole() {
    for tokenizer in [bytes(), sentence_piece()] {
        for text in [TEXT, "", "a", "\n", "a\n", "\n\nab", "abc ab abc"] {
            let whole = tokenizer.encode(text, Encode::PROMPT).unwrap();
            for piece in [1, 2, 5, 7, 13, 30, 1000] {
                assert_eq!(all(&tokenizer, text, piece), whole, "{text:?} in pieces of {piece}");
            }
        }
    }
}

#[test]
fn a_text_is_taken_up_where_it_was_left() {
    for tokenizer in [bytes(), sentence_piece()] {
        let whole = all(&tokenizer, TEXT, 4);
        let mut stream = TextStream::new(&tokenizer, TEXT.as_bytes()).unwrap().pieces_of(4);
        let mut tokens = vec![];
        while let Some(piece) = stream.next_piece().unwrap() {
            tokens.extend(piece);
            let rest = TextStream::after(&tokenizer, TEXT.as_bytes(), stream.offset()).unwrap();
            let mut rest = rest.pieces_of(9);
            let mut both = tokens.clone();
            while let Some(piece) = rest.next_piece().unwrap() {
                both.extend(piece);
            }
            assert_eq!(both, whole);
        }
        let short = TextStream::after(&tokenizer, &b"ab"[..], 3).map(|stream| stream.offset());
        assert!(matches!(short, Err(Error::TextStream { .. })), "{short:?}");
    }
}

#[test]
fn what_is_no_text_is_refused() {
    let tokenizer = bytes();
    let mut stream = TextStream::new(&tokenizer, &b"ab\nab\xff ab"[..]).unwrap().pieces_of(3);
    let mut last = stream.next_piece();
    while matches!(last, Ok(Some(_))) {
        last = stream.next_piece();
    }
    let Err(Error::TextStream { reason }) = last else { panic!("{last:?}") };
    assert!(reason.contains("byte 5"), "{reason}");
}

fn model(mixer: &Value, folder: &Folder) -> (Model, Weights) {
    let sizes = TinySizes { vocab: 256, layers: 2, ..TinySizes::default() };
    Tiny::mixed(sizes, mixer, 64).save_folder(&folder.0, Format::F32, 1).unwrap();
    let weights = Weights::open(&folder.0).unwrap();
    (Model::new(&weights).unwrap(), weights)
}

fn mixers() -> Vec<Value> {
    let infini = json!({"name": "infini", "segment": 24});
    let xl = json!({"name": "transformer_xl", "segment": 16, "memory": 40});
    let memorizing = json!({"name": "memorizing", "segment": 30, "top": 5, "capacity": 300});
    let half = |mixer: &Value| {
        let mut half = mixer.clone();
        (half["heads"], half["kv_heads"]) = (2.into(), 1.into());
        half
    };
    let previous = json!({
        "name": "memorizing", "segment": 20, "top": 3, "capacity": 600, "previous": true,
        "index": {"lists": 4, "probes": 2}, "heads": 2, "kv_heads": 1,
    });
    vec![
        xl.clone(),
        infini.clone(),
        memorizing.clone(),
        json!([[half(&xl), previous], [half(&infini), half(&memorizing)]]),
    ]
}

fn text() -> String {
    (0..70).map(|n| format!("line {} of {}\n", n * n % 97, n % 7)).collect()
}

/// Reads a text from where it was left; saves it after each of `stops` pieces, and drops the state there.
fn read(
    (model, weights): (&Model, &Weights),
    options: CacheOptions,
    (folder, file): (Option<&MemoryFolder>, &std::path::Path),
    stops: usize,
) -> Option<Running> {
    let tokenizer = bytes();
    let cache = PromptCache::new(model, weights, options).unwrap();
    let cache = match folder {
        Some(folder) => cache.with_memories(folder.clone()),
        None => cache,
    };
    let (mut streamed, mut state) = cache.open_streamed(file).unwrap().unwrap_or_else(|| {
        let mut state = model.state_with(&options).unwrap();
        if let Some(folder) = folder {
            state.keep_memories_in(folder).unwrap();
        }
        (Streamed::default(), state)
    });
    let text = text();
    let stream = TextStream::after(&tokenizer, text.as_bytes(), streamed.offset).unwrap();
    let (mut stream, mut scratch) = (stream.pieces_of(100), Scratch::new());
    let mut pieces = 0;
    while let Some(piece) = stream.next_piece().unwrap() {
        let both = (&mut state, &mut scratch);
        let mut go_on = |_| ControlFlow::Continue(());
        streamed.running.push(model, &piece, both, &mut go_on).unwrap();
        streamed.offset = stream.offset();
        pieces += 1;
        if pieces == stops {
            state.sync_memories().unwrap();
            cache.save_streamed(file, &streamed, &state).unwrap();
        }
        if Some(pieces) == stops.checked_add(2) {
            // What was read after the file was written is lost, but for entries in files.
            return None;
        }
    }
    Some(streamed.running)
}

#[test]
fn a_stream_is_predicted_as_the_whole_and_taken_up_to_the_bit() {
    for (n, mixer) in mixers().iter().enumerate() {
        let folder = Folder::new(&format!("bits-{n}"));
        let (model, weights) = model(mixer, &folder);
        let tokens = bytes().encode(&text(), Encode::PROMPT).unwrap();
        let storages = [CacheStorage::F32, CacheStorage::Q8];
        for storage in storages {
            let options = CacheOptions { storage, ..CacheOptions::default() };
            let mut state = model.state_with(&options).unwrap();
            let mut go_on = |_| ControlFlow::Continue(());
            let nll = token_nll(&model, &tokens, &mut state, &mut go_on).unwrap();
            let entries = [None, Some(folder.0.join(format!("memories-{storage:?}")))];
            for (place, entries) in entries.into_iter().enumerate() {
                if place == 1 && !mixer.to_string().contains("memorizing") {
                    continue;
                }
                let whole = entries.map(|path| MemoryFolder::new(&path, &model, &weights));
                let file = folder.0.join(format!("state-{storage:?}-{place}"));
                let at = (whole.as_ref(), &*file);
                let once = read((&model, &weights), options, at, usize::MAX).unwrap();
                let total = once.total();
                assert_eq!(total.tokens, tokens.len() - 1);
                if place == 0 || !storage.coded() {
                    let sums: f64 = by_position(&nll, 1).iter().map(|bucket| bucket.nll).sum();
                    assert!((total.nll - sums).abs() < 1e-6 * sums, "{mixer} {storage:?}");
                }
                // Memories of the run before are cleared by a new text.
                let again = whole.as_ref().map(|_| folder.0.join(format!("again-{storage:?}")));
                let again = again.map(|path| MemoryFolder::new(&path, &model, &weights));
                let at = (again.as_ref(), &*file);
                let runs = || read((&model, &weights), options, at, 3);
                let taken_up = std::iter::from_fn(|| Some(runs())).flatten().next().unwrap();
                assert!(taken_up == once, "{mixer} {storage:?} {place}");
            }
        }
    }
}

#[test]
fn memories_that_do_not_fit_are_refused() {
    let folder = Folder::new("refused");
    let (model, weights) = model(&mixers()[2], &folder);
    let memories = MemoryFolder::new(&folder.0.join("memories"), &model, &weights);
    let mut state = model.state().unwrap();
    assert_eq!(state.keep_memories_in(&memories).unwrap(), 0);
    let second = model.state().unwrap().keep_memories_in(&memories);
    assert!(matches!(second, Err(Error::MemoryFile { .. })), "{second:?}");
    let tokens: Vec<u32> = (0..100).collect();
    let mut go_on = |_| ControlFlow::Continue(());
    token_nll(&model, &tokens, &mut state, &mut go_on).unwrap();
    assert_eq!(state.memory_file_bytes(), 2 * 90 * 2 * 16 * 4);
    let begun = state.keep_memories_in(&memories);
    assert!(matches!(begun, Err(Error::CacheOptions { .. })), "{begun:?}");
    drop(state);
    // Found again by the next text.
    let mut state = model.state().unwrap();
    assert_eq!(state.keep_memories_in(&memories).unwrap(), 90);
    let other = Folder::new("other");
    let (constant, own) = self::model(&mixers()[1], &other);
    let memories = MemoryFolder::new(&other.0.join("memories"), &constant, &own);
    let none = constant.state().unwrap().keep_memories_in(&memories);
    assert!(matches!(none, Err(Error::CacheOptions { .. })), "{none:?}");
}
