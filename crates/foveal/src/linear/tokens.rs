//! What a call reads: queries, keys, values, gates, and which tokens belong together.

use super::{DecayForm, Form};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::problem::Scale;
use crate::tensor::{Shape, Spans, TensorRef};

/// The largest key or value dim.
const MAX_DIM: usize = 4096;

/// The tokens of a call.
///
/// Queries and keys may have fewer heads than values: head `h` of the values, of the state and of the output reads query
/// and key head `h / (heads / key heads)`, as in Mamba-2. No copy is made for that.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a, E> {
    /// Queries, `[B, T, G, Dk]`.
    pub q: TensorRef<'a, E>,
    /// Keys, `[B, T, G, Dk]`.
    pub k: TensorRef<'a, E>,
    /// Values, `[B, T, H, Dv]`.
    pub v: TensorRef<'a, E>,
    /// See [`Tokens::log_decay`].
    pub log_decay: Option<TensorRef<'a, f32>>,
    /// See [`Tokens::beta`].
    pub beta: Option<TensorRef<'a, f32>>,
    /// See [`Tokens::present`].
    pub present: Option<&'a [bool]>,
    /// See [`Tokens::cuts`].
    pub cuts: Option<&'a [usize]>,
}

impl<'a, E: Element> Tokens<'a, E> {
    /// Tokens without gates.
    pub fn new(q: TensorRef<'a, E>, k: TensorRef<'a, E>, v: TensorRef<'a, E>) -> Tokens<'a, E> {
        Tokens { q, k, v, log_decay: None, beta: None, present: None, cuts: None }
    }

    /// Natural logarithms of the decays, `[B, T, H, 1]` or `[B, T, H, Dk]` as the mechanism asks. 0 keeps everything, −∞
    /// forgets everything.
    pub fn log_decay(self, log_decay: TensorRef<'a, f32>) -> Tokens<'a, E> {
        Tokens { log_decay: Some(log_decay), ..self }
    }

    /// Writing strengths β, `[B, T, H, 1]`.
    pub fn beta(self, beta: TensorRef<'a, f32>) -> Tokens<'a, E> {
        Tokens { beta: Some(beta), ..self }
    }

    /// Which of the B·T tokens are real. A token that is not writes nothing, whatever its key and value are: the *mapped*
    /// key counts as 0. It still decays the state and reads from it.
    pub fn present(self, present: &'a [bool]) -> Tokens<'a, E> {
        Tokens { present: Some(present), ..self }
    }

    /// Several sequences one after the other in a batch of 1 (`cu_seqlens`): sequence `n` is tokens `cuts[n]` to
    /// `cuts[n + 1]`, and has a state of its own.
    pub fn cuts(self, cuts: &'a [usize]) -> Tokens<'a, E> {
        Tokens { cuts: Some(cuts), ..self }
    }

    /// The sizes of a call, if everything fits together.
    pub(crate) fn check(&self, form: Form, scale: Scale) -> Result<Sizes<'a>> {
        let (q, v) = (self.q.shape(), self.v.shape());
        expect("keys, which have the shape of queries", q, self.k.shape())?;
        expect("values", Shape { heads: v.heads, dim: v.dim, ..q }, v)?;
        if q.heads == 0 || v.heads == 0 || !v.heads.is_multiple_of(q.heads) {
            return Err(Error::HeadGrouping { heads: v.heads, kv_heads: q.heads });
        }
        for (what, got) in [("key dim", q.dim), ("value dim", v.dim)] {
            if !(1..=MAX_DIM).contains(&got) {
                let (expected, got) = ("1 to 4096", got.to_string());
                return Err(Error::InvalidParameter { what, expected, got });
            }
        }
        let decay_dim = match form.decay {
            DecayForm::None => None,
            DecayForm::Scalar => Some(1),
            DecayForm::Vector => Some(q.dim),
        };
        gate("decays", self.log_decay, decay_dim.map(|dim| Shape { dim, ..v }))?;
        gate("writing strengths", self.beta, form.beta.then_some(v.per_row()))?;
        if let Some(present) = self.present {
            let expected = q.batch.saturating_mul(q.seq);
            if present.len() != expected {
                let (what, got) = ("flags of present tokens", present.len());
                return Err(Error::LengthMismatch { what, expected, got });
            }
        }
        let spans = Spans::new(q.batch, q.seq, self.cuts)?;
        Ok(Sizes {
            spans,
            groups: q.heads,
            heads: v.heads,
            input_dim: q.dim,
            key_dim: q.dim,
            value_dim: v.dim,
            sums: form.sums,
            decay_dim,
            scale: scale.resolve(q.dim)?,
        })
    }
}

/// The sizes of a checked call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes<'a> {
    pub(crate) spans: Spans<'a>,
    /// Heads of queries and keys.
    pub(crate) groups: usize,
    /// Heads of values and states.
    pub(crate) heads: usize,
    /// Numbers of a query or key.
    pub(crate) input_dim: usize,
    /// Numbers of a mapped query or key.
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    /// Sums of each key channel that a state holds.
    pub(crate) sums: usize,
    /// Numbers of a decay.
    pub(crate) decay_dim: Option<usize>,
    /// What reads of the state are multiplied by.
    pub(crate) scale: f32,
}

pub(crate) fn expect(what: &'static str, expected: Shape, got: Shape) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::ShapeMismatch { what, expected, got }) }
}

/// A gate has to be there exactly if the mechanism asks for it, in the right shape.
fn gate(
    what: &'static str,
    gate: Option<TensorRef<'_, f32>>,
    expected: Option<Shape>,
) -> Result<()> {
    match (gate, expected) {
        (Some(gate), Some(expected)) => expect(what, expected, gate.shape()),
        (None, None) => Ok(()),
        (None, Some(shape)) => Err(Error::InvalidParameter {
            what,
            expected: "a tensor of them, which this mechanism asks for",
            got: format!("none; the shape is {shape}"),
        }),
        (Some(gate), None) => Err(Error::InvalidParameter {
            what,
            expected: "none, since this mechanism has no use for them",
            got: format!("a tensor of shape {}", gate.shape()),
        }),
    }
}
