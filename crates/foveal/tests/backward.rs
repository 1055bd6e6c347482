//! Gradients of the engine against their definition in f64: shapes, masks, storage types, instructions.

mod support;

use foveal::mask::{Band, Documents};
use foveal::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use foveal::reference::Options;
use foveal::{Attention, Mask, Scale, Tensor, Workspace};
use half::bf16;
use support::backward::{Call, Wanted};
use support::sizes::{Sizes, masks, random_mask};
use support::{cpus, error};

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

#[test]
fn logits_of_ten_thousand() {
    let mut call = Call::<f32>::random(SMALL, 6);
    call.d_lse = None;
    let mask = Mask::causal();
    // |q · k| reaches about 16; one f32 logit near 10⁴ is off by up to 5e-4, and so is its weight.
    let scale = 700.0f32;
    let expected = call.define(&Options::new(f64::from(scale), &mask));
    for cpu in cpus() {
        let attention = Attention::new().mask(mask.clone()).cpu(cpu);
        let got = call.run(&attention.scale(Scale::Value(scale)));
        for (what, got, expected) in got.beside(&expected) {
            let worst = error(&got, expected);
            assert!(worst <= 2e-3, "{}: {what} off by {worst:e}", cpu.level);
        }
    }
}

#[test]
fn keys_may_be_stored_in_another_type_than_queries() {
    let sizes = Sizes { queries: 100, keys: 300, ..SMALL };
    let narrow = Call::<bf16>::random(sizes, 9);
    let wide = |x: &Tensor<bf16>| {
        Tensor::from_vec(x.as_slice().iter().map(|x| x.to_f32()).collect(), x.shape()).unwrap()
    };
    let same = Call {
        q: wide(&narrow.q),
        k: wide(&narrow.k),
        v: wide(&narrow.v),
        d_out: wide(&narrow.d_out),
        d_lse: None,
    };
    let attention = Attention::new().mask(Mask::causal());
    let forward = attention.forward(same.q.view(), same.k.view(), same.v.view()).unwrap();
    let expected = same.backward(&attention, &forward, Wanted::default());
    let plan = attention.plan(same.q.shape(), same.k.shape(), same.v.shape()).unwrap();
    let mut d_q = Tensor::<f32>::zeros(same.q.shape()).unwrap();
    let mut d_k = Tensor::<bf16>::zeros(same.k.shape()).unwrap();
    let mut d_v = Tensor::<bf16>::zeros(same.v.shape()).unwrap();
    plan.backward(
        Inputs { q: same.q.view(), k: narrow.k.view(), v: narrow.v.view() },
        Saved { out: forward.out.view(), lse: forward.lse.view() },
        Upstream { d_out: same.d_out.view(), d_lse: None },
        Gradients {
            d_q: d_q.view_mut(),
            d_k: d_k.view_mut(),
            d_v: d_v.view_mut(),
            terms: TermGradients::default(),
        },
        &mut Workspace::for_backward::<f32>(&plan),
    )
    .unwrap();
    assert_eq!(d_q.as_slice(), expected.d_q);
    let round = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
    assert_eq!(d_k.as_slice(), round(&expected.d_k));
    assert_eq!(d_v.as_slice(), round(&expected.d_v));
}

#[test]
fn the_short_form_gives_the_same() {
    let mut call = Call::<f32>::random(SMALL, 10);
    call.d_lse = None;
    let attention = Attention::new().mask(Mask::causal());
    let inputs = Inputs { q: call.q.view(), k: call.k.view(), v: call.v.view() };
    let forward = attention.forward(inputs.q, inputs.k, inputs.v).unwrap();
    let short = attention.backward(inputs, &forward, call.d_out.view()).unwrap();
    let expected = call.run(&attention);
    assert_eq!(short.d_q.as_slice(), expected.d_q);
    assert_eq!(short.d_k.as_slice(), expected.d_k);
    assert_eq!(short.d_v.as_slice(), expected.d_v);
}
