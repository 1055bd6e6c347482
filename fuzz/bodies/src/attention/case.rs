//! Fuzz input as an attention call: shapes, strides, mask, phase, instructions, threads, numbers.

use super::terms::Terms;
use arbitrary::{Result, Unstructured};
use foveal::cache::TILE;
use foveal::mask::{Band, Dense, Documents, Extent, Pattern, Site, Tree};
use foveal::{Cpu, Level, Mask, Phase, Scale, Shape, Threads};
use std::num::NonZeroUsize;

/// A call that may or may not be valid.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) storage: Storage,
    pub(super) phase: Phase,
    pub(super) cpu: Cpu,
    pub(super) scale: Scale,
    pub(super) q: Shape,
    pub(super) k: Shape,
    pub(super) v: Shape,
    pub(super) mask: Mask,
    /// Whether the mask fits no other lengths than the call's.
    pub(super) sized: bool,
    /// Whether no query sees a later key.
    pub(super) causal: bool,
    /// Of queries, keys, values and output.
    pub(super) layouts: [Layout; 4],
    pub(super) numbers: u64,
    /// Keys and values that are not finite.
    pub(super) poison: usize,
    /// Where a second run of the same call is cut.
    pub(super) cut: usize,
    /// Keys that a plan for a cache leaves room for.
    pub(super) spare: usize,
    /// What a second call does to scores.
    pub(super) terms: Option<Terms>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Storage {
    F32,
    F16,
    Bf16,
}

/// How a tensor lies in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// The axes from the innermost outwards: 0 = batch, 1 = seq, 2 = heads.
    pub(super) order: [usize; 3],
    /// Elements between neighbours beyond what they need.
    pub(super) gap: usize,
    /// Elements before the first.
    pub(super) skip: usize,
    /// Whether all sequences are one and the same memory.
    pub(super) repeat: bool,
}

impl Case {
    pub(super) fn read(input: &mut Unstructured<'_>) -> Result<Case> {
        let storage = *input.choose(&[Storage::F32, Storage::F16, Storage::Bf16, Storage::F32])?;
        let phase = *input.choose(&[Phase::Prompt, Phase::Generated])?;
        let levels: Vec<Level> = Level::available().collect();
        let threads = NonZeroUsize::new(input.int_in_range(1..=2)?).unwrap_or(NonZeroUsize::MIN);
        let cpu = Cpu { level: *input.choose(&levels)?, threads: Threads::at_most(threads) };
        let scale = scale(input)?;
        let [q, k, v] = shapes(input)?;
        let extent = Extent { batch: q.batch, heads: q.heads, queries: q.seq, keys: k.seq };
        let mut masks = Masks { extent, sized: false };
        let mut mask = masks.read(input, 3)?;
        let causal = input.arbitrary()?;
        if causal {
            mask = mask.and(Mask::causal());
        }
        Ok(Case {
            storage,
            phase,
            cpu,
            scale,
            q,
            k,
            v,
            mask,
            sized: masks.sized,
            causal,
            layouts: [layout(input)?, layout(input)?, layout(input)?, layout(input)?],
            numbers: input.arbitrary()?,
            poison: if input.ratio(1u8, 4u8)? { input.int_in_range(1..=4)? } else { 0 },
            cut: input.int_in_range(0..=q.seq.min(1 << 16))?,
            spare: *input.choose(&[0, 1, TILE, 5000])?,
            terms: if input.is_empty() { None } else { Some(Terms::read(input)?) },
        })
    }

    /// Whether the call is small enough to be run.
    pub(super) fn runs(&self) -> bool {
        let small = |shape: Shape| shape.checked_len().is_some_and(|n| n <= 1 << 17);
        let extents = [self.q.batch, self.q.seq, self.k.seq, self.q.heads, self.k.heads];
        let work =
            extents.iter().try_fold(self.q.dim + self.v.dim, |n, &e| n.checked_mul(e.max(1)));
        small(self.q) && small(self.k) && small(self.v) && work.is_some_and(|n| n <= 1 << 16)
    }
}

fn scale(input: &mut Unstructured<'_>) -> Result<Scale> {
    Ok(match input.int_in_range(0..=3)? {
        0 => Scale::Value(f32::from(input.arbitrary::<i8>()?) / 16.0),
        1 => *input.choose(&[
            Scale::Value(f32::NAN),
            Scale::Value(0.0),
            Scale::Value(f32::INFINITY),
        ])?,
        _ => Scale::InverseSqrtDim,
    })
}

/// Shapes that agree, most of the time.
fn shapes(input: &mut Unstructured<'_>) -> Result<[Shape; 3]> {
    let batch = extent(input, 2)?;
    let kv_heads = extent(input, 3)?;
    let group = input.int_in_range(1..=5)?;
    let queries = sequence(input, 70)?;
    let keys = sequence(input, 40)?;
    let dim = dimension(input)?;
    let value_dim = dimension(input)?;
    let q = Shape { batch, seq: queries, heads: kv_heads.saturating_mul(group), dim };
    let k = Shape { batch, seq: keys, heads: kv_heads, dim };
    let mut shapes = [q, k, Shape { dim: value_dim, ..k }];
    if input.ratio(1u8, 16u8)? {
        let shape = &mut shapes[input.int_in_range(0..=2)?];
        let Shape { batch, seq, heads, dim } = shape;
        *[batch, seq, heads, dim][input.int_in_range(0..=3)?] = extent(input, 7)?;
    }
    Ok(shapes)
}

/// Up to `most`, or far beyond everything.
fn extent(input: &mut Unstructured<'_>, most: usize) -> Result<usize> {
    match input.int_in_range(0..=63u8)? {
        63 => Ok(*input.choose(&[usize::MAX, isize::MAX as usize, 1 << 40, 1 << 20])?),
        n => Ok(usize::from(n) % (most + 1)),
    }
}

/// A length that is short, or next to a multiple of a tile.
fn sequence(input: &mut Unstructured<'_>, short: usize) -> Result<usize> {
    match input.int_in_range(0..=15u8)? {
        15 => extent(input, short),
        14 => Ok(TILE * input.int_in_range(1..=3)? + input.int_in_range(0..=2)? - 1),
        13 => Ok(TILE + input.int_in_range(0..=TILE)?),
        _ => input.int_in_range(0..=short),
    }
}

fn dimension(input: &mut Unstructured<'_>) -> Result<usize> {
    match input.int_in_range(0..=31u8)? {
        31 => extent(input, 8),
        30 => Ok(*input.choose(&[64, 128, 4096, 4097])?),
        n => Ok(usize::from(n) + 1),
    }
}

fn layout(input: &mut Unstructured<'_>) -> Result<Layout> {
    let orders = [[2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [0, 1, 2], [1, 0, 2]];
    Ok(Layout {
        order: *input.choose(&orders)?,
        gap: if input.arbitrary()? { input.int_in_range(1..=9)? } else { 0 },
        skip: input.int_in_range(0..=3)?,
        repeat: input.ratio(1u8, 8u8)?,
    })
}

/// Builds masks for a call.
struct Masks {
    extent: Extent,
    sized: bool,
}

impl Masks {
    fn read(&mut self, input: &mut Unstructured<'_>, depth: usize) -> Result<Mask> {
        Ok(match input.int_in_range(0..=if depth == 0 { 5 } else { 14 })? {
            0 => Mask::full(),
            1 => Mask::causal(),
            2 => Mask::window(far(input)?),
            3 => {
                let Band { behind, ahead } = band(input)?;
                Mask::band(behind, ahead)
            }
            4 => self.documents(input)?,
            5 => self.dense(input)?,
            6 => Mask::pattern(Strided { by: input.int_in_range(1..=5)? }),
            7 | 8 => self.read(input, depth - 1)?.and(self.read(input, depth - 1)?),
            9 => self.read(input, depth - 1)?.or(self.read(input, depth - 1)?),
            10 => Mask::prefix(far(input)?),
            11 => Mask::streaming(far(input)?, far(input)?),
            12 => Mask::keys(far(input)?..far(input)?),
            13 => self.tree(input)?,
            _ => {
                let heads = self.extent.heads.min(16);
                let masks = (0..heads).map(|_| self.read(input, 0)).collect::<Result<_>>()?;
                if heads < self.extent.heads { Mask::causal() } else { Mask::per_head(masks) }
            }
        })
    }

    /// A tree of the newest tokens; shorter sequences see less of it.
    fn tree(&mut self, input: &mut Unstructured<'_>) -> Result<Mask> {
        let keys = self.extent.keys;
        let count = input.int_in_range(0..=keys.min(70))?;
        let parent =
            |n: usize| -> Result<Option<usize>> { Ok(input.int_in_range(0..=n)?.checked_sub(1)) };
        let parents = (0..count).map(parent).collect::<Result<Vec<_>>>()?;
        Ok(Tree::new(keys - count, &parents).expect("parents come first").into())
    }

    fn documents(&mut self, input: &mut Unstructured<'_>) -> Result<Mask> {
        self.sized = true;
        let count = input.int_in_range(1..=4)?;
        let queries = starts(input, self.extent.queries, count)?;
        let keys = starts(input, self.extent.keys, count)?;
        let documents = Documents::new(&queries, &keys).expect("sorted lengths from 0");
        Ok(if input.arbitrary()? { documents } else { documents.within(band(input)?) }.into())
    }

    fn dense(&mut self, input: &mut Unstructured<'_>) -> Result<Mask> {
        self.sized = true;
        let Extent { batch, heads, .. } = self.extent;
        let shared = Extent {
            batch: if input.arbitrary()? { 1 } else { batch },
            heads: if input.arbitrary()? { 1 } else { heads },
            ..self.extent
        };
        let bits = [shared.heads, shared.queries, shared.keys];
        let bits = bits.iter().try_fold(shared.batch, |n, &e| n.checked_mul(e));
        let Some(bits) = bits.filter(|&n| n <= 1 << 20) else { return Ok(Mask::full()) };
        let mut numbers = crate::numbers::Numbers::new(input.arbitrary()?);
        let run = input.int_in_range(1..=300u64)?;
        let mut visible = false;
        let visible: Vec<bool> = (0..bits)
            .map(|_| {
                visible ^= numbers.bits().is_multiple_of(run);
                visible
            })
            .collect();
        Ok(Dense::new(&visible, shared).expect("as many bits as the extent has").into())
    }
}

fn band(input: &mut Unstructured<'_>) -> Result<Band> {
    let behind = if input.arbitrary()? { Some(far(input)?) } else { None };
    let ahead = if input.arbitrary()? { Some(far(input)?) } else { None };
    Ok(Band { behind, ahead })
}

/// A distance that is short, long, or as long as a number can be.
fn far(input: &mut Unstructured<'_>) -> Result<usize> {
    match input.int_in_range(0..=7u8)? {
        7 => Ok(*input.choose(&[usize::MAX, usize::MAX - 1, isize::MAX as usize, 1 << 63])?),
        6 => input.int_in_range(0..=3 * TILE),
        _ => input.int_in_range(0..=20),
    }
}

/// Cumulative lengths of `count` documents that end at `total`.
fn starts(input: &mut Unstructured<'_>, total: usize, count: usize) -> Result<Vec<usize>> {
    let mut starts = vec![0, total];
    for _ in 1..count {
        starts.push(input.int_in_range(0..=total)?);
    }
    starts.sort_unstable();
    Ok(starts)
}

/// A caller's own pattern, with nothing but its definition; it differs between heads.
#[derive(Debug)]
struct Strided {
    by: usize,
}

impl Pattern for Strided {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        (i.unsigned_abs() + j + at.q_head).is_multiple_of(self.by)
    }
}
