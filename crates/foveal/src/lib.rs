//! Attention on CPUs.

pub mod projection;
