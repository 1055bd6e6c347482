//! What is to be computed: the description of one attention call.

use crate::cpu::{Cpu, Phase};
use crate::error::{Error, Result};
use crate::exact::terms::{Dropout, Terms};
use crate::mask::Mask;
use crate::plan::Plan;
use crate::position::{RelativeBias, RelativeEncoding, Slopes};
use crate::tensor::{Shape, Tensor, TensorRef};
use crate::workspace::Workspace;
use crate::{Element, plan};

/// What scores are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Scale {
    /// 1/√(key dimension), as in Vaswani et al. 2017, §3.2.1.
    #[default]
    InverseSqrtDim,
    /// A number of your own.
    Value(f32),
}

impl Scale {
    /// The factor for keys of so many numbers.
    pub(crate) fn resolve(self, dim: usize) -> Result<f32> {
        match self {
            Scale::InverseSqrtDim => Ok(1.0 / (dim as f32).sqrt()),
            Scale::Value(scale) if scale.is_finite() => Ok(scale),
            Scale::Value(scale) => Err(Error::InvalidParameter {
                what: "scale",
                expected: "a finite number",
                got: scale.to_string(),
            }),
        }
    }
}

/// Softmax attention, exactly: `softmax(scale · Q Kᵀ under the mask) V`.
///
/// Query head `h` reads key/value head `h / (heads / kv_heads)`; one key/value head is multi-query
/// attention. No copy of keys or values is made for grouping.
///
/// ```
/// use foveal::{Attention, Mask, Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 8, heads: 4, dim: 64 })?;
/// let kv = Tensor::<f32>::zeros(Shape { batch: 1, seq: 8, heads: 2, dim: 64 })?;
/// let result = Attention::new().mask(Mask::causal()).forward(q.view(), kv.view(), kv.view())?;
/// assert_eq!(result.out.shape(), q.shape());
/// # Ok(())
/// # }
/// ```
///
/// Scores go through, in this order: scale, [softcap](Attention::softcap), biases, mask,
/// [sinks](Attention::sinks), softmax, [dropout](Attention::dropout). The numbers of biases and sinks are
/// borrowed: they are parameters of a model, and belong to it.
#[derive(Debug, Clone, Default)]
pub struct Attention<'a> {
    mask: Mask,
    scale: Scale,
    terms: Terms<'a>,
    cpu: Option<Cpu>,
}

/// An output and the log-sum-exp of each row's scores.
#[derive(Debug, Clone, PartialEq)]
pub struct Forward<E> {
    /// `[batch, seq, heads, value dim]`.
    pub out: Tensor<E>,
    /// `[batch, seq, heads, 1]`, natural logarithm; −∞ for a row that saw nothing.
    pub lse: Tensor<f32>,
}

impl<'a> Attention<'a> {
    /// Everything sees everything, scores are scaled by 1/√dim, all threads and the fastest
    /// instructions are used.
    pub fn new() -> Attention<'a> {
        Attention::default()
    }

    /// Which keys each query may see.
    pub fn mask(self, mask: Mask) -> Attention<'a> {
        Attention { mask, ..self }
    }

    /// What scores are multiplied by.
    pub fn scale(self, scale: Scale) -> Attention<'a> {
        Attention { scale, ..self }
    }

    /// Bends scores towards ±`cap`: `cap · tanh(score / cap)`, before biases and mask (Gemma 2, 2024).
    pub fn softcap(self, cap: f32) -> Attention<'a> {
        let terms = Terms { softcap: Some(cap), ..self.terms };
        Attention { terms, ..self }
    }

    /// A number added to each score, natural logits: a tensor `{batch: B, seq: T, heads: H, dim: S}` with any
    /// strides, of which the first three extents may be 1 and are shared then. −∞ hides a key, at the cost of
    /// computing it: that is what a [`Mask`] is for. With caches it has a number for every position since the
    /// sequence's beginning.
    pub fn bias(self, bias: TensorRef<'a, f32>) -> Attention<'a> {
        let terms = Terms { bias: Some(bias), ..self.terms };
        Attention { terms, ..self }
    }

    /// Scores fall linearly with distance (ALiBi, Press et al. 2022).
    pub fn alibi(self, slopes: Slopes<'a>) -> Attention<'a> {
        let terms = Terms { alibi: Some(slopes), ..self.terms };
        Attention { terms, ..self }
    }

    /// A learned bias by bucketed distance (T5, Raffel et al. 2020).
    pub fn relative_bias(self, bias: RelativeBias<'a>) -> Attention<'a> {
        let terms = Terms { relative: Some(bias), ..self.terms };
        Attention { terms, ..self }
    }

    /// A second product of queries, with keys by distance, and what queries are moved by for each (Transformer-XL,
    /// Dai et al. 2019). Earlier segments are keys and values in front of the segment's own. Products of bf16 are
    /// computed as numbers.
    pub fn relative_encoding(self, encoding: RelativeEncoding<'a>) -> Attention<'a> {
        let terms = Terms { encoding: Some(encoding), ..self.terms };
        Attention { terms, ..self }
    }

    /// One learned logit for each query head, as of a key without a value (gpt-oss, 2025): rows may weigh less
    /// than 1 in all. The log-sum-exp counts it.
    pub fn sinks(self, sinks: &'a [f32]) -> Attention<'a> {
        let terms = Terms { sinks: Some(sinks), ..self.terms };
        Attention { terms, ..self }
    }

    /// Leaves out weights at random, for training. The log-sum-exp is that of all weights.
    pub fn dropout(self, dropout: Dropout) -> Attention<'a> {
        let terms = Terms { dropout: Some(dropout), ..self.terms };
        Attention { terms, ..self }
    }

    /// Which instructions and threads to use, instead of [`Cpu::detect`].
    pub fn cpu(self, cpu: Cpu) -> Attention<'a> {
        Attention { cpu: Some(cpu), ..self }
    }

    /// Validates shapes and chooses kernels for prompts: queries `[B, T, H, Dk]`, keys
    /// `[B, S, KV, Dk]`, values `[B, S, KV, Dv]`, dims from 1 to [`plan::MAX_DIM`]. `S` is the most
    /// keys that a call with this plan will see. Neither allocates nor looks at data.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::HeadGrouping`], [`Error::InvalidParameter`], and
    /// [`Error::ShapeOverflow`] for sizes beyond the address space.
    pub fn plan(&self, q: Shape, k: Shape, v: Shape) -> Result<Plan<'_>> {
        Plan::new(self, [q, k, v], Phase::Prompt)
    }

    /// Like [`Attention::plan`], for generated tokens: up to 64 query rows that each read all keys.
    ///
    /// # Errors
    /// Those of [`Attention::plan`], and [`Error::TooManyRows`].
    pub fn plan_decode(&self, q: Shape, k: Shape, v: Shape) -> Result<Plan<'_>> {
        Plan::new(self, [q, k, v], Phase::Generated)
    }

    /// Plans, allocates and runs: queries `[B, T, H, Dk]`, keys `[B, S, KV, Dk]`, values
    /// `[B, S, KV, Dv]`.
    ///
    /// # Errors
    /// Those of [`Attention::plan`].
    pub fn forward<E: Element>(
        &self,
        q: TensorRef<'_, E>,
        k: TensorRef<'_, E>,
        v: TensorRef<'_, E>,
    ) -> Result<Forward<E>> {
        self.plan(q.shape(), k.shape(), v.shape())?.run(q, k, v)
    }

    /// Like [`Attention::forward`] with the kernels for generated tokens.
    ///
    /// # Errors
    /// Those of [`Attention::plan_decode`].
    pub fn decode<E: Element>(
        &self,
        q: TensorRef<'_, E>,
        k: TensorRef<'_, E>,
        v: TensorRef<'_, E>,
    ) -> Result<Forward<E>> {
        self.plan_decode(q.shape(), k.shape(), v.shape())?.run(q, k, v)
    }

    pub(crate) fn masked_by(&self) -> &Mask {
        &self.mask
    }

    pub(crate) fn terms(&self) -> &Terms<'a> {
        &self.terms
    }

    /// The same without learned sinks, which are counted once.
    pub(crate) fn without_sinks(self) -> Attention<'a> {
        Attention { terms: Terms { sinks: None, ..self.terms }, ..self }
    }

    pub(crate) fn resolved_cpu(&self) -> Result<Cpu> {
        self.cpu.map_or_else(Cpu::detect, Ok)
    }

    pub(crate) fn resolved_scale(&self, dim: usize) -> Result<f32> {
        self.scale.resolve(dim)
    }
}

impl Plan<'_> {
    fn run<E: Element>(
        &self,
        q: TensorRef<'_, E>,
        k: TensorRef<'_, E>,
        v: TensorRef<'_, E>,
    ) -> Result<Forward<E>> {
        let mut out = Tensor::zeros(self.out_shape())?;
        let mut lse = Tensor::zeros(self.out_shape().per_row())?;
        let mut workspace = Workspace::for_plan(self);
        let inputs = plan::Inputs { q, k, v };
        self.forward(inputs, out.view_mut(), Some(lse.view_mut()), &mut workspace)?;
        Ok(Forward { out, lse })
    }
}
