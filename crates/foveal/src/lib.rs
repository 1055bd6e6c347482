//! Attention on CPUs.
pub mod cache;
mod cpu;
mod element;
mod error;
mod exact;
pub mod mask;
mod parallel;
pub mod nn;
pub mod plan;
pub mod position;
mod problem;
pub mod projection;
pub mod registry;
mod simd;
mod tensor;
mod workspace;

pub use cpu::{Cpu, MAX_GENERATED_ROWS, Phase};
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use exact::state::SoftmaxState;
pub use mask::Mask;
pub use parallel::Threads;
pub use plan::Plan;
pub use problem::{Attention, Forward, Scale};
pub use simd::Level;
pub use tensor::{Rows, Shape, Strides, Tensor, TensorMut, TensorRef};
pub use workspace::Workspace;
