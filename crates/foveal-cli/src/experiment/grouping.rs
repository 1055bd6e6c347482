//! E8: fewer key/value heads from a model that has as many as query heads.
//!
//! Ainslie et al. 2023, "GQA", arXiv:2305.13245.

use std::path::Path;

use foveal::projection::Format;
use foveal_lm::Model;
use foveal_lm::convert::{Attention, Conversion, Pool, convert};
use foveal_lm::train::Config;
use foveal_lm::train::config::{ModelSection, ScheduleSection};

use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table};
use super::language::{Folder, bits_a_token, config, held_out, trained};
use super::results::Results;
use super::{Models, Numbers};
use crate::plot::{Axis, Plot, Series};

/// Held-out bytes that are predicted.
const PREDICTED: usize = 1 << 14;
/// Further training, in hundredths of the steps before.
const SHARES: [usize; 3] = [0, 5, 20];
const POOLS: [(&str, Pool); 3] =
    [("mean", Pool::Mean), ("first", Pool::First), ("random", Pool::Random)];

pub(super) fn run(cell: &Cell, _: &Models) -> anyhow::Result<Numbers> {
    let tokens = cell.count("tokens")?;
    let text = held_out(PREDICTED);
    let bits = |folder: &Path| -> anyhow::Result<f64> {
        bits_a_token(&Model::load(folder)?, &text, tokens)
    };
    let base = config(cell, (cell.count("heads")?, None))?;
    let before = Folder::new(&format!("{}-before", cell.name()))?;
    trained(base.clone(), before.path())?;
    let mut numbers = Numbers::from([("before".to_owned(), bits(before.path())?)]);
    for (name, pool) in POOLS {
        let after = Folder::new(&format!("{}-{name}", cell.name()))?;
        let attention = Attention::Grouped { kv_heads: cell.count("kv_heads")?, pool };
        let conversion = Conversion { attention, layers: None, seed: cell.seed()? };
        convert(before.path(), after.path(), &conversion, Format::F32)?;
        numbers.insert(format!("{name} 0"), bits(after.path())?);
        for share in SHARES.into_iter().filter(|&share| share > 0) {
            let further = Folder::new(&format!("{}-{name}-{share}", cell.name()))?;
            trained(uptraining(&base, after.path(), share), further.path())?;
            numbers.insert(format!("{name} {share}"), bits(further.path())?);
        }
    }
    Ok(numbers)
}

/// Training that goes on from a folder, at half the rate.
fn uptraining(base: &Config, from: &Path, share: usize) -> Config {
    let mut config = base.clone();
    config.model = ModelSection { from: Some(from.to_owned()), ..ModelSection::default() };
    config.optimizer.learning_rate /= 2.0;
    let steps = (base.schedule.steps * share as u64 / 100).max(1);
    config.schedule = ScheduleSection { steps, ..ScheduleSection::default() };
    // Other batches than those of the beginning.
    config.train.seed += 1000;
    config
}

pub(super) fn judge(results: &Results) -> Judgement {
    let of = |number: &str| results.numbers(&[], number);
    let means = |number: &str| Sample::of(&of(number)).map(|one| one.mean);
    let lost = means("mean 0").zip(means("before")).zip(means("mean 5"));
    let recovered = lost.map(|((at_once, before), later)| (at_once - later) / (at_once - before));
    let checks = vec![
        Check::greater(
            "at once, the first head of a group costs more than the mean",
            &of("first 0"),
            &of("mean 0"),
        ),
        Check::greater(
            "at once, random heads cost more than the first of a group",
            &of("random 0"),
            &of("first 0"),
        ),
        Check::greater(
            "after a twentieth of the steps, random heads cost more than the mean",
            &of("random 5"),
            &of("mean 5"),
        ),
        Check::new(
            "a twentieth of the steps recovers most of what averaging lost",
            recovered.map(|share| (share > 0.5, format!("{:.0} %", 100.0 * share))),
        ),
    ];
    let mut head = vec!["heads from".to_owned()];
    head.extend(SHARES.map(|share| format!("after {share} % of the steps")));
    let mut rows = vec![vec![
        "all heads, before".to_owned(),
        Sample::words(&of("before")),
        String::new(),
        String::new(),
    ]];
    for (name, _) in POOLS {
        let cells = SHARES.map(|share| Sample::words(&of(&format!("{name} {share}"))));
        rows.push(std::iter::once(name.to_owned()).chain(cells).collect());
    }
    let line = |name: &str| Series {
        name: name.to_owned(),
        points: SHARES
            .iter()
            .filter_map(|share| Some((*share as f64, means(&format!("{name} {share}"))?)))
            .collect(),
    };
    let mut series = POOLS.map(|(name, _)| line(name)).to_vec();
    let before = means("before").map(|bits| vec![(0.0, bits), (20.0, bits)]);
    series.push(Series { name: "all heads".to_owned(), points: before.unwrap_or_default() });
    let plot = Plot {
        title: "Fewer key/value heads",
        x: Axis::linear("further training, % of the steps"),
        y: Axis::linear("bits per byte"),
        series,
    };
    Judgement { checks, table: Table { head, rows }, plots: vec![plot] }
}
