//! Result files: one for each finished cell, written whole or not at all.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::Numbers;
use super::cell::{Cell, Grid, Size};
use crate::compare::write;

/// A cell and what it found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Finished {
    pub(super) cell: Cell,
    pub(super) numbers: Numbers,
    /// How long it took.
    pub(super) seconds: f64,
}

/// The results of an experiment: those of its default grid and of the full one, if they are there.
#[derive(Debug, Default)]
pub(super) struct Results {
    pub(super) all: Vec<Finished>,
    /// Cells of the default grid that have no result.
    pub(super) missing: usize,
}

fn folder(out: &Path, experiment: &str) -> PathBuf {
    out.join("experiments").join(experiment)
}

fn path(out: &Path, experiment: &str, cell: &Cell) -> PathBuf {
    folder(out, experiment).join(format!("{}.json", cell.name()))
}

fn read(path: &Path) -> anyhow::Result<Finished> {
    let text = std::fs::read_to_string(path)?;
    serde_json::from_str(&text).with_context(|| format!("{} is no result", path.display()))
}

/// Whether a cell has a result.
pub(super) fn is_finished(out: &Path, experiment: &str, cell: &Cell) -> bool {
    read(&path(out, experiment, cell)).is_ok_and(|known| known.cell == *cell)
}

/// Writes a result.
pub(super) fn save(out: &Path, experiment: &str, finished: &Finished) -> anyhow::Result<()> {
    let wrong = finished.numbers.iter().find(|(_, number)| !number.is_finite());
    ensure!(wrong.is_none(), "a number that is not finite: {wrong:?}");
    let folder = folder(out, experiment);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let text = serde_json::to_string_pretty(finished)? + "\n";
    write(&path(out, experiment, &finished.cell), &text)
}

impl Results {
    /// What is there of the cells of a grid: of the default size, the full one, or, where there is nothing of these, the tiny one.
    pub(super) fn read(out: &Path, experiment: &str, grid: &Grid) -> anyhow::Result<Results> {
        let mut results = Results::default();
        let mut known: Vec<Cell> = vec![];
        for size in [Size::Default, Size::Full, Size::Tiny] {
            if size == Size::Tiny && !results.all.is_empty() {
                break;
            }
            for cell in grid.cells(size) {
                let path = path(out, experiment, &cell);
                if known.contains(&cell) {
                    continue;
                }
                if path.exists() {
                    let finished = read(&path)?;
                    ensure!(finished.cell == cell, "{} is of another cell", path.display());
                    results.all.push(finished);
                } else if size == Size::Default {
                    results.missing += 1;
                }
                known.push(cell);
            }
        }
        Ok(results)
    }

    /// Those whose cells have these values.
    pub(super) fn of<'a>(
        &'a self,
        values: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Finished> {
        self.all.iter().filter(|one| values.iter().all(|(key, value)| one.cell.is(key, value)))
    }

    /// A number of each of them.
    pub(super) fn numbers(&self, values: &[(&str, &str)], number: &str) -> Vec<f64> {
        self.of(values).filter_map(|one| one.numbers.get(number).copied()).collect()
    }

    /// The values of a key, in the order in which they come.
    pub(super) fn values(&self, key: &str) -> Vec<String> {
        let mut values: Vec<String> = vec![];
        for one in &self.all {
            let value = one.cell.text(key);
            if !value.is_empty() && !values.contains(&value) {
                values.push(value);
            }
        }
        values
    }

    /// The same of whole numbers, in order.
    pub(super) fn counts(&self, key: &str) -> Vec<usize> {
        let mut counts: Vec<usize> =
            self.values(key).iter().filter_map(|value| value.parse().ok()).collect();
        counts.sort_unstable();
        counts
    }

    /// How long all of it took.
    pub(super) fn seconds(&self) -> f64 {
        self.all.iter().fold(0.0, |sum, one| sum + one.seconds)
    }
}
