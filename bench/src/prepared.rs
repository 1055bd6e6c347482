//! A case that is ready to be timed.

use crate::contender::Contender;
use crate::peaks::Roof;
use anyhow::Context;
use foveal::Level;

/// A peer that could not take part, and why.
#[derive(Debug, Clone)]
pub(crate) struct Absent {
    pub(crate) name: &'static str,
    pub(crate) reason: String,
}

impl Absent {
    pub(crate) fn new(name: &'static str, reason: &str) -> Absent {
        Absent { name, reason: reason.to_owned() }
    }
}

/// What one execution does at least.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Work {
    /// Floating-point operations.
    pub(crate) flops: f64,
    /// Bytes to read.
    pub(crate) bytes: f64,
}

/// Contenders whose results are right; ours is the first.
pub(crate) struct Prepared {
    pub(crate) contenders: Vec<Box<dyn Contender>>,
    pub(crate) absent: Vec<Absent>,
    pub(crate) work: Work,
    pub(crate) roof: Roof,
}

/// The level of a name; `best` is the fastest here.
pub(crate) fn level(name: &str) -> anyhow::Result<Level> {
    match name {
        "best" => Level::available().last().context("no instructions at all"),
        _ => Ok(Level::named(name)?),
    }
}
