//! Gradients of the engine against their definition in f64: shapes, masks, storage types, instructions.

mod support;

use foveal::mask::{Band, Dense, Documents, Extent};
use foveal::reference::Options;
use foveal::{Attention, Element, Mask, Scale, Tensor};
use half::{bf16, f16};
use support::backward::{Call, Sizes};
use support::{Random, cpus, error};

/// Every level against the definition.
fn check(sizes: Sizes, mask: &Mask, bound: f64) {
    let call = Call::<f32>::random(sizes, sizes.queries as u64 * 31 + sizes.keys as u64);
    let expected = call.define(&Options::new(1.0 / (sizes.dim as f64).sqrt(), mask));
    for cpu in cpus() {
        let got = call.run(&Attention::new().mask(mask.clone()).cpu(cpu));
        for (what, got, expected) in got.beside(&expected) {
            let worst = error(&got, expected);
            assert!(worst <= bound, "{sizes:?} {mask} {}: {what} off by {worst:e}", cpu.level);
        }
    }
}

fn random_mask(sizes: Sizes, seed: u64) -> Mask {
    let mut random = Random::new(seed);
    let Sizes { batch, queries, keys, heads, .. } = sizes;
    let extent = Extent { batch, heads, queries, keys };
    // A third of the rows sees nothing, a third half, a third nearly everything.
    let visible: Vec<bool> = (0..batch * heads * queries)
        .flat_map(|row| {
            let mut bits: Vec<bool> = (0..keys).map(|_| random.below(8) > row % 3 * 4).collect();
            if row % 3 == 1 {
                bits.fill(false);
            }
            bits
        })
        .collect();
    Dense::new(&visible, extent).unwrap().into()
}

fn masks(sizes: Sizes) -> Vec<Mask> {
    vec![
        Mask::full(),
        Mask::causal(),
        Mask::window(1),
        Mask::window(3),
        Mask::window(0),
        Mask::band(Some(2), Some(1)),
        Mask::band(None, Some(3)).and(Mask::window(2).or(Mask::band(Some(90), Some(0)))),
        random_mask(sizes, 7),
    ]
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
                check(sizes, &mask, 3e-6);
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
        (95, 255),
        (96, 256),
        (97, 257),
        (288, 512),
        (289, 300),
        (13, 700),
        (600, 40),
    ]
    .iter()
    .enumerate()
    {
        let dim = [64, 80, 128, 40, 15, 96, 72, 32, 1, 257][n];
        let value_dim = [64, 48, 128, 80, 130, 96, 257, 1, 33, 16][n];
        let (heads, kv_heads) = [(4, 2), (1, 1), (3, 1), (2, 2)][n % 4];
        let sizes = Sizes { batch: 1, queries, keys, heads, kv_heads, dim, value_dim };
        for mask in [
            Mask::full(),
            Mask::causal(),
            Mask::window(37),
            Mask::window(200),
            Mask::band(Some(70), Some(70)),
            random_mask(sizes, 3),
        ] {
            check(sizes, &mask, 3e-6);
        }
    }
}

#[test]
fn packed_documents_do_not_see_each_other() {
    let starts = [0, 3, 3, 70, 200, 201];
    let sizes =
        Sizes { batch: 1, queries: 201, keys: 201, heads: 2, kv_heads: 1, dim: 16, value_dim: 16 };
    check(sizes, &Mask::documents(&starts).unwrap(), 3e-6);
    check(sizes, &Mask::documents(&starts).unwrap().and(Mask::causal()), 3e-6);
    let causal = Band { behind: None, ahead: Some(0) };
    let cross = Documents::new(&[0, 5, 5, 40], &[0, 9, 30, 61]).unwrap().within(causal);
    check(Sizes { queries: 40, keys: 61, ..sizes }, &cross.into(), 3e-6);
}

const SMALL: Sizes =
    Sizes { batch: 1, queries: 9, keys: 70, heads: 2, kv_heads: 1, dim: 8, value_dim: 8 };

#[test]
fn any_scale() {
    let call = Call::<f32>::random(SMALL, 5);
    for scale in [1.0f32, -0.7, 0.0, 3e3] {
        let mask = Mask::causal();
        let expected = call.define(&Options::new(f64::from(scale), &mask));
        for cpu in cpus() {
            let attention = Attention::new().mask(mask.clone()).cpu(cpu);
            let got = call.run(&attention.scale(Scale::Value(scale)));
            for (what, got, expected) in got.beside(&expected) {
                let bound = 2e-6 * f64::from(scale.abs()).max(1.0);
                let worst = error(&got, expected);
                assert!(worst <= bound, "{scale} {}: {what} off by {worst:e}", cpu.level);
            }
        }
    }
}
