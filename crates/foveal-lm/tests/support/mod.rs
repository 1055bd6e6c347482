//! A layer of attention with its whole input, run forward and backward in calls of any lengths.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::ops::Range;

use foveal::position::Rope;
use foveal::projection::Activations;
use foveal::{Cpu, Level, Phase, Threads, Workspace};
use foveal_lm::Error;
use foveal_lm::mixer::{
    AttentionParameters, Inputs, LayerState, MultiHeadAttention, Run, Saved, Source, StateGradient,
    Upstream,
};

pub type Parameters = AttentionParameters<Vec<f32>>;

/// A layer with its parameters and the whole input of a batch.
pub struct Problem {
    pub layer: MultiHeadAttention,
    pub parameters: Parameters,
    pub sequences: usize,
    pub x: Vec<f32>,
    /// What keys and values are made from, if not from `x`.
    pub source: Option<[Vec<f32>; 2]>,
    pub rope: Option<Rope>,
    /// One for each token of each sequence.
    pub positions: Vec<usize>,
    pub d_y: Vec<f32>,
}

/// What forward and backward gave for the whole input.
pub struct Results {
    pub y: Vec<f32>,
    pub states: Vec<LayerState>,
    pub gradients: Parameters,
    pub d_x: Vec<f32>,
    pub d_source: Option<[Vec<f32>; 2]>,
}

pub fn cpus() -> impl Iterator<Item = Cpu> {
    Level::available().map(|level| Cpu { level, threads: Threads::ONE })
}

/// Some tokens of every sequence.
pub fn tokens<T: Copy>(all: &[T], sequences: usize, total: usize, range: &Range<usize>) -> Vec<T> {
    let width = all.len() / (sequences * total).max(1);
    let sequences = all.chunks((total * width).max(1));
    sequences.flat_map(|s| &s[range.start * width..range.end * width]).copied().collect()
}

impl Problem {
    pub fn tokens(&self) -> usize {
        self.x.len() / (self.sequences * self.layer.width)
    }

    pub fn forward(
        &self,
        range: &Range<usize>,
        states: &mut [LayerState],
        run: &mut Run<'_>,
    ) -> Result<(Vec<f32>, Saved), Error> {
        let take = |all: &[f32]| tokens(all, self.sequences, self.tokens(), range);
        let x = take(&self.x);
        let positions = tokens(&self.positions, self.sequences, self.tokens(), range);
        let table = self.rope.as_ref().map(|rope| rope.table(positions).unwrap());
        let source = match &self.source {
            None => Source::Own,
            Some([keys, values]) => Source::Other { keys, values },
        };
        let inputs = Inputs { x: &x, source, rotation: table.as_ref() };
        self.layer.forward(&self.parameters.as_slices(), inputs, states, run)
    }

    /// Calls of the given lengths one after the other, and back again.
    pub fn run(&self, lengths: &[usize], cpu: Cpu) -> Results {
        let mut workspace = Workspace::new();
        workspace.reserve(1 << 22);
        workspace.poison();
        let mut run = Run {
            cpu,
            phase: Phase::Prompt,
            activations: Activations::F32,
            workspace: &mut workspace,
        };
        let mut states: Vec<_> = (0..self.sequences).map(|_| self.layer.state().unwrap()).collect();
        let (mut calls, mut first) = (vec![], 0);
        for length in lengths {
            let range = first..first + length;
            let (y, saved) = self.forward(&range, &mut states, &mut run).unwrap();
            calls.push((range, y, saved));
            first += length;
        }
        assert_eq!(first, self.tokens());
        let mut gradients = self.parameters.zeros();
        let (mut y, mut d_x) = (vec![f32::NAN; self.x.len()], vec![f32::NAN; self.x.len()]);
        let (mut d_state, mut d_source) = (None::<StateGradient>, None);
        for (range, result, saved) in calls.iter().rev() {
            let d_y = tokens(&self.d_y, self.sequences, self.tokens(), range);
            let upstream = Upstream { d_y: &d_y, d_state: d_state.as_ref() };
            let parameters = self.parameters.as_slices();
            let places = &mut gradients.as_slices_mut();
            let before =
                self.layer.backward(&parameters, saved, upstream, places, &mut run).unwrap();
            self.place(result, range, &mut y);
            self.place(&before.d_x, range, &mut d_x);
            d_state = Some(before.d_state);
            d_source = before.d_source;
        }
        let d_state = d_state.unwrap();
        assert!(d_state.keys.is_empty() && d_state.values.is_empty(), "nothing was before");
        Results { y, states, gradients, d_x, d_source }
    }

    /// Puts the rows of a call to their place among all.
    fn place(&self, rows: &[f32], range: &Range<usize>, all: &mut [f32]) {
        let (total, width) = (self.tokens() * self.layer.width, self.layer.width);
        for (rows, all) in
            rows.chunks((range.len() * width).max(1)).zip(all.chunks_mut(total.max(1)))
        {
            all[range.start * width..range.end * width].copy_from_slice(rows);
        }
    }
}

/// Every number of parameters or gradients, with names.
pub fn named(parameters: &Parameters) -> Vec<(&'static str, &[f32])> {
    let AttentionParameters { query, key, value, output, query_norm, key_norm, sinks } =
        parameters.as_slices();
    let optional = [
        ("q.bias", query.bias),
        ("k.bias", key.bias),
        ("v.bias", value.bias),
        ("o.bias", output.bias),
        ("q_norm", query_norm),
        ("k_norm", key_norm),
        ("sinks", sinks),
    ];
    let weights = [
        ("q.weight", query.weight),
        ("k.weight", key.weight),
        ("v.weight", value.weight),
        ("o.weight", output.weight),
    ];
    let optional = optional.into_iter().filter_map(|(name, x)| x.map(|x| (name, x)));
    weights.into_iter().chain(optional).collect()
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}
