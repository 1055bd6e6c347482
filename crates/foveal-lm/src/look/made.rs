//! Weights of layers that are made of what the layers were given: latent attention, and mixers that the configuration names.
//!
//! ```text
//! softmax and what is mixed of it      a_ij as it is: negative nowhere; sums to 1, to the gates, or to 1 − g of an empty memory
//! recurrences                          a_ij / Σ_j |a_ij|: their shares, with their signs, as the norm behind them takes length away
//! ```
//!
//! `a_ij` is what a row's output, before norm and gate, has of the value of token j.

use std::ops::Range;

use super::habits::Habits;
use super::{Head, Layer, Row, Section, Wanted, cell, greatest};
use crate::Error;
use crate::config::SectionConfig;
use crate::mixer::{CacheOptions, Part, Recalled, Trace, Weigher};
use crate::model::Model;

/// Some of a text's weights under all heads of a layer, as they are made.
pub(super) struct Making {
    rows: Range<usize>,
    cells: usize,
    /// The cell of each key.
    cell_of: Vec<usize>,
    /// Rows that are kept whole, in ascending order.
    kept: Vec<usize>,
    heads: Vec<Sums>,
}

/// Of one head.
#[derive(Default)]
struct Sums {
    recurrent: bool,
    /// `[rows, cells]`: magnitudes.
    cells: Vec<f32>,
    /// A number for each row: the sum of magnitudes.
    totals: Vec<f64>,
    /// Of each row that is kept all weights.
    kept: Vec<Vec<f32>>,
    recalled: Vec<Option<Recalled>>,
}

/// Of each head its map, and the rows that are kept.
pub(super) struct Made {
    pub(super) maps: Vec<Vec<f32>>,
    pub(super) rows: Vec<Vec<Vec<f32>>>,
    pub(super) recalled: Vec<Vec<Option<Recalled>>>,
}

impl Making {
    fn new(heads: &[bool], rows: Range<usize>, cells: usize, kept: Vec<usize>) -> Making {
        let end = rows.end;
        let cell_of = (0..cells).flat_map(|c| cell(end, c, cells).map(move |_| c)).collect();
        let sums = |&recurrent: &bool| Sums {
            recurrent,
            cells: vec![0.0; rows.len() * cells],
            totals: vec![0.0; rows.len()],
            kept: kept.iter().map(|row| vec![0.0; row + 1]).collect(),
            recalled: vec![None; kept.len()],
        };
        let heads = heads.iter().map(sums).collect();
        Making { rows, cells, cell_of, kept, heads }
    }

    fn finish(self) -> Made {
        let Making { rows, cells, kept, heads, .. } = self;
        let mut made = Made { maps: vec![], rows: vec![], recalled: vec![] };
        for mut head in heads {
            let share = |row: usize| match head.recurrent {
                true if head.totals[row] > 0.0 => (1.0 / head.totals[row]) as f32,
                _ => 1.0,
            };
            let mut map = vec![0.0; cells * cells];
            for a in 0..cells {
                let own = cell(rows.end, a, cells);
                let part = own.start.max(rows.start)..own.end;
                for row in part {
                    let row = row - rows.start;
                    let factor = share(row) / own.len() as f32;
                    let sums = &head.cells[row * cells..][..cells];
                    let map = map[a * cells..][..cells].iter_mut();
                    map.zip(sums).for_each(|(to, sum)| *to += factor * sum);
                }
            }
            for (weights, row) in head.kept.iter_mut().zip(&kept) {
                let factor = share(row - rows.start);
                weights.iter_mut().for_each(|w| *w *= factor);
            }
            made.maps.push(map);
            made.rows.push(head.kept);
            made.recalled.push(head.recalled);
        }
        made
    }
}

impl Weigher for Making {
    fn weights(&mut self, Part { head, row, first, weights }: Part<'_>) {
        let Some(at) = row.checked_sub(self.rows.start) else { return };
        let Sums { cells, totals, kept, .. } = &mut self.heads[head];
        // Later keys have no weight.
        let weights = &weights[..weights.len().min((row + 1).saturating_sub(first))];
        totals[at] += weights.iter().map(|w| f64::from(w.abs())).sum::<f64>();
        if self.cells > 0 {
            let cells = &mut cells[at * self.cells..][..self.cells];
            let places = &self.cell_of[first..];
            weights.iter().zip(places).for_each(|(w, &cell)| cells[cell] += w.abs());
        }
        if let Ok(n) = self.kept.binary_search(&row) {
            let to = kept[n][first..].iter_mut();
            to.zip(weights).for_each(|(to, w)| *to += w);
        }
    }

    fn recalled(&mut self, head: usize, row: usize, recalled: Recalled) {
        if let Ok(n) = self.kept.binary_search(&row) {
            self.heads[head].recalled[n] = Some(recalled);
        }
    }
}

/// Of each head of a layer whether its weights are those of a recurrence.
fn recurrent(model: &Model, layer: usize) -> Vec<bool> {
    match model.kinds(layer) {
        kinds if kinds.is_empty() => vec![false; model.config().attention.heads],
        kinds => kinds.iter().flat_map(|&(heads, recurs)| vec![recurs; heads]).collect(),
    }
}

/// The sections of a layer.
pub(super) fn sections(model: &Model, layer: usize) -> Vec<Section> {
    let config = model.config();
    if config.attention.latent.is_some() {
        return vec![Section { name: "mla", heads: config.attention.heads, recurrent: false }];
    }
    let named = config.layers[layer].sections.iter().zip(model.kinds(layer));
    let section = |(section, (heads, recurrent)): (&SectionConfig, _)| Section {
        name: section.mechanism.name(),
        heads,
        recurrent,
    };
    named.map(section).collect()
}

/// The weights of one token under all heads of a layer.
pub(super) fn row(
    model: &Model,
    (layer, trace): (usize, &Trace),
    position: usize,
    options: &CacheOptions,
) -> Result<Made, Error> {
    let rows = position..position + 1;
    let heads = recurrent(model, layer);
    let mut making = Making::new(&heads, rows.clone(), 0, vec![position]);
    model.weigh((layer, trace), rows, options, &mut making)?;
    Ok(making.finish())
}

/// A layer over a whole text, and the habits of its heads.
pub(super) fn layer(
    model: &Model,
    (layer, trace): (usize, &Trace),
    (tokens, wanted, sampled): (&[u32], &Wanted, &[usize]),
    options: &CacheOptions,
) -> Result<(Layer, Vec<Habits>), Error> {
    let length = tokens.len();
    let mut kept: Vec<usize> = wanted.rows.iter().chain(sampled).copied().collect();
    kept.sort_unstable();
    kept.dedup();
    let heads = recurrent(model, layer);
    let mut making = Making::new(&heads, 0..length, wanted.cells.min(length), kept.clone());
    model.weigh((layer, trace), 0..length, options, &mut making)?;
    let Made { maps, rows, recalled } = making.finish();
    let (mut shown, mut habits) = (vec![], vec![]);
    for ((map, rows), recalled) in maps.into_iter().zip(rows).zip(recalled) {
        let mut head = Head { map, rows: vec![] };
        let mut mean = Habits::default();
        for ((weights, &position), recalled) in rows.iter().zip(&kept).zip(recalled) {
            if wanted.rows.binary_search(&position).is_ok() {
                head.rows.push(whole(weights, wanted.kept, recalled));
            }
            if sampled.binary_search(&position).is_ok() {
                let sizes: Vec<f32> = weights.iter().map(|w| w.abs()).collect();
                let row = Habits::of_row(&sizes, &(0..position + 1), (tokens, position));
                mean.add(&row, 1.0 / sampled.len() as f32);
            }
        }
        shown.push(head);
        habits.push(mean);
    }
    let reach = match model.kinds(layer).is_empty() {
        true => Some(model.config().reach_within(&model.config().layers[layer], options.context)),
        false => None,
    };
    Ok((Layer { reach, sections: sections(model, layer), heads: shown }, habits))
}

/// All weights of a row.
fn whole(weights: &[f32], kept: usize, recalled: Option<Recalled>) -> Row {
    let sizes = weights.iter().map(|w| f64::from(w.abs()));
    let entropy: f64 = sizes.filter(|&w| w > 0.0).map(|w| -w * w.ln()).sum();
    Row {
        weights: greatest(weights, kept, 0),
        sum: weights.iter().map(|&x| f64::from(x)).sum::<f64>() as f32,
        entropy: entropy as f32,
        recalled,
    }
}
