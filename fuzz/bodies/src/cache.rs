//! Caches against a list of tokens, through any sequence of appends, forgetting and clearing.

use crate::numbers::Numbers;
use crate::pool::pool;
use arbitrary::Unstructured;
use foveal::cache::codes::{Bits, ChannelCodes, GROUP, Scaling, TokenCodes};
use foveal::cache::{ContiguousCache, KvKeys, KvRows, KvStore, KvValues, QuantizedCache, TILE};
use foveal::{Element, Error, Shape, Tensor, TensorRef};
use half::{bf16, f16};

/// What the cache should hold: keys and values, position after position, each head after head.
struct Model {
    sizes: Sizes,
    start: usize,
    end: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Model {
    fn new(sizes: Sizes) -> Model {
        Model { sizes, start: 0, end: 0, keys: vec![], values: vec![] }
    }

    fn held(&self) -> usize {
        self.end - self.start
    }

    /// Whole tiles below `before` go.
    fn forget(&mut self, before: usize) {
        let start = (before.min(self.end) / TILE * TILE).max(self.start);
        let gone = (start - self.start) * self.sizes.kv_heads;
        self.keys.drain(..gone * self.sizes.key_dim);
        self.values.drain(..gone * self.sizes.value_dim);
        self.start = start;
    }
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    capacity: usize,
}

/// What every cache can do.
trait Cache: KvStore {
    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> Result<(), Error>;
    fn forget(&mut self, before: usize);
    fn clear(&mut self);
    fn room(&self) -> usize;
    /// What a number is rounded to when it is appended.
    fn rounded(x: f32) -> f32;
}

macro_rules! cache {
    ($type:ty, $element:ty) => {
        impl Cache for $type {
            fn append(
                &mut self,
                k: TensorRef<'_, f32>,
                v: TensorRef<'_, f32>,
            ) -> Result<(), Error> {
                <$type>::append(self, k, v)
            }
            fn forget(&mut self, before: usize) {
                <$type>::forget(self, before);
            }
            fn clear(&mut self) {
                <$type>::clear(self);
            }
            fn room(&self) -> usize {
                <$type>::room(self)
            }
            fn rounded(x: f32) -> f32 {
                <$element>::from_f32(x).to_f32()
            }
        }
    };
}
cache!(ContiguousCache<f32>, f32);
cache!(ContiguousCache<f16>, f16);
cache!(QuantizedCache, bf16);

/// Operations on a cache of any sizes.
pub fn cache(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let _ = operate(&mut input);
}

fn operate(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let kind = input.int_in_range(0..=7)?;
    if kind > 5 {
        return pool(input);
    }
    let sizes = Sizes {
        kv_heads: input.int_in_range(0..=2)?,
        key_dim: input.int_in_range(0..=3)?,
        value_dim: input.int_in_range(0..=3)?,
        capacity: input.int_in_range(0..=5 * TILE)?,
    };
    let Sizes { kv_heads, key_dim, value_dim, capacity } = sizes;
    let dims = (key_dim, value_dim);
    let fits = "small sizes fit the address space";
    let codes = |bits| QuantizedCache::new(bits, kv_heads, dims, capacity).expect(fits);
    match kind {
        0 => {
            let cache = ContiguousCache::<f32>::new(kv_heads, dims, capacity).expect(fits);
            through(cache, None, sizes, input)
        }
        1 => {
            let cache = ContiguousCache::<f16>::new(kv_heads, dims, capacity).expect(fits);
            through(cache, None, sizes, input)
        }
        2 | 3 => through(codes(Bits::Four), Some(Bits::Four), sizes, input),
        _ => through(codes(Bits::Eight), Some(Bits::Eight), sizes, input),
    }
}

fn through<C: Cache>(
    mut cache: C,
    bits: Option<Bits>,
    sizes: Sizes,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<()> {
    let mut model = Model::new(sizes);
    let mut numbers = Numbers::new(input.arbitrary()?);
    for _ in 0..32 {
        if input.is_empty() {
            break;
        }
        // Of the positions held before, none changes but by forgetting.
        let mut changed = model.end;
        match input.int_in_range(0..=7)? {
            0 => {
                cache.clear();
                model = Model::new(sizes);
            }
            1 | 2 => {
                let before = match input.int_in_range(0..=7)? {
                    0 => usize::MAX,
                    _ => input.int_in_range(0..=model.end + 2)?,
                };
                cache.forget(before);
                model.forget(before);
                changed = model.start;
            }
            3 => append_misfit(&mut cache, sizes, input)?,
            _ => {
                let tokens = input.int_in_range(0..=TILE + 40)?;
                append(&mut cache, &mut model, tokens, &mut numbers);
            }
        }
        assert_same(&cache, bits, &model, changed);
    }
    assert_same(&cache, bits, &model, model.start);
    Ok(())
}

/// Appends if there is room, and is refused if not.
fn append<C: Cache>(cache: &mut C, model: &mut Model, tokens: usize, numbers: &mut Numbers) {
    let sizes = model.sizes;
    let mut tensor = |dim: usize| {
        let shape = Shape { batch: 1, seq: tokens, heads: sizes.kv_heads, dim };
        let data = (0..tokens * sizes.kv_heads * dim).map(|_| numbers.next()).collect();
        Tensor::<f32>::from_vec(data, shape).expect("as many numbers as the shape has")
    };
    let (keys, values) = (tensor(sizes.key_dim), tensor(sizes.value_dim));
    let room = sizes.capacity - model.held();
    assert_eq!(cache.room(), room);
    match cache.append(keys.view(), values.view()) {
        Ok(()) => assert!(tokens <= room),
        Err(Error::CacheFull { len, capacity, appended }) => {
            assert_eq!((len, capacity, appended), (model.held(), sizes.capacity, tokens));
            return assert!(tokens > room);
        }
        Err(error) => panic!("{error}"),
    }
    let rounded = |x: &f32| C::rounded(*x);
    model.keys.extend(keys.as_slice().iter().map(rounded));
    model.values.extend(values.as_slice().iter().map(rounded));
    model.end += tokens;
}

/// Tokens of other shapes are refused and change nothing.
fn append_misfit<C: Cache>(
    cache: &mut C,
    sizes: Sizes,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<()> {
    let mut shape = |dim| -> arbitrary::Result<Shape> {
        Ok(Shape {
            batch: input.int_in_range(0..=2)?,
            seq: input.int_in_range(0..=2)?,
            heads: input.int_in_range(0..=4)?,
            dim: if input.ratio(1u8, 4u8)? { dim + 1 } else { dim },
        })
    };
    let (k, v) = (shape(sizes.key_dim)?, shape(sizes.value_dim)?);
    let fitting = |dim| Shape { batch: 1, seq: k.seq, heads: sizes.kv_heads, dim };
    if (k, v) == (fitting(sizes.key_dim), fitting(sizes.value_dim)) {
        return Ok(());
    }
    let tensor = |shape| Tensor::<f32>::zeros(shape).expect("a small shape");
    let refused = cache.append(tensor(k).view(), tensor(v).view());
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })), "{refused:?}");
    Ok(())
}

/// The positions from `from` on hold what they should.
fn assert_same<C: Cache>(cache: &C, bits: Option<Bits>, model: &Model, from: usize) {
    let Sizes { kv_heads, key_dim, value_dim, .. } = model.sizes;
    assert_eq!((cache.start(), cache.end()), (model.start, model.end));
    assert_eq!((cache.kv_heads(), cache.dims()), (kv_heads, (key_dim, value_dim)));
    let newest = model.end.saturating_sub(1) / TILE * TILE;
    for head in 0..kv_heads {
        let mut first = from;
        while first < model.end {
            let start = first / TILE * TILE;
            let coded = bits.is_some() && start + 2 * TILE <= newest;
            let whole = if coded { start } else { first };
            let positions = whole..(start + TILE).min(model.end);
            let tile = cache.tile(head, positions.clone());
            let key = |position: usize| {
                let row = (position - model.start) * kv_heads + head;
                &model.keys[row * key_dim..][..key_dim]
            };
            let value = |position: usize| {
                let row = (position - model.start) * kv_heads + head;
                &model.values[row * value_dim..][..value_dim]
            };
            match (tile.keys, tile.values, bits.filter(|_| coded)) {
                (KvKeys::Channels(keys), KvValues::Tokens(values), Some(bits)) => {
                    let bits = bits.count() as u32;
                    assert_keys(&keys, bits, |t| key(start + t));
                    assert_values(&values, bits, |t| value(start + t));
                }
                (KvKeys::Rows(keys), KvValues::Rows(values), None) => {
                    for (n, position) in positions.enumerate() {
                        assert_row(keys, n, key(position));
                        assert_row(values, n, value(position));
                    }
                }
                other => panic!("coded: {coded}, found {other:?}"),
            }
            first = start + TILE;
        }
    }
}

/// What the code of a number of a group stands for.
fn decoded(group: &[f32], x: f32, bits: u32) -> f32 {
    let (min, max) =
        (group.iter().copied().reduce(f32::min), group.iter().copied().reduce(f32::max));
    let (min, max) = min.zip(max).expect("a group has numbers");
    let scaling = Scaling::between(min, max, bits).expect("small numbers in order");
    scaling.number(scaling.code(x, bits))
}

fn assert_keys<'a>(keys: &ChannelCodes<'_>, bits: u32, key: impl Fn(usize) -> &'a [f32]) {
    for (first, c) in (0..TILE).step_by(GROUP).flat_map(|t| (0..keys.width()).map(move |c| (t, c)))
    {
        let group: Vec<f32> = (first..first + GROUP).map(|t| key(t)[c]).collect();
        for (n, &x) in group.iter().enumerate() {
            assert_eq!(keys.number(first + n, c), decoded(&group, x, bits));
        }
    }
}

/// There are fewer channels than a group has.
fn assert_values<'a>(values: &TokenCodes<'_>, bits: u32, value: impl Fn(usize) -> &'a [f32]) {
    for t in 0..TILE {
        for (c, &x) in value(t).iter().enumerate() {
            assert_eq!(values.number(t, c), decoded(value(t), x, bits));
        }
    }
}

fn assert_row(rows: KvRows<'_>, n: usize, expected: &[f32]) {
    fn same<E: Element>(row: &[E], expected: &[f32]) {
        assert!(row.iter().map(|x| x.to_f32()).eq(expected.iter().copied()), "{expected:?}");
    }
    match rows {
        KvRows::F32(rows) => same(rows.row(n), expected),
        KvRows::F16(rows) => same(rows.row(n), expected),
        KvRows::Bf16(rows) => same(rows.row(n), expected),
        other => panic!("rows of an unknown type: {other:?}"),
    }
}
