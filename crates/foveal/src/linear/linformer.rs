//! Linformer: softmax attention to few mixtures of all keys and values.
//!
//! ```text
//! K' = E K      V' = F V      O = softmax(scale · Q K'ᵀ) V'           E, F [r, n], K and V [S, KV · D], S ≤ n
//! dE = dK' Kᵀ      dK = Eᵀ dK'      dF = dV' Vᵀ      dV = Fᵀ dV'      (dE and dF summed over batch and heads)
//! ```
//!
//! A sequence that is shorter than n takes the first columns of E and F. Each row of K' mixes tokens of the whole sequence:
//! later ones cannot be hidden, so there is no causal form. Cost: 2 r S (Dk + Dv) operations for each key/value head to
//! mix and 2 T r (Dk + Dv) for each query head to attend; memory for K' and V', f32. Exact for the low-rank softmax that
//! it defines. Wang et al. 2020, arXiv:2006.04768, section 4.

use crate::cpu::{Cpu, Phase};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::gradient::Gradient;
use crate::mask::Mask;
use crate::plan::{Backward, Gradients, Inputs, Saved, TermGradients, Upstream, expect};
use crate::problem::Attention;
use crate::projection::{
    Activations, Call, Input, Matrix, MatrixShape, Output, ProjectionBackward, ProjectionGradients,
    backward_workspace_bytes, project, project_backward, workspace_bytes,
};
use crate::simd::row::widen;
use crate::tensor::{Shape, Tensor, TensorRef};
use crate::workspace::Workspace;

/// A matrix `[rank, length]` over the tokens of a sequence, row-major.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SequenceMatrix<'a> {
    numbers: &'a [f32],
    rank: usize,
    length: usize,
}

impl<'a> SequenceMatrix<'a> {
    /// Views `rank` rows of `length` numbers.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for no rows or columns; [`Error::BufferLength`] unless `numbers` is exactly the matrix.
    pub fn new(numbers: &'a [f32], rank: usize, length: usize) -> Result<SequenceMatrix<'a>> {
        for (what, n) in [("rank of a Linformer", rank), ("length of a Linformer", length)] {
            if n == 0 {
                let (expected, got) = ("1 or more", n.to_string());
                return Err(Error::InvalidParameter { what, expected, got });
            }
        }
        let (what, expected) = ("a matrix over tokens", rank.saturating_mul(length));
        match numbers.len() {
            got if got == expected => Ok(SequenceMatrix { numbers, rank, length }),
            got => Err(Error::BufferLength { what, expected, got }),
        }
    }
}

/// Which matrices mix keys and values. All heads of a layer share them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sharing<'a> {
    /// One for keys and one for values in each layer.
    Headwise {
        /// E.
        keys: SequenceMatrix<'a>,
        /// F.
        values: SequenceMatrix<'a>,
    },
    /// One in each layer, for keys and values.
    KeyValue(SequenceMatrix<'a>),
    /// One for all layers, for keys and values. Each layer's gradient has to be added to those of the others:
    /// [`Gradient::Write`] is refused.
    Layerwise(SequenceMatrix<'a>),
}

impl<'a> Sharing<'a> {
    /// E and F.
    fn matrices(&self) -> [SequenceMatrix<'a>; 2] {
        match *self {
            Sharing::Headwise { keys, values } => [keys, values],
            Sharing::KeyValue(both) | Sharing::Layerwise(both) => [both; 2],
        }
    }
}

/// A layer's Linformer attention.
///
/// ```
/// use foveal::linear::{Linformer, SequenceMatrix, Sharing};
/// use foveal::plan::Inputs;
/// use foveal::{Attention, Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let x = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 2, dim: 16 })?;
/// let numbers = vec![0.01; 8 * 128];
/// let layer = Linformer {
///     attention: &Attention::new(),
///     sharing: Sharing::KeyValue(SequenceMatrix::new(&numbers, 8, 128)?),
/// };
/// let forward = layer.forward(Inputs { q: x.view(), k: x.view(), v: x.view() })?;
/// assert_eq!(forward.out.shape(), x.shape());
/// assert_eq!(forward.keys.shape().seq, 8);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Linformer<'a> {
    /// Scale, softcap, biases over mixtures, sinks, dropout; instructions and threads. No mask.
    pub attention: &'a Attention<'a>,
    /// The matrices.
    pub sharing: Sharing<'a>,
}

/// An output, and what backward needs of its making.
#[derive(Debug, Clone, PartialEq)]
pub struct LinformerForward<E> {
    /// `[B, T, H, Dv]`.
    pub out: Tensor<E>,
    /// The log-sum-exp of each row, `[B, T, H, 1]`.
    pub lse: Tensor<f32>,
    /// K', `[B, rank, KV, Dk]`.
    pub keys: Tensor<f32>,
    /// V', `[B, rank, KV, Dv]`.
    pub values: Tensor<f32>,
}

/// Where gradients of the matrices go, each `[rank, length]`; columns beyond the sequence get zeros.
#[derive(Debug, Default)]
pub struct MatrixGradients<'a> {
    /// Of E, or of the matrix that keys and values share.
    pub d_keys: Gradient<&'a mut [f32]>,
    /// Of F; [`Gradient::Skip`] where there is one matrix.
    pub d_values: Gradient<&'a mut [f32]>,
}

impl Linformer<'_> {
    /// The output for queries `[B, T, H, Dk]`, keys `[B, S, KV, Dk]` and values `[B, S, KV, Dv]`. Allocates it and what it
    /// is made of.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a mask, causal ones included, or scores by distance; for more keys than E has
    /// columns; [`Error::LengthMismatch`] for E and F of different ranks; those of [`Attention::plan`].
    pub fn forward<E: Element>(&self, inputs: Inputs<'_, E, E>) -> Result<LinformerForward<E>> {
        let [e, f] = self.check(&inputs)?;
        let cpu = self.attention.resolved_cpu()?;
        let Inputs { q, k, v } = inputs;
        let mixed = |x: Shape| Shape { seq: e.rank, ..x };
        let plan = self.attention.plan(q.shape(), mixed(k.shape()), mixed(v.shape()))?;
        let (keys, values) = (mix(e, k, cpu)?, mix(f, v, cpu)?);
        let mut out = Tensor::zeros(plan.out_shape())?;
        let mut lse = Tensor::zeros(plan.out_shape().per_row())?;
        let inputs = Inputs { q, k: keys.view(), v: values.view() };
        let mut workspace = Workspace::for_plan(&plan);
        plan.forward(inputs, out.view_mut(), Some(lse.view_mut()), &mut workspace)?;
        Ok(LinformerForward { out, lse, keys, values })
    }

    /// Gradients from what [`Linformer::forward`] was given and gave, and the gradient of its output `[B, T, H, Dv]`.
    /// Allocates those of queries, keys and values.
    ///
    /// # Errors
    /// Those of [`Linformer::forward`] and [`crate::Plan::backward`]; [`Error::InvalidParameter`] for a gradient of F
    /// where there is none, or one to be written where layers share a matrix; [`Error::LengthMismatch`] for gradients of
    /// another size. No gradient of a matrix is written then.
    pub fn backward<E: Element>(
        &self,
        inputs: Inputs<'_, E, E>,
        forward: &LinformerForward<E>,
        d_out: TensorRef<'_, E>,
        matrices: MatrixGradients<'_>,
    ) -> Result<Backward<E>> {
        let [e, f] = self.check(&inputs)?;
        self.check_gradients(&matrices)?;
        let cpu = self.attention.resolved_cpu()?;
        let Inputs { q, k, v } = inputs;
        expect("mixed keys", Shape { seq: e.rank, ..k.shape() }, forward.keys.shape())?;
        expect("mixed values", Shape { seq: f.rank, ..v.shape() }, forward.values.shape())?;
        let mixed = Inputs { q, k: forward.keys.view(), v: forward.values.view() };
        let plan = self.attention.plan(q.shape(), mixed.k.shape(), mixed.v.shape())?;
        let mut d_q = Tensor::zeros(q.shape())?;
        let mut d_keys = Tensor::zeros(mixed.k.shape())?;
        let mut d_values = Tensor::zeros(mixed.v.shape())?;
        let gradients = Gradients {
            d_q: d_q.view_mut(),
            d_k: d_keys.view_mut(),
            d_v: d_values.view_mut(),
            terms: TermGradients::default(),
        };
        let saved = Saved { out: forward.out.view(), lse: forward.lse.view() };
        let upstream = Upstream { d_out, d_lse: None };
        let mut workspace = Workspace::for_backward::<E>(&plan);
        plan.backward(mixed, saved, upstream, gradients, &mut workspace)?;
        let MatrixGradients { d_keys: mut to_e, d_values: to_f } = matrices;
        let d_k = unmix(e, (k, &d_keys), place(&mut to_e, true), cpu)?;
        let d_v = match (self.sharing, to_f) {
            (Sharing::Headwise { .. }, mut to_f) => {
                unmix(f, (v, &d_values), place(&mut to_f, true), cpu)?
            }
            _ => unmix(f, (v, &d_values), place(&mut to_e, false), cpu)?,
        };
        Ok(Backward { d_q, d_k, d_v })
    }

    /// E and F, if everything fits together.
    fn check<E: Element>(&self, inputs: &Inputs<'_, E, E>) -> Result<[SequenceMatrix<'_>; 2]> {
        let mask = self.attention.masked_by();
        if !matches!(mask, Mask::Full) {
            return Err(Error::InvalidParameter {
                what: "mask of a Linformer",
                expected: "none: each of its keys mixes tokens of the whole sequence, later ones included, so that none \
                           can be hidden; use another mechanism for causal attention",
                got: mask.to_string(),
            });
        }
        let terms = self.attention.terms();
        if terms.alibi.is_some() || terms.relative.is_some() {
            return Err(Error::InvalidParameter {
                what: "scores of a Linformer by distance",
                expected: "none: its keys are mixtures and have no position",
                got: terms.to_string(),
            });
        }
        let [e, f] = self.sharing.matrices();
        if e.rank != f.rank {
            let what = "the ranks of a Linformer's two matrices";
            return Err(Error::LengthMismatch { what, expected: e.rank, got: f.rank });
        }
        let (k, v) = (inputs.k.shape(), inputs.v.shape());
        expect("values, which have the tokens of keys", Shape { dim: v.dim, ..k }, v)?;
        let length = e.length.min(f.length);
        if k.seq > length {
            return Err(Error::InvalidParameter {
                what: "tokens of a Linformer's keys",
                expected: "as many as its matrices have columns, or fewer",
                got: format!("{}, with {length} columns", k.seq),
            });
        }
        Ok([e, f])
    }

    fn check_gradients(&self, gradients: &MatrixGradients<'_>) -> Result<()> {
        let [e, f] = self.sharing.matrices();
        let MatrixGradients { d_keys, d_values } = gradients;
        for (what, place, matrix) in [
            ("gradient of the matrix of keys", d_keys, e),
            ("gradient of the matrix of values", d_values, f),
        ] {
            let expected = matrix.numbers.len();
            let got = place.place().map_or(expected, |place| place.len());
            if got != expected {
                return Err(Error::LengthMismatch { what, expected, got });
            }
        }
        let refuse = |what, expected, got: &str| {
            Err(Error::InvalidParameter { what, expected, got: got.to_string() })
        };
        match (self.sharing, d_keys, d_values.place()) {
            (Sharing::KeyValue(_) | Sharing::Layerwise(_), _, Some(_)) => refuse(
                "gradient of the matrix of values",
                "Gradient::Skip: values share the matrix of keys, whose gradient is the sum",
                "a place",
            ),
            (Sharing::Layerwise(_), Gradient::Write(_), _) => refuse(
                "gradient of a matrix that layers share",
                "Gradient::Add, to what other layers have added",
                "Gradient::Write",
            ),
            _ => Ok(()),
        }
    }
}

/// A place to add to, cleared first if it was to be written and `first` is set.
fn place<'a>(gradient: &'a mut Gradient<&mut [f32]>, first: bool) -> Option<&'a mut [f32]> {
    match gradient {
        Gradient::Skip => None,
        Gradient::Write(place) => {
            if first {
                place.fill(0.0);
            }
            Some(place)
        }
        Gradient::Add(place) => Some(place),
    }
}

/// The rows of all heads of a sequence as f32, `[S, heads · dim]`.
fn flatten<E: Element>(x: TensorRef<'_, E>, batch: usize, cpu: Cpu, to: &mut [f32]) {
    let Shape { seq, heads, dim, .. } = x.shape();
    for (n, to) in to.chunks_exact_mut(dim.max(1)).enumerate().take(seq * heads) {
        widen(cpu.level, x.row(batch, n / heads, n % heads), to);
    }
}

/// The tokens of `x` as a matrix, and its width.
fn width(x: Shape) -> MatrixShape {
    MatrixShape { out_features: x.seq, in_features: x.heads * x.dim }
}

/// X' = M X for each sequence.
fn mix<E: Element>(
    matrix: SequenceMatrix<'_>,
    x: TensorRef<'_, E>,
    cpu: Cpu,
) -> Result<Tensor<f32>> {
    let shape = width(x.shape());
    let mut mixed = Tensor::zeros(Shape { seq: matrix.rank, ..x.shape() })?.into_vec();
    let empty = shape.out_features == 0 || shape.in_features == 0;
    let batches = if empty { 0 } else { x.shape().batch };
    let mut tokens = vec![0.0; shape.out_features * shape.in_features];
    let mut workspace = Workspace::new();
    workspace.reserve(backward_workspace_bytes(cpu));
    let out = mixed.chunks_exact_mut((matrix.rank * shape.in_features).max(1));
    for (batch, out) in out.enumerate().take(batches) {
        flatten(x, batch, cpu, &mut tokens);
        let call = ProjectionBackward {
            weights: Matrix::from_floats(shape, &tokens)?,
            x: Input { data: &[], rows: matrix.rank, stride: 0 },
            d_y: Input { data: matrix.numbers, rows: matrix.rank, stride: matrix.length },
        };
        let d_x = Gradient::Write(Output { data: out, stride: shape.in_features });
        let gradients = ProjectionGradients { d_x, ..ProjectionGradients::default() };
        project_backward(call, gradients, cpu, &mut workspace)?;
    }
    Tensor::from_vec(mixed, Shape { seq: matrix.rank, ..x.shape() })
}

/// dX = Mᵀ dX', rounded to the storage type; dM += dX' Xᵀ.
fn unmix<E: Element>(
    matrix: SequenceMatrix<'_>,
    (x, d_mixed): (TensorRef<'_, E>, &Tensor<f32>),
    mut d_matrix: Option<&mut [f32]>,
    cpu: Cpu,
) -> Result<Tensor<E>> {
    let shape = width(x.shape());
    let MatrixShape { out_features: seq, in_features } = shape;
    if seq == 0 || in_features == 0 {
        return Tensor::zeros(x.shape());
    }
    let mut tokens = vec![0.0; seq * in_features];
    let mut gradient = vec![0.0; seq * in_features];
    let mut products = vec![0.0; matrix.rank * seq];
    let mut d_x = Vec::with_capacity(x.shape().batch * gradient.len());
    let mut workspace = Workspace::new();
    let call = Call { phase: Phase::Prompt, cpu, activations: Activations::F32 };
    for (batch, d_mixed) in d_mixed.as_slice().chunks_exact(matrix.rank * in_features).enumerate() {
        let rows = Input { data: d_mixed, rows: matrix.rank, stride: in_features };
        flatten(x, batch, cpu, &mut tokens);
        let weights = Matrix::from_floats(shape, &tokens)?;
        let needed = workspace_bytes(&[weights], matrix.rank, call);
        workspace.reserve(needed.max(backward_workspace_bytes(cpu)));
        let d_y = Input { data: matrix.numbers, rows: matrix.rank, stride: matrix.length };
        let d_weights = Gradient::Write(&mut gradient[..]);
        let gradients = ProjectionGradients { d_weights, ..ProjectionGradients::default() };
        let back = ProjectionBackward { weights, x: rows, d_y };
        project_backward(back, gradients, cpu, &mut workspace)?;
        d_x.extend(gradient.iter().map(|&x| E::from_f32(x)));
        if let Some(d_matrix) = &mut d_matrix {
            let output = Output { data: &mut products, stride: seq };
            project(&weights, rows, output, call, &mut workspace)?;
            for (to, from) in d_matrix.chunks_exact_mut(matrix.length).zip(products.chunks(seq)) {
                to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
            }
        }
    }
    Tensor::from_vec(d_x, x.shape())
}
