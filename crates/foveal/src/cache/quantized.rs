//! Codes of 8 or 4 bits for all but the newest tokens, whose keys and values stay bf16.
//!
//! ```text
//! tokens held     [ coded tiles .................. | the tile before the newest one | the newest token's tile ]
//!                 b + 0.5 bits a number              bf16                             bf16
//! ```
//!
//! A tile of 256 tokens is coded when the second tile after it begins, so that every token sees at least the 256 tokens before
//! it as bf16. How keys and values are coded is in [`codes`](super::codes). Kernels multiply codes (decoding) or decode a
//! tile to where they would pack it (prompts): no tile is decoded for its own sake.
//!
//! What a row sees of a token then depends on nothing but the two positions, as long as no call's tokens lie on both sides of a
//! multiple of [`TILE`]: cut prompts with [`pieces`](super::pieces), and append and attend to a piece at a time. A longer call
//! is right as well, but its first rows see coded what they would see as bf16 in a shorter one.

use super::codes::{Bits, ChannelCodes, GROUP, GROUPS, TokenCodes, coded_width};
use super::contiguous::check_start;
use super::{
    ContiguousCache, KvKeys, KvRows, KvStore, KvTile, KvValues, TILE, check_appended, pieces,
};
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::simd::Level;
use crate::simd::encode::{Encode, encode_keys, encode_values};
use crate::tensor::{Shape, TensorRef};
use half::{bf16, f16};
use std::ops::Range;

/// From here on bf16 rounds to more than an f16 holds.
const LIMIT: f32 = 65408.0;

/// Keys and values of one sequence of one layer, most of them as codes.
#[derive(Debug, Clone)]
pub struct QuantizedCache {
    bits: Bits,
    level: Level,
    capacity: usize,
    /// Coded tiles: those of the positions `start..recent.start()`, one after the other, each head after head.
    start: usize,
    key_codes: Vec<u8>,
    key_ranges: Vec<f16>,
    value_codes: Vec<u8>,
    value_ranges: Vec<f16>,
    recent: ContiguousCache<bf16>,
}

/// The coded tiles of a [`QuantizedCache`], as they lie in memory: tile after tile, in it head after head.
#[derive(Debug, Clone, Copy)]
pub struct CodedTiles<'a> {
    /// Codes of keys, groups of tokens of each channel.
    pub key_codes: &'a [u8],
    /// A scale and a minimum for each of these groups.
    pub key_ranges: &'a [f16],
    /// Codes of values, groups of channels of each token.
    pub value_codes: &'a [u8],
    /// A scale and a minimum for each of these groups.
    pub value_ranges: &'a [f16],
}

/// What one head has of a tile.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    key_codes: usize,
    key_ranges: usize,
    value_codes: usize,
    value_ranges: usize,
}

impl Sizes {
    fn new(bits: Bits, (key_dim, value_dim): (usize, usize)) -> Sizes {
        Sizes {
            key_codes: bits.bytes(TILE) * key_dim,
            key_ranges: 2 * GROUPS * key_dim,
            value_codes: TILE * bits.bytes(coded_width(value_dim)),
            value_ranges: 2 * TILE * value_dim.div_ceil(GROUP),
        }
    }
}

impl QuantizedCache {
    /// Room for `capacity` tokens of `kv_heads` heads with keys of `dims.0` and values of `dims.1` numbers. Allocates
    /// all of it.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if that is more than the address space, [`Error::SimdUnavailable`] as
    /// [`Level::detect`].
    pub fn new(
        bits: Bits,
        kv_heads: usize,
        dims: (usize, usize),
        capacity: usize,
    ) -> Result<QuantizedCache> {
        let recent = ContiguousCache::new(kv_heads, dims, 2 * TILE)?;
        let (level, start) = (Level::detect()?, 0);
        let (key_codes, value_codes) = (vec![], vec![]);
        let (key_ranges, value_ranges) = (vec![], vec![]);
        let mut cache = QuantizedCache {
            bits,
            level,
            capacity: 0,
            start,
            key_codes,
            key_ranges,
            value_codes,
            value_ranges,
            recent,
        };
        cache.grow(capacity)?;
        Ok(cache)
    }

    /// Makes the capacity at least `capacity` tokens. If it was less, allocates anew and copies what is held.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if that is more than the address space; the cache is then unchanged.
    pub fn grow(&mut self, capacity: usize) -> Result<()> {
        if capacity <= self.capacity {
            return Ok(());
        }
        let (sizes, heads) = (self.sizes(), self.kv_heads());
        let (key_dim, value_dim) = self.dims();
        let dim = key_dim.saturating_add(value_dim);
        let shape = Shape { batch: 1, seq: capacity, heads, dim };
        let overflow = Error::ShapeOverflow { what: "key/value cache", shape };
        // A tile of a head has fewer bytes than four for each of its tokens and numbers, padding included.
        let padded = Shape { dim: dim.saturating_add(256), ..shape };
        if padded.checked_len().is_none_or(|n| n > isize::MAX as usize / 4) {
            return Err(overflow);
        }
        // The newest token's tile and the one before it are never coded.
        let units = capacity.div_ceil(TILE).saturating_sub(1) * heads;
        grow_to(&mut self.key_codes, units * sizes.key_codes);
        grow_to(&mut self.key_ranges, units * sizes.key_ranges);
        grow_to(&mut self.value_codes, units * sizes.value_codes);
        grow_to(&mut self.value_ranges, units * sizes.value_ranges);
        self.capacity = capacity;
        Ok(())
    }

    /// Bits of a code.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// Tokens that can be held at once.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens that can still be appended before something has to be forgotten.
    pub fn room(&self) -> usize {
        self.capacity - (self.end() - self.start)
    }

    /// Bytes of keys and values that are held, as codes or as bf16.
    pub fn bytes(&self) -> usize {
        let sizes = self.sizes();
        let codes = sizes.key_codes + sizes.value_codes;
        let ranges = sizes.key_ranges + sizes.value_ranges;
        let tile = self.kv_heads() * (codes + size_of::<f16>() * ranges);
        let recent = self.end() - self.recent.start();
        self.tiles(&(self.start..self.recent.start())).len() * tile
            + recent * self.recent.bytes_per_token()
    }

    /// Appends the tokens of one sequence, `[1, tokens, kv_heads, dim]`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::CacheFull`]; [`Error::InvalidParameter`] if a number is not finite or 65408 or more
    /// in magnitude, which codes can't stand for. The cache is then unchanged.
    pub fn append<F: Element>(&mut self, k: TensorRef<'_, F>, v: TensorRef<'_, F>) -> Result<()> {
        let tokens = check_appended(self, k.shape(), v.shape())?;
        if tokens > self.room() {
            let len = self.end() - self.start;
            return Err(Error::CacheFull { len, capacity: self.capacity, appended: tokens });
        }
        check_numbers("a key to be coded", k)?;
        check_numbers("a value to be coded", v)?;
        let first = self.end();
        for piece in pieces(first..first + tokens) {
            self.code_before((piece.start / TILE).saturating_sub(1) * TILE);
            let part = piece.start - first..piece.end - first;
            self.recent.append(k.tokens(part.clone()), v.tokens(part))?;
        }
        Ok(())
    }

    /// Gives up whole tiles of positions below `before`: what no later query will see. What remains
    /// moves to the front of its memory; nothing is allocated.
    pub fn forget(&mut self, before: usize) {
        let coded = self.recent.start();
        let start = (before / TILE * TILE).clamp(self.start, coded.max(self.start));
        let (sizes, heads) = (self.sizes(), self.kv_heads());
        let kept = self.tiles(&(start..coded));
        let kept = kept.start * heads..kept.end * heads;
        to_front(&mut self.key_codes, &kept, sizes.key_codes);
        to_front(&mut self.key_ranges, &kept, sizes.key_ranges);
        to_front(&mut self.value_codes, &kept, sizes.value_codes);
        to_front(&mut self.value_ranges, &kept, sizes.value_ranges);
        self.start = start;
        if start == coded {
            self.recent.forget(before);
            self.start = self.recent.start();
        }
    }

    /// Forgets everything; the next token has position 0.
    pub fn clear(&mut self) {
        self.start = 0;
        self.recent.clear();
    }

    /// As [`ContiguousCache::clear_to`].
    pub(crate) fn clear_to(&mut self, start: usize) -> Result<()> {
        self.recent.clear_to(start)?;
        self.start = start;
        Ok(())
    }

    /// The positions whose keys and values are codes; those behind them are bf16.
    pub fn coded_positions(&self) -> Range<usize> {
        self.start..self.recent.start()
    }

    /// The codes of these positions. With them, and the newest tokens, [`QuantizedCache::restore`] makes the same cache again.
    pub fn coded_tiles(&self) -> CodedTiles<'_> {
        let (sizes, units) = (self.sizes(), self.units(&self.coded_positions()));
        CodedTiles {
            key_codes: &self.key_codes[..units * sizes.key_codes],
            key_ranges: &self.key_ranges[..units * sizes.key_ranges],
            value_codes: &self.value_codes[..units * sizes.value_codes],
            value_ranges: &self.value_ranges[..units * sizes.value_ranges],
        }
    }

    /// Forgets everything and holds the codes of `positions`, whole tiles; the tokens that were bf16 are to be appended next.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for positions that are no whole tiles, [`Error::LengthMismatch`] for codes that are not
    /// those of as many, [`Error::ShapeOverflow`] as [`QuantizedCache::grow`]; the cache is then unchanged.
    pub fn restore(&mut self, positions: Range<usize>, tiles: CodedTiles<'_>) -> Result<()> {
        check_start(positions.start)?;
        check_start(positions.end)?;
        let sizes = self.sizes();
        let units = (positions.len() / TILE).checked_mul(self.kv_heads());
        for (what, got, size) in [
            ("codes of keys", tiles.key_codes.len(), sizes.key_codes),
            ("ranges of keys", tiles.key_ranges.len(), sizes.key_ranges),
            ("codes of values", tiles.value_codes.len(), sizes.value_codes),
            ("ranges of values", tiles.value_ranges.len(), sizes.value_ranges),
        ] {
            let expected = units.and_then(|units| units.checked_mul(size)).unwrap_or(usize::MAX);
            if got != expected {
                return Err(Error::LengthMismatch { what, expected, got });
            }
        }
        self.grow(positions.len().saturating_add(TILE))?;
        self.recent.clear_to(positions.end.max(positions.start))?;
        self.start = positions.start;
        self.key_codes[..tiles.key_codes.len()].copy_from_slice(tiles.key_codes);
        self.key_ranges[..tiles.key_ranges.len()].copy_from_slice(tiles.key_ranges);
        self.value_codes[..tiles.value_codes.len()].copy_from_slice(tiles.value_codes);
        self.value_ranges[..tiles.value_ranges.len()].copy_from_slice(tiles.value_ranges);
        Ok(())
    }

    /// Tiles of all heads that some positions have.
    fn units(&self, positions: &Range<usize>) -> usize {
        self.tiles(positions).len() * self.kv_heads()
    }

    fn sizes(&self) -> Sizes {
        Sizes::new(self.bits, self.recent.dims())
    }

    /// The numbers of tiles of some positions.
    fn tiles(&self, positions: &Range<usize>) -> Range<usize> {
        (positions.start - self.start) / TILE..(positions.end - self.start) / TILE
    }

    /// Codes the tiles of positions below `before` that are not yet.
    fn code_before(&mut self, before: usize) {
        while self.recent.start() < before && self.recent.start() + TILE <= self.recent.end() {
            let from = self.recent.start();
            for head in 0..self.kv_heads() {
                self.code(head, from);
            }
            self.recent.forget(from + TILE);
        }
    }

    /// Codes one head of the tile at `from`.
    fn code(&mut self, head: usize, from: usize) {
        let (sizes, (key_dim, value_dim)) = (self.sizes(), self.dims());
        let unit = (from - self.start) / TILE * self.kv_heads() + head;
        let (bits, level) = (self.bits, self.level);
        let tile = self.recent.tile(head, from..from + TILE);
        let (KvKeys::Rows(KvRows::Bf16(keys)), KvValues::Rows(KvRows::Bf16(values))) =
            (tile.keys, tile.values)
        else {
            unreachable!("a cache of bf16 hands out rows of bf16")
        };
        let mut key_codes = of(&mut self.key_codes, unit, sizes.key_codes);
        let mut key_ranges = of(&mut self.key_ranges, unit, sizes.key_ranges);
        let mut value_codes = of(&mut self.value_codes, unit, sizes.value_codes);
        let mut value_ranges = of(&mut self.value_ranges, unit, sizes.value_ranges);
        for first in (0..TILE).step_by(GROUP) {
            let group = first..first + GROUP;
            let (rows, width) = (keys.slice(group.clone()).as_slice(), key_dim);
            let codes = first_of(&mut key_codes, sizes.key_codes);
            let ranges = first_of(&mut key_ranges, sizes.key_ranges);
            encode_keys(level, Encode { bits, width, rows, codes, ranges });
            let (rows, width) = (values.slice(group).as_slice(), value_dim);
            let codes = first_of(&mut value_codes, sizes.value_codes);
            let ranges = first_of(&mut value_ranges, sizes.value_ranges);
            encode_values(level, Encode { bits, width, rows, codes, ranges });
        }
    }
}

fn check_numbers<F: Element>(what: &'static str, x: TensorRef<'_, F>) -> Result<()> {
    let Shape { seq, heads, .. } = x.shape();
    for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
        let row = x.row(0, t, head);
        // A sum of flags has no early exit and is computed many numbers at a time.
        let beyond = |x: &F| u32::from(x.to_f32().abs() >= LIMIT || x.to_f32().is_nan());
        if row.iter().map(beyond).sum::<u32>() > 0 {
            let got = row.iter().find(|x| beyond(x) > 0).map_or(f32::NAN, |x| x.to_f32());
            let expected = "a finite number below 65408 in magnitude";
            return Err(Error::InvalidParameter { what, expected, got: got.to_string() });
        }
    }
    Ok(())
}

/// A vector of at least `len`, which was checked to be possible.
fn grow_to<T: Copy + Default>(data: &mut Vec<T>, len: usize) {
    if len > data.len() {
        data.reserve_exact(len - data.len());
        data.resize(len, T::default());
    }
}

fn to_front<T: Copy>(data: &mut [T], units: &Range<usize>, size: usize) {
    if units.start > 0 {
        data.copy_within(units.start * size..units.end * size, 0);
    }
}

fn of<T>(data: &mut [T], unit: usize, size: usize) -> &mut [T] {
    &mut data[unit * size..(unit + 1) * size]
}

/// Splits off one of the [`GROUPS`] parts that a tile's slice of `size` has.
fn first_of<'a, T>(rest: &mut &'a mut [T], size: usize) -> &'a mut [T] {
    rest.split_off_mut(..size / GROUPS).expect("a part for each group")
}

impl KvStore for QuantizedCache {
    fn end(&self) -> usize {
        self.recent.end()
    }

    fn start(&self) -> usize {
        self.start
    }

    fn kv_heads(&self) -> usize {
        self.recent.kv_heads()
    }

    fn dims(&self) -> (usize, usize) {
        self.recent.dims()
    }

    fn dtype(&self) -> DType {
        DType::Bf16
    }

    fn coded(&self) -> bool {
        true
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        if positions.start >= self.recent.start() {
            return self.recent.tile(head, positions);
        }
        let whole = positions.start.is_multiple_of(TILE) && positions.len() == TILE;
        assert!(head < self.kv_heads() && self.start <= positions.start && whole);
        let (bits, sizes, (key_dim, value_dim)) = (self.bits, self.sizes(), self.dims());
        let unit = self.tiles(&positions).start * self.kv_heads() + head;
        KvTile {
            keys: KvKeys::Channels(ChannelCodes::new(
                bits,
                key_dim,
                &self.key_codes[unit * sizes.key_codes..][..sizes.key_codes],
                &self.key_ranges[unit * sizes.key_ranges..][..sizes.key_ranges],
            )),
            values: KvValues::Tokens(TokenCodes {
                bits,
                width: value_dim,
                codes: &self.value_codes[unit * sizes.value_codes..][..sizes.value_codes],
                ranges: &self.value_ranges[unit * sizes.value_ranges..][..sizes.value_ranges],
            }),
        }
    }
}
