//! Mechanisms with a memory of earlier segments.

use crate::call::{Given, Mechanism, cpu};
use crate::error::{Error, Result};
use crate::output::Output;
use foveal::linear::State;
use foveal::memory::infini::{Infini, Tokens, Upstream};
use foveal::memory::memorizing::{self, Memorizing};
use foveal::sparse::StateHeads;
use foveal::{Element, Phase, Shape, Tensor, TensorRef};

const GATE: usize = 3;
const ROTATED: usize = Segments::ROTATED;
const MEMORY: usize = Segments::MEMORY;
const SUMS: usize = 7;

/// Infini-attention.
#[derive(Debug)]
pub(crate) struct Segments(pub(crate) Infini);

impl Segments {
    /// Where in its arrays queries and keys with positions lie.
    pub(crate) const ROTATED: usize = 4;
    /// Where the memory lies.
    pub(crate) const MEMORY: usize = 6;

    /// What a call is given.
    pub(crate) fn tokens<'a, E: Element>(given: &Given<'a>) -> Result<Tokens<'a, E>> {
        let gate = given.view(GATE)?.floats()?;
        let tokens = Tokens::new(given.tensor(0)?, given.tensor(1)?, given.tensor(2)?, gate);
        match (given.maybe(ROTATED)?, given.maybe(ROTATED + 1)?) {
            (Some(q), Some(k)) => Ok(tokens.rotated(q, k)),
            (None, None) => Ok(tokens),
            _ => Err(Error::Missing { what: "the other one of rotated_q and rotated_k" }),
        }
    }

    fn memory<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        given: &Given<'_>,
        [matrices, sums]: [usize; 2],
    ) -> Result<State> {
        let mut memory = self.0.memory(tokens)?;
        fill(given, matrices, memory.matrices_mut())?;
        fill(given, sums, memory.key_sums_mut())?;
        Ok(memory)
    }

    /// A memory's matrices and sums of keys.
    pub(crate) fn given_back(memory: &State) -> [Output; 2] {
        let shape = memory.shape();
        let heads = [shape.sequences, shape.heads];
        let [batch, kv_heads] = heads;
        let matrices = [batch, kv_heads, shape.key_dim, shape.value_dim];
        [
            Output::new(memory.matrices().to_vec(), &matrices),
            Output::new(memory.key_sums().to_vec(), &[batch, kv_heads, shape.key_dim]),
        ]
    }
}

fn fill(given: &Given<'_>, n: usize, to: &mut [f32]) -> Result<()> {
    let Some(from) = given.maybe_floats(n)? else { return Ok(()) };
    if from.len() != to.len() {
        let (what, got) = ("memory", given.view(n)?.shape().to_vec());
        return Err(Error::Shape { what, expected: vec![to.len()], got });
    }
    to.copy_from_slice(from);
    Ok(())
}

impl Mechanism for Segments {
    const ARRAYS: &'static [&'static str] =
        &["q", "k", "v", "gate", "rotated_q", "rotated_k", "memory", "memory_sums"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let infini = self.0.clone().cpu(cpu()?);
        let tokens = Segments::tokens::<E>(given)?;
        let mut memory = self.memory(&tokens, given, [MEMORY, SUMS])?;
        let out = infini.forward(&tokens, &mut memory)?;
        let [matrices, sums] = Segments::given_back(&memory);
        Ok(vec![Output::tensor(out), matrices, sums])
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        _results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        let infini = self.0.clone().cpu(cpu()?);
        let tokens = Segments::tokens::<E>(given)?;
        let initial = self.memory(&tokens, given, [MEMORY, SUMS])?;
        let mut d_memory = self.memory(&tokens, d, [1, 2])?;
        let upstream = Upstream { d_out: d.tensor(0)?, initial: &initial };
        let back = infini.backward(&tokens, upstream, &mut d_memory)?;
        let [matrices, sums] = Segments::given_back(&d_memory);
        let (q, k) = back
            .d_rotated
            .map_or((None, None), |(q, k)| (Some(Output::tensor(q)), Some(Output::tensor(k))));
        let heads = back.d_gate.len();
        Ok(vec![
            Some(Output::tensor(back.d_q)),
            Some(Output::tensor(back.d_k)),
            Some(Output::tensor(back.d_v)),
            Some(Output::new(back.d_gate, &[heads])),
            q,
            k,
            given.optional(MEMORY).map(|_| matrices),
            given.optional(SUMS).map(|_| sums),
        ])
    }
}

/// Memorizing Transformers' attention to documents, each from its beginning. Gradients compute forward again.
#[derive(Debug)]
pub(crate) struct Documents(pub(crate) Memorizing);

impl Documents {
    /// Runs `each` with the tokens of every sequence.
    fn each<E: Element>(
        given: &Given<'_>,
        mut each: impl FnMut(usize, StateHeads, memorizing::Tokens<'_, E>) -> Result<()>,
    ) -> Result<()> {
        let (q, k, v): (TensorRef<'_, E>, TensorRef<'_, E>, TensorRef<'_, E>) =
            (given.tensor(0)?, given.tensor(1)?, given.tensor(2)?);
        let expected = Shape { batch: q.shape().batch, ..k.shape() };
        for (what, got) in [("keys", k.shape()), ("values", v.shape())] {
            if got.batch != expected.batch {
                let numbers = |x: Shape| vec![x.batch, x.seq, x.heads, x.dim];
                return Err(Error::Shape { what, expected: numbers(expected), got: numbers(got) });
            }
        }
        let heads = StateHeads {
            heads: q.shape().heads,
            kv_heads: k.shape().heads,
            key_dim: k.shape().dim,
            value_dim: v.shape().dim,
        };
        for b in 0..q.shape().batch {
            let [q, k, v] = [q, k, v].map(|x| x.part(b..b + 1, 0..x.shape().heads));
            each(b, heads, Documents::tokens((q, k, v), given)?)?;
        }
        Ok(())
    }

    /// Tokens of one document with the gates, scales and biases of a call.
    pub(crate) fn tokens<'a, E: Element>(
        (q, k, v): (TensorRef<'a, E>, TensorRef<'a, E>, TensorRef<'a, E>),
        given: &Given<'a>,
    ) -> Result<memorizing::Tokens<'a, E>> {
        let (gate, scale) = (given.view(3)?.floats()?, given.view(4)?.floats()?);
        let tokens = memorizing::Tokens::new(q, k, v, gate, scale);
        let bias = given.optional(5).map(|bias| bias.scores()).transpose()?;
        Ok(bias.into_iter().fold(tokens, |tokens, bias| tokens.bias(bias)))
    }
}

impl Mechanism for Documents {
    const ARRAYS: &'static [&'static str] = &["q", "k", "v", "gate", "scale", "bias"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let layer = self.0.clone().cpu(cpu()?);
        let (q, v) = (given.tensor::<E>(0)?.shape(), given.tensor::<E>(2)?.shape());
        let shape = Shape { dim: v.dim, ..q };
        let mut out = Vec::with_capacity(shape.checked_len().unwrap_or(0));
        Documents::each::<E>(given, |_, heads, tokens| {
            let mut state = layer.state(heads, layer.store::<f32>(heads)?)?;
            let forward = state.forward(&tokens, Phase::Prompt)?;
            out.extend_from_slice(forward.out.as_slice());
            Ok(())
        })?;
        Ok(vec![Output::tensor(Tensor::from_vec(out, shape)?)])
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        _results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        let layer = self.0.clone().cpu(cpu()?);
        let d_out = d.tensor::<E>(0)?;
        let mut sums: [Vec<f32>; 6] = Default::default();
        Documents::each::<E>(given, |b, heads, tokens| {
            let state = layer.state(heads, layer.store::<f32>(heads)?)?;
            let forward = state.clone().forward(&tokens, Phase::Prompt)?;
            let own = d_out.part(b..b + 1, 0..d_out.shape().heads);
            let back = state.backward(&tokens, &forward, own)?;
            let [q, k, v, ..] = &mut sums;
            q.extend_from_slice(back.d_q.as_slice());
            k.extend_from_slice(back.d_k.as_slice());
            v.extend_from_slice(back.d_v.as_slice());
            add(&mut sums[3], &back.d_gate);
            add(&mut sums[4], &back.d_scale);
            if let Some(bias) = &back.d_bias {
                add(&mut sums[5], by_heads(bias).as_slice());
            }
            Ok(())
        })?;
        let [d_q, d_k, d_v, d_gate, d_scale, d_bias] = sums;
        let rounded = |n: usize, d: Vec<f32>| -> Result<Option<Output>> {
            let shape = given.tensor::<E>(n)?.shape();
            Ok(Some(Output::rounded::<E>(Tensor::from_vec(d, shape)?)))
        };
        let like = |n: usize, d: Vec<f32>| {
            given.optional(n).map(|view| {
                let len = view.shape().iter().product();
                // Nothing was added for a batch of no documents.
                Output::new(if d.is_empty() { vec![0.0; len] } else { d }, view.shape())
            })
        };
        Ok(vec![
            rounded(0, d_q)?,
            rounded(1, d_k)?,
            rounded(2, d_v)?,
            like(3, d_gate),
            like(4, d_scale),
            like(5, d_bias),
        ])
    }
}

fn add(sum: &mut Vec<f32>, own: &[f32]) {
    sum.resize(own.len(), 0.0);
    sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
}

/// From `[1, queries, heads, keys]` to `[1, heads, queries, keys]`.
fn by_heads(x: &Tensor<f32>) -> Vec<f32> {
    let (shape, view) = (x.shape(), x.view());
    let sites = (0..shape.heads).flat_map(|h| (0..shape.seq).map(move |t| (t, h)));
    sites.flat_map(|(t, h)| view.row(0, t, h).to_vec()).collect()
}
