//! Damaged model files: an error or some text, never a panic.

use foveal_lm::generate::{Generator, Options, prompt_tokens};
use foveal_lm::tokenizer::Tokenizer;
use foveal_lm::weights::{Description, Gguf, Weights};
use foveal_lm::{Error, Model};

/// All that the command does with a file.
fn use_file(bytes: Vec<u8>) -> Result<usize, Error> {
    let weights = Weights::from_gguf(Gguf::from_bytes(bytes)?)?;
    let model = Model::new(&weights)?;
    let Description::Gguf(metadata) = weights.description() else { panic!("a GGUF file") };
    let tokenizer = Tokenizer::from_gguf(metadata)?;
    let prompt = prompt_tokens(&tokenizer, "Alice was beginning to")?;
    let options = Options { max_tokens: 3, ..Options::default() };
    let mut state = model.state()?;
    let pieces = Generator::new(&model, &tokenizer, &mut state, &prompt, &options)?;
    Ok(pieces.collect::<Result<Vec<_>, Error>>()?.len())
}

fn file() -> Vec<u8> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/assets/glassllm-en.gguf");
    std::fs::read(path).unwrap()
}

/// Where the tensors' data begins.
fn header(file: &[u8]) -> usize {
    let weights = Weights::from_gguf(Gguf::from_bytes(file.to_vec()).unwrap()).unwrap();
    weights.tensors().iter().map(|tensor| tensor.offset).min().unwrap()
}

#[test]
fn flipped_bits_in_the_header_are_survived() {
    let (whole, mut state) = (file(), 1u64);
    let header = header(&whole);
    let mut random = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let (mut fine, mut refused) = (0, 0);
    for round in 0..400 {
        let mut bytes = whole.clone();
        // The keys come first, and matter most.
        let below = if round % 2 == 0 { 1200 } else { header };
        for _ in 0..=random(3) {
            bytes[random(below)] ^= 1 << random(8);
        }
        match use_file(bytes) {
            Ok(_) => fine += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(fine > 0 && refused > 0, "{fine} fine, {refused} refused");
}

#[test]
fn files_that_are_cut_short_are_refused() {
    let whole = file();
    let header = header(&whole);
    let lengths = [0, 1, 4, 8, 23, 24, 100, 1000, header - 1, header, whole.len() / 2];
    for length in lengths {
        assert!(use_file(whole[..length].to_vec()).is_err(), "{length} bytes");
    }
    assert_eq!(use_file(whole).unwrap(), 3);
}

#[test]
fn weights_that_are_no_numbers_are_an_error() {
    let mut bytes = file();
    let header = header(&bytes);
    // NaN in all formats.
    bytes[header..].fill(0xff);
    let error = use_file(bytes).unwrap_err();
    assert!(matches!(error, Error::Logit { .. } | Error::NoCandidate), "{error}");
}
