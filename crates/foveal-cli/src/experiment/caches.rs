//! E7: how many bits a smaller cache costs.
//!
//! Liu et al. 2024, arXiv:2402.02750; Xiao et al. 2024, arXiv:2309.17453; Zhang et al. 2023, arXiv:2306.14048.

use foveal::cache::Rolling;
use foveal_lm::Model;
use foveal_lm::mixer::{CacheOptions, CacheStorage, Keep};

use super::Numbers;
use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table};
use super::language::{Folder, bits_per_byte, config, held_out, trained};
use super::results::Results;
use crate::plot::{Axis, Plot, Series};

/// Held-out bytes that are read; those of each text's last third are predicted.
const READ: usize = 1 << 14;
/// Tokens of the window, first ones included, and how many of those.
const WINDOW: usize = 64;
const SINKS: usize = 4;
/// Keys that are kept, as shares of a text.
const BUDGETS: [(&str, f64); 3] = [("50 %", 0.5), ("20 %", 0.2), ("10 %", 0.1)];

/// All caches by name.
fn caches(tokens: usize) -> anyhow::Result<Vec<(String, CacheOptions)>> {
    let stored = |storage: CacheStorage| CacheOptions { storage, ..CacheOptions::default() };
    let kept = |keep: Keep| CacheOptions { keep, ..CacheOptions::default() };
    let storages = [CacheStorage::F32, CacheStorage::F16, CacheStorage::Q8, CacheStorage::Q4];
    let mut all: Vec<(String, CacheOptions)> =
        storages.map(|storage| (storage.name().to_owned(), stored(storage))).to_vec();
    let rolling = |sinks: usize, window: usize| -> anyhow::Result<CacheOptions> {
        Ok(kept(Keep::Rolling(Rolling::new(sinks, window)?)))
    };
    all.push(("window".to_owned(), rolling(0, WINDOW)?));
    all.push(("window, first tokens".to_owned(), rolling(SINKS, WINDOW - SINKS)?));
    for (name, share) in BUDGETS {
        let budget = (share * tokens as f64).ceil() as usize;
        all.push((format!("H2O {name}"), kept(Keep::HeavyHitters { budget })));
        all.push((format!("newest {name}"), rolling(0, budget)?));
    }
    Ok(all)
}

pub(super) fn run(cell: &Cell) -> anyhow::Result<Numbers> {
    let tokens = cell.count("tokens")?;
    let folder = Folder::new(&cell.name())?;
    trained(config(cell, (cell.count("heads")?, None))?, folder.path())?;
    let model = Model::load(folder.path())?;
    let text = held_out(READ);
    let from = tokens * 2 / 3;
    let mut numbers = Numbers::new();
    for (name, options) in caches(tokens)? {
        numbers.insert(name, bits_per_byte(&model, &text, (tokens, from), &options)?);
    }
    Ok(numbers)
}

pub(super) fn judge(results: &Results) -> Judgement {
    let of = |name: &str| results.numbers(&[], name);
    let costs = |name: &str| -> Vec<f64> {
        of(name).iter().zip(of("f32")).map(|(bits, plain)| bits - plain).collect()
    };
    let mut checks = vec![
        Check::within("codes of 8 bits cost at most 0.002 bits a byte", &costs("q8"), -1.0..=0.002),
        Check::within("codes of 4 bits cost at most 0.02 bits a byte", &costs("q4"), -1.0..=0.02),
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
    let names: Vec<String> = caches(768).unwrap_or_default().into_iter().map(|one| one.0).collect();
    let text =
        |numbers: &[f64]| Sample::of(numbers).map_or("–".to_owned(), |one| one.to_string());
    let row = |name: &String| vec![name.clone(), text(&of(name)), text(&costs(name))];
    let head = ["cache", "bits per byte", "cost against f32"].map(str::to_owned).to_vec();
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
        y: Axis::linear("bits per byte more than with all"),
        series: ["H2O", "newest"].map(line).to_vec(),
    };
    Judgement { checks, table, plots: vec![plot] }
}
