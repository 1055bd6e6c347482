//! A contiguous cache against a list of tokens, through any sequence of appends, forgetting and clearing.

use crate::numbers::Numbers;
use arbitrary::Unstructured;
use foveal::cache::{ContiguousCache, KvRows, KvStore, TILE};
use foveal::{Element, Error, Shape, Tensor};
use half::f16;
use std::fmt::Debug;

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

/// Operations on a cache of any sizes.
pub fn cache(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let _ = match input.ratio(1u8, 2u8) {
        Ok(true) => operate::<f16>(&mut input),
        _ => operate::<f32>(&mut input),
    };
}

fn operate<E: Element + Debug>(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let sizes = Sizes {
        kv_heads: input.int_in_range(0..=2)?,
        key_dim: input.int_in_range(0..=3)?,
        value_dim: input.int_in_range(0..=3)?,
        capacity: input.int_in_range(0..=3 * TILE)?,
    };
    let Sizes { kv_heads, key_dim, value_dim, capacity } = sizes;
    let mut cache = ContiguousCache::<E>::new(kv_heads, (key_dim, value_dim), capacity)
        .expect("small sizes fit the address space");
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
        assert_same(&cache, &model, changed);
    }
    assert_same(&cache, &model, model.start);
    Ok(())
}

/// Appends if there is room, and is refused if not.
fn append<E: Element>(
    cache: &mut ContiguousCache<E>,
    model: &mut Model,
    tokens: usize,
    numbers: &mut Numbers,
) {
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
    let rounded = |x: &f32| E::from_f32(*x).to_f32();
    model.keys.extend(keys.as_slice().iter().map(rounded));
    model.values.extend(values.as_slice().iter().map(rounded));
    model.end += tokens;
}

/// Tokens of other shapes are refused and change nothing.
fn append_misfit<E: Element>(
    cache: &mut ContiguousCache<E>,
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
fn assert_same<E: Element + Debug>(cache: &ContiguousCache<E>, model: &Model, from: usize) {
    let Sizes { kv_heads, key_dim, value_dim, .. } = model.sizes;
    assert_eq!((cache.start(), cache.end()), (model.start, model.end));
    assert_eq!((cache.kv_heads(), cache.dims()), (kv_heads, (key_dim, value_dim)));
    for head in 0..kv_heads {
        let mut first = from;
        while first < model.end {
            let positions = first..(first / TILE * TILE + TILE).min(model.end);
            let tile = cache.tile(head, positions.clone());
            for (n, position) in positions.enumerate() {
                let row = (position - model.start) * kv_heads + head;
                assert_row(tile.keys, n, &model.keys[row * key_dim..][..key_dim]);
                assert_row(tile.values, n, &model.values[row * value_dim..][..value_dim]);
            }
            first = first / TILE * TILE + TILE;
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
