//! Memorizing Transformers: exact attention within a segment, and to the few keys of a document's past that suit a query best.
//!
//! ```text
//! q̂ = q / √(Σ q² + 10⁻⁶)        k̂ likewise                                 no 1/√D
//! A_near = softmax(|s| (q̂ k̂ᵀ + bias), causal) V                            the segment, and perhaps the one before
//! A_mem  = softmax(|s| q̂ k̂ⱼᵀ, j among the k largest q̂ k̂ⱼᵀ of the memory) V
//! out    = g · A_mem + (1 − g) · A_near                                    g = sigmoid(β); s, β one for each query head
//! ```
//!
//! Wu, Rabe, Hutchins and Szegedy 2022, "Memorizing Transformers", ICLR, arXiv:2203.08913, §3.1 and §3.2; the normalisation is
//! that of the released code. The memory holds k̂ and v of the document's last `capacity` tokens, for each key/value head, but
//! for the segment that is not whole yet. A segment reads before it is written: no token retrieves itself. Two softmaxes are
//! mixed, never joined. Fewer entries than k count as they are; an empty memory reads as 0, and the gate still acts. Among equal
//! scores the earlier entry is taken; a key whose score is NaN or −∞ is not retrieved.
//!
//! No gradient reaches the memory, nor the segment before: both are constants. Queries have gradients of both softmaxes.
//!
//! Cost a token and query head: 2·M·Dk operations for M entries, and selection; attention to k gathered entries. Memory: entries
//! in their storage type, Dk + Dv numbers each and key/value head, and two segments in f32. With an [`Index`], retrieval is approximate and
//! costs a small share of that.

mod backward;
mod best;
mod bounded;
mod index;
mod probe;
mod retrieve;
mod search;
mod state;

pub use backward::MemorizingBackward;
pub use index::Index;
pub use state::MemorizingState;

use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::plan::expect;
use crate::problem::{Attention, Scale};
use crate::simd::nn::sum_squares;
use crate::simd::{Level, row};
use crate::sparse::StateHeads;
use crate::tensor::{Shape, Tensor, TensorRef};

/// What is added to a sum of squares (the released code's).
const EPSILON: f32 = 1e-6;

/// Attention with a memory of past keys and values.
///
/// ```
/// use foveal::cache::ContiguousCache;
/// use foveal::memory::memorizing::{Memorizing, Tokens};
/// use foveal::sparse::StateHeads;
/// use foveal::{Phase, Shape, Tensor};
///
/// # fn main() -> foveal::Result<()> {
/// let heads = StateHeads { heads: 4, kv_heads: 2, key_dim: 16, value_dim: 16 };
/// let memorizing = Memorizing::new(32, 8, 1000)?;
/// let mut state = memorizing.state(heads, memorizing.store::<half::bf16>(heads)?)?;
/// let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 4, dim: 16 })?;
/// let kv = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 2, dim: 16 })?;
/// let tokens = Tokens::new(q.view(), kv.view(), kv.view(), &[0.0; 4], &[1.0; 4]);
/// let forward = state.forward(&tokens, Phase::Prompt)?;
/// assert_eq!(forward.out.shape(), q.shape());
/// assert_eq!((state.tokens(), state.open(), state.remembered()), (100, 4, 96));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Memorizing {
    segment: usize,
    top: usize,
    capacity: usize,
    previous: bool,
    index: Option<Index>,
    cpu: Option<Cpu>,
}

/// The tokens of a call: one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a, E> {
    /// Queries, `[1, T, H, Dk]`.
    pub q: TensorRef<'a, E>,
    /// Keys, `[1, T, KV, Dk]`.
    pub k: TensorRef<'a, E>,
    /// Values, `[1, T, KV, Dv]`.
    pub v: TensorRef<'a, E>,
    /// β, one for each query head: sigmoid(β) is the share of the memory.
    pub gate: &'a [f32],
    /// s, one for each query head: scores are multiplied by |s|.
    pub scale: &'a [f32],
    /// See [`Tokens::bias`].
    pub bias: Option<TensorRef<'a, f32>>,
}

impl<'a, E: Element> Tokens<'a, E> {
    /// Tokens without a bias.
    pub fn new(
        q: TensorRef<'a, E>,
        k: TensorRef<'a, E>,
        v: TensorRef<'a, E>,
        gate: &'a [f32],
        scale: &'a [f32],
    ) -> Tokens<'a, E> {
        Tokens { q, k, v, gate, scale, bias: None }
    }

    /// A number for each query and key of a segment of N, added to q̂ k̂ᵀ of local attention: `{batch: 1, seq: N, heads: H, dim: N}`,
    /// or `dim: 2 N` if the segment before is seen too, whose keys come first. Entries of the memory have no place, and none.
    pub fn bias(self, bias: TensorRef<'a, f32>) -> Tokens<'a, E> {
        Tokens { bias: Some(bias), ..self }
    }

    fn span(&self, tokens: std::ops::Range<usize>) -> Tokens<'a, E> {
        let [q, k, v] = [self.q, self.k, self.v].map(|x| x.span(tokens.clone()));
        Tokens { q, k, v, ..*self }
    }
}

/// What a call gives.
#[derive(Debug, Clone, PartialEq)]
pub struct MemorizingForward<E> {
    /// The outputs, `[1, T, H, Dv]`.
    pub out: Tensor<E>,
    /// A_near, `[1, T, H, Dv]`.
    pub local: Tensor<f32>,
    /// The log-sum-exp of A_near's scores, `[1, T, H, 1]`.
    pub local_lse: Tensor<f32>,
    /// A_mem, `[1, T, H, Dv]`.
    pub memory: Tensor<f32>,
    /// The log-sum-exp of A_mem's scores, `[1, T, H, 1]`; −∞ where nothing was retrieved.
    pub memory_lse: Tensor<f32>,
    /// Which entries were retrieved.
    pub selected: Selected,
}

/// The entries that queries retrieved, by the position of their token in the document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selected {
    heads: usize,
    top: usize,
    /// `[token][head][top]`.
    data: Vec<u32>,
}

impl Selected {
    /// What a query retrieved, the best first.
    ///
    /// # Panics
    /// If there is no such query.
    pub fn of(&self, token: usize, head: usize) -> impl Iterator<Item = usize> {
        assert!(head < self.heads, "no such head");
        let at = (token * self.heads + head) * self.top;
        let own = self.data[at..at + self.top].iter();
        own.take_while(|&&at| at != search::NONE).map(|&at| at as usize)
    }

    /// What the queries of some tokens retrieved, `[head][token][top]`.
    fn by_head(&self, tokens: std::ops::Range<usize>) -> Vec<u32> {
        let mut selected = Vec::with_capacity(tokens.len() * self.heads * self.top);
        for head in 0..self.heads {
            for token in tokens.clone() {
                let at = (token * self.heads + head) * self.top;
                selected.extend_from_slice(&self.data[at..at + self.top]);
            }
        }
        selected
    }

    /// Puts what a segment's queries selected, `[head][token][top]`, in order.
    fn extend(&mut self, selected: &[u32]) {
        let tokens = selected.len() / (self.heads * self.top).max(1);
        for (token, head) in (0..tokens).flat_map(|t| (0..self.heads).map(move |h| (t, h))) {
            let at = (head * tokens + token) * self.top;
            self.data.extend_from_slice(&selected[at..at + self.top]);
        }
    }
}

impl Memorizing {
    /// Segments of so many tokens; so many entries for each query; so many tokens of a document that are remembered.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a number that is 0, or more entries than a memory of 2³² − 2 tokens has.
    pub fn new(segment: usize, top: usize, capacity: usize) -> Result<Memorizing> {
        let most = search::NONE as usize - 1;
        for (what, n) in [
            ("tokens of a segment", segment),
            ("entries that a query retrieves", top),
            ("tokens that are remembered", capacity),
        ] {
            if !(1..=most).contains(&n) {
                let expected = "1 to 4294967294";
                return Err(Error::InvalidParameter { what, expected, got: n.to_string() });
            }
        }
        Ok(Memorizing { segment, top, capacity, previous: false, index: None, cpu: None })
    }

    /// Whether local attention sees the whole segment before, too (Transformer-XL's cache): constants.
    pub fn previous(self, previous: bool) -> Memorizing {
        Memorizing { previous, ..self }
    }

    /// Whether retrieval is approximate, by an inverted file, once the memory is large: see [`Index`]. All else stays as it is.
    pub fn index(self, index: Option<Index>) -> Memorizing {
        Memorizing { index, ..self }
    }

    /// Which instructions and threads to use, instead of [`Cpu::detect`].
    pub fn cpu(self, cpu: Cpu) -> Memorizing {
        Memorizing { cpu: Some(cpu), ..self }
    }

    /// Tokens of a segment.
    pub fn segment(&self) -> usize {
        self.segment
    }

    /// Tokens that are remembered.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How retrieval is approximate, if it is.
    pub fn indexed(&self) -> Option<Index> {
        self.index
    }

    /// Whether local attention sees the segment before.
    pub fn sees_previous(&self) -> bool {
        self.previous
    }

    fn attention(&self) -> Result<Attention<'static>> {
        Ok(Attention::new().scale(Scale::Value(1.0)).cpu(self.machine()?))
    }

    /// Local attention, but for its bias.
    fn near(&self) -> Result<Attention<'static>> {
        Ok(self.attention()?.mask(Mask::causal()))
    }

    fn machine(&self) -> Result<Cpu> {
        self.cpu.map_or_else(Cpu::detect, Ok)
    }

    /// Rows of keys that local attention may see.
    fn window(&self) -> usize {
        if self.previous { 2 * self.segment } else { self.segment }
    }

    /// Refuses tokens that are not those of a state's sequence.
    fn check<E: Element>(&self, shape: StateHeads, tokens: &Tokens<'_, E>) -> Result<()> {
        let StateHeads { heads, kv_heads, key_dim, value_dim } = shape;
        let q = Shape { batch: 1, seq: tokens.q.shape().seq, heads, dim: key_dim };
        let k = Shape { heads: kv_heads, ..q };
        expect("queries of the state's sequence", q, tokens.q.shape())?;
        expect("keys of the state's sequence", k, tokens.k.shape())?;
        expect("values of the state's sequence", Shape { dim: value_dim, ..k }, tokens.v.shape())?;
        for (what, got) in [
            ("gates, one for each query head", tokens.gate.len()),
            ("scales, one for each query head", tokens.scale.len()),
        ] {
            if got != heads {
                return Err(Error::LengthMismatch { what, expected: heads, got });
            }
        }
        if let Some(bias) = tokens.bias {
            let expected = Shape { batch: 1, seq: self.segment, heads, dim: self.window() };
            expect("bias of a segment", expected, bias.shape())?;
        }
        Ok(())
    }
}

/// The rows of some tokens in f32, as attention takes them.
struct Normal {
    /// q̂.
    q: Tensor<f32>,
    /// |s| q̂.
    scaled: Tensor<f32>,
    /// k̂.
    k: Tensor<f32>,
    v: Tensor<f32>,
}

impl Normal {
    fn of<E: Element>(level: Level, tokens: &Tokens<'_, E>) -> Result<Normal> {
        let q = widen(level, tokens.q, |row| normalise(level, row))?;
        let mut scaled = q.clone();
        let Shape { seq, heads, .. } = q.shape();
        let mut rows = scaled.view_mut();
        for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
            let scale = tokens.scale[head].abs();
            rows.row_mut(0, t, head).iter_mut().for_each(|x| *x *= scale);
        }
        let k = widen(level, tokens.k, |row| normalise(level, row))?;
        Ok(Normal { q, scaled, k, v: widen(level, tokens.v, |_| {})? })
    }
}

/// 1 / √(Σ x² + ε).
fn inverse_norm(level: Level, row: &[f32]) -> f32 {
    1.0 / (sum_squares(level, row) + EPSILON).sqrt()
}

fn normalise(level: Level, row: &mut [f32]) {
    let factor = inverse_norm(level, row);
    row.iter_mut().for_each(|x| *x *= factor);
}

/// A copy in f32, each row changed.
fn widen<E: Element>(
    level: Level,
    x: TensorRef<'_, E>,
    change: impl Fn(&mut [f32]),
) -> Result<Tensor<f32>> {
    let Shape { seq, heads, .. } = x.shape();
    let mut to = Tensor::zeros(x.shape())?;
    let mut rows = to.view_mut();
    for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
        let to = rows.row_mut(0, t, head);
        row::widen(level, x.row(0, t, head), to);
        change(to);
    }
    Ok(to)
}
