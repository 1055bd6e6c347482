//! The weights of sections, made of what a layer was given of a text.
//!
//! ```text
//! full … transformer_xl      softmax over what the pattern shows, row by row
//! memorizing                 g · softmax over what was retrieved + (1 − g) · softmax over what is near
//! all others                 what comes out of unit vectors in place of values, before norm and gate
//! ```

use std::ops::Range;

use foveal::memory::memorizing::{self, Memorizing};
use foveal::{Attention, Mask, Phase, Scale, Shape, Tensor, TensorMut, TensorRef};

use super::across::{Encoding, Remembering, segments_mask};
use super::core::{Core, Kind, SectionTokens};
use super::global::Globals;
use super::{Section, SectionedAttention};
use crate::Error;
use crate::linear::Run;
use crate::mixer::trace::{Asked, Part, Recalled, Weigher, exact, probed, probes};
use crate::mixer::{CacheStorage, LayerState, Store};

/// The tokens that a section was given, up to the last query, and whose weights are asked for.
struct Given<'a> {
    tokens: SectionTokens<'a>,
    rows: Range<usize>,
    first_head: usize,
}

impl SectionedAttention {
    /// What each section's weights are.
    pub(crate) fn weigh(
        &self,
        asked: &Asked<'_>,
        weigher: &mut dyn Weigher,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let trace = asked.trace;
        let call = [1, asked.rows.end];
        let plain = match trace.plain[0].is_empty() {
            true => [&trace.q, &trace.k],
            false => trace.plain.each_ref(),
        };
        let x = &trace.x[..trace.x.len() / trace.tokens.max(1) * asked.rows.end];
        for section in &self.sections {
            let k = self.view(&trace.k, call, self.kv_heads, section.kv_heads)?;
            let tokens = SectionTokens {
                x,
                q: self.view(&trace.q, call, self.heads, section.heads)?,
                k,
                v: k,
                plain: [
                    self.view(plain[0], call, self.heads, section.heads)?,
                    self.view(plain[1], call, self.kv_heads, section.kv_heads)?,
                ],
            };
            let rows = asked.rows.clone();
            let given = Given { tokens, rows, first_head: section.heads.0 };
            match section.core.globals() {
                None => section.core.weigh(&given, weigher, run)?,
                Some(globals) => {
                    self.with_globals(section, globals, (&given, asked), weigher, run)?
                }
            }
        }
        Ok(())
    }

    /// Rows of tokens that are not global, and those that are by their own projections.
    fn with_globals(
        &self,
        section: &Section,
        globals: &Globals,
        (given, asked): (&Given<'_>, &Asked<'_>),
        weigher: &mut dyn Weigher,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let mut start = given.rows.start;
        for &global in globals.positions().iter().filter(|at| given.rows.contains(at)) {
            let rows = start..global;
            section.core.weigh(&Given { rows, ..*given }, weigher, run)?;
            start = global + 1;
        }
        section.core.weigh(&Given { rows: start..given.rows.end, ..*given }, weigher, run)?;
        let parameters = self.parameters.views()?;
        let norms = [parameters.query_norm, parameters.key_norm]
            .map(|weight| weight.map(|weight| self.norm(weight)));
        let (end, rope) = (given.rows.end, &asked.ropes[self.rope]);
        let table = rope.table(0..end)?;
        let projected = globals.project(given.tokens.x, [1, end], (norms, &table), run)?;
        let attention = Attention::new().scale(section.core.scale()).cpu(run.cpu);
        let [q, k] = globals.scored(&projected, [1, end])?;
        for &global in globals.positions().iter().filter(|at| given.rows.contains(at)) {
            let rows = (global..global + 1, given.first_head);
            exact(&attention, [q, k], rows, &|_| 1.0, (weigher, run.workspace))?;
        }
        Ok(())
    }

    /// For each section its name in configurations, its heads, and whether its weights are those of a recurrence.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = (usize, bool)> + '_ {
        self.sections.iter().map(|section| (section.heads.1, section.core.recurs()))
    }
}

impl Core {
    /// Whether its weights are what is left of each value in a state.
    fn recurs(&self) -> bool {
        matches!(self.kind(), Kind::Recurring(_))
    }

    fn weigh(
        &self,
        given: &Given<'_>,
        weigher: &mut dyn Weigher,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        if given.rows.is_empty() {
            return Ok(());
        }
        let rows = (given.rows.clone(), given.first_head);
        match self.kind() {
            Kind::Masked { mask, .. } => self.shown((mask, None), given, weigher, run),
            Kind::Segments(segments) => {
                self.shown((&segments.mask, Some(&segments.encoding)), given, weigher, run)
            }
            Kind::Recurring(recurring) => recurring.weigh(given.tokens, rows, weigher, run),
            Kind::Remembering(remembering) => match &**remembering {
                Remembering::Memorizing { layer, gate, scale } => {
                    self.retrieved(layer, (gate, scale), given, weigher, run)
                }
                Remembering::Infini { layer, gate, .. } => {
                    self.probe(given, weigher, run)?;
                    for row in given.rows.clone() {
                        for (head, &beta) in gate.iter().enumerate() {
                            let segment = row / layer.segment() * layer.segment();
                            let recalled = Recalled { gate: share(beta), segment, entries: vec![] };
                            weigher.recalled(given.first_head + head, row, recalled);
                        }
                    }
                    Ok(())
                }
            },
            Kind::Sparse(_) | Kind::Moba(_) | Kind::Native(..) | Kind::Lsh(..) => {
                self.probe(given, weigher, run)
            }
        }
    }

    /// Exact attention to what a mask shows.
    fn shown(
        &self,
        (mask, encoding): (&Mask, Option<&Encoding>),
        given: &Given<'_>,
        weigher: &mut dyn Weigher,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let attention = Attention::new().mask(mask.clone()).scale(self.scale()).cpu(run.cpu);
        let attention = match encoding {
            Some(encoding) => attention.relative_encoding(encoding.view()?),
            None => attention,
        };
        let SectionTokens { q, k, .. } = given.tokens;
        let rows = (given.rows.clone(), given.first_head);
        exact(&attention, [q, k], rows, &|_| 1.0, (weigher, run.workspace))
    }

    /// What the section's own code gives of unit vectors, from a state without tokens on.
    fn probe(
        &self,
        given: &Given<'_>,
        weigher: &mut dyn Weigher,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let (q, k) = (given.tokens.q.shape(), given.tokens.k.shape());
        for first in (0..given.rows.end).step_by(k.dim.max(1)) {
            let values = probes(k, first)?;
            let tokens = SectionTokens { v: values.view(), ..given.tokens };
            let mut states = [LayerState::of_sections(vec![self.state(CacheStorage::F32)?])?];
            let mut out = Tensor::zeros(q)?;
            let to: TensorMut<'_, f32> = out.view_mut();
            self.forward((&mut states, 0), tokens, to, run)?;
            let rows = (given.rows.clone(), given.first_head);
            probed(out.view(), (0, first), rows, weigher);
        }
        Ok(())
    }

    /// What queries retrieved, and what is near them.
    fn retrieved(
        &self,
        layer: &Memorizing,
        (gate, scale): (&[f32], &[f32]),
        given: &Given<'_>,
        weigher: &mut dyn Weigher,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let [q, k] = given.tokens.plain;
        let Shape { heads, dim, .. } = q.shape();
        let nothing = Tensor::zeros(Shape { dim: 1, ..k.shape() })?;
        let sizes = foveal::sparse::StateHeads {
            heads,
            kv_heads: k.shape().heads,
            key_dim: dim,
            value_dim: 1,
        };
        let entries = Store::new(CacheStorage::F32, sizes.kv_heads, (dim, 1))?;
        let entries = super::entries::Entries::Rows(super::Rows::Ram(Box::new(entries)));
        let mut state = layer.clone().cpu(run.cpu).state(sizes, entries)?;
        let tokens = memorizing::Tokens::new(q, k, nothing.view(), gate, scale);
        let forward = state.forward(&tokens, Phase::Prompt)?;
        // Queries as long as |s|, keys as long as 1: softmax of their products.
        let (q, k) = (lengths(q, |head| scale[head].abs())?, lengths(k, |_| 1.0)?);
        let before = if layer.sees_previous() { layer.segment() } else { 0 };
        let mask = segments_mask((layer.segment(), before), 0);
        let attention = Attention::new().mask(mask).scale(Scale::Value(1.0)).cpu(run.cpu);
        let rows = (given.rows.clone(), given.first_head);
        let near = |head: usize| 1.0 - share(gate[head]);
        exact(&attention, [q.view(), k.view()], rows, &near, (weigher, run.workspace))?;
        for row in given.rows.clone() {
            for (head, &beta) in gate.iter().enumerate() {
                let entries: Vec<usize> = forward.selected.of(row, head).collect();
                let lse = forward.memory_lse.view().row(0, row, head)[0];
                let query = q.view().row(0, row, head);
                for &at in &entries {
                    let key = k.view().row(0, at, head * sizes.kv_heads / heads);
                    let score: f32 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                    let weights = &[share(beta) * (score - lse).exp()];
                    let head = given.first_head + head;
                    weigher.weights(Part { head, row, first: at, weights });
                }
                let segment = row / layer.segment() * layer.segment();
                let recalled = Recalled { gate: share(beta), segment, entries };
                weigher.recalled(given.first_head + head, row, recalled);
            }
        }
        Ok(())
    }
}

/// A memory's share: the sigmoid of its gate.
fn share(beta: f32) -> f32 {
    1.0 / (1.0 + (-beta).exp())
}

/// Rows with the length of each head, as Memorizing Transformers have them.
fn lengths(x: TensorRef<'_, f32>, length: impl Fn(usize) -> f32) -> Result<Tensor<f32>, Error> {
    let mut to = Tensor::zeros(x.shape())?;
    let mut view = to.view_mut();
    let Shape { seq, heads, .. } = x.shape();
    for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
        let from = x.row(0, t, head);
        let square: f64 = from.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let factor = f64::from(length(head)) / (square + 1e-6).sqrt();
        let to = view.row_mut(0, t, head).iter_mut();
        to.zip(from).for_each(|(to, &x)| *to = (factor * f64::from(x)) as f32);
    }
    Ok(to)
}
