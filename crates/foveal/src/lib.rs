//! Attention on CPUs.
mod cpu;
mod element;
mod error;
pub mod mask;
pub mod nn;
mod parallel;
pub mod projection;
mod simd;
mod tensor;
mod workspace;

pub use cpu::{Cpu, MAX_GENERATED_ROWS, Phase};
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use mask::Mask;
pub use parallel::Threads;
pub use simd::Level;
pub use tensor::{Shape, Strides, Tensor, TensorMut, TensorRef};
pub use workspace::Workspace;
