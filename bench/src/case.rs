//! Cases as data: `bench/cases/*.toml`.

use anyhow::{Context, Result};
use foveal::{Mask, Phase, Shape};
use serde::Deserialize;

/// One attention call to be measured.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    pub(crate) name: String,
    #[serde(default = "one")]
    pub(crate) batch: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) heads: usize,
    kv_heads: Option<usize>,
    pub(crate) dim: usize,
    #[serde(default)]
    pub(crate) mask: MaskName,
    #[serde(default)]
    phase: PhaseName,
}

/// A mask by name, spelt as the peers' protocol spells it.
#[derive(Debug, Clone, Copy, Default, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MaskName {
    #[default]
    Full,
    Causal,
    Window(usize),
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PhaseName {
    #[default]
    Prompt,
    Generated,
}

#[derive(Deserialize)]
struct File {
    case: Vec<Case>,
}

fn one() -> usize {
    1
}

impl Case {
    /// All cases whose name contains `filter`.
    pub(crate) fn all(filter: &str) -> Result<Vec<Case>> {
        let text = include_str!("../cases/attention.toml");
        let file: File = toml::from_str(text).context("bench/cases/attention.toml")?;
        Ok(file.case.into_iter().filter(|case| case.name.contains(filter)).collect())
    }

    pub(crate) fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    pub(crate) fn q_shape(&self) -> Shape {
        Shape { batch: self.batch, seq: self.queries, heads: self.heads, dim: self.dim }
    }

    pub(crate) fn kv_shape(&self) -> Shape {
        Shape { batch: self.batch, seq: self.keys, heads: self.kv_heads(), dim: self.dim }
    }

    pub(crate) fn mask(&self) -> Mask {
        match self.mask {
            MaskName::Full => Mask::full(),
            MaskName::Causal => Mask::causal(),
            MaskName::Window(width) => Mask::window(width),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.phase {
            PhaseName::Prompt => Phase::Prompt,
            PhaseName::Generated => Phase::Generated,
        }
    }

    /// Visible (query, key) pairs of one head.
    fn pairs(&self) -> f64 {
        let seen = |i: usize| {
            let position = i + self.keys - self.queries;
            match self.mask {
                MaskName::Full => self.keys,
                MaskName::Causal => position + 1,
                MaskName::Window(width) => (position + 1).min(width),
            }
        };
        (0..self.queries).map(|i| seen(i) as f64).sum()
    }

    /// Floating-point operations of the visible part.
    pub(crate) fn operations(&self) -> f64 {
        4.0 * self.dim as f64 * self.pairs() * (self.batch * self.heads) as f64
    }

    /// Bytes of keys and values.
    pub(crate) fn kv_bytes(&self) -> f64 {
        8.0 * (self.batch * self.keys * self.kv_heads() * self.dim) as f64
    }
}
