//! Rotary position embedding: pairs of numbers turn by angles that grow with the position.
//!
//! ```text
//! x'_a = A · (x_a cos pω_c − x_b sin pω_c)     x'_b = A · (x_b cos pω_c + x_a sin pω_c)
//! ```
//!
//! so that ⟨q′, k′⟩ depends on positions only through their difference (Su et al. 2021, arXiv
//! 2104.09864). A is 1 except under YaRN. Pair c is (2c, 2c + 1) or (c, c + d/2): see [`RopeLayout`].
//!
//! A [`Rope`] is the frequencies; a [`RopeTable`] holds cosines and sines of the positions of one call,
//! made once and used by every layer and head: d numbers a token. Angles are formed and reduced in f64,
//! so that cosines are right to half a unit in the last place of f32 at position 10⁶ as at 1 (f32 angles
//! are off by 0.06 there); a rotation then costs three roundings of f32.

use super::frequency::{RopeScaling, frequencies, positive};
use crate::error::{Error, Result};
use crate::simd::{Level, rotate};
use crate::tensor::{Shape, TensorMut};

/// The most numbers of a head that rotate.
pub const MAX_ROTARY_DIM: usize = 1 << 16;

/// Which numbers form a pair. Weights made for one layout give nonsense in the other: the rows of their
/// query and key projections have to be permuted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// Neighbours, (0, 1), (2, 3), …: the paper, GPT-J, original Llama checkpoints, GGUF files of
    /// `llama`, DeepSeek.
    Interleaved,
    /// (0, d/2), (1, d/2 + 1), …: GPT-NeoX, and Llama, Qwen and Gemma checkpoints of Hugging Face.
    HalfSplit,
}

/// What a [`Rope`] is made from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// Numbers of a head.
    pub head_dim: usize,
    /// How many of them rotate, from the first on: even, at most `head_dim` and [`MAX_ROTARY_DIM`].
    pub rotary_dim: usize,
    /// The base θ of the frequencies.
    pub theta: f64,
    /// Which numbers form a pair.
    pub layout: RopeLayout,
    /// How frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// All numbers of the head rotate, θ = 10 000, no scaling.
    pub fn new(head_dim: usize, layout: RopeLayout) -> RopeConfig {
        let (rotary_dim, theta) = (head_dim, 10_000.0);
        RopeConfig { head_dim, rotary_dim, theta, layout, scaling: RopeScaling::None }
    }
}

/// Frequencies of a rotary embedding.
///
/// ```
/// use foveal::position::{Rope, RopeConfig, RopeLayout};
/// use foveal::{Level, Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let rope = Rope::new(RopeConfig::new(64, RopeLayout::HalfSplit))?;
/// let mut table = rope.table(100..108)?;
/// let mut q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 8, heads: 4, dim: 64 })?;
/// table.rotate(Level::detect()?, q.view_mut())?;
/// table.set_positions(108..109)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    head_dim: usize,
    layout: RopeLayout,
    frequencies: Vec<f64>,
    amplitude: f64,
}

impl Rope {
    /// Computes the frequencies. Allocates `rotary_dim / 2` numbers.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a number outside its range.
    pub fn new(config: RopeConfig) -> Result<Rope> {
        let RopeConfig { head_dim, rotary_dim, theta, layout, scaling } = config;
        if !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim.min(MAX_ROTARY_DIM) {
            return Err(Error::InvalidParameter {
                what: "rotary dim",
                expected: "an even number, at most the head's dim and 65536",
                got: format!("{rotary_dim} of {head_dim}"),
            });
        }
        let theta = positive("RoPE theta", theta)?;
        let (frequencies, amplitude) = frequencies(theta, rotary_dim, scaling)?;
        for &frequency in &frequencies {
            positive("RoPE frequency", frequency)?;
        }
        Ok(Rope { head_dim, layout, frequencies, amplitude })
    }

    /// Divides each pair's frequency by a factor of the model's (`rope_freqs.weight` in GGUF files).
    ///
    /// # Errors
    /// [`Error::BufferLength`] unless there is one factor for each pair; [`Error::InvalidParameter`]
    /// unless all are positive and finite.
    pub fn with_frequency_factors(mut self, factors: &[f32]) -> Result<Rope> {
        let (expected, got) = (self.frequencies.len(), factors.len());
        if expected != got {
            return Err(Error::BufferLength { what: "RoPE frequency factors", expected, got });
        }
        for (frequency, &factor) in self.frequencies.iter_mut().zip(factors) {
            let factor = positive("RoPE frequency factor", f64::from(factor))?;
            *frequency = positive("RoPE frequency", *frequency / factor)?;
        }
        Ok(self)
    }

    /// Radians per position of each pair (`inv_freq`).
    pub fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }

    /// What cosines and sines are multiplied by; scores get its square. 1 except under YaRN.
    pub fn amplitude(&self) -> f64 {
        self.amplitude
    }

    /// Which numbers form a pair.
    pub fn layout(&self) -> RopeLayout {
        self.layout
    }

    /// Cosine and sine of each pair at a position, times the amplitude.
    pub fn cos_sin(&self, position: usize) -> impl Iterator<Item = (f64, f64)> {
        self.frequencies.iter().map(move |frequency| {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (cos * self.amplitude, sin * self.amplitude)
        })
    }

    /// Cosines and sines of the positions of one call. Allocates `rotary_dim` floats a position.
    ///
    /// # Errors
    /// Those of [`RopeTable::set_positions`].
    pub fn table(
        &self,
        positions: impl IntoIterator<Item = usize, IntoIter: ExactSizeIterator>,
    ) -> Result<RopeTable> {
        let mut table = RopeTable { rope: self.clone(), positions: vec![], rows: vec![] };
        table.set_positions(positions)?;
        Ok(table)
    }
}

/// Cosines and sines of some positions, in the order of the tokens that they belong to.
///
/// Its memory is that of the largest call, whatever the length of the text.
#[derive(Debug, Clone)]
pub struct RopeTable {
    rope: Rope,
    positions: Vec<usize>,
    /// `[positions][cos, sin][pairs]`.
    rows: Vec<f32>,
}

impl RopeTable {
    /// Moves to other positions: one for each token, shared by all sequences of a batch, or one for each
    /// token of each sequence. Costs one sine and cosine a pair and position that changes its place;
    /// allocates only where there are more positions than ever before.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for more positions than memory holds. The table is then empty.
    pub fn set_positions(
        &mut self,
        positions: impl IntoIterator<Item = usize, IntoIter: ExactSizeIterator>,
    ) -> Result<()> {
        let positions = positions.into_iter();
        let width = 2 * self.rope.frequencies.len();
        let count = positions.len();
        let known = self.reserve(count, width)?;
        for (n, position) in positions.take(count).enumerate() {
            if n < known && self.positions[n] == position {
                continue;
            }
            self.positions[n] = position;
            let (cos, sin) = self.rows[n * width..][..width].split_at_mut(width / 2);
            for ((cos, sin), (c, s)) in cos.iter_mut().zip(sin).zip(self.rope.cos_sin(position)) {
                (*cos, *sin) = (c as f32, s as f32);
            }
        }
        Ok(())
    }

    /// Makes room for so many positions and says how many of them still have their rows.
    fn reserve(&mut self, count: usize, width: usize) -> Result<usize> {
        let known = self.positions.len().min(count);
        let fits = count.checked_mul(width).is_some_and(|floats| {
            self.positions.try_reserve_exact(count - known).is_ok()
                && self.rows.try_reserve_exact(floats - known * width).is_ok()
        });
        if !fits {
            (self.positions, self.rows) = (vec![], vec![]);
            let (what, expected) = ("positions of a RoPE table", "as many as memory holds");
            return Err(Error::InvalidParameter { what, expected, got: count.to_string() });
        }
        self.positions.resize(count, 0);
        self.rows.resize(count * width, 0.0);
        Ok(known)
    }

    /// The positions that the table holds.
    pub fn positions(&self) -> &[usize] {
        &self.positions
    }

    /// The frequencies behind the table.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Rotates queries or keys `[B, T, H, head_dim]` in place; numbers past `rotary_dim` stay.
    ///
    /// Every level gives the same bits.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for another head size, or unless the table has `T` positions or `B · T`.
    pub fn rotate(&self, level: Level, x: TensorMut<'_, f32>) -> Result<()> {
        self.run(level, x, (1.0, 1.0))
    }

    /// Turns the gradient for rotated numbers into the gradient for those before: rotation backwards,
    /// times the same amplitude.
    ///
    /// # Errors
    /// Those of [`RopeTable::rotate`].
    pub fn rotate_gradient(&self, level: Level, d_x: TensorMut<'_, f32>) -> Result<()> {
        self.run(level, d_x, (1.0, -1.0))
    }

    /// Undoes [`RopeTable::rotate`] up to rounding, amplitude included: for keys of a cache that get new
    /// positions.
    ///
    /// # Errors
    /// Those of [`RopeTable::rotate`].
    pub fn unrotate(&self, level: Level, x: TensorMut<'_, f32>) -> Result<()> {
        let shrink = (self.rope.amplitude * self.rope.amplitude).recip() as f32;
        self.run(level, x, (shrink, -shrink))
    }

    /// Rotates with cosines and sines times a factor each.
    fn run(&self, level: Level, x: TensorMut<'_, f32>, (cos, sin): (f32, f32)) -> Result<()> {
        let (got, tokens) = (x.shape(), self.positions.len());
        let expected = Shape { dim: self.rope.head_dim, ..got };
        if got != expected {
            return Err(Error::ShapeMismatch { what: "head size of RoPE", expected, got });
        }
        if tokens != got.seq && Some(tokens) != got.seq.checked_mul(got.batch) {
            let (what, expected) = ("tokens of a RoPE table", Shape { seq: tokens, ..got });
            return Err(Error::ShapeMismatch { what, expected, got });
        }
        let pairs = self.rope.frequencies.len();
        if pairs == 0 || tokens == 0 {
            return Ok(());
        }
        let interleaved = self.rope.layout == RopeLayout::Interleaved;
        rotate::rotate(level, x, rotate::Angles { rows: &self.rows, pairs, cos, sin, interleaved });
        Ok(())
    }
}
