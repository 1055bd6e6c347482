//! Training: every mechanism's gradients against differences, against models that are run, and against their own laws.

mod across;
mod encoders;
mod laws;
mod lstm;
mod mechanisms;
mod pairs;
mod runs;
mod setup;
mod together;
mod translation;
