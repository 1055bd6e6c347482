//! Grids: words about an experiment, and its cells as lists of values.
//!
//! ```toml
//! title = "…"  claim = "…"  source = "…"  method = "…"  rule = "…"
//! [settings]                 # of every cell that does not say otherwise
//! steps = 100
//! [[default]]                # a block: every combination of its lists is a cell
//! mechanism = ["full", "linear"]
//! seed = [1, 2, 3]
//! ```
//!
//! `tiny`, `default` and `full` are lists of blocks.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Which cells of a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    Tiny,
    Default,
    Full,
}

/// What a page says about an experiment.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Words {
    pub(super) title: String,
    /// What a paper says.
    pub(super) claim: String,
    /// Which one.
    pub(super) source: String,
    /// What is done here.
    pub(super) method: String,
    /// When a check holds.
    pub(super) rule: String,
}

type Block = BTreeMap<String, Value>;

/// An experiment's file.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Grid {
    #[serde(flatten)]
    pub(super) words: Words,
    #[serde(default)]
    settings: Block,
    tiny: Vec<Block>,
    default: Vec<Block>,
    full: Vec<Block>,
}

/// One cell: values by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Cell {
    values: BTreeMap<String, Value>,
}

impl Grid {
    pub(super) fn parse(text: &str) -> anyhow::Result<Grid> {
        toml::from_str(text).context("a grid that can't be read")
    }

    /// The cells of one size, in the order of the file; what several blocks have is there once.
    pub(super) fn cells(&self, size: Size) -> Vec<Cell> {
        let blocks = match size {
            Size::Tiny => &self.tiny,
            Size::Default => &self.default,
            Size::Full => &self.full,
        };
        let mut cells: Vec<Cell> = vec![];
        for block in blocks {
            for cell in self.combinations(block) {
                if !cells.contains(&cell) {
                    cells.push(cell);
                }
            }
        }
        cells
    }

    fn combinations(&self, block: &Block) -> Vec<Cell> {
        let mut cells = vec![Cell { values: self.settings.clone() }];
        for (key, values) in block {
            let values = match values {
                Value::Array(values) => &values[..],
                one => std::slice::from_ref(one),
            };
            let with = |cell: Cell| {
                values.iter().map(move |value| {
                    let mut values = cell.values.clone();
                    values.insert(key.clone(), value.clone());
                    Cell { values }
                })
            };
            cells = cells.into_iter().flat_map(with).collect();
        }
        cells
    }
}

impl Cell {
    fn get(&self, key: &str) -> anyhow::Result<&Value> {
        self.values.get(key).ok_or_else(|| anyhow!("the cell has no {key:?}"))
    }

    /// A number of things.
    pub(super) fn count(&self, key: &str) -> anyhow::Result<usize> {
        let value = self.get(key)?;
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
        count.with_context(|| format!("{key} is a count, not {value}"))
    }

    /// A number.
    pub(super) fn number(&self, key: &str) -> anyhow::Result<f64> {
        let value = self.get(key)?;
        value.as_f64().with_context(|| format!("{key} is a number, not {value}"))
    }

    /// A seed.
    pub(super) fn seed(&self) -> anyhow::Result<u64> {
        Ok(self.count("seed")? as u64)
    }

    /// A word.
    pub(super) fn word(&self, key: &str) -> anyhow::Result<&str> {
        let value = self.get(key)?;
        value.as_str().with_context(|| format!("{key} is a word, not {value}"))
    }

    /// Whether a value is this one, in the form in which names have it.
    pub(super) fn is(&self, key: &str, value: &str) -> bool {
        self.values.get(key).is_some_and(|own| plain(own) == value)
    }

    /// A value as names have it; empty for none.
    pub(super) fn text(&self, key: &str) -> String {
        self.values.get(key).map(plain).unwrap_or_default()
    }

    /// What tells it from the others, for files and messages.
    pub(super) fn name(&self) -> String {
        let part = |(key, value): (&String, &Value)| format!("{key}_{}", plain(value));
        let name = self.values.iter().map(part).collect::<Vec<_>>().join("-");
        let safe = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '+' };
        name.chars().map(safe).collect()
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: &str = "title = 't'\nclaim = 'c'\nsource = 's'\nmethod = 'm'\nrule = 'r'\n[settings]\nsteps = 3\n\
        [[tiny]]\nn = 1\n[[default]]\nname = ['a b', 'c']\nn = [1, 2]\n[[default]]\nname = 'c'\nn = 2\nsteps = 5\n\
        [[default]]\nname = 'c'\nn = 2\n[[full]]\nn = 9\n";

    #[test]
    fn cells_are_all_combinations_once() {
        let grid = Grid::parse(GRID).unwrap();
        let names: Vec<String> = grid.cells(Size::Default).iter().map(Cell::name).collect();
        let expected = ["n_1-name_a+b", "n_1-name_c", "n_2-name_a+b", "n_2-name_c"]
            .map(|n| format!("{n}-steps_3"));
        assert_eq!(names[..4], expected);
        assert_eq!(names[4..], ["n_2-name_c-steps_5"]);
        let cell = &grid.cells(Size::Tiny)[0];
        assert_eq!((cell.count("steps").unwrap(), cell.is("n", "1")), (3, true));
        assert!(cell.word("n").is_err() && cell.count("other").is_err());
    }
}
