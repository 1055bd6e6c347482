//! `foveal bench`: how fast a whole model reads and writes on this machine.
//!
//! Each round reads a prompt of every length and goes on greedily from there, so that what disturbs the machine for a
//! while disturbs all cases. All rounds of a case have to make the same tokens: what computes something else from round to
//! round is an error and has no speed.

use std::time::Instant;

use foveal_lm::Model;
use foveal_lm::generate::read;
use foveal_lm::model::{Scratch, State, Step};
use foveal_lm::sample::{Sampler, Sampling};
use foveal_lm::tokenizer::TokenKind;
use serde_json::json;

use crate::kv::KvArguments;
use crate::session::{ModelArguments, Session};
use crate::{interrupt, numbers, output};

/// Measure how fast a model reads prompts and makes tokens.
///
/// For each length: tokens per second of reading a prompt so long, and of making tokens behind it; best and median of the
/// rounds. Tokens are made greedily and must be the same in every round.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Lengths of prompts.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [128, 512, 2048], value_parser = numbers::tokens)]
    lengths: Vec<usize>,

    /// Tokens to make behind each prompt.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 64, value_parser = numbers::tokens)]
    tokens: usize,

    /// Rounds, besides one that is not counted.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = numbers::tokens)]
    rounds: usize,

    #[command(flatten)]
    model: ModelArguments,

    #[command(flatten)]
    kv: KvArguments,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// One length.
#[derive(Debug, Default)]
struct Case {
    length: usize,
    /// Seconds of each round.
    read: Vec<f64>,
    made: Vec<f64>,
    greedy: Vec<u32>,
    kv_bytes: usize,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    arguments.model.run(|session| bench(arguments, session))
}

fn bench(arguments: &Arguments, session: &Session) -> anyhow::Result<()> {
    let model = &session.model;
    let longest = arguments.lengths.iter().max().copied().unwrap_or(0);
    arguments.kv.warn(model, longest.saturating_add(arguments.tokens));
    let prompt = prompt(session, longest);
    let mut state = arguments.kv.state(model)?;
    let case = |&length: &usize| Case { length, ..Case::default() };
    let mut cases: Vec<Case> = arguments.lengths.iter().map(case).collect();
    for round in 0..=arguments.rounds {
        for case in &mut cases {
            let measured = measure(model, &prompt[..case.length], arguments.tokens, &mut state)?;
            case.take(measured, round > 0)?;
            case.kv_bytes = state.kv_bytes();
        }
    }
    if arguments.json {
        return Ok(output::print_json(&as_json(arguments, session, &cases))?);
    }
    Ok(output::print(&table(arguments, session, &cases))?)
}

/// Plain tokens of the vocabulary, one after the other: speed does not depend on what they say.
fn prompt(session: &Session, length: usize) -> Vec<u32> {
    let size = session.tokenizer.vocab_size().min(session.model.config().vocab) as u32;
    let plain = |&token: &u32| session.tokenizer.token_kind(token) == Some(TokenKind::Normal);
    let mut tokens: Vec<u32> = (0..size).filter(plain).collect();
    if tokens.is_empty() {
        tokens.push(0);
    }
    tokens.into_iter().cycle().take(length).collect()
}

struct Measured {
    read: f64,
    made: f64,
    greedy: Vec<u32>,
}

fn measure(
    model: &Model,
    prompt: &[u32],
    tokens: usize,
    state: &mut State,
) -> anyhow::Result<Measured> {
    state.reset();
    let mut scratch = Scratch::new();
    let start = Instant::now();
    let rest = read(model, prompt, state, &mut |_| interrupt::flow())?;
    model.forward(rest, Step::PROMPT, state, &mut scratch)?;
    let read = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut sampler = Sampler::new(Sampling::greedy())?;
    let mut greedy = Vec::with_capacity(tokens + 1);
    greedy.push(sampler.sample(scratch.logits())?);
    for n in 0..tokens {
        model.forward(&[greedy[n]], Step::GENERATED, state, &mut scratch)?;
        greedy.push(sampler.sample(scratch.logits())?);
        if interrupt::asked() {
            return Err(foveal_lm::Error::Interrupted.into());
        }
    }
    Ok(Measured { read, made: start.elapsed().as_secs_f64(), greedy })
}

impl Case {
    fn take(&mut self, measured: Measured, counts: bool) -> anyhow::Result<()> {
        let Measured { read, made, greedy } = measured;
        if self.greedy.is_empty() {
            self.greedy = greedy;
        } else {
            let same = self.greedy.iter().zip(&greedy).take_while(|(a, b)| a == b).count();
            anyhow::ensure!(
                same == self.greedy.len(),
                "two rounds of {} tokens differ from token {same} on; this is a fault of foveal or of \
                 the machine, please report it",
                self.length
            );
        }
        if counts {
            self.read.push(read);
            self.made.push(made);
        }
        Ok(())
    }

    /// Tokens per second, best and median.
    fn reading(&self) -> [f64; 2] {
        rates(self.length, &self.read)
    }

    fn making(&self) -> [f64; 2] {
        rates(self.greedy.len() - 1, &self.made)
    }
}

fn rates(tokens: usize, seconds: &[f64]) -> [f64; 2] {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (best, middle) = (sorted[0], sorted.len() / 2);
    let median = match sorted.len() % 2 {
        0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    };
    [best, median].map(|seconds| numbers::rate(tokens, seconds))
}

fn table(arguments: &Arguments, session: &Session, cases: &[Case]) -> String {
    let mut text = format!(
        "{:>8} {:>21} {:>21} {:>12}\n{:>8} {:>10} {:>10} {:>10} {:>10} {:>12}\n",
        "",
        "reading, tok/s",
        "making, tok/s",
        "keys and",
        "tokens",
        "best",
        "median",
        "best",
        "median",
        "values",
    );
    for case in cases {
        let ([read, read_median], [made, made_median]) = (case.reading(), case.making());
        let kv = numbers::bytes(case.kv_bytes).to_string();
        text += &format!(
            "{:>8} {read:>10.1} {read_median:>10.1} {made:>10.1} {made_median:>10.1} {kv:>12}\n",
            case.length,
        );
    }
    let resident = numbers::resident_bytes();
    let resident = resident.map_or_else(|| "?".to_owned(), |n| numbers::bytes(n).to_string());
    text + &format!(
        "\n{} on {} threads, {} rounds, {} tokens made behind each prompt, {resident} resident at most\n",
        session.model.config().architecture,
        rayon::current_num_threads(),
        arguments.rounds,
        arguments.tokens,
    )
}

fn as_json(arguments: &Arguments, session: &Session, cases: &[Case]) -> serde_json::Value {
    let cases = cases.iter().map(|case| {
        let ([read, read_median], [made, made_median]) = (case.reading(), case.making());
        json!({
            "length": case.length,
            "read_best": read,
            "read_median": read_median,
            "read_seconds": case.read,
            "made": case.greedy.len() - 1,
            "made_best": made,
            "made_median": made_median,
            "made_seconds": case.made,
            "greedy": case.greedy,
            "kv_bytes": case.kv_bytes,
        })
    });
    json!({
        "architecture": session.model.config().architecture.name(),
        "threads": rayon::current_num_threads(),
        "rounds": arguments.rounds,
        "cases": cases.collect::<Vec<_>>(),
        "resident_bytes": numbers::resident_bytes(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_fastest_and_the_middle_round() {
        assert_eq!(rates(10, &[4.0, 1.0, 2.0]), [10.0, 5.0]);
        assert_eq!(rates(10, &[4.0, 1.0]), [10.0, 4.0]);
    }

    #[test]
    fn rounds_that_differ_have_no_speed() {
        let measured = |last| Measured { read: 1.0, made: 1.0, greedy: vec![1, 2, last] };
        let mut case = Case { length: 5, ..Case::default() };
        case.take(measured(3), false).unwrap();
        case.take(measured(3), true).unwrap();
        assert_eq!((case.read.len(), case.making()), (1, [2.0, 2.0]));
        let error = case.take(measured(4), true).unwrap_err();
        assert!(error.to_string().contains("differ from token 2 on"), "{error}");
    }
}
