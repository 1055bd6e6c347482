//! Who looks at whom: the weights of all heads of a model over a text, as much of them as can be shown.
//!
//! ```text
//! map[a][b] = mean over queries i of cell a of Σ_{j in cell b} P_ij        [C, C] a head; rows sum to 1, sinks apart
//! row i:      the greatest of P_i1 … P_ii, and what is left                 of chosen tokens
//! ```
//!
//! Cell `a` of `C` holds the positions from `N·a/C` up to `N·(a + 1)/C`, both rounded down; with `C = N` the map is the
//! matrix itself. Cost: one prefill, and the scores once more for the map and for the rows. Memory: the result,
//! `layers · heads · (C² + rows · kept)` numbers, and a few rows of weights: nothing is quadratic in the text.

mod habits;
mod looking;
mod made;

use std::ops::{ControlFlow, Range};

use crate::Error;
use crate::mixer::Attended;
use crate::model::{CHUNK, Model, Observer, Scratch, State};

pub use crate::mixer::Recalled;
pub use habits::Habits;
pub use looking::{Looking, Weights};

/// Rows of weights that are there at a time.
const ROWS: usize = 16;

/// What is to be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Cells of a map's side; no more than there are tokens. 0 for no maps.
    pub cells: usize,
    /// Positions whose rows are kept, in ascending order.
    pub rows: Vec<usize>,
    /// How many of a row's weights are kept: the greatest.
    pub kept: usize,
}

/// All layers of a model over a text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Look {
    /// The first to the last.
    pub layers: Vec<Layer>,
}

/// One layer's heads.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// How many of the newest tokens a token sees at most.
    pub reach: Option<usize>,
    /// The mechanisms of neighbouring heads, where they are other than attention to the newest tokens.
    pub sections: Vec<Section>,
    /// Query heads.
    pub heads: Vec<Head>,
}

/// Neighbouring heads of one mechanism.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its name in the registry.
    pub name: &'static str,
    /// Query heads.
    pub heads: usize,
    /// Whether there is no softmax: weights are what is left of each token's value in what a row reads of a matrix, as shares of
    /// all such magnitudes, some of them negative.
    pub recurrent: bool,
}

/// One head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Head {
    /// `[cells, cells]`, a row for each cell of queries.
    pub map: Vec<f32>,
    /// The wanted rows.
    pub rows: Vec<Row>,
}

/// The weights of one token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// Positions and weights, the greatest magnitude first; of equal ones the older.
    pub weights: Vec<(usize, f32)>,
    /// The sum of all weights, those that are not kept too; 1 but for rounding, and for what a sink or a gate takes.
    pub sum: f32,
    /// In nats: 0 where one token gets everything, ln n where n share evenly.
    pub entropy: f32,
    /// What was read of a memory, if the head has one.
    pub recalled: Option<Recalled>,
}

impl Look {
    /// Lets `model` read `tokens` and looks. `watch` is told how many have been read, and may break the reading off.
    ///
    /// # Errors
    ///
    /// [`Error::Interrupted`], [`Error::EmptyPrompt`] without tokens, [`Error::Position`] for a row that there is not,
    /// and those of [`Model::forward`].
    pub fn at(
        model: &Model,
        tokens: &[u32],
        wanted: &Wanted,
        watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Look, Error> {
        let mut state = model.state()?;
        Look::with_state(model, tokens, wanted, (&mut state, watch))
    }

    /// [`Look::at`], with keys and values kept in `state`, which has read nothing.
    ///
    /// # Errors
    ///
    /// Those of [`Look::at`].
    pub fn with_state(
        model: &Model,
        tokens: &[u32],
        wanted: &Wanted,
        (state, watch): (&mut State, &mut dyn FnMut(usize) -> ControlFlow<()>),
    ) -> Result<Look, Error> {
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(&found) = wanted.rows.iter().find(|&&row| row >= tokens.len()) {
            return Err(Error::Position { found, tokens: tokens.len() });
        }
        state.reset();
        if model.traced() {
            return Look::made(model, tokens, wanted, (state, watch));
        }
        let cells = wanted.cells.min(tokens.len());
        let mut watcher =
            Watcher { look: Look::default(), wanted, cells, length: tokens.len(), watch };
        model.forward_observed(tokens, state, &mut Scratch::new(), &mut watcher)?;
        Ok(watcher.look)
    }
}

impl Look {
    /// The same of layers whose weights are made of what they were given.
    fn made(
        model: &Model,
        tokens: &[u32],
        wanted: &Wanted,
        (state, watch): (&mut State, &mut dyn FnMut(usize) -> ControlFlow<()>),
    ) -> Result<Look, Error> {
        let (mut scratch, mut traces) = (Scratch::new(), vec![]);
        for (n, chunk) in tokens.chunks(CHUNK).enumerate() {
            if watch(n * CHUNK).is_break() {
                return Err(Error::Interrupted);
            }
            model.forward_traced(chunk, state, &mut scratch, &mut traces)?;
        }
        let options = *state.options();
        let layers = traces.iter().enumerate().map(|(n, trace)| {
            Ok(made::layer(model, (n, trace), (tokens, wanted, &[]), &options)?.0)
        });
        Ok(Look { layers: layers.collect::<Result<_, Error>>()? })
    }
}

/// Collects what is wanted.
struct Watcher<'a> {
    look: Look,
    wanted: &'a Wanted,
    cells: usize,
    length: usize,
    watch: &'a mut dyn FnMut(usize) -> ControlFlow<()>,
}

impl Observer for Watcher<'_> {
    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> Result<(), Error> {
        if layer == 0 && (self.watch)(attended.queries().start).is_break() {
            return Err(Error::Interrupted);
        }
        if layer == self.look.layers.len() {
            let head = Head { map: vec![0.0; self.cells * self.cells], rows: Vec::new() };
            let heads = vec![head; attended.heads()];
            self.look.layers.push(Layer { reach: attended.reach(), sections: vec![], heads });
        }
        self.add_to_maps(layer, attended)?;
        self.add_rows(layer, attended)
    }
}

impl Watcher<'_> {
    /// Adds a chunk's part of the maps: the sums over the columns of each cell of queries.
    fn add_to_maps(&mut self, layer: usize, attended: &Attended<'_>) -> Result<(), Error> {
        let (queries, keys, cells) = (attended.queries(), attended.keys(), self.cells);
        for a in 0..cells {
            let all = cell(self.length, a, cells);
            let rows = all.start.max(queries.start)..all.end.min(queries.end);
            if rows.is_empty() {
                continue;
            }
            let sums = attended.column_sums(rows)?;
            let sums = sums.view();
            for (h, head) in self.look.layers[layer].heads.iter_mut().enumerate() {
                let map = &mut head.map[a * cells..(a + 1) * cells];
                for (b, mass) in map.iter_mut().enumerate() {
                    let columns = cell(self.length, b, cells);
                    let columns = columns.start.max(keys.start)..columns.end.min(keys.end);
                    let sum: f64 =
                        columns.map(|j| f64::from(sums.row(0, j - keys.start, h)[0])).sum();
                    *mass += (sum / all.len() as f64) as f32;
                }
            }
        }
        Ok(())
    }

    fn add_rows(&mut self, layer: usize, attended: &Attended<'_>) -> Result<(), Error> {
        let queries = attended.queries();
        let own = |row: &&usize| queries.contains(*row);
        let rows: Vec<usize> = self.wanted.rows.iter().filter(own).copied().collect();
        for run in runs(&rows) {
            for start in run.clone().step_by(ROWS) {
                let positions = start..(start + ROWS).min(run.end);
                self.add_run(layer, attended, positions)?;
            }
        }
        Ok(())
    }

    fn add_run(
        &mut self,
        layer: usize,
        attended: &Attended<'_>,
        positions: Range<usize>,
    ) -> Result<(), Error> {
        let weights = attended.weights(positions.clone())?;
        let entropy = attended.entropy(positions.clone())?;
        let first = attended.keys().start;
        for n in 0..positions.len() {
            for (h, head) in self.look.layers[layer].heads.iter_mut().enumerate() {
                let weights = weights.view().row(0, n, h);
                head.rows.push(Row {
                    weights: greatest(weights, self.wanted.kept, first),
                    sum: weights.iter().map(|&x| f64::from(x)).sum::<f64>() as f32,
                    entropy: entropy.view().row(0, n, h)[0],
                    recalled: None,
                });
            }
        }
        Ok(())
    }
}

/// The `kept` greatest weights that are not 0, with positions that count from `first`.
fn greatest(weights: &[f32], kept: usize, first: usize) -> Vec<(usize, f32)> {
    let seen = (first..).zip(weights.iter().copied()).filter(|(_, weight)| *weight != 0.0);
    let mut seen: Vec<(usize, f32)> = seen.collect();
    let order =
        |a: &(usize, f32), b: &(usize, f32)| b.1.abs().total_cmp(&a.1.abs()).then(a.0.cmp(&b.0));
    if seen.len() > kept {
        seen.select_nth_unstable_by(kept, order);
        seen.truncate(kept);
    }
    seen.sort_unstable_by(order);
    seen
}

/// Neighbouring numbers together.
fn runs(rows: &[usize]) -> impl Iterator<Item = Range<usize>> {
    let runs = rows.chunk_by(|a, b| a + 1 == *b);
    runs.map(|run| run[0]..run[run.len() - 1] + 1)
}

/// What cell `index` of `count` holds of `length` positions.
pub fn cell(length: usize, index: usize, count: usize) -> Range<usize> {
    let edge = |n: usize| (length as u128 * n as u128 / count.max(1) as u128) as usize;
    edge(index)..edge(index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greatest_come_first_and_equal_ones_by_age() {
        let weights = [0.1, 0.0, 0.3, 0.1, 0.5];
        assert_eq!(greatest(&weights, 3, 10), [(14, 0.5), (12, 0.3), (10, 0.1)]);
        assert_eq!(greatest(&weights, 9, 0).len(), 4);
        assert_eq!(greatest(&weights, 0, 0), []);
        assert_eq!(greatest(&[], 3, 0), []);
    }

    #[test]
    fn cells_and_runs_cover_everything_once() {
        for length in 0..40 {
            for count in 1..12 {
                let cells = (0..count).map(|n| cell(length, n, count));
                assert!(cells.flatten().eq(0..length));
            }
        }
        let found: Vec<_> = runs(&[1, 2, 3, 7, 9, 10]).collect();
        assert_eq!(found, [1..4, 7..8, 9..11]);
        assert_eq!(runs(&[]).count(), 0);
    }
}
