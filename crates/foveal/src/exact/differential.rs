//! Differential attention: what two softmaxes disagree about.
//!
//! ```text
//! P_n = softmax(scale · Q_n K_nᵀ under the mask)         n = 1, 2        Q_n [B, T, H, d], K_n [B, S, KV, d]
//! λ = e^⟨λq1, λk1⟩ − e^⟨λq2, λk2⟩ + λ_init               X = P_1 V − λ P_2 V           V [B, S, KV, 2d]
//! O = (1 − λ_init) · RMSNorm(X) · w                      for each row and head; w is shared by the heads
//! ```
//!
//! Noise that both maps agree about cancels. Cost: two runs of the exact engine over the same values, which
//! are kept once; a head is as wide as two. Rows that see nothing are 0. Both maps have the options of one
//! [`Attention`]. P_1 V and P_2 V are rounded to the storage type before they are subtracted.
//! Ye et al. 2024, equations 1 to 3 (any head dims here, with d and 2d as published).

use crate::cache::{KvKeys, KvStore, KvTile, SharedTile};
use crate::cpu::Phase;
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::gradient::Gradient;
use crate::nn::{NormBackward, NormGradients, RmsNorm, rms_norm_backward, rms_norm_in_place};
use crate::plan::{Inputs, expect};
use crate::problem::{Attention, Forward};
use crate::tensor::{Shape, Tensor, TensorRef};
use crate::workspace::Workspace;
use std::ops::Range;

/// The learned weight of the second map: λ = e^⟨q1, k1⟩ − e^⟨q2, k2⟩ + init.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lambda<'a> {
    /// λq1 and λk1, of one length.
    pub first: [&'a [f32]; 2],
    /// λq2 and λk2, of one length.
    pub second: [&'a [f32]; 2],
    /// λ_init, from 0 to 1; [`Lambda::init_at`] is the published choice.
    pub init: f32,
}

impl Lambda<'_> {
    /// 0.8 − 0.6 e^(−0.3 depth), for layers counted from 0.
    pub fn init_at(depth: usize) -> f32 {
        (0.8 - 0.6 * (-0.3 * depth as f64).exp()) as f32
    }

    /// λ.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for vectors of different lengths, [`Error::InvalidParameter`] for an
    /// `init` outside 0 to 1 and for a λ that is not finite.
    pub fn value(&self) -> Result<f32> {
        if !(0.0..=1.0).contains(&self.init) {
            let (what, expected, got) = ("lambda's init", "0 to 1", self.init.to_string());
            return Err(Error::InvalidParameter { what, expected, got });
        }
        let [first, second] = self.powers()?;
        let value = (first - second + f64::from(self.init)) as f32;
        if value.is_finite() {
            return Ok(value);
        }
        let (what, expected) = ("lambda", "vectors whose products have finite powers of e");
        Err(Error::InvalidParameter { what, expected, got: value.to_string() })
    }

    /// e^⟨q1, k1⟩ and e^⟨q2, k2⟩.
    fn powers(&self) -> Result<[f64; 2]> {
        let mut powers = [0.0; 2];
        for (power, [q, k]) in powers.iter_mut().zip([self.first, self.second]) {
            if q.len() != k.len() {
                let (expected, got) = (q.len(), k.len());
                return Err(Error::LengthMismatch { what: "lambda's vectors", expected, got });
            }
            let products = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k));
            *power = products.sum::<f64>().exp();
        }
        Ok(powers)
    }

    /// Gradients of the four vectors from that of λ.
    fn backward(&self, d_lambda: f64) -> Result<LambdaGradients> {
        let [first, second] = self.powers()?;
        let times = |x: &[f32], by: f64| x.iter().map(|&x| (f64::from(x) * by) as f32).collect();
        let pair = |[q, k]: [&[f32]; 2], by: f64| [times(k, by), times(q, by)];
        Ok(LambdaGradients {
            first: pair(self.first, d_lambda * first),
            second: pair(self.second, -d_lambda * second),
        })
    }
}

/// Gradients of [`Lambda`]'s vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct LambdaGradients {
    /// Of λq1 and λk1.
    pub first: [Vec<f32>; 2],
    /// Of λq2 and λk2.
    pub second: [Vec<f32>; 2],
}

/// A layer's differential attention.
///
/// ```
/// use foveal::differential::{Differential, Lambda, Pairs};
/// use foveal::nn::RmsNorm;
/// use foveal::{Attention, Mask, Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let shape = Shape { batch: 1, seq: 10, heads: 4, dim: 8 };
/// let x = Tensor::<f32>::zeros(shape)?;
/// let v = Tensor::<f32>::zeros(Shape { dim: 16, ..shape })?;
/// let vector = [0.1; 8];
/// let layer = Differential {
///     attention: &Attention::new().mask(Mask::causal()),
///     lambda: Lambda { first: [&vector; 2], second: [&vector; 2], init: Lambda::init_at(0) },
///     norm: RmsNorm { weight: &[1.0; 16], epsilon: 1e-5 },
/// };
/// let inputs = Pairs { q: [x.view(); 2], k: [x.view(); 2], v: v.view() };
/// assert_eq!(layer.forward(inputs)?.out.shape(), v.shape());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Differential<'a> {
    /// Mask, scale and all else of both maps.
    pub attention: &'a Attention<'a>,
    /// The weight of the second map.
    pub lambda: Lambda<'a>,
    /// The normalisation of each row of each head, as wide as a value.
    pub norm: RmsNorm<'a>,
}

/// Queries `[B, T, H, d]` and keys `[B, S, KV, d]` of both maps, and values `[B, S, KV, Dv]`.
#[derive(Debug, Clone, Copy)]
pub struct Pairs<'a, E> {
    /// Queries of the first and the second map.
    pub q: [TensorRef<'a, E>; 2],
    /// Keys of the first and the second map.
    pub k: [TensorRef<'a, E>; 2],
    /// Values.
    pub v: TensorRef<'a, E>,
}

impl<'a, E: Element> Pairs<'a, E> {
    fn of(&self, n: usize) -> Inputs<'a, E, E> {
        Inputs { q: self.q[n], k: self.k[n], v: self.v }
    }

    fn check(&self) -> Result<()> {
        expect("queries of the second map", self.q[0].shape(), self.q[1].shape())?;
        expect("keys of the second map", self.k[0].shape(), self.k[1].shape())
    }
}

/// An output, and what backward needs of its making.
#[derive(Debug, Clone, PartialEq)]
pub struct DifferentialForward<E> {
    /// `[B, T, H, Dv]`.
    pub out: Tensor<E>,
    /// P_1 V and P_2 V with their log-sum-exps.
    pub maps: [Forward<E>; 2],
}

/// Gradients of everything that [`Differential::forward`] read.
#[derive(Debug, Clone, PartialEq)]
pub struct DifferentialBackward<E> {
    /// Of the queries of both maps.
    pub d_q: [Tensor<E>; 2],
    /// Of the keys of both maps.
    pub d_k: [Tensor<E>; 2],
    /// Of the values.
    pub d_v: Tensor<E>,
    /// Of λ's vectors.
    pub d_lambda: LambdaGradients,
    /// Of the normalisation's weight.
    pub d_weight: Vec<f32>,
}

impl Differential<'_> {
    /// The output for a prompt. Allocates it and what it is made of.
    ///
    /// # Errors
    /// Those of [`Attention::forward`] and [`Lambda::value`]; [`Error::ShapeMismatch`] for maps of different
    /// shapes, [`Error::LengthMismatch`] for a normalisation of another width than the values.
    pub fn forward<E: Element>(&self, inputs: Pairs<'_, E>) -> Result<DifferentialForward<E>> {
        inputs.check()?;
        let run = |n| {
            let Inputs { q, k, v } = inputs.of(n);
            self.attention.forward(q, k, v)
        };
        self.join([run(0)?, run(1)?])
    }

    /// [`Differential::forward`] with the kernels for generated tokens.
    ///
    /// # Errors
    /// Those of [`Differential::forward`] and [`Attention::decode`].
    pub fn decode<E: Element>(&self, inputs: Pairs<'_, E>) -> Result<DifferentialForward<E>> {
        inputs.check()?;
        let run = |n| {
            let Inputs { q, k, v } = inputs.of(n);
            self.attention.decode(q, k, v)
        };
        self.join([run(0)?, run(1)?])
    }

    /// The output over caches, one for each sequence, whose keys hold both maps' keys side by side:
    /// first the `d` numbers of K_1, then those of K_2. Allocates as [`Differential::forward`].
    ///
    /// # Errors
    /// Those of [`Differential::forward`] and [`crate::Plan::forward_cached`];
    /// [`Error::ShapeMismatch`] unless keys are twice as wide as queries.
    pub fn forward_cached<E: Element>(
        &self,
        q: [TensorRef<'_, E>; 2],
        stores: &[&dyn KvStore],
        phase: Phase,
    ) -> Result<DifferentialForward<E>> {
        let shape = q[0].shape();
        expect("queries of the second map", shape, q[1].shape())?;
        let kv_heads = stores.first().map_or(shape.heads, |store| store.kv_heads());
        let seq = stores.iter().map(|store| store.end() - store.start()).max().unwrap_or(0);
        let k = Shape { batch: stores.len(), seq, heads: kv_heads, dim: shape.dim };
        for store in stores {
            let both = Shape { dim: store.dims().0, ..k };
            let what = "a store must hold the keys of both maps side by side";
            expect(what, Shape { dim: 2 * shape.dim, ..k }, both)?;
        }
        let v = Shape { dim: self.norm.weight.len(), ..k };
        let plan = match phase {
            Phase::Prompt => self.attention.plan(shape, k, v)?,
            Phase::Generated => self.attention.plan_decode(shape, k, v)?,
        };
        let mut workspace = Workspace::for_plan(&plan);
        let mut run = |n: usize| -> Result<Forward<E>> {
            let halves: Vec<_> = stores.iter().map(|&store| Half { store, n }).collect();
            let halves: Vec<&dyn KvStore> = halves.iter().map(|half| half as _).collect();
            let mut out = Tensor::zeros(plan.out_shape())?;
            let mut lse = Tensor::zeros(plan.out_shape().per_row())?;
            let outputs = (out.view_mut(), Some(lse.view_mut()));
            plan.forward_cached(q[n], &halves, outputs, &mut workspace)?;
            Ok(Forward { out, lse })
        };
        let maps = [run(0)?, run(1)?];
        self.join(maps)
    }

    /// Gradients from what [`Differential::forward`] was given and gave, and the gradient of its output
    /// `[B, T, H, Dv]`. Those of the attention's own terms are not computed: [`crate::Plan::backward`]
    /// does that for either map. Allocates the result.
    ///
    /// # Errors
    /// Those of [`Differential::forward`] and [`Attention::backward`].
    pub fn backward<E: Element>(
        &self,
        inputs: Pairs<'_, E>,
        forward: &DifferentialForward<E>,
        d_out: TensorRef<'_, E>,
    ) -> Result<DifferentialBackward<E>> {
        inputs.check()?;
        let shape = Shape { dim: inputs.v.shape().dim, ..inputs.q[0].shape() };
        for map in &forward.maps {
            expect("output of a map", shape, map.out.shape())?;
        }
        expect("gradient of the output", shape, d_out.shape())?;
        let Rows { d_maps, d_lambda, d_weight } = self.rows_backward(&forward.maps, d_out)?;
        let run =
            |n: usize| self.attention.backward(inputs.of(n), &forward.maps[n], d_maps[n].view());
        let (first, second) = (run(0)?, run(1)?);
        let pairs = first.d_v.as_slice().iter().zip(second.d_v.as_slice());
        let d_v = pairs.map(|(a, b)| E::from_f32(a.to_f32() + b.to_f32())).collect();
        Ok(DifferentialBackward {
            d_q: [first.d_q, second.d_q],
            d_k: [first.d_k, second.d_k],
            d_v: Tensor::from_vec(d_v, inputs.v.shape())?,
            d_lambda: self.lambda.backward(d_lambda)?,
            d_weight,
        })
    }

    /// λ, checked together with the normalisation's width.
    fn checked(&self, width: usize) -> Result<f32> {
        let got = self.norm.weight.len();
        if got != width {
            let what = "the normalisation of a head, as wide as a value";
            return Err(Error::LengthMismatch { what, expected: width, got });
        }
        self.lambda.value()
    }

    /// O from both maps' outputs.
    fn join<E: Element>(&self, maps: [Forward<E>; 2]) -> Result<DifferentialForward<E>> {
        let shape = maps[0].out.shape();
        let mut x = subtract(&maps, self.checked(shape.dim)?);
        rms_norm_in_place(self.norm, &mut x, self.attention.resolved_cpu()?.level)?;
        let keep = 1.0 - self.lambda.init;
        let out = x.into_iter().map(|x| E::from_f32(keep * x)).collect();
        Ok(DifferentialForward { out: Tensor::from_vec(out, shape)?, maps })
    }

    /// From the output back to both maps' outputs:
    ///
    /// ```text
    /// dX, dw from (1 − λ_init) dO by the norm        dO_1 = dX        dO_2 = −λ dX        dλ = −⟨dX, O_2⟩
    /// ```
    fn rows_backward<E: Element>(
        &self,
        maps: &[Forward<E>; 2],
        d_out: TensorRef<'_, E>,
    ) -> Result<Rows<E>> {
        let shape = d_out.shape();
        let (lambda, keep) = (self.checked(shape.dim)?, 1.0 - self.lambda.init);
        let x = subtract(maps, lambda);
        let mut d_y = Vec::with_capacity(x.len());
        for (batch, t) in (0..shape.batch).flat_map(|b| (0..shape.seq).map(move |t| (b, t))) {
            for head in 0..shape.heads {
                d_y.extend(d_out.row(batch, t, head).iter().map(|d| keep * d.to_f32()));
            }
        }
        let (mut d_x, mut d_weight) = (vec![0.0; x.len()], vec![0.0; shape.dim]);
        let gradients = NormGradients {
            d_x: Gradient::Write(&mut d_x),
            d_weight: Gradient::Write(&mut d_weight),
            d_bias: Gradient::Skip,
        };
        let rows = NormBackward { x: &x, d_y: &d_y };
        rms_norm_backward(self.norm, rows, gradients, self.attention.resolved_cpu()?.level)?;
        let products = d_x.iter().zip(maps[1].out.as_slice());
        let d_lambda = -products.map(|(d, o)| f64::from(*d) * f64::from(o.to_f32())).sum::<f64>();
        let d_map = |by: f32| d_x.iter().map(|d| E::from_f32(by * d)).collect();
        let d_maps =
            [Tensor::from_vec(d_map(1.0), shape)?, Tensor::from_vec(d_map(-lambda), shape)?];
        Ok(Rows { d_maps, d_lambda, d_weight })
    }
}

/// Gradients of what rows are joined from.
struct Rows<E> {
    d_maps: [Tensor<E>; 2],
    d_lambda: f64,
    d_weight: Vec<f32>,
}

/// X = O_1 − λ O_2.
fn subtract<E: Element>(maps: &[Forward<E>; 2], lambda: f32) -> Vec<f32> {
    let [first, second] = maps.each_ref().map(|map| map.out.as_slice());
    first.iter().zip(second).map(|(a, b)| a.to_f32() - lambda * b.to_f32()).collect()
}

/// A store whose keys are one half of another's.
#[derive(Debug)]
struct Half<'a> {
    store: &'a dyn KvStore,
    n: usize,
}

impl KvStore for Half<'_> {
    fn end(&self) -> usize {
        self.store.end()
    }

    fn start(&self) -> usize {
        self.store.start()
    }

    fn kv_heads(&self) -> usize {
        self.store.kv_heads()
    }

    fn dims(&self) -> (usize, usize) {
        let (both, value) = self.store.dims();
        (both / 2, value)
    }

    fn dtype(&self) -> DType {
        self.store.dtype()
    }

    fn coded(&self) -> bool {
        self.store.coded()
    }

    fn shared_tile(&self, position: usize) -> Option<SharedTile> {
        // All stores of a call are the same halves.
        self.store.shared_tile(position)
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        let dim = self.dims().0;
        let columns = self.n * dim..(self.n + 1) * dim;
        let KvTile { keys, values } = self.store.tile(head, positions);
        let keys = match keys {
            KvKeys::Rows(rows) => KvKeys::Rows(rows.columns(columns)),
            KvKeys::Channels(codes) => KvKeys::Channels(codes.columns(columns)),
        };
        KvTile { keys, values }
    }
}
