//! Which instructions a call uses: found once, passed around as a value, and its own proof.

#[cfg(target_arch = "x86_64")]
use super::{Avx2, Avx512, Avx512Bf16};
use super::{Pairs, Portable};
use crate::error::{Error, Result};
use std::sync::OnceLock;

/// A set of vector instructions that this processor has.
///
/// Values come only from detection, so holding one proves that its kernels can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level(Kind);

/// The tokens behind a [`Level`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// Kernels that do not multiply pairs of bf16 are those of AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
}

impl Level {
    /// The levels of this processor, slowest first. The portable one is always there.
    pub fn available() -> impl Iterator<Item = Level> {
        let mut levels = vec![Level(Kind::Portable(Portable::new()))];
        #[cfg(target_arch = "x86_64")]
        {
            levels.extend(Avx2::detect().map(|token| Level(Kind::Avx2(token))));
            levels.extend(Avx512::detect().map(|token| Level(Kind::Avx512(token))));
            levels.extend(Avx512Bf16::detect().map(|token| Level(Kind::Avx512Bf16(token))));
        }
        levels.into_iter()
    }

    /// The level that calls use unless told otherwise: the one named by the environment variable
    /// `FOVEAL_SIMD` (`portable`, `avx2`, `avx512`, `avx512bf16`), else the fastest. Read once per process.
    ///
    /// # Errors
    /// [`Error::SimdUnavailable`] if the variable names a level that is not here.
    pub fn detect() -> Result<Level> {
        static LEVEL: OnceLock<Result<Level>> = OnceLock::new();
        LEVEL
            .get_or_init(|| match std::env::var("FOVEAL_SIMD") {
                Ok(name) if !name.is_empty() => Level::named(&name),
                _ => Ok(Level::available().last().expect("the portable level is always there")),
            })
            .clone()
    }

    /// The level called `portable`, `avx2`, `avx512` or `avx512bf16`.
    ///
    /// # Errors
    /// [`Error::SimdUnavailable`] if there is none of that name on this processor.
    pub fn named(name: &str) -> Result<Level> {
        Level::available().find(|level| level.name() == name).ok_or_else(|| {
            let names: Vec<_> = Level::available().map(Level::name).collect();
            Error::SimdUnavailable { name: name.to_owned(), available: names.join(", ") }
        })
    }

    /// `portable`, `avx2`, `avx512` or `avx512bf16`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16(_) => "avx512bf16",
        }
    }

    /// Whether kernels multiply pairs of bf16.
    pub fn multiplies_bf16(self) -> bool {
        self.pairs().is_some()
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }

    /// The level that such a token stands for.
    pub(crate) fn of(pairs: Pairs) -> Level {
        #[cfg(target_arch = "x86_64")]
        return Level(Kind::Avx512Bf16(pairs));
        #[cfg(not(target_arch = "x86_64"))]
        match pairs {}
    }

    /// The token of products of pairs, where the level has them.
    pub(crate) fn pairs(self) -> Option<Pairs> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16(token) => Some(token),
            _ => None,
        }
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
