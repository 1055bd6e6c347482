//! E7: how many bits a smaller cache costs a model that was trained with all of it.
//!
//! Liu et al. 2024, arXiv:2402.02750; Xiao et al. 2024, arXiv:2309.17453; Zhang et al. 2023, arXiv:2306.14048.

use foveal::cache::Rolling;
use foveal_lm::Model;
use foveal_lm::evaluate::token_nll;
use foveal_lm::mixer::{CacheOptions, CacheStorage, Keep};
use foveal_lm::tokenizer::Encode;

use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table};
use super::results::Results;
use super::{Models, Numbers};
use crate::plot::{Axis, Plot, Series};
use crate::{interrupt, source, train};

/// How many of the first tokens a window keeps.
const SINKS: usize = 4;
/// Keys that are kept, as shares of a text.
const BUDGETS: [(&str, f64); 3] = [("50 %", 0.5), ("20 %", 0.2), ("10 %", 0.1)];

/// All caches by name.
fn caches(tokens: usize, window: usize) -> anyhow::Result<Vec<(String, CacheOptions)>> {
    let stored = |storage: CacheStorage| CacheOptions { storage, ..CacheOptions::default() };
    let kept = |keep: Keep| CacheOptions { keep, ..CacheOptions::default() };
    let storages = [CacheStorage::F32, CacheStorage::F16, CacheStorage::Q8, CacheStorage::Q4];
    let mut all: Vec<(String, CacheOptions)> =
        storages.map(|storage| (storage.name().to_owned(), stored(storage))).to_vec();
    let rolling = |sinks: usize, window: usize| -> anyhow::Result<CacheOptions> {
        Ok(kept(Keep::Rolling(Rolling::new(sinks, window)?)))
    };
    all.push(("window".to_owned(), rolling(0, window)?));
    all.push(("window, first tokens".to_owned(), rolling(SINKS, window - SINKS)?));
    for (name, share) in BUDGETS {
        let budget = (share * tokens as f64).ceil() as usize;
        all.push((format!("H2O {name}"), kept(Keep::HeavyHitters { budget })));
        all.push((format!("newest {name}"), rolling(0, budget)?));
    }
    Ok(all)
}

pub(super) fn run(cell: &Cell, models: &Models) -> anyhow::Result<Numbers> {
    let (tokens, window) = (cell.count("tokens")?, cell.count("window")?);
    anyhow::ensure!(window > SINKS, "a window of {window} tokens with {SINKS} first ones");
    let path = models.path(cell.word("model")?)?;
    let weights = source::open(Some(&path))?;
    let model = Model::new(&weights)?;
    let tokenizer = source::tokenizer(Some(&path), &weights)?;
    let text = part(cell.seed()? as usize, 16 * tokens);
    let mut text = tokenizer.encode(text, Encode::TEXT)?;
    anyhow::ensure!(
        text.len() >= tokens,
        "the part has {} tokens, fewer than {tokens}",
        text.len()
    );
    text.truncate(tokens);
    let from = tokens * 2 / 3;
    let mut numbers = Numbers::new();
    for (name, options) in caches(tokens, window)? {
        numbers.insert(name, bits_behind(&model, (&text, from), &options)?);
    }
    Ok(numbers)
}

/// Bits a token of a text from place `from` on, with keys and values kept as `options` say.
fn bits_behind(
    model: &Model,
    (text, from): (&[u32], usize),
    options: &CacheOptions,
) -> anyhow::Result<f64> {
    let mut state = model.state_with(options)?;
    let nll = token_nll(model, text, &mut state, &mut |_| interrupt::flow())?;
    // The first token is predicted by nothing.
    let own = nll.get(from.saturating_sub(1)..).unwrap_or(&[]);
    anyhow::ensure!(!own.is_empty(), "a text of {} tokens, to be read from {from} on", text.len());
    let sum = own.iter().map(|&nll| f64::from(nll)).sum::<f64>();
    Ok(sum / std::f64::consts::LN_2 / own.len() as f64)
}

/// Another place of the novel for each seed, so many bytes.
fn part(seed: usize, bytes: usize) -> &'static str {
    let text = train::TEXT;
    // Behind the title and the list of chapters.
    let first = (4096 + seed * 40_009) % text.len().saturating_sub(bytes).max(1);
    let first = text.ceil_char_boundary(first);
    &text[first..text.ceil_char_boundary((first + bytes).min(text.len()))]
}

pub(super) fn judge(results: &Results) -> Judgement {
    let of = |name: &str| results.numbers(&[], name);
    let costs = |name: &str| -> Vec<f64> {
        of(name).iter().zip(of("f32")).map(|(bits, plain)| bits - plain).collect()
    };
    let mut checks = vec![
        Check::within("codes of 8 bits cost at most 0.01 bits a token", &costs("q8"), -1.0..=0.01),
        Check::within("codes of 4 bits cost at most 0.1 bits a token", &costs("q4"), -1.0..=0.1),
        Check::greater("codes of 4 bits cost more than those of 8", &costs("q4"), &costs("q8")),
        Check::greater(
            "a window without the first tokens costs more than one with them",
            &costs("window"),
            &costs("window, first tokens"),
        ),
    ];
    for (name, _) in BUDGETS {
        let words = format!("keeping the newest {name} of the keys costs more than H2O");
        let (newest, heavy) = (costs(&format!("newest {name}")), costs(&format!("H2O {name}")));
        checks.push(Check::greater(&words, &newest, &heavy));
    }
    let names: Vec<String> =
        caches(1024, 256).unwrap_or_default().into_iter().map(|one| one.0).collect();
    let row =
        |name: &String| vec![name.clone(), Sample::words(&of(name)), Sample::words(&costs(name))];
    let head = ["cache", "bits per token", "cost against f32"].map(str::to_owned).to_vec();
    let table = Table { head, rows: names.iter().map(row).collect() };
    let line = |kind: &str| Series {
        name: kind.to_owned(),
        points: BUDGETS
            .iter()
            .filter_map(|(name, share)| {
                Some((100.0 * share, Sample::of(&costs(&format!("{kind} {name}")))?.mean))
            })
            .collect(),
    };
    let plot = Plot {
        title: "Bits that fewer keys cost",
        x: Axis::log("keys kept, % of the text"),
        y: Axis::linear("bits per token more than with all"),
        series: ["H2O", "newest"].map(line).to_vec(),
    };
    Judgement { checks, table, plots: vec![plot] }
}
