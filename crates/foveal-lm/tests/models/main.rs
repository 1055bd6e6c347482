//! Whole models: against golden outputs, against each other, and against the laws that they should keep.

mod across;
mod activations;
mod batch;
mod caches;
mod chat;
mod chosen;
mod convert;
mod evaluate;
mod formats;
mod generation;
mod golden_case;
mod hostile;
mod keeping;
mod latent;
mod laws;
mod look;
mod pages;
mod prompt_cache;
mod quantize;
mod real;
mod recurrent;
mod reference;
mod retrieve;
mod section_caches;
mod sections;
mod small;
