//! A number hidden in a long text of filler, asked for at its end: how often a model gives it, and whether it was fetched.
//!
//! ```text
//! cargo run --release -p foveal-lm --example passkey -- MODEL.gguf TOKENS HOW BUDGET SEEDS > record.csv
//! ```
//!
//! HOW is `full` (attention to all), `window` (the first tokens and the newest, BUDGET in all) or `retrieve` (those and fetched
//! pieces, BUDGET in all). 11 depths, SEEDS numbers each, or those of FIRST..END; the text is Mohtashami and Jaggi's (2023), cut
//! to TOKENS tokens. What comes before a number is read once for all of them. Prints a line of CSV for each answer: whether it is
//! right, and the share of layers and key/value heads that had all of the number's sentences among what they fetched when the
//! answer began. Sums go to standard error.

use std::ops::Range;
use std::path::Path;

use foveal::cache::Rolling;
use foveal::projection::Activations;
use foveal_lm::Model;
use foveal_lm::generate::{Generator, Options, Prompt, read};
use foveal_lm::mixer::{CacheOptions, CacheStorage, Keep, Retrieval};
use foveal_lm::model::{Logits, Scratch, State, Step};
use foveal_lm::sample::Sampling;
use foveal_lm::tokenizer::{Encode, Tokenizer};
use foveal_lm::weights::{Description, Weights};

const DEPTHS: usize = 11;
/// What is read together of a prompt, at most: a text is cut at a multiple of it.
const CHUNK: usize = 256;
const FILLER: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ";
const BEFORE: &str = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the important information there.\n\n";
const ASKED: &str = "\n\nWhat is the pass key? The pass key is";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, tokens, how, budget, seeds] = &arguments[..] else {
        return Err("give a model, TOKENS, full | window | retrieve, BUDGET and SEEDS".into());
    };
    let (tokens, budget): (usize, usize) = (tokens.parse()?, budget.parse()?);
    let seeds: Range<usize> = match seeds.split_once("..") {
        Some((first, end)) => first.parse()?..end.parse()?,
        None => 0..seeds.parse()?,
    };
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
    let context = (how == "full").then_some(tokens + 64);
    let options = CacheOptions { storage: CacheStorage::F16, context, keep };
    let case = Case { model: &model, tokenizer: &tokenizer, tokens };
    println!("tokens,how,budget,depth,seed,right,fetched");
    let (mut right, mut found, mut base) = (0, vec![], model.state_with(&options)?);
    for (depth, seed) in (0..DEPTHS).flat_map(|depth| seeds.clone().map(move |seed| (depth, seed)))
    {
        let number = 10_000 + (seed * 7919 + depth * 104_729 + 12_345) % 90_000;
        let text = case.text(depth, number)?;
        case.read_before(&text, &mut base)?;
        let (own, fetched) = case.answer(&text, base.clone(), number)?;
        let share = fetched.map_or(String::new(), |share| format!("{share:.3}"));
        println!("{tokens},{how},{budget},{depth},{seed},{},{share}", u8::from(own));
        right += usize::from(own);
        found.extend(fetched);
    }
    let (all, mean) = (DEPTHS * seeds.len(), found.iter().sum::<f64>() / found.len().max(1) as f64);
    let percent = 100.0 * right as f64 / all as f64;
    let fetched = match found.is_empty() {
        true => String::new(),
        false => format!("; fetched by {:.1} %", 100.0 * mean),
    };
    eprintln!("{right} of {all} right, {percent:.1} %{fetched}");
    Ok(())
}

/// What texts of a length are made for.
struct Case<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    tokens: usize,
}

/// A text and where its number is.
struct Text {
    tokens: Vec<u32>,
    place: Range<usize>,
}

impl Case<'_> {
    fn text(&self, depth: usize, number: usize) -> Result<Text, foveal_lm::Error> {
        let encode = |text: &str| self.tokenizer.encode(text, Encode::TEXT);
        let needle = format!("The pass key is {number}. Remember it. {number} is the pass key. ");
        let (before, needle, asked) = (encode(BEFORE)?, encode(&needle)?, encode(ASKED)?);
        let filler = encode(FILLER)?;
        let room = self.tokens.saturating_sub(before.len() + needle.len() + asked.len());
        // Whole sentences before the number.
        let first = room * depth / (DEPTHS - 1) / filler.len() * filler.len();
        let mut tokens = before;
        tokens.extend(filler.iter().cycle().take(first));
        let place = tokens.len()..tokens.len() + needle.len();
        tokens.extend(needle);
        tokens.extend(filler.iter().cycle().take(room - first));
        tokens.extend(asked);
        Ok(Text { tokens, place })
    }

    /// Reads what all texts of a depth have in common, on from what those of less depth have.
    fn read_before(&self, text: &Text, base: &mut State) -> Result<(), foveal_lm::Error> {
        let shared = base.position()..text.place.start / CHUNK * CHUNK;
        let step = Step { logits: Logits::None, ..Step::PROMPT };
        self.model.forward(&text.tokens[shared], step, base, &mut Scratch::new())
    }

    /// Whether the model gives the number at the end of a text of which `state` has read a part, and what share of heads had
    /// fetched its place by then.
    fn answer(
        &self,
        text: &Text,
        mut state: State,
        number: usize,
    ) -> Result<(bool, Option<f64>), foveal_lm::Error> {
        let Case { model, tokenizer, .. } = *self;
        let mut watch = |_| std::ops::ControlFlow::Continue(());
        let rest = read(model, &text.tokens[state.position()..], &mut state, &mut watch)?;
        let options = Options { max_tokens: 8, sampling: Sampling::greedy(), ..Options::default() };
        let prompt = Prompt { held: &[], new: rest };
        let generator = Generator::new(model, tokenizer, &mut state, prompt, &options)?;
        let fetched = share(generator.state(), &text.place);
        let said: Result<String, _> =
            generator.map(|piece| piece.map(|piece| piece.text)).collect();
        Ok((said?.contains(&number.to_string()), fetched))
    }
}

/// The share of heads that have fetched all of a place; `None` if none fetches.
fn share(state: &State, place: &Range<usize>) -> Option<f64> {
    let heads: Vec<Vec<Range<usize>>> = state.fetched().into_iter().flatten().flatten().collect();
    let has = |own: &&Vec<Range<usize>>| {
        place.clone().all(|at| own.iter().any(|piece| piece.contains(&at)))
    };
    let count = heads.iter().filter(has).count();
    (!heads.is_empty()).then(|| count as f64 / heads.len() as f64)
}
