//! Calls that do not fit are refused, and nothing is written.

use crate::layers::{FORMS, Layer};
use foveal::cache::codes::Bits;
use foveal::cache::{ContiguousCache, KvStore, LatentCache, LatentRows, QuantizedCache};
use foveal::latent::{LatentAttention, LatentCall, LatentDims, LatentScratch};
use foveal::projection::{Matrix, MatrixShape};
use foveal::{Attention, Error, Phase, Scale, Shape, Tensor, TensorRef, Workspace};

const DIMS: LatentDims = LatentDims { heads: 2, latent: 8, rope: 4, nope: 6, value: 5 };

#[test]
fn sizes_and_matrices() {
    let layer = Layer::new(DIMS, [1, 1, 1], 1);
    let refuse = |dims: LatentDims, rows: usize, columns: usize| {
        let numbers = vec![0.0; rows * columns];
        let shape = MatrixShape { out_features: rows, in_features: columns };
        let up = Matrix::from_floats(shape, &numbers).unwrap();
        LatentAttention::new(Attention::new(), dims, up).unwrap_err()
    };
    assert!(matches!(refuse(DIMS, 21, 8), Error::LengthMismatch { expected: 22, got: 21, .. }));
    assert!(matches!(refuse(DIMS, 22, 9), Error::LengthMismatch { expected: 8, got: 9, .. }));
    for dims in [
        LatentDims { latent: 0, ..DIMS },
        LatentDims { value: 0, ..DIMS },
        LatentDims { nope: 0, rope: 0, ..DIMS },
        LatentDims { latent: 4096, ..DIMS },
        LatentDims { nope: usize::MAX, ..DIMS },
    ] {
        assert!(matches!(refuse(dims, 0, 0), Error::InvalidParameter { .. }), "{dims:?}");
    }
    let infinite = Attention::new().scale(Scale::Value(f32::INFINITY));
    let refused = LatentAttention::new(infinite, DIMS, layer.matrix());
    assert!(matches!(refused, Err(Error::InvalidParameter { .. })));
}

#[test]
fn queries_outputs_and_stores() {
    let layer = Layer::new(DIMS, [1, 3, 7], 2);
    let own = LatentAttention::new(Attention::new(), DIMS, layer.matrix()).unwrap();
    let cache = layer.caches::<f32>().remove(0);
    let zeros = |shape| Tensor::<f32>::zeros(shape).unwrap();
    let shape = Shape { dim: DIMS.value, ..layer.q.shape() };
    let refuse = |q: &Tensor<f32>, stores: &[&dyn KvStore], out: Shape, lse: Shape| {
        let refused = FORMS.map(|form| {
            let (mut out, mut lse) = (zeros(out), zeros(lse));
            let outputs = (out.view_mut(), Some(lse.view_mut()));
            let call = LatentCall { q: q.view(), stores, phase: Phase::Prompt, form };
            let (mut scratch, mut workspace) = (LatentScratch::default(), Workspace::new());
            let refused = own.forward(call, outputs, &mut scratch, &mut workspace);
            assert!(out.as_slice().iter().all(|&x| x == 0.0));
            refused.unwrap_err()
        });
        let [plain, absorbed] = refused;
        assert_eq!(plain, absorbed);
        plain
    };
    let lse = shape.per_row();
    let mismatch = |error| matches!(error, Error::ShapeMismatch { .. });
    let wide = zeros(Shape { dim: 11, ..layer.q.shape() });
    assert!(mismatch(refuse(&wide, &[&cache], shape, lse)));
    assert!(mismatch(refuse(&layer.q, &[], shape, lse)));
    assert!(mismatch(refuse(&layer.q, &[&cache, &cache], shape, lse)));
    assert!(mismatch(refuse(&layer.q, &[&cache], Shape { dim: 6, ..shape }, lse)));
    assert!(mismatch(refuse(&layer.q, &[&cache], shape, Shape { seq: 2, ..lse })));
    for dims in [(12, 8), (13, 0)] {
        let other = ContiguousCache::<f32>::new(2, dims, 3).unwrap();
        assert!(mismatch(refuse(&layer.q, &[&other], shape, lse)));
    }
    let coded = QuantizedCache::new(Bits::Eight, 1, (12, 8), 3).unwrap();
    let refused = refuse(&layer.q, &[&coded], shape, lse);
    assert!(matches!(refused, Error::InvalidParameter { .. }));
}

#[test]
fn more_generated_rows_than_a_call_takes() {
    let layer = Layer::new(DIMS, [1, 65, 70], 3);
    let own = LatentAttention::new(Attention::new(), DIMS, layer.matrix()).unwrap();
    let cache = layer.caches::<f32>().remove(0);
    for form in FORMS {
        let mut out = Tensor::zeros(Shape { dim: DIMS.value, ..layer.q.shape() }).unwrap();
        let phase = Phase::Generated;
        let call = LatentCall { q: layer.q.view(), stores: &[&cache], phase, form };
        let (mut scratch, mut workspace) = (LatentScratch::default(), Workspace::new());
        let refused = own.forward(call, (out.view_mut(), None), &mut scratch, &mut workspace);
        assert_eq!(refused, Err(Error::TooManyRows { got: 65, limit: 64 }));
    }
}

#[test]
fn stores_that_hold_no_latent_rows() {
    let values = ContiguousCache::<f32>::new(1, (12, 8), 3).unwrap();
    let heads = ContiguousCache::<f32>::new(2, (12, 0), 3).unwrap();
    let narrow = ContiguousCache::<f32>::new(1, (7, 0), 3).unwrap();
    let coded = QuantizedCache::new(Bits::Four, 1, (12, 0), 3).unwrap();
    let stores: [&dyn KvStore; 4] = [&values, &heads, &narrow, &coded];
    for store in stores {
        let refused = LatentRows::new(store, 8);
        assert!(matches!(refused, Err(Error::InvalidParameter { .. })), "{store:?}");
    }
}

#[test]
fn a_cache_that_is_full_or_given_other_rows() {
    let mut cache = LatentCache::<f32>::new((8, 4), 2).unwrap();
    let numbers = [0.0f32; 39];
    let rows = |seq, dim| {
        TensorRef::new(&numbers[..seq * dim], Shape { batch: 1, seq, heads: 1, dim }).unwrap()
    };
    assert!(matches!(cache.append(rows(1, 13)), Err(Error::ShapeMismatch { .. })));
    cache.append(rows(1, 12)).unwrap();
    let full = Error::CacheFull { len: 1, capacity: 2, appended: 2 };
    assert_eq!(cache.append(rows(2, 12)), Err(full));
    cache.grow(3).unwrap();
    cache.append(rows(2, 12)).unwrap();
    assert_eq!((cache.end(), cache.room(), cache.capacity()), (3, 0, 3));
    cache.clear();
    assert_eq!((cache.end(), cache.room()), (0, 3));
    for dims in [(usize::MAX, 1), (usize::MAX / 2, usize::MAX / 2)] {
        assert!(matches!(LatentCache::<f32>::new(dims, 1), Err(Error::ShapeOverflow { .. })));
    }
}
