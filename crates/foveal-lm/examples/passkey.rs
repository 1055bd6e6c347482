//! A number hidden in a long text of filler, asked for at its end: how often a model gives it, and whether it was fetched.
//!
//! ```text
//! cargo run --release -p foveal-lm --example passkey -- MODEL.gguf TOKENS HOW BUDGET SEEDS [THREADS]
//! ```
//!
//! HOW is `full` (attention to all), `window` (the first tokens and the newest, BUDGET in all) or `retrieve` (those and fetched
//! pieces, BUDGET in all). 11 depths, SEEDS numbers each; the text is Mohtashami and Jaggi's (2023), cut to TOKENS tokens. Prints one
//! line a depth: right answers, and the share of layers and key/value heads that had the number's place among what they fetched
//! when the answer began.

use std::ops::Range;
use std::path::Path;

use foveal::cache::Rolling;
use foveal::projection::Activations;
use foveal_lm::Model;
use foveal_lm::generate::{Generator, Options, Prompt, read};
use foveal_lm::mixer::{CacheOptions, CacheStorage, Keep, Retrieval};
use foveal_lm::model::State;
use foveal_lm::sample::Sampling;
use foveal_lm::tokenizer::{Encode, Tokenizer};
use foveal_lm::weights::{Description, Weights};

const DEPTHS: usize = 11;
const FILLER: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ";
const BEFORE: &str = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the important information there.\n\n";
const ASKED: &str = "\n\nWhat is the pass key? The pass key is";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, tokens, how, budget, seeds] = &arguments[..] else {
        return Err("give a model, TOKENS, full | window | retrieve, BUDGET and SEEDS".into());
    };
    let (tokens, budget, seeds) = (tokens.parse()?, budget.parse()?, seeds.parse()?);
    let weights = Weights::open(Path::new(path))?;
    let Description::Gguf(metadata) = weights.description() else {
        return Err("the model is to be a GGUF file".into());
    };
    let tokenizer = Tokenizer::from_gguf(metadata)?;
    let model = Model::new(&weights)?.with_activations(Activations::Bf16);
    let retrieval = Retrieval::within(budget);
    let keep = match how.as_str() {
        "full" => Keep::All,
        "window" => Keep::Rolling(Rolling::new(retrieval.sinks, budget - retrieval.sinks)?),
        "retrieve" => Keep::Retrieve(retrieval),
        _ => return Err("HOW is full, window or retrieve".into()),
    };
    let storage = CacheStorage::F16;
    let context = (how == "full").then_some(tokens + 64);
    let options = CacheOptions { storage, context, keep };
    println!("{tokens} tokens, {how}, {budget} in all, {seeds} numbers a depth");
    let (mut right, mut found) = (0, vec![]);
    for depth in 0..DEPTHS {
        let (mut own, mut fetched) = (0, vec![]);
        for seed in 0..seeds {
            let number = 10_000 + (seed * 7919 + depth * 104_729 + 12_345) % 90_000;
            let text = Text::new(&tokenizer, (tokens, depth), number)?;
            let mut state = model.state_with(&options)?;
            own += usize::from(answer(&model, &tokenizer, &text, &mut state, &mut fetched)?);
        }
        right += own;
        let share =
            mean(&fetched).map_or("-".to_owned(), |share| format!("{:.0} %", 100.0 * share));
        println!("depth {:3} %: {own:3} of {seeds} right, fetched by {share}", depth * 10);
        found.extend(fetched);
    }
    let share = mean(&found).map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share));
    let all = DEPTHS * seeds;
    let percent = 100.0 * right as f64 / all as f64;
    println!("all: {right} of {all}, {percent:.1} %; fetched by {share}");
    Ok(())
}

fn mean(x: &[f64]) -> Option<f64> {
    (!x.is_empty()).then(|| x.iter().sum::<f64>() / x.len() as f64)
}

/// A text and where its number is.
struct Text {
    tokens: Vec<u32>,
    place: Range<usize>,
    number: usize,
}

impl Text {
    fn new(
        tokenizer: &Tokenizer,
        (length, depth): (usize, usize),
        number: usize,
    ) -> Result<Text, foveal_lm::Error> {
        let encode = |text: &str| tokenizer.encode(text, Encode::TEXT);
        let needle = format!("The pass key is {number}. Remember it. {number} is the pass key. ");
        let (before, needle, asked) = (encode(BEFORE)?, encode(&needle)?, encode(ASKED)?);
        let filler = encode(FILLER)?;
        let room = length.saturating_sub(before.len() + needle.len() + asked.len());
        // Whole sentences before the number.
        let first = room * depth / (DEPTHS - 1) / filler.len() * filler.len();
        let mut tokens = before;
        tokens.extend(filler.iter().cycle().take(first));
        let place = tokens.len()..tokens.len() + needle.len();
        tokens.extend(needle);
        tokens.extend(filler.iter().cycle().take(room - first));
        tokens.extend(asked);
        Ok(Text { tokens, place, number })
    }
}

/// Whether the model gives the number; what share of heads has fetched its place is added to `fetched`.
fn answer(
    model: &Model,
    tokenizer: &Tokenizer,
    text: &Text,
    state: &mut State,
    fetched: &mut Vec<f64>,
) -> Result<bool, foveal_lm::Error> {
    let mut watch = |_| std::ops::ControlFlow::Continue(());
    let rest = read(model, &text.tokens, state, &mut watch)?;
    let options = Options { max_tokens: 8, sampling: Sampling::greedy(), ..Options::default() };
    let prompt = Prompt { held: &[], new: rest };
    let generator = Generator::new(model, tokenizer, state, prompt, &options)?;
    fetched.extend(share(generator.state(), &text.place));
    let said: Result<String, _> = generator.map(|piece| piece.map(|piece| piece.text)).collect();
    Ok(said?.contains(&text.number.to_string()))
}

/// The share of heads that have fetched the place of a number; `None` if none fetches.
fn share(state: &State, place: &Range<usize>) -> Option<f64> {
    let heads: Vec<Vec<Range<usize>>> = state.fetched().into_iter().flatten().flatten().collect();
    let has = |own: &&Vec<Range<usize>>| {
        own.iter().any(|piece| piece.start < place.end && place.start < piece.end)
    };
    let count = heads.iter().filter(has).count();
    (!heads.is_empty()).then(|| count as f64 / heads.len() as f64)
}
