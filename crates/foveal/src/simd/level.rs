//! Which instructions a call uses: found once, passed around as a value, and its own proof.

use super::Portable;
#[cfg(target_arch = "x86_64")]
use super::{Avx2, Avx512};
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
}

impl Level {
    /// The levels of this processor, slowest first. The portable one is always there.
    pub fn available() -> impl Iterator<Item = Level> {
        let mut levels = vec![Level(Kind::Portable(Portable::new()))];
        #[cfg(target_arch = "x86_64")]
        {
            levels.extend(Avx2::detect().map(|token| Level(Kind::Avx2(token))));
            levels.extend(Avx512::detect().map(|token| Level(Kind::Avx512(token))));
        }
        levels.into_iter()
    }

    /// The level that calls use unless told otherwise: the one named by the environment variable
    /// `FOVEAL_SIMD` (`portable`, `avx2`, `avx512`), else the fastest. Read once per process.
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

    /// The level called `portable`, `avx2` or `avx512`.
    ///
    /// # Errors
    /// [`Error::SimdUnavailable`] if there is none of that name on this processor.
    pub fn named(name: &str) -> Result<Level> {
        Level::available().find(|level| level.name() == name).ok_or_else(|| {
            let names: Vec<_> = Level::available().map(Level::name).collect();
            Error::SimdUnavailable { name: name.to_owned(), available: names.join(", ") }
        })
    }

    /// `portable`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
        }
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
