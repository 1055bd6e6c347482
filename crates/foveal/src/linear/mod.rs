//! Linear attention: a matrix state that every token decays, writes to and reads, so that a sequence of any length
//! costs the same memory and each token the same time.
//!
//! ```text
//! S_t = a_t S_{t−1} + k_t v_tᵀ        [Dk, Dv] for each head
//! o_t = scale · S_tᵀ q_t              [Dv]
//! ```
//!
//! Mechanisms differ in what they do to queries and keys first, in the decay a_t, in what they write and in whether they
//! normalise. A mechanism is one implementation of [`Recurrence`]; [`Recurrent`] runs it over tensors, forward and
//! backward, with a [`State`] that is carried from call to call: a prompt in pieces and token-by-token decoding are the
//! same call, and give the same bits as one call on the whole.
//!
//! ```
//! use foveal::linear::{Linear, Recurrent, Tokens};
//! use foveal::{Shape, Tensor};
//!
//! # fn main() -> foveal::Result<()> {
//! let x = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 4, dim: 64 })?;
//! let attention = Recurrent::new(Linear::new());
//! let prompt = Tokens::new(x.view(), x.view(), x.view());
//! let mut state = attention.state(&prompt)?;
//! let out = attention.forward(&prompt, &mut state)?;
//! assert_eq!(out.shape(), x.shape());
//!
//! let y = Tensor::<f32>::zeros(Shape { seq: 1, ..x.shape() })?;
//! let next = attention.forward(&Tokens::new(y.view(), y.view(), y.view()), &mut state)?;
//! assert_eq!(next.shape().seq, 1);
//! # Ok(())
//! # }
//! ```
//!
//! Where a state decays, 2⁻¹⁰⁰ is added to each of its numbers at each token, so that none of them becomes subnormal.
//!
//! Cost: 4·Dk·Dv floating-point operations a token and head forward, three times that backward; decays and delta rules cost
//! more, see there. Exact in the sense that nothing is approximated but by rounding.
//!
//! | mechanism | name | source |
//! |---|---|---|
//! | [`Linear`] | `linear` | Katharopoulos et al. 2020 |
//! | [`Retention`] | `retention` | Sun et al. 2023 |
//! | [`ScalarDecay`] | `scalar_decay` | Dao and Gu 2024 |
//! | [`VectorDecay`] | `gla` | Yang et al. 2023 |
//! | [`Delta`] | `delta`, `gated_delta` | Yang et al. 2024 |
//! | [`Efficient`] | `efficient` | Shen et al. 2021 |
//! | [`Favor`] | `performer` | Choromanski et al. 2021 |
//!
//! [`Linformer`] is linear in another way: softmax attention to a fixed number of mixtures of all keys.

mod backward;
mod bidirectional;
mod block;
mod delta;
mod driver;
mod efficient;
mod favor;
mod feature;
mod gather;
mod kernel;
mod linformer;
mod random_features;
pub mod reference;
mod scalar_decay;
mod state;
mod tokens;
mod vector_decay;

pub(crate) use block::BLOCK;
pub(crate) use driver::scratches;
pub(crate) use gather::take;

pub use backward::{Gradients, RecurrentBackward, Upstream};
pub use bidirectional::AnyOrder;
pub use block::{Block, BlockGradient, Pass, Written};
pub use delta::Delta;
pub use driver::{Recurrent, Results};
pub use efficient::Efficient;
pub use favor::{Favor, Stabiliser};
pub use feature::FeatureMap;
pub use kernel::Linear;
pub use linformer::{Linformer, LinformerForward, MatrixGradients, SequenceMatrix, Sharing};
pub use random_features::{Draw, RandomFeatures, RowMaps};
pub use scalar_decay::{Retention, ScalarDecay};
pub use state::{State, StateShape};
pub use tokens::Tokens;
pub use vector_decay::VectorDecay;

use crate::error::Result;
use crate::problem::Scale;
use reference::{Memory, Token};

/// Which decays the tokens of a mechanism bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DecayForm {
    /// None.
    #[default]
    None,
    /// One logarithm for each token and head.
    Scalar,
    /// One logarithm for each token, head and key channel.
    Vector,
}

/// What a mechanism asks of its tokens and keeps in its state.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Form {
    /// What queries and keys go through first.
    pub map: FeatureMap,
    /// Which decays come with the tokens.
    pub decay: DecayForm,
    /// Whether a writing strength comes with each token and head.
    pub beta: bool,
    /// Numbers of each key channel that the state holds next to the matrix: 1 for the sum of the keys.
    pub sums: usize,
    /// What the mapped key of an absent token consists of: the number that writes nothing.
    pub absent: f32,
}

/// A mechanism with a matrix state: [`step`](Recurrence::step) defines it, [`block`](Recurrence::block) is its fast form,
/// [`backward`](Recurrence::backward) trains it.
///
/// Mechanisms live in this crate: what kernels see of tokens and states is not public. Tensors, strides, packed sequences, padding, feature maps, scales and threads are the driver's business: all
/// three functions see the mapped rows of one head. The tests of the crate hold `block` and `backward` to `step`.
pub trait Recurrence: Sync + std::fmt::Debug {
    /// What it asks of tokens and keeps in a state.
    fn form(&self) -> Form;

    /// What reads of the state are multiplied by.
    fn scale(&self) -> Scale {
        Scale::Value(1.0)
    }

    /// Refuses parameters that do not fit together, or not the number of heads.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParameter`], [`crate::Error::LengthMismatch`].
    fn check(&self, _heads: usize) -> Result<()> {
        Ok(())
    }

    /// Numbers of a mapped key of `key_dim` numbers: the rows of the state.
    ///
    /// # Errors
    /// If the mechanism was made for keys of another length.
    fn mapped_dim(&self, key_dim: usize) -> Result<usize> {
        Ok(key_dim)
    }

    /// Maps of whole rows of queries and keys, in place of [`Form::map`], to [`Recurrence::mapped_dim`] numbers each.
    fn row_maps(&self) -> Option<RowMaps<'_>> {
        None
    }

    /// The decay of a head whose tokens bring none, for mechanisms with a fixed one.
    fn fixed_decay(&self, _head: usize) -> Option<f32> {
        None
    }

    /// The definition in f64: one token of one head updates the state and reads from it into `out`, unscaled.
    fn step(&self, memory: &mut Memory, token: &Token<'_>, out: &mut [f64]);

    /// The fast form of `step` over any number of tokens. The bits of its results do not depend on how a sequence is cut
    /// into blocks.
    fn block(&self, block: &mut Block<'_>);

    /// One pass of the gradients over any number of tokens.
    fn backward(&self, pass: Pass, block: &mut BlockGradient<'_>) -> Written;

    /// Numbers a token that one pass of [`backward`](Recurrence::backward) keeps for the next ones.
    fn kept(&self, key_dim: usize, value_dim: usize) -> usize;

    /// The passes of [`backward`](Recurrence::backward), in order.
    fn passes(&self) -> &'static [Pass] {
        &[Pass::Ahead, Pass::Back]
    }
}
