//! The frequencies of rotary embeddings, and how they are changed for contexts longer than trained.
//!
//! ```text
//! ω_c = θ^(−2c/d)        for pair c of d/2; the angle at position p is p · ω_c
//! ```
//!
//! | scaling | ω′ | source |
//! |---|---|---|
//! | linear | ω / s | Chen et al. 2023 (arXiv 2306.15595) |
//! | NTK | θ′ = θ · s^(d/(d−2)) | "NTK-aware" RoPE, 2023 |
//! | dynamic NTK | the same with s′ = 1 + s·(T/T₀ − 1) where T > T₀ | as above |
//! | YaRN | ω/s below a ramp over c, ω above it; cosines and sines times an amplitude | Peng et al. 2023 (arXiv 2309.00071) |
//! | Llama 3 | the same idea with a ramp over wavelengths | Llama 3.1 |
//!
//! s is the factor, T₀ the context that the model was trained with. All in f64.

use crate::error::{Error, Result};
use std::f64::consts::PI;

/// How frequencies are changed for contexts longer than those of training. Factors and contexts are
/// positive and finite.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum RopeScaling {
    /// As trained.
    #[default]
    None,
    /// Positions are divided by `factor` (position interpolation).
    Linear {
        /// How many times longer contexts become.
        factor: f64,
    },
    /// The base grows so that only low frequencies are stretched.
    Ntk {
        /// How many times longer contexts become.
        factor: f64,
    },
    /// [`RopeScaling::Ntk`] with a factor that follows the length of the text. Keys that were rotated for
    /// a shorter `context` keep its frequencies: rotate a cache anew, or choose `context` once.
    DynamicNtk {
        /// How fast the base's factor grows with the context: it is `factor + 1` at twice the original.
        factor: f64,
        /// Tokens of the context in training; shorter texts are not scaled.
        original_context: f64,
        /// Tokens of the text.
        context: f64,
    },
    /// YaRN.
    Yarn(Yarn),
    /// Llama 3.1 and later.
    Llama3 {
        /// What the lowest frequencies are divided by.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Tokens of the context in training.
        original_context: f64,
    },
}

/// The numbers of YaRN.
///
/// It multiplies cosines and sines by an amplitude, of queries and keys alike, so that **scores are
/// multiplied by its square**. A model that asks for that factor in its softmax scale instead (DeepSeek)
/// gets [`YarnAmplitude::Fixed`]`(1.0)`; both would apply it twice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How many times longer contexts become.
    pub factor: f64,
    /// Tokens of the context in training.
    pub original_context: f64,
    /// Pairs that turn more often than this over the original context are kept.
    pub beta_fast: f64,
    /// Pairs that turn less often than this are divided by the factor.
    pub beta_slow: f64,
    /// Whether the ramp's ends are rounded to whole pairs (everyone but gpt-oss).
    pub truncate: bool,
    /// What cosines and sines are multiplied by.
    pub amplitude: YarnAmplitude,
}

impl Yarn {
    /// The paper's numbers: ramp between 32 and 1 turns, rounded ends, standard amplitude.
    pub fn new(factor: f64, original_context: f64) -> Yarn {
        Yarn {
            factor,
            original_context,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            amplitude: YarnAmplitude::Standard,
        }
    }
}

/// What YaRN multiplies cosines and sines by.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum YarnAmplitude {
    /// `0.1 · ln factor + 1`, and 1 for factors up to 1.
    #[default]
    Standard,
    /// A number of the model's (`attention_factor`).
    Fixed(f64),
    /// `(0.1 · mscale · ln factor + 1) / (0.1 · mscale_all_dim · ln factor + 1)`.
    Mscale {
        /// Weight of the numerator.
        mscale: f64,
        /// Weight of the denominator.
        mscale_all_dim: f64,
    },
}

/// Refuses a number that is not positive and finite.
pub(super) fn positive(what: &'static str, x: f64) -> Result<f64> {
    if x > 0.0 && x.is_finite() {
        return Ok(x);
    }
    let expected = "a positive, finite number";
    Err(Error::InvalidParameter { what, expected, got: x.to_string() })
}

/// θ^(−2c/d) for the pairs of `dim` numbers.
fn powers(theta: f64, dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|c| 1.0 / theta.powf(2.0 * c as f64 / dim as f64)).collect()
}

/// The angle of each pair per position, and the amplitude of cosines and sines.
pub(super) fn frequencies(theta: f64, dim: usize, scaling: RopeScaling) -> Result<(Vec<f64>, f64)> {
    let stretched = |factor: f64| {
        let exponent = if dim > 2 { dim as f64 / (dim as f64 - 2.0) } else { 0.0 };
        powers(theta * factor.powf(exponent), dim)
    };
    let mut plain = powers(theta, dim);
    match scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            let factor = positive("RoPE factor", factor)?;
            plain.iter_mut().for_each(|w| *w /= factor);
        }
        RopeScaling::Ntk { factor } => plain = stretched(positive("RoPE factor", factor)?),
        RopeScaling::DynamicNtk { factor, original_context, context } => {
            let factor = positive("RoPE factor", factor)?;
            let ratio = positive("RoPE context", context)?
                / positive("original RoPE context", original_context)?;
            plain = stretched(1.0 + factor * (ratio.max(1.0) - 1.0));
        }
        RopeScaling::Yarn(yarn) => {
            yarn.blend(theta, dim, &mut plain)?;
            return Ok((plain, yarn.amplitude()?));
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let factor = positive("RoPE factor", factor)?;
            let low = positive("RoPE low_freq_factor", low_freq_factor)?;
            let range =
                positive("RoPE high_freq_factor − low_freq_factor", high_freq_factor - low)?;
            let context = positive("original RoPE context", original_context)?;
            for w in &mut plain {
                // By turns over the original context: divided up to `low`, kept from `high` on.
                let keep = ((context * *w / (2.0 * PI) - low) / range).clamp(0.0, 1.0);
                *w = (1.0 - keep) * *w / factor + keep * *w;
            }
        }
    }
    Ok((plain, 1.0))
}

impl Yarn {
    fn blend(&self, theta: f64, dim: usize, frequencies: &mut [f64]) -> Result<()> {
        let factor = positive("YaRN factor", self.factor)?;
        let context = positive("YaRN original context", self.original_context)?;
        let slow = positive("YaRN beta_slow", self.beta_slow)?;
        positive("YaRN beta_fast − beta_slow", self.beta_fast - slow)?;
        positive("ln of YaRN's theta", theta.ln())?;
        let pair =
            |turns: f64| dim as f64 * (context / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (low, high) = (pair(self.beta_fast), pair(slow));
        let (low, high) = if self.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        let range = if low == high { 0.001 } else { high - low };
        for (c, w) in frequencies.iter_mut().enumerate() {
            let ramp = ((c as f64 - low) / range).clamp(0.0, 1.0);
            *w = *w / factor * ramp + *w * (1.0 - ramp);
        }
        Ok(())
    }

    fn amplitude(&self) -> Result<f64> {
        let scaled = |weight: f64| 1.0 + 0.1 * weight * self.factor.max(1.0).ln();
        positive(
            "YaRN amplitude",
            match self.amplitude {
                YarnAmplitude::Standard => scaled(1.0),
                YarnAmplitude::Fixed(amplitude) => amplitude,
                YarnAmplitude::Mscale { mscale, mscale_all_dim } => {
                    scaled(mscale) / scaled(mscale_all_dim)
                }
            },
        )
    }
}
