//! Keys and values as small whole numbers with a scale and a minimum for each group of 64.
//!
//! ```text
//! s = f16((max − min) / (2ᵇ − 1))     m = f16(min)     code = ⌊(x − m) / s + 0.5⌋ in 0..2ᵇ     x̂ = code · s + m
//! ```
//!
//! A group is 64 neighbouring tokens of one channel for keys, whose outliers keep to their channels, and 64
//! neighbouring channels of one token for values (KIVI: Liu et al. 2024, §3). A group whose scale would be 0 has a scale of 1
//! and codes of 0. With b bits, a number takes b + 0.5. The error is at most s / 2 and what rounding s and m adds; a code is
//! taken from the stored s and m, so that it makes up for their rounding as far as it can.

use crate::error::{Error, Result};
use crate::simd::tile::{KEY_TILE, PANEL};
use half::f16;
use std::ops::Range;

/// Numbers that share a scale and a minimum: tokens of a channel for keys, channels of a token for values.
pub const GROUP: usize = PANEL;

/// Groups of tokens in a tile.
pub(crate) const GROUPS: usize = KEY_TILE / GROUP;

/// The largest magnitude that a coded number may have: that of an f16.
pub(crate) const LARGEST: f32 = 65504.0;

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Bits {
    /// 16 steps between the smallest and the largest number of a group.
    Four,
    /// 256 of them.
    Eight,
}

impl Bits {
    /// 4 or 8.
    pub const fn count(self) -> usize {
        match self {
            Bits::Four => 4,
            Bits::Eight => 8,
        }
    }

    /// The bytes of `n` codes; `n` is a multiple of 64.
    pub(crate) const fn bytes(self, n: usize) -> usize {
        n / 8 * self.count()
    }
}

/// What the codes of a group stand for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaling {
    /// Distance of neighbouring codes.
    pub scale: f16,
    /// What code 0 stands for.
    pub min: f16,
}

impl Scaling {
    /// The scale and minimum of numbers between `min` and `max` in codes of 2 to 8 `bits`.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for another number of bits, or bounds that are not finite, not in order or
    /// beyond an f16.
    pub fn between(min: f32, max: f32, bits: u32) -> Result<Scaling> {
        let (what, expected) = ("bits of a code", "2 to 8");
        if !(2..=8).contains(&bits) {
            return Err(Error::InvalidParameter { what, expected, got: bits.to_string() });
        }
        if !(-LARGEST <= min && min <= max && max <= LARGEST) {
            let what = "bounds of a coded group";
            let expected = "finite numbers of at most 65504 in magnitude, the smaller first";
            return Err(Error::InvalidParameter { what, expected, got: format!("{min}, {max}") });
        }
        Ok(crate::simd::encode::scaling(min, max, ((1u32 << bits) - 1) as f32))
    }

    /// The code of a number in `0..2^bits`.
    pub fn code(self, x: f32, bits: u32) -> u8 {
        let most = (1u32 << bits.min(8)) - 1;
        crate::simd::encode::code(x, self.scale.to_f32(), self.min.to_f32(), most as f32) as u8
    }

    /// What a code stands for: `code * scale + min`.
    pub fn number(self, code: u8) -> f32 {
        f32::from(code) * self.scale.to_f32() + self.min.to_f32()
    }
}

/// The coded keys of one tile and head: `[group of tokens][channel][token]`.
#[derive(Debug, Clone, Copy)]
pub struct ChannelCodes<'a> {
    pub(crate) bits: Bits,
    /// The first of the channels that are looked at.
    first: usize,
    /// How many are looked at.
    pub(crate) width: usize,
    /// How many are stored.
    stored: usize,
    /// The codes of 64 tokens for each channel of each group of tokens.
    codes: &'a [u8],
    /// For each group of tokens the scales, then the minima, of all channels.
    ranges: &'a [f16],
}

impl<'a> ChannelCodes<'a> {
    /// All channels of a tile.
    pub(crate) fn new(bits: Bits, width: usize, codes: &'a [u8], ranges: &'a [f16]) -> Self {
        assert!(codes.len() == bits.bytes(KEY_TILE) * width && ranges.len() == 2 * GROUPS * width);
        ChannelCodes { bits, first: 0, width, stored: width, codes, ranges }
    }

    /// Some of the channels.
    pub(crate) fn columns(self, columns: Range<usize>) -> Self {
        assert!(columns.start <= columns.end && columns.end <= self.width);
        ChannelCodes { first: self.first + columns.start, width: columns.len(), ..self }
    }

    /// Numbers of a key.
    pub fn width(&self) -> usize {
        self.width
    }

    /// What is stored for one number of the `token`-th key of the tile.
    ///
    /// # Panics
    /// Beyond the tile's 256 tokens or the width.
    pub fn number(&self, token: usize, channel: usize) -> f32 {
        assert!(token < KEY_TILE && channel < self.width);
        let codes = &self.codes(token / GROUP)[self.bits.bytes(GROUP) * channel..];
        let [scales, minima] = self.ranges(token / GROUP);
        Scaling { scale: scales[channel], min: minima[channel] }.number(code(
            self.bits,
            codes,
            token % GROUP,
        ))
    }

    /// The codes of a group of tokens, channel after channel.
    pub(crate) fn codes(&self, group: usize) -> &'a [u8] {
        let bytes = self.bits.bytes(GROUP);
        &self.codes[(group * self.stored + self.first) * bytes..][..self.width * bytes]
    }

    /// Scales and minima of a group of tokens.
    pub(crate) fn ranges(&self, group: usize) -> [&'a [f16]; 2] {
        [0, 1].map(|n| &self.ranges[(2 * group + n) * self.stored + self.first..][..self.width])
    }
}

/// The coded values of one tile and head: `[token][channel]`.
#[derive(Debug, Clone, Copy)]
pub struct TokenCodes<'a> {
    pub(crate) bits: Bits,
    /// Channels.
    pub(crate) width: usize,
    /// The codes of each token, channels rounded up to a multiple of 64.
    pub(crate) codes: &'a [u8],
    /// For each group of tokens and each group of channels, 64 scales, then 64 minima.
    pub(crate) ranges: &'a [f16],
}

impl<'a> TokenCodes<'a> {
    /// Numbers of a value.
    pub fn width(&self) -> usize {
        self.width
    }

    /// What is stored for one number of the `token`-th value of the tile.
    ///
    /// # Panics
    /// Beyond the tile's 256 tokens or the width.
    pub fn number(&self, token: usize, channel: usize) -> f32 {
        assert!(token < KEY_TILE && channel < self.width);
        let codes = &self.codes[self.row_bytes() * token..];
        let [scales, minima] = self.ranges(token / GROUP, channel / GROUP);
        Scaling { scale: scales[token % GROUP], min: minima[token % GROUP] }
            .number(code(self.bits, codes, channel))
    }

    /// What is stored for the `token`-th value of the tile.
    pub(crate) fn row(&self, token: usize, to: &mut [f32]) {
        let codes = &self.codes[self.row_bytes() * token..];
        for (group, to) in to[..self.width].chunks_mut(GROUP).enumerate() {
            let [scales, minima] = self.ranges(token / GROUP, group);
            let [scale, min] = [scales, minima].map(|x| x[token % GROUP].to_f32());
            for (n, to) in to.iter_mut().enumerate() {
                *to = f32::from(code(self.bits, codes, group * GROUP + n)) * scale + min;
            }
        }
    }

    /// Bytes of one token's codes.
    pub(crate) fn row_bytes(&self) -> usize {
        self.bits.bytes(coded_width(self.width))
    }

    /// Scales and minima of a group of channels for the tokens of a group.
    pub(crate) fn ranges(&self, tokens: usize, channels: usize) -> [&'a [f16]; 2] {
        let group = tokens * self.width.div_ceil(GROUP) + channels;
        let (scales, minima) = self.ranges[2 * group * GROUP..][..2 * GROUP].split_at(GROUP);
        [scales, minima]
    }
}

/// Codes of a value, padding included.
pub(crate) fn coded_width(width: usize) -> usize {
    width.next_multiple_of(GROUP)
}

/// The `n`-th of a row of codes, of which each group lies as vectors take it apart.
fn code(bits: Bits, codes: &[u8], n: usize) -> u8 {
    let group = &codes[n / GROUP * bits.bytes(GROUP)..];
    let (byte, shift) = place(bits, n % GROUP);
    match bits {
        Bits::Eight => group[byte],
        Bits::Four => group[byte] >> shift & 15,
    }
}

/// The byte of a group that holds its `n`-th code, and how many bits lie below it there: as
/// [`load_bytes` and `load_halves`](crate::simd::Simd) of the vectors take a group apart.
const fn place(bits: Bits, n: usize) -> (usize, usize) {
    let (k, l) = (n / 16, n % 16);
    match bits {
        Bits::Eight => (4 * l + k, 0),
        Bits::Four => {
            let bit = 4 * k + 16 * (l / 8);
            (4 * (l % 8) + bit / 8, bit % 8)
        }
    }
}
