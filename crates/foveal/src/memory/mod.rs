//! Memory beyond the tokens that a row attends to.
//!
//! ```text
//! out = g · read of the memory + (1 − g) · attention to near tokens            g = sigmoid(β), one β for each query head
//! ```
//!
//! A sequence is cut into segments. A segment first reads what earlier ones have left, and then writes: no token retrieves
//! itself. Attention to near tokens is [`crate::Attention`]'s; the two results are mixed, never their softmaxes.
//!
//! | mechanism | what is remembered | source |
//! |---|---|---|
//! | [`Infini`] | a matrix and a sum of keys for each key/value head, of constant size | Munkhdalai et al. 2024 |
//! | [`Memorizing`] | keys and values of a document's past, of which each query retrieves the best | Wu et al. 2022 |

mod coded;
pub mod infini;
pub mod memorizing;
pub mod reference;
mod store;

pub use coded::CodedMemory;
pub use infini::{Empty, Infini, InfiniState, Update};
pub use memorizing::{Memorizing, MemorizingState};
pub use store::MemoryStore;

/// The two weights that a gate gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Gate {
    /// Of what the memory gives: sigmoid(β).
    pub(crate) memory: f32,
    /// Of local attention: 1 − sigmoid(β), without cancellation.
    pub(crate) local: f32,
}

impl Gate {
    pub(crate) fn new(beta: f32) -> Gate {
        let beta = f64::from(beta);
        let sigmoid = |x: f64| (1.0 / (1.0 + (-x).exp())) as f32;
        Gate { memory: sigmoid(beta), local: sigmoid(-beta) }
    }

    /// What a gradient with respect to sigmoid(β) is multiplied by.
    pub(crate) fn slope(self) -> f64 {
        f64::from(self.memory) * f64::from(self.local)
    }
}
