//! Caches that are made again from what another one holds.

mod support;

use foveal::cache::codes::Bits;
use foveal::cache::{
    CodedTiles, ContiguousCache, KvKeys, KvRows, KvStore, KvValues, QuantizedCache, TILE, pieces,
};
use foveal::{Error, Shape, Tensor, TensorRef};
use half::bf16;
use support::{Random, tokens};

const HEADS: usize = 2;
const DIMS: (usize, usize) = (6, 70);

/// Keys and values of `count` tokens.
fn numbers(count: usize) -> [Tensor<f32>; 2] {
    let mut random = Random::new(7);
    let shape = Shape { batch: 1, seq: count, heads: HEADS, dim: DIMS.0 };
    [random.tensor(shape, 3.0), random.tensor(Shape { dim: DIMS.1, ..shape }, 3.0)]
}

/// What a store has of the positions from `from` on, all of them rows of bf16.
fn rows(store: &dyn KvStore, from: usize) -> [Vec<bf16>; 2] {
    let mut all = [vec![], vec![]];
    for head in 0..HEADS {
        let tile = store.tile(head, from..store.end());
        let (KvKeys::Rows(KvRows::Bf16(keys)), KvValues::Rows(KvRows::Bf16(values))) =
            (tile.keys, tile.values)
        else {
            panic!("no rows of bf16")
        };
        for n in 0..keys.count() {
            all[0].extend_from_slice(keys.row(n));
            all[1].extend_from_slice(values.row(n));
        }
    }
    all
}

/// The same as tokens of one sequence.
fn as_tokens(x: &[bf16], count: usize, dim: usize) -> TensorRef<'_, bf16> {
    let shape = Shape { batch: 1, seq: count, heads: HEADS, dim };
    let strides = foveal::Strides { batch: 0, seq: dim, heads: count * dim };
    TensorRef::from_strides(x, shape, strides).unwrap()
}

fn append(cache: &mut QuantizedCache, [k, v]: &[Tensor<f32>; 2], range: std::ops::Range<usize>) {
    for piece in pieces(range) {
        cache.append(tokens(k, piece.clone()), tokens(v, piece)).unwrap();
    }
}

fn same(a: &QuantizedCache, b: &QuantizedCache) {
    assert_eq!(
        (a.start(), a.end(), a.coded_positions()),
        (b.start(), b.end(), b.coded_positions())
    );
    let (x, y) = (a.coded_tiles(), b.coded_tiles());
    assert!(x.key_codes == y.key_codes && x.value_codes == y.value_codes);
    let bits = |ranges: &[half::f16]| ranges.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(x.key_ranges), bits(y.key_ranges));
    assert_eq!(bits(x.value_ranges), bits(y.value_ranges));
    let recent = a.coded_positions().end;
    assert_eq!(rows(a, recent), rows(b, recent));
}

#[test]
fn a_coded_cache_goes_on_as_if_it_had_never_stopped() {
    let numbers = numbers(6 * TILE);
    for bits in [Bits::Eight, Bits::Four] {
        for end in [0, 1, TILE, TILE + 1, 2 * TILE, 3 * TILE - 1, 3 * TILE, 4 * TILE + 9] {
            for forgotten in [0, TILE, 2 * TILE + 5] {
                let mut cache = QuantizedCache::new(bits, HEADS, DIMS, 6 * TILE).unwrap();
                append(&mut cache, &numbers, 0..end);
                cache.forget(forgotten.min(end));
                let mut again = QuantizedCache::new(bits, HEADS, DIMS, TILE).unwrap();
                again.append(tokens(&numbers[0], 0..9), tokens(&numbers[1], 0..9)).unwrap();
                again.restore(cache.coded_positions(), cache.coded_tiles()).unwrap();
                again.grow(6 * TILE).unwrap();
                let from = cache.coded_positions().end;
                let [keys, values] = rows(&cache, from);
                for piece in pieces(from..end) {
                    let part = piece.start - from..piece.end - from;
                    let k = as_tokens(&keys, end - from, DIMS.0).tokens(part.clone());
                    again.append(k, as_tokens(&values, end - from, DIMS.1).tokens(part)).unwrap();
                }
                same(&cache, &again);
                append(&mut cache, &numbers, end..6 * TILE);
                append(&mut again, &numbers, end..6 * TILE);
                same(&cache, &again);
            }
        }
    }
}

#[test]
fn codes_of_another_size_are_refused() {
    let mut cache = QuantizedCache::new(Bits::Eight, HEADS, DIMS, 4 * TILE).unwrap();
    append(&mut cache, &numbers(4 * TILE), 0..4 * TILE);
    let (positions, tiles) = (cache.coded_positions(), cache.coded_tiles());
    let mut other = QuantizedCache::new(Bits::Eight, HEADS, DIMS, 9).unwrap();
    other.append(tokens(&numbers(9)[0], 0..9), tokens(&numbers(9)[1], 0..9)).unwrap();
    let short = CodedTiles { value_codes: &tiles.value_codes[1..], ..tiles };
    let refused = other.restore(positions.clone(), short);
    assert!(matches!(refused, Err(Error::LengthMismatch { what: "codes of values", .. })));
    for positions in [positions.start..positions.end + TILE, 0..usize::MAX / TILE * TILE] {
        let refused = other.restore(positions, tiles);
        assert!(matches!(refused, Err(Error::LengthMismatch { .. })), "{refused:?}");
    }
    for positions in [1..positions.end + 1, 0..positions.end - 1] {
        let refused = other.restore(positions, tiles);
        assert!(matches!(refused, Err(Error::InvalidParameter { .. })), "{refused:?}");
    }
    assert_eq!((other.start(), other.end()), (0, 9));
}

#[test]
fn a_text_may_be_taken_up_in_the_middle() {
    let mut cache = ContiguousCache::<f32>::new(HEADS, DIMS, 9).unwrap();
    let numbers = numbers(9);
    cache.append(tokens(&numbers[0], 0..9), tokens(&numbers[1], 0..9)).unwrap();
    assert!(matches!(cache.clear_to(TILE - 1), Err(Error::InvalidParameter { .. })));
    assert_eq!((cache.start(), cache.end()), (0, 9));
    cache.clear_to(3 * TILE).unwrap();
    assert_eq!((cache.start(), cache.end(), cache.room()), (3 * TILE, 3 * TILE, 9));
    cache.append(tokens(&numbers[0], 3..5), tokens(&numbers[1], 3..5)).unwrap();
    let KvKeys::Rows(KvRows::F32(rows)) = cache.tile(1, 3 * TILE..3 * TILE + 2).keys else {
        panic!("stored as f32")
    };
    assert_eq!(rows.row(1), numbers[0].view().row(0, 4, 1));
}
