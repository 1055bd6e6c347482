//! The engine against its definition in f64: shapes, masks, storage types, instructions, threads.

mod support;

use foveal::mask::{Band, Documents};
use foveal::{Attention, Element, Mask, Scale};
use half::{bf16, f16};
use support::sizes::{Sizes, masks, random_mask};
use support::{cpus, error, reference};

/// Both kernels on every level against the definition.
fn check<E: Element>(sizes: Sizes, mask: &Mask, bound: f64) {
    let (q, k, v) = sizes.tensors::<E>(sizes.queries as u64 * 31 + sizes.keys as u64);
    let scale = 1.0 / (sizes.dim as f64).sqrt();
    let (out, lse) = reference((&q, &k, &v), mask, scale);
    for cpu in cpus() {
        let attention = Attention::new().mask(mask.clone()).cpu(cpu);
        let prompt = attention.forward(q.view(), k.view(), v.view()).unwrap();
        let mut results = vec![prompt];
        if sizes.queries <= 64 {
            results.push(attention.decode(q.view(), k.view(), v.view()).unwrap());
        }
        for (phase, result) in results.iter().enumerate() {
            let got: Vec<f32> = result.out.as_slice().iter().map(|x| x.to_f32()).collect();
            let what = format!("{sizes:?} {mask} {} phase {phase}", cpu.level);
            let worst = error(&got, &out);
            assert!(worst <= bound, "{what}: output off by {worst:e}");
            let worst = error(result.lse.as_slice(), &lse);
            assert!(worst <= 2e-6, "{what}: log-sum-exp off by {worst:e}");
        }
    }
}

#[test]
fn all_small_shapes() {
    for queries in 0..=9 {
        for keys in 0..=9 {
            let dim = [1, 2, 3, 7, 8, 9, 16, 17, 31, 33][(queries * 3 + keys) % 10];
            let (heads, kv_heads) = [(1, 1), (2, 1), (2, 2), (6, 3), (6, 2)][(queries + keys) % 5];
            let value_dim = [1, 5, 16, 17, 40][(queries + 2 * keys) % 5];
            let sizes = Sizes { batch: 2, queries, keys, heads, kv_heads, dim, value_dim };
            for mask in masks(sizes) {
                check::<f32>(sizes, &mask, 2e-6);
            }
        }
    }
}

#[test]
fn shapes_around_every_block_size() {
    for (n, &(queries, keys)) in [
        (5, 63),
        (6, 64),
        (7, 65),
        (47, 255),
        (48, 256),
        (49, 257),
        (64, 512),
        (97, 300),
        (13, 1100),
    ]
    .iter()
    .enumerate()
    {
        let dim = [64, 80, 128, 40, 15, 96, 256, 32, 1][n];
        let value_dim = [64, 48, 128, 80, 130, 96, 256, 1, 33][n];
        let (heads, kv_heads) = [(4, 2), (1, 1), (3, 1), (4, 4)][n % 4];
        let sizes = Sizes { batch: 1, queries, keys, heads, kv_heads, dim, value_dim };
        for mask in [
            Mask::full(),
            Mask::causal(),
            Mask::window(37),
            Mask::window(200),
            Mask::band(Some(70), Some(70)),
            random_mask(sizes, 3),
        ] {
            check::<f32>(sizes, &mask, 3e-6);
        }
    }
}

#[test]
fn many_heads_of_one_key() {
    for (n, &(queries, keys)) in
        [(1, 300), (2, 5), (3, 257), (5, 64), (64, 290), (0, 3), (3, 0)].iter().enumerate()
    {
        let (heads, kv_heads) = [(12, 1), (24, 2), (32, 1), (13, 1)][n % 4];
        let (dim, value_dim) = [(64, 128), (33, 17), (7, 48), (128, 5)][n % 4];
        let sizes = Sizes { batch: 2, queries, keys, heads, kv_heads, dim, value_dim };
        for mask in masks(sizes) {
            check::<f32>(sizes, &mask, 3e-6);
        }
    }
}

#[test]
fn sixteen_bit_storage_errs_by_its_last_rounding() {
    let sizes =
        Sizes { batch: 1, queries: 33, keys: 290, heads: 4, kv_heads: 2, dim: 72, value_dim: 40 };
    for mask in [Mask::full(), Mask::causal()] {
        check::<f16>(sizes, &mask, 5e-4);
        check::<bf16>(sizes, &mask, 4e-3);
    }
}

#[test]
fn packed_documents_do_not_see_each_other() {
    let starts = [0, 3, 3, 70, 200, 201];
    let sizes =
        Sizes { batch: 1, queries: 201, keys: 201, heads: 2, kv_heads: 1, dim: 16, value_dim: 16 };
    check::<f32>(sizes, &Mask::documents(&starts).unwrap(), 2e-6);
    check::<f32>(sizes, &Mask::documents(&starts).unwrap().and(Mask::causal()), 2e-6);
    let causal = Band { behind: None, ahead: Some(0) };
    let cross = Documents::new(&[0, 5, 5, 40], &[0, 9, 30, 61]).unwrap().within(causal);
    check::<f32>(Sizes { queries: 40, keys: 61, ..sizes }, &cross.into(), 2e-6);
}

#[test]
fn any_scale() {
    let sizes =
        Sizes { batch: 1, queries: 9, keys: 70, heads: 2, kv_heads: 1, dim: 8, value_dim: 8 };
    let (q, k, v) = sizes.tensors::<f32>(5);
    for scale in [1.0f32, -0.7, 0.0, 3e3] {
        let (out, lse) = reference((&q, &k, &v), &Mask::causal(), f64::from(scale));
        for cpu in cpus() {
            let attention =
                Attention::new().mask(Mask::causal()).scale(Scale::Value(scale)).cpu(cpu);
            for result in [
                attention.forward(q.view(), k.view(), v.view()).unwrap(),
                attention.decode(q.view(), k.view(), v.view()).unwrap(),
            ] {
                let bound = 2e-6 * f64::from(scale.abs()).max(1.0);
                assert!(error(result.out.as_slice(), &out) <= bound, "{scale} {}", cpu.level);
                assert!(error(result.lse.as_slice(), &lse) <= bound, "{scale} {}", cpu.level);
            }
        }
    }
    assert!(
        Attention::new()
            .scale(Scale::Value(f32::NAN))
            .plan(q.shape(), k.shape(), v.shape())
            .is_err()
    );
}
