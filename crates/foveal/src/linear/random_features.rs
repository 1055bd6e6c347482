//! Random directions of features, and the map from rows to features.
//!
//! ```text
//! orthogonal     blocks of D rows: the rows of a Gaussian matrix made orthogonal one after the other, each times the norm
//!                of a Gaussian row of its own (χ with D degrees)
//! independent    standard normal rows
//! ```
//!
//! Both have standard normal rows, so that features are unbiased; orthogonal ones are not independent, and their errors
//! cancel in part. Making rows orthogonal in order (Gram and Schmidt) has no sign to get wrong: a triangular factor has a
//! positive diagonal. Choromanski et al. 2021, arXiv:2009.14794, section 2.4.

use super::gather::Role;
use crate::error::{Error, Result};
use crate::random::{Random, mix};
use crate::simd::Level;
use crate::simd::favor::{ProductMap, derive_products, less_rows, map_products};
use crate::simd::sweep::{Layout, NARROW, Read, TokenRows, padded, read};
use std::sync::Arc;

/// The most directions, and the most numbers of each.
const MOST: usize = 4096;

/// How directions are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Draw {
    /// Orthogonal within blocks, with the norms of Gaussian rows.
    Orthogonal,
    /// Gaussian rows.
    Independent,
}

/// `count` random directions of `dim` numbers, cheap to clone.
///
/// A draw depends on nothing but how it is drawn, its sizes, its seed and its number: [`RandomFeatures::redrawn`] is the
/// next one. A state belongs to one draw; gradients take the draw of their forward.
#[derive(Debug, Clone, PartialEq)]
pub struct RandomFeatures {
    /// ω, `[count, dim]`.
    directions: Arc<[f32]>,
    dim: usize,
    origin: Option<Origin>,
    /// ω D^(−1/4), transposed and packed.
    ahead: Arc<[f32]>,
    /// The same, packed.
    back: Arc<[f32]>,
}

/// What a draw depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Origin {
    draw: Draw,
    seed: u64,
    number: u64,
}

impl RandomFeatures {
    /// The first draw of a seed. Allocates; orthogonal ones take 2 · count · dim² operations, in f64.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] unless count and dim are 1 to 4096.
    pub fn new(draw: Draw, count: usize, dim: usize, seed: u64) -> Result<RandomFeatures> {
        RandomFeatures::drawn(Origin { draw, seed, number: 0 }, count, dim)
    }

    /// Directions that are given, `[count, dim]`.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] unless they are whole rows; [`Error::InvalidParameter`] as for a draw.
    pub fn given(directions: &[f32], dim: usize) -> Result<RandomFeatures> {
        let count = directions.len() / dim.max(1);
        check(count, dim)?;
        if directions.len() != count * dim {
            let (what, expected) = ("directions of random features", count * dim);
            return Err(Error::LengthMismatch { what, expected, got: directions.len() });
        }
        Ok(RandomFeatures::packed(directions.into(), dim, None))
    }

    /// The next draw of the same seed. Not between a forward and its backward, and not while a state is carried.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for directions that were given.
    pub fn redrawn(&self) -> Result<RandomFeatures> {
        let Some(origin) = self.origin else {
            let (what, expected) = ("random features to draw again", "drawn ones");
            return Err(Error::InvalidParameter { what, expected, got: "given ones".into() });
        };
        RandomFeatures::drawn(
            Origin { number: origin.number + 1, ..origin },
            self.count(),
            self.dim,
        )
    }

    /// How many directions there are.
    pub fn count(&self) -> usize {
        self.directions.len() / self.dim
    }

    /// Numbers of each.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// ω, `[count, dim]`.
    pub fn directions(&self) -> &[f32] {
        &self.directions
    }

    fn drawn(origin: Origin, count: usize, dim: usize) -> Result<RandomFeatures> {
        check(count, dim)?;
        let mut random = Random::new(mix(origin.seed) ^ origin.number);
        let mut gaussian = || -> Vec<f64> { (0..dim).map(|_| random.normal().into()).collect() };
        let mut directions = Vec::with_capacity(count * dim);
        let mut block: Vec<Vec<f64>> = Vec::new();
        while directions.len() < count * dim {
            let mut row = gaussian();
            if origin.draw == Draw::Orthogonal {
                if block.len() == dim {
                    block.clear();
                }
                orthogonalise(&mut row, &block);
                let length = norm(&row);
                row.iter_mut().for_each(|x| *x /= length);
                block.push(row.clone());
                let length = norm(&gaussian());
                row.iter_mut().for_each(|x| *x *= length);
            }
            directions.extend(row.into_iter().map(|x| x as f32));
        }
        Ok(RandomFeatures::packed(directions.into(), dim, Some(origin)))
    }

    fn packed(directions: Arc<[f32]>, dim: usize, origin: Option<Origin>) -> RandomFeatures {
        let count = directions.len() / dim;
        let scale = (dim as f64).powf(-0.25);
        let scaled: Vec<f32> = directions.iter().map(|&x| (f64::from(x) * scale) as f32).collect();
        let (ahead, back) = layouts(count, dim);
        let [mut to_features, mut to_rows] = [ahead, back].map(|layout| vec![0.0; layout.floats()]);
        ahead.pack_transposed(&scaled, &mut to_features);
        back.pack(&scaled, dim, &mut to_rows);
        RandomFeatures { directions, dim, origin, ahead: to_features.into(), back: to_rows.into() }
    }
}

/// The layouts of the transposed directions and of the directions.
fn layouts(count: usize, dim: usize) -> (Layout, Layout) {
    (Layout::packed(dim, count, NARROW), Layout::packed(count, dim, NARROW))
}

fn check(count: usize, dim: usize) -> Result<()> {
    for (what, got) in [("number of random features", count), ("dim of random features", dim)] {
        if !(1..=MOST).contains(&got) {
            let (expected, got) = ("1 to 4096", got.to_string());
            return Err(Error::InvalidParameter { what, expected, got });
        }
    }
    Ok(())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

/// Takes from a row what lies in the directions of others, twice, so that roundings of the first time go too.
fn orthogonalise(row: &mut [f64], others: &[Vec<f64>]) {
    for _ in 0..2 {
        for other in others {
            let along = dot(row, other);
            row.iter_mut().zip(other).for_each(|(x, o)| *x -= along * o);
        }
    }
}

/// Maps of whole rows of queries and keys to features of another number.
#[derive(Debug, Clone, Copy)]
pub struct RowMaps<'a> {
    pub(super) features: &'a RandomFeatures,
    pub(super) query: ProductMap,
    pub(super) key: ProductMap,
}

impl RowMaps<'_> {
    fn of(&self, role: Role) -> ProductMap {
        match role {
            Role::Query => self.query,
            Role::Key => self.key,
        }
    }

    /// φ(x) of `tokens` rows, padded.
    pub(super) fn apply(
        &self,
        level: Level,
        role: Role,
        (x, tokens): (TokenRows<'_>, usize),
        to: &mut [f32],
    ) {
        let (count, dim) = (self.features.count(), self.features.dim);
        let to = &mut to[..tokens * padded(count)];
        let (layout, _) = layouts(count, dim);
        read(level, &self.features.ahead, layout, tokens, Read { by: x, out: to });
        map_products(level, self.of(role), count, x, dim, to);
    }

    /// dx from φ(x) and dφ, which becomes the gradient of products; all padded rows.
    pub(super) fn derive(
        &self,
        level: Level,
        role: Role,
        x: TokenRows<'_>,
        (mapped, gradient): (&[f32], &mut [f32]),
        (sums, d_x): (&mut [f32], &mut [f32]),
    ) {
        let (map, (count, dim)) = (self.of(role), (self.features.count(), self.features.dim));
        derive_products(level, map, mapped, gradient, sums);
        let (_, layout) = layouts(count, dim);
        let by = TokenRows { data: gradient, stride: padded(count) };
        read(level, &self.features.back, layout, sums.len(), Read { by, out: d_x });
        if map.norm != 0.0 {
            less_rows(level, 2.0 * map.norm, sums, x, dim, d_x);
        }
    }

    /// φ(x) in f64.
    pub(super) fn define(&self, role: Role, x: &[f64]) -> Vec<f64> {
        let map = self.of(role);
        let scale = (self.features.dim as f64).powf(-0.25);
        let rows = self.features.directions.chunks_exact(self.features.dim);
        let product = |row: &[f32]| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
        let products: Vec<f64> = rows.map(|row| product(row) * scale).collect();
        let largest = products.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let norm = if map.norm == 0.0 { 0.0 } else { scale * scale / 2.0 * dot(x, x) };
        let shift = norm + f64::from(map.shift) + if map.largest { largest } else { 0.0 };
        let factor = if map.exponential { (products.len() as f64).powf(-0.5) } else { 1.0 };
        let feature = |u: f64| match map.exponential {
            true => (u - shift).exp(),
            false => u.max(0.0),
        };
        products.iter().map(|&u| factor * (feature(u) + f64::from(map.epsilon))).collect()
    }
}
