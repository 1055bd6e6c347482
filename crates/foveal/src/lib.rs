//! Attention on CPUs.
