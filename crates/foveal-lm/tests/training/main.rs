//! Training: every mechanism's gradients against differences, against models that are run, and against their own laws.

mod encoders;
mod laws;
mod mechanisms;
mod setup;
mod translation;
