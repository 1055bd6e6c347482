//! Training: models whose gradients are computed by hand-written backward passes on plain slices.
//!
//! [`parameters`] holds what is learned, [`network`] computes losses and gradients of it; around them are texts ([`data`]),
//! a [`Trainer`] with its optimizer, and the loop ([`run`]). [`Config`] says all of it.

mod checkpoint;
pub mod config;
mod corpus;
pub mod data;
mod error;
pub mod network;
mod optimizer;
mod pairs;
pub mod parameters;
mod random;
mod run;
mod sample;
pub mod schedule;
pub(crate) mod start;
mod trainer;
mod vocabulary;

pub use checkpoint::State;
pub use config::Config;
pub use error::Error;
pub use network::{
    Batch, Carried, EncoderDecoder, EncoderDecoderConfig, IGNORED, Loss, Lstm, LstmConfig, Network,
    NormPlace, Objective, Pairs, PositionKind, Precision, Scratch, StepOptions,
};
pub use optimizer::{Move, Optimizer, length};
pub use parameters::{Entry, Group, Parameters};
pub use run::{End, Event, begin, run};
pub use trainer::{CONFIG, Evaluation, METRICS, Step, Trainer};
pub use vocabulary::Vocabulary;
