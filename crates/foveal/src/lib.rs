//! Attention mechanisms of the transformer family on CPUs: exact, fast, on plain slices.
//!
//! ```
//! use foveal::{Attention, Mask, Shape, Tensor};
//!
//! # fn main() -> foveal::Result<()> {
//! // Axes are [batch, seq, heads, dim]; 8 query heads share 2 key/value heads.
//! let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 8, dim: 64 })?;
//! let k = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 2, dim: 64 })?;
//! let v = k.clone();
//! let attention = Attention::new().mask(Mask::causal());
//! let result = attention.forward(q.view(), k.view(), v.view())?;
//! assert_eq!(result.out.shape(), q.shape());
//! # Ok(())
//! # }
//! ```
//!
//! # From a description to a result
//!
//! [`Attention`] describes a call: mask, scale, instructions and threads. With shapes it becomes a
//! [`Plan`], which has been checked, knows its kernels and its workspace, and can [explain
//! itself](Plan::explain). A plan runs on tensors ([`Plan::forward`]) or on key/value caches
//! ([`Plan::forward_cached`]) without allocating; [`Attention::forward`] and [`Attention::decode`] do all of
//! it at once and allocate the result. [`Plan::backward`] and [`Attention::backward`] give the gradients of a
//! prompt.
//!
//! Prompts and generated tokens have kernels of their own ([`Phase`]): many rows against packed tiles, or a
//! few rows over keys as they lie in a [`cache`]. Which one a row takes is the caller's word, so that its
//! bits never depend on how many rows happen to share a call.
//!
//! # Should I use this crate?
//!
//! Yes, for attention without T×S memory on a CPU, from any program that has its numbers in slices: long
//! sequences, causal, window, packed-document or arbitrary masks, grouped heads without copies, 16-bit
//! caches, log-sum-exp, and results that are the same bit for bit whatever the threads and the batch. Not for
//! GPUs, and not for a whole model with one call: that is the crate `foveal-lm`.
//!
//! # Map
//!
//! | module | what | source |
//! |---|---|---|
//! | [`Attention`], [`plan`] | exact attention, forward and backward | Vaswani et al. 2017; Dao et al. 2022, 2023 |
//! | [`mask`] | causal, window, prefix, padding, documents, blocks, trees, dense, combinations, patterns of your own | |
//! | [`inspect`] | weights, column sums, entropies and block means, made again from the log-sum-exp | Zhang et al. 2023; Li et al. 2024 |
//! | [`differential`] | the difference of two softmaxes, forward and backward | Ye et al. 2024 |
//! | [`latent`] | multi-head latent attention over rows that all heads share | DeepSeek-V2 2024 |
//! | [`sparse`] | exact attention to chosen keys: forward, backward, token by token | Child et al. 2019; Beltagy et al. 2020; Zaheer et al. 2020; Kitaev et al. 2020; Lu et al. 2025; Yuan et al. 2025 |
//! | [`linear`] | linear attention with a matrix state: forward, backward, token by token | Katharopoulos et al. 2020 |
//! | [`memory`] | segments, and what they leave to later ones: forward, backward, token by token | Munkhdalai et al. 2024; Wu et al. 2022 |
//! | [`cache`] | what decoding keeps | |
//! | [`SoftmaxState`] | partial results and how they are joined | Milakov and Gimelshein 2018 |
//! | [`projection`] | matrices around attention, quantised as files hold them | GGUF |
//! | [`mod@reference`] | the definition in f64 | |
//!
//! # Features
//!
//! `parallel` (default) splits work over the current rayon pool. There is no feature per mechanism or per
//! instruction set: instructions are found at run time, and the environment variable `FOVEAL_SIMD`
//! (`portable`, `avx2`, `avx512`, `avx512bf16`) forces one.

pub mod cache;
mod cpu;
mod element;
mod error;
mod exact;
mod gradient;
pub mod linear;
pub mod mask;
pub mod memory;
pub mod nn;
mod parallel;
pub mod plan;
pub mod position;
mod problem;
pub mod projection;
#[doc(hidden)]
pub mod random;
pub mod registry;
mod simd;
pub mod sparse;
mod tensor;
#[doc(hidden)]
pub mod testing;
mod workspace;

pub use cpu::{Cpu, MAX_GENERATED_ROWS, Phase};
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use exact::state::SoftmaxState;
pub use exact::terms::Dropout;
pub use exact::{differential, inspect, latent, reference};
pub use gradient::Gradient;
pub use mask::Mask;
pub use parallel::Threads;
pub use plan::{Backward, Plan};
pub use problem::{Attention, Forward, Scale};
pub use simd::Level;
pub use tensor::{Rows, Shape, Strides, Tensor, TensorMut, TensorRef};
pub use workspace::Workspace;

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
