//! A contiguous cache against a list of tokens, through any sequence of appends, forgetting and clearing.

use crate::numbers::Numbers;
use arbitrary::Unstructured;
use foveal::cache::{ContiguousCache, KvRows, KvStore, TILE};
use foveal::{Element, Error, Shape, Tensor};
use half::f16;
use std::fmt::Debug;

/// What the cache should hold: the keys and values of one position, head after head.
struct Model {
    start: usize,
    tokens: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Model {
    fn end(&self) -> usize {
        self.start + self.tokens.len()
    }

    /// Whole tiles below `before` go.
    fn forget(&mut self, before: usize) {
        let start = (before.min(self.end()) / TILE * TILE).max(self.start);
        self.tokens.drain(..start - self.start);
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
        kv_heads: input.int_in_range(0..=3)?,
        key_dim: input.int_in_range(0..=5)?,
        value_dim: input.int_in_range(0..=5)?,
        capacity: input.int_in_range(0..=3 * TILE)?,
    };
    let Sizes { kv_heads, key_dim, value_dim, capacity } = sizes;
    let mut cache = ContiguousCache::<E>::new(kv_heads, (key_dim, value_dim), capacity)
        .expect("small sizes fit the address space");
    let mut model = Model { start: 0, tokens: vec![] };
    let mut numbers = Numbers::new(input.arbitrary()?);
    for _ in 0..32 {
        if input.is_empty() {
            break;
        }
        match input.int_in_range(0..=7)? {
            0 => {
                cache.clear();
                model = Model { start: 0, tokens: vec![] };
            }
            1 | 2 => {
                let before = match input.int_in_range(0..=7)? {
                    0 => usize::MAX,
                    _ => input.int_in_range(0..=model.end() + 2)?,
                };
                cache.forget(before);
                model.forget(before);
            }
            3 => append_misfit(&mut cache, sizes, input)?,
            _ => {
                let tokens = input.int_in_range(0..=TILE + 40)?;
                append(&mut cache, sizes, (&mut model, tokens), &mut numbers);
            }
        }
        assert_same(&cache, &model, sizes);
    }
    Ok(())
}

/// Appends if there is room, and is refused if not.
fn append<E: Element>(
    cache: &mut ContiguousCache<E>,
    sizes: Sizes,
    (model, tokens): (&mut Model, usize),
    numbers: &mut Numbers,
) {
    let mut tensor = |dim: usize| {
        let shape = Shape { batch: 1, seq: tokens, heads: sizes.kv_heads, dim };
        let data = (0..tokens * sizes.kv_heads * dim).map(|_| numbers.next()).collect();
        Tensor::<f32>::from_vec(data, shape).expect("as many numbers as the shape has")
    };
    let (keys, values) = (tensor(sizes.key_dim), tensor(sizes.value_dim));
    let room = sizes.capacity - model.tokens.len();
    assert_eq!(cache.room(), room);
    match cache.append(keys.view(), values.view()) {
        Ok(()) => assert!(tokens <= room),
        Err(Error::CacheFull { len, capacity, appended }) => {
            let expected = (model.tokens.len(), sizes.capacity, tokens);
            assert_eq!((len, capacity, appended), expected);
            assert!(tokens > room);
            return;
        }
        Err(error) => panic!("{error}"),
    }
    let stored = |tensor: &Tensor<f32>, t: usize, dim: usize| -> Vec<f32> {
        let row = &tensor.as_slice()[t * sizes.kv_heads * dim..(t + 1) * sizes.kv_heads * dim];
        row.iter().map(|&x| E::from_f32(x).to_f32()).collect()
    };
    for t in 0..tokens {
        model.tokens.push((stored(&keys, t, sizes.key_dim), stored(&values, t, sizes.value_dim)));
    }
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

fn assert_same<E: Element + Debug>(cache: &ContiguousCache<E>, model: &Model, sizes: Sizes) {
    assert_eq!((cache.start(), cache.end()), (model.start, model.end()));
    assert_eq!(cache.kv_heads(), sizes.kv_heads);
    assert_eq!(cache.dims(), (sizes.key_dim, sizes.value_dim));
    for head in 0..sizes.kv_heads {
        for first in (model.start..model.end()).step_by(TILE) {
            let positions = first..(first + TILE).min(model.end());
            let tile = cache.tile(head, positions.clone());
            for (n, position) in positions.enumerate() {
                let (keys, values) = &model.tokens[position - model.start];
                assert_row(tile.keys, n, of_head(keys, head, sizes.key_dim));
                assert_row(tile.values, n, of_head(values, head, sizes.value_dim));
            }
        }
    }
}

fn of_head(row: &[f32], head: usize, dim: usize) -> &[f32] {
    &row[head * dim..(head + 1) * dim]
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
