//! Performer: softmax attention estimated by positive random features (FAVOR+).
//!
//! ```text
//! φ(x)_r = m^(−1/2) exp(ω_r · x̃ − ‖x̃‖² / 2)      x̃ = x D^(−1/4)      E[φ(q) · φ(k)] = exp(q · k / √D)
//! o_t = Σ_{j≤t} φ(q_t) · φ(k_j) v_j / (Σ_{j≤t} φ(q_t) · φ(k_j) + ε)
//! ```
//!
//! that is [`Linear`](super::Linear) with another map: rows of D numbers become rows of m, a block of tokens at a time. The
//! relative error of a product of features grows as exp(‖q̃ + k̃‖²) / m: it falls as m^(−1/2), and inputs that are large
//! have no useful estimate. Orthogonal directions ([`Draw::Orthogonal`](super::Draw::Orthogonal)) err less than independent
//! ones.
//!
//! What keeps exponentials in range ([`Stabiliser`]) may not look at later keys, or a prompt would not give what tokens give
//! one by one. By default a query loses its largest exponent, by which numerator and denominator are divided alike, and
//! keys are taken as they are. Gradients, with dφ as in [`Linear`](super::Linear) and a largest product taken for a constant:
//!
//! ```text
//! du = dφ ∘ (φ − m^(−1/2) ε_φ)      dx̃ = Ωᵀ du − (Σ_r du_r) x̃      dx = D^(−1/4) dx̃
//! ```
//!
//! Cost: 2·m·D operations for the features of each query and each key, 4·m·Dv for the state, and m exponentials each.
//! Choromanski et al. 2021, arXiv:2009.14794, sections 2.3 and 2.4; generalised attention (ReLU), section 2.2.

use super::bidirectional::AnyOrder;
use super::reference::{Memory, Token};
use super::{
    Block, BlockGradient, Draw, FeatureMap, Form, Linear, Pass, RandomFeatures, Recurrence,
    RowMaps, Written,
};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::simd::favor::ProductMap;
use crate::tensor::TensorRef;

/// What keeps the exponentials of features in the range of f32.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Stabiliser {
    /// Nothing: φ as it is defined.
    None,
    /// The exponents of each query are taken relative to the largest of them: a factor that cancels. Keys as they are:
    /// their exponents are at most ‖ω‖²/2, and below −87 their features are 0.
    #[default]
    Queries,
    /// As published: the largest product ω · q̃ of a query is subtracted, `keys` from the products of keys, and `epsilon`
    /// added to each exponential. Published code takes the largest product of all keys for `keys`, later ones included
    /// ([`Favor::largest_product`]); what is decoded token by token needs a constant.
    Published {
        /// Subtracted from products of keys.
        keys: f32,
        /// Added to exponentials.
        epsilon: f32,
    },
}

/// What is estimated.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kernel {
    Softmax(Stabiliser),
    /// max(ω · x̃, 0) + ε.
    Relu(f32),
}

/// Performer's attention, causal or not.
///
/// ```
/// use foveal::linear::{Draw, Favor, RandomFeatures, Recurrent, Tokens};
/// use foveal::{Shape, Tensor};
///
/// # fn main() -> foveal::Result<()> {
/// let x = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 4, dim: 64 })?;
/// let features = RandomFeatures::new(Draw::Orthogonal, 256, 64, 1)?;
/// let attention = Recurrent::new(Favor::new(features));
/// let tokens = Tokens::new(x.view(), x.view(), x.view());
/// let out = attention.forward(&tokens, &mut attention.state(&tokens)?)?;
/// assert_eq!(out.shape(), x.shape());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Favor {
    features: RandomFeatures,
    kernel: Kernel,
    /// The map is done by rows: what is left is a linear attention of what they become.
    linear: Linear,
}

impl Favor {
    /// The softmax kernel, stabilised by queries; 10⁻³⁰ is added to denominators.
    pub fn new(features: RandomFeatures) -> Favor {
        let linear = Linear::new().map(FeatureMap::Relu).normaliser(Some(1e-30));
        Favor { features, kernel: Kernel::Softmax(Stabiliser::default()), linear }
    }

    /// The softmax kernel with another stabiliser.
    pub fn stabiliser(self, stabiliser: Stabiliser) -> Favor {
        Favor { kernel: Kernel::Softmax(stabiliser), ..self }
    }

    /// Generalised attention: features max(ω · x̃, 0) + ε (published: ε = 10⁻³).
    pub fn relu(self, epsilon: f32) -> Favor {
        Favor { kernel: Kernel::Relu(epsilon), ..self }
    }

    /// What is added to the denominator.
    pub fn normaliser(self, epsilon: f32) -> Favor {
        Favor { linear: self.linear.normaliser(Some(epsilon)), ..self }
    }

    /// The directions.
    pub fn features(&self) -> &RandomFeatures {
        &self.features
    }

    /// The same with the next draw of the directions ([`RandomFeatures::redrawn`]).
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for directions that were given.
    pub fn redrawn(self) -> Result<Favor> {
        Ok(Favor { features: self.features.redrawn()?, ..self })
    }

    /// The largest product ω · x̃ of any row, in f64 and rounded: for [`Stabiliser::Published`] where all keys are known.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for rows of another length than the directions.
    pub fn largest_product<E: Element>(&self, x: TensorRef<'_, E>) -> Result<f32> {
        let (shape, dim) = (x.shape(), self.features.dim());
        self.mapped_dim(shape.dim)?;
        let scale = (dim as f64).powf(-0.25);
        let mut largest = f64::NEG_INFINITY;
        for (b, t) in (0..shape.batch).flat_map(|b| (0..shape.seq).map(move |t| (b, t))) {
            for h in 0..shape.heads {
                let row = x.row(b, t, h);
                for direction in self.features.directions().chunks_exact(dim) {
                    let terms = direction.iter().zip(row);
                    let product: f64 =
                        terms.map(|(&w, x)| f64::from(w) * f64::from(x.to_f32())).sum();
                    largest = largest.max(product * scale);
                }
            }
        }
        Ok(largest as f32)
    }
}

impl AnyOrder for Favor {}

impl Recurrence for Favor {
    fn form(&self) -> Form {
        Form { map: FeatureMap::Identity, ..self.linear.form() }
    }

    fn mapped_dim(&self, key_dim: usize) -> Result<usize> {
        let expected = self.features.dim();
        if key_dim != expected {
            let what = "dim of queries and keys, which is that of the random directions";
            return Err(Error::LengthMismatch { what, expected, got: key_dim });
        }
        Ok(self.features.count())
    }

    fn row_maps(&self) -> Option<RowMaps<'_>> {
        let half = 0.5 * (self.features.dim() as f32).powf(-0.5);
        let plain = ProductMap {
            exponential: true,
            norm: half,
            largest: false,
            shift: 0.0,
            epsilon: 0.0,
            factor: (self.features.count() as f64).powf(-0.5) as f32,
        };
        let (query, key) = match self.kernel {
            Kernel::Softmax(Stabiliser::None) => (plain, plain),
            Kernel::Softmax(Stabiliser::Queries) => {
                (ProductMap { norm: 0.0, largest: true, ..plain }, plain)
            }
            Kernel::Softmax(Stabiliser::Published { keys, epsilon }) => (
                ProductMap { largest: true, epsilon, ..plain },
                ProductMap { shift: keys, epsilon, ..plain },
            ),
            Kernel::Relu(epsilon) => {
                let relu =
                    ProductMap { exponential: false, norm: 0.0, epsilon, factor: 1.0, ..plain };
                (relu, relu)
            }
        };
        Some(RowMaps { features: &self.features, query, key })
    }

    fn check(&self, heads: usize) -> Result<()> {
        let (epsilon, shift) = match self.kernel {
            Kernel::Softmax(Stabiliser::None | Stabiliser::Queries) => (0.0, 0.0),
            Kernel::Softmax(Stabiliser::Published { keys, epsilon }) => (epsilon, keys),
            Kernel::Relu(epsilon) => (epsilon, 0.0),
        };
        let refuse = |what, expected, got: f32| {
            Err(Error::InvalidParameter { what, expected, got: got.to_string() })
        };
        if !(0.0..f32::INFINITY).contains(&epsilon) {
            return refuse("epsilon of random features", "a finite number ≥ 0", epsilon);
        }
        if !shift.is_finite() {
            return refuse("what is subtracted from products of keys", "a finite number", shift);
        }
        self.linear.check(heads)
    }

    fn step(&self, memory: &mut Memory, token: &Token<'_>, out: &mut [f64]) {
        self.linear.step(memory, token, out);
    }

    fn block(&self, block: &mut Block<'_>) {
        self.linear.block(block);
    }

    fn backward(&self, pass: Pass, block: &mut BlockGradient<'_>) -> Written {
        self.linear.backward(pass, block)
    }

    fn kept(&self, key_dim: usize, value_dim: usize) -> usize {
        self.linear.kept(key_dim, value_dim)
    }
}

/// Orthogonal directions, as published: 256 of them.
impl Favor {
    /// [`Favor::new`] with 256 orthogonal directions of a seed.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] unless `dim` is 1 to 4096.
    pub fn published(dim: usize, seed: u64) -> Result<Favor> {
        Ok(Favor::new(RandomFeatures::new(Draw::Orthogonal, 256, dim, seed)?))
    }
}
