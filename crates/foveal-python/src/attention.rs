//! Exact attention: the options of `foveal.attention`, forward and backward in place.

use crate::array::View;
use crate::call::{Given, Mechanism, cpu, scale};
use crate::error::{Error, Result};
use crate::output::Output;
use foveal::mask::{Band, Dense, Documents, Extent};
use foveal::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use foveal::position::{RelativeEncoding, Slopes};
use foveal::{
    Attention, Dropout, Element, Mask, Phase, Plan, Shape, Tensor, TensorMut, TensorRef, Workspace,
};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::cell::RefCell;

/// Where in [`Exact::ARRAYS`] what is beside queries, keys and values lies.
const MASK: usize = 3;
const BIAS: usize = 4;
const SLOPES: usize = 5;
const SINKS: usize = 6;
const QUERY_STARTS: usize = 7;
const KEY_STARTS: usize = 8;
const KEY_LENGTHS: usize = 9;
const DISTANCES: usize = 10;
const CONTENT_BIAS: usize = 11;
const POSITION_BIAS: usize = 12;

/// What `foveal.attention` is asked for.
#[derive(Debug, Clone)]
pub(crate) struct Exact {
    /// Keys before and after a query's position that it sees; `None` for all.
    pub(crate) behind: Option<usize>,
    pub(crate) ahead: Option<usize>,
    pub(crate) scale: Option<f32>,
    pub(crate) softcap: Option<f32>,
    /// The standard slopes of ALiBi.
    pub(crate) alibi: bool,
    pub(crate) dropout: f32,
    pub(crate) seed: u64,
    /// Whether rows are generated ones.
    pub(crate) generated: bool,
    /// Whether the log-sum-exp is a result.
    pub(crate) lse: bool,
}

impl Exact {
    /// The fields, in order.
    pub(crate) fn from_options(options: &Bound<'_, PyTuple>) -> PyResult<Exact> {
        let (behind, ahead, scale, softcap, alibi, dropout, seed, generated, lse) =
            options.extract()?;
        Ok(Exact { behind, ahead, scale, softcap, alibi, dropout, seed, generated, lse })
    }

    /// The mask that options and arrays describe, but for the arrays of truth values.
    pub(crate) fn band(&self) -> Band {
        Band { behind: self.behind, ahead: self.ahead }
    }

    fn mask(&self, given: &Given<'_>, extent: Extent) -> Result<Mask> {
        let band = self.band();
        let mut mask = match (given.optional(QUERY_STARTS), given.optional(KEY_STARTS)) {
            (Some(queries), Some(keys)) => {
                Documents::new(&queries.indices()?, &keys.indices()?)?.within(band).into()
            }
            _ => simple(band),
        };
        if let Some(lengths) = given.optional(KEY_LENGTHS) {
            mask = mask.and(Mask::key_lengths(&lengths.indices()?));
        }
        if let Some(seen) = given.optional(MASK) {
            let dense = Mask::from(dense(seen, extent)?);
            mask = if matches!(mask, Mask::Full) { dense } else { mask.and(dense) };
        }
        Ok(mask)
    }

    /// The description of the call.
    fn attention<'a>(&self, given: &Given<'a>, extent: Extent) -> Result<Attention<'a>> {
        let mut attention =
            Attention::new().mask(self.mask(given, extent)?).scale(scale(self.scale)).cpu(cpu()?);
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        if let Some(bias) = given.optional(BIAS) {
            attention = attention.bias(bias.scores()?);
        }
        match given.maybe_floats(SLOPES)? {
            Some(slopes) => attention = attention.alibi(Slopes::Given(slopes)),
            None if self.alibi => attention = attention.alibi(Slopes::Standard),
            None => {}
        }
        if let Some(sinks) = given.maybe_floats(SINKS)? {
            attention = attention.sinks(sinks);
        }
        if let Some(keys) = given.optional(DISTANCES) {
            let (keys, content, position) = (
                keys.unbatched()?,
                given.view(CONTENT_BIAS)?.floats()?,
                given.view(POSITION_BIAS)?.floats()?,
            );
            attention =
                attention.relative_encoding(RelativeEncoding::new(keys, content, position)?);
        }
        if self.dropout != 0.0 {
            attention = attention.dropout(Dropout { rate: self.dropout, seed: self.seed });
        }
        Ok(attention)
    }

    /// Runs forward into arrays.
    pub(crate) fn forward_into<E: Element>(
        &self,
        given: &Given<'_>,
        out: TensorMut<'_, E>,
        lse: Option<TensorMut<'_, f32>>,
    ) -> Result<()> {
        let inputs = inputs::<E>(given)?;
        let attention = self.attention(given, extent(&inputs))?;
        let plan = self.plan(&attention, &inputs)?;
        with_workspace(plan.workspace_bytes(), |workspace| {
            Ok(plan.forward(inputs, out, lse, workspace)?)
        })
    }

    fn plan<'b, E: Element>(
        &self,
        attention: &'b Attention<'_>,
        inputs: &Inputs<'_, E, E>,
    ) -> Result<Plan<'b>> {
        let (q, k, v) = (inputs.q.shape(), inputs.k.shape(), inputs.v.shape());
        Ok(match self.phase() {
            Phase::Generated => attention.plan_decode(q, k, v)?,
            Phase::Prompt => attention.plan(q, k, v)?,
        })
    }

    fn phase(&self) -> Phase {
        if self.generated { Phase::Generated } else { Phase::Prompt }
    }
}

/// The plainest form of a band.
pub(crate) fn simple(band: Band) -> Mask {
    match band {
        Band { behind: None, ahead: None } => Mask::Full,
        Band { behind: None, ahead: Some(0) } => Mask::causal(),
        Band { behind, ahead } => Mask::band(behind, ahead),
    }
}

fn inputs<'a, E: Element>(given: &Given<'a>) -> Result<Inputs<'a, E, E>> {
    Ok(Inputs { q: given.tensor(0)?, k: given.tensor(1)?, v: given.tensor(2)? })
}

fn extent<E: Element>(inputs: &Inputs<'_, E, E>) -> Extent {
    let Shape { batch, seq: queries, heads, .. } = inputs.q.shape();
    Extent { batch, heads, queries, keys: inputs.k.shape().seq }
}

impl Mechanism for Exact {
    const ARRAYS: &'static [&'static str] = &[
        "q",
        "k",
        "v",
        "mask",
        "bias",
        "alibi",
        "sinks",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "key_lengths",
        "distances",
        "content_bias",
        "position_bias",
    ];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let (q, v) = (given.tensor::<E>(0)?.shape(), given.tensor::<E>(2)?.shape());
        let mut out = Tensor::<E>::zeros(Shape { dim: v.dim, ..q })?;
        if !self.lse {
            self.forward_into(given, out.view_mut(), None)?;
            return Ok(vec![Output::tensor(out)]);
        }
        let mut lse = Tensor::zeros(q.per_row())?;
        self.forward_into(given, out.view_mut(), Some(lse.view_mut()))?;
        Ok(vec![Output::tensor(out), Output::per_row(lse)])
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        let inputs = inputs::<E>(given)?;
        let attention = self.attention(given, extent(&inputs))?;
        let plan = self.plan(&attention, &inputs)?;
        let lse = results.view(1)?.per_row()?;
        let saved = Saved { out: results.tensor(0)?, lse };
        let upstream = Upstream { d_out: d.tensor(0)?, d_lse: d.maybe_per_row(1)? };
        let mut places = Places::new(given, &inputs)?;
        with_workspace(plan.backward_workspace_bytes::<E>(), |workspace| {
            Ok(plan.backward(inputs, saved, upstream, places.gradients(), workspace)?)
        })?;
        Ok(places.into_outputs(given))
    }
}

/// Attention in PyTorch's layout, `[batch, heads, seq, dim]`; the output too. Its gradients are those of attention.
#[derive(Debug)]
pub(crate) struct ByHeads(pub(crate) Exact);

impl Mechanism for ByHeads {
    const ARRAYS: &'static [&'static str] = Exact::ARRAYS;

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let outputs = self.0.forward::<E>(&given.by_heads(3))?;
        Ok(outputs.into_iter().map(Output::by_heads).collect())
    }

    fn backward<E: Element>(
        &self,
        _given: &Given<'_>,
        _results: &Given<'_>,
        _d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        Err(Error::NoBackward { what: "attention in PyTorch's layout" })
    }
}

/// Where gradients are written.
struct Places<E> {
    inputs: [Tensor<E>; 3],
    bias: Option<Tensor<f32>>,
    slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    distances: Option<Tensor<f32>>,
    moved: Option<[Vec<f32>; 2]>,
}

impl<E: Element> Places<E> {
    fn new(given: &Given<'_>, inputs: &Inputs<'_, E, E>) -> Result<Places<E>> {
        let zeros = |x: TensorRef<'_, f32>| Tensor::zeros(x.shape());
        let of = |n: usize| -> Result<Option<Vec<f32>>> {
            Ok(given.maybe_floats(n)?.map(|x| vec![0.0; x.len()]))
        };
        let moved = match (of(CONTENT_BIAS)?, of(POSITION_BIAS)?) {
            (Some(content), Some(position)) => Some([content, position]),
            _ => None,
        };
        let bias = given.optional(BIAS).map(View::scores).transpose()?;
        let distances = given.optional(DISTANCES).map(View::unbatched).transpose()?;
        Ok(Places {
            inputs: [
                Tensor::zeros(inputs.q.shape())?,
                Tensor::zeros(inputs.k.shape())?,
                Tensor::zeros(inputs.v.shape())?,
            ],
            bias: bias.map(zeros).transpose()?,
            slopes: of(SLOPES)?,
            sinks: of(SINKS)?,
            distances: distances.map(zeros).transpose()?,
            moved,
        })
    }

    fn gradients(&mut self) -> Gradients<'_, E, E> {
        let [d_q, d_k, d_v] = self.inputs.each_mut().map(Tensor::view_mut);
        let (content, position) = match &mut self.moved {
            Some([content, position]) => (Some(&mut content[..]), Some(&mut position[..])),
            None => (None, None),
        };
        let terms = TermGradients {
            d_bias: self.bias.as_mut().map(Tensor::view_mut),
            d_slopes: self.slopes.as_deref_mut(),
            d_sinks: self.sinks.as_deref_mut(),
            d_relative_keys: self.distances.as_mut().map(Tensor::view_mut),
            d_content_bias: content,
            d_position_bias: position,
            ..TermGradients::default()
        };
        Gradients { d_q, d_k, d_v, terms }
    }

    fn into_outputs(self, given: &Given<'_>) -> Vec<Option<Output>> {
        let like = |n: usize, numbers: Vec<f32>| {
            Output::new(numbers, given.optional(n).map_or(&[], |view| view.shape()))
        };
        let bias = self.bias.map(|bias| {
            // From [batch, queries, heads, keys] to the bias's own order.
            let (shape, view) = (bias.shape(), bias.view());
            let mut numbers = Vec::with_capacity(bias.as_slice().len());
            for (b, h) in (0..shape.batch).flat_map(|b| (0..shape.heads).map(move |h| (b, h))) {
                (0..shape.seq).for_each(|t| numbers.extend_from_slice(view.row(b, t, h)));
            }
            like(BIAS, numbers)
        });
        let [d_q, d_k, d_v] = self.inputs.map(|x| Some(Output::tensor(x)));
        let [content, position] = self.moved.map_or([None, None], |[content, position]| {
            [Some(like(CONTENT_BIAS, content)), Some(like(POSITION_BIAS, position))]
        });
        let slopes = self.slopes.map(|x| like(SLOPES, x));
        let sinks = self.sinks.map(|x| like(SINKS, x));
        let distances = self.distances.map(Output::unbatched);
        let nothing = || None;
        vec![
            d_q,
            d_k,
            d_v,
            nothing(),
            bias,
            slopes,
            sinks,
            nothing(),
            nothing(),
            nothing(),
            distances,
            content,
            position,
        ]
    }
}

/// Bits of truth values `[batch, heads, queries, keys]`, of which the first three extents may be 1.
pub(crate) fn dense(seen: &View<'_>, extent: Extent) -> Result<Dense> {
    let truths = seen.truths()?;
    let Extent { batch, heads, queries, keys } = extent;
    let fits = |got: usize, all: usize| got == 1 || got == all;
    let [b, h, t, s] = truths.shape;
    if !fits(b, batch) || !fits(h, heads) || !fits(t, queries) || !fits(s, keys) {
        let expected = vec![batch, heads, queries, keys];
        return Err(Error::Shape { what: "mask", expected, got: seen.shape().to_vec() });
    }
    let words = keys.div_ceil(64);
    let mut bits = vec![0u64; b * h * queries * words];
    let rows = if words == 0 { &mut [][..] } else { &mut bits[..] };
    for (n, to) in rows.chunks_exact_mut(words.max(1)).enumerate() {
        let (site, t_row) = (n / queries, n % queries);
        let from = truths.row([site / h, site % h, t_row.min(t - 1)]);
        match s == keys {
            true => pack(from, to),
            false => to.fill(if from[0] != 0 { u64::MAX } else { 0 }),
        }
    }
    Ok(Dense::from_words(bits, Extent { batch: b, heads: h, queries, keys })?)
}

/// One bit for each byte that is not 0.
fn pack(from: &[u8], to: &mut [u64]) {
    for (word, bytes) in to.iter_mut().zip(from.chunks(64)) {
        for (n, eight) in bytes.chunks(8).enumerate() {
            let mut own = [0; 8];
            for (to, &byte) in own.iter_mut().zip(eight) {
                *to = u8::from(byte != 0);
            }
            // Moves the lowest bits of eight bytes together.
            let bits = u64::from_le_bytes(own).wrapping_mul(0x0102_0408_1020_4080) >> 56;
            *word |= bits << (8 * n);
        }
    }
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// The most bytes that a thread keeps between calls.
const KEPT: usize = 64 << 20;

/// Runs with the workspace of this thread.
pub(crate) fn with_workspace<T>(
    bytes: usize,
    run: impl FnOnce(&mut Workspace) -> Result<T>,
) -> Result<T> {
    WORKSPACE.with_borrow_mut(|workspace| {
        workspace.try_reserve(bytes)?;
        let result = run(workspace);
        if workspace.bytes() > KEPT {
            *workspace = Workspace::new();
        }
        result
    })
}
