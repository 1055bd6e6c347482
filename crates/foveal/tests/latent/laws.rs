//! What a row's bits may not depend on, and what may not reach it.

use crate::layers::{Answer, FORMS, Layer, PHASES, attention};
use crate::support::{cpus, error, tokens};
use foveal::cache::{KvStore, LatentCache, LatentRows, PagePool};
use foveal::latent::{LatentAttention, LatentCall, LatentDims, LatentForm, LatentScratch};
use foveal::{Attention, Cpu, Element, Mask, Phase, Shape, Tensor, Threads, Workspace};
use half::bf16;
use std::num::NonZeroUsize;

const DIMS: LatentDims = LatentDims { heads: 6, latent: 40, rope: 8, nope: 20, value: 24 };

fn ways() -> impl Iterator<Item = (LatentForm, Phase)> {
    FORMS.into_iter().flat_map(|form| PHASES.map(|phase| (form, phase)))
}

#[test]
fn threads() {
    let layer = Layer::new(DIMS, [2, 60, 700], 1);
    for (Cpu { level, .. }, way) in cpus().flat_map(|cpu| ways().map(move |way| (cpu, way))) {
        let run = |n: usize| {
            let threads = Threads::at_most(NonZeroUsize::new(n).unwrap());
            layer.run::<f32>(attention(Mask::causal(), Cpu { level, threads }), way).bits()
        };
        let one = run(1);
        for n in [2, 3, 8] {
            assert!(run(n) == one, "{level} {way:?}, {n} threads");
        }
    }
}

#[test]
fn many_heads_on_many_threads() {
    // So large that the projections of heads are shared out.
    let dims = LatentDims { heads: 12, latent: 256, rope: 4, nope: 64, value: 64 };
    let layer = Layer::new(dims, [1, 40, 100], 2);
    for (Cpu { level, .. }, way) in cpus().flat_map(|cpu| ways().map(move |way| (cpu, way))) {
        let run = |n: usize| {
            let threads = Threads::at_most(NonZeroUsize::new(n).unwrap());
            layer.run::<f32>(attention(Mask::causal(), Cpu { level, threads }), way).bits()
        };
        assert!(run(1) == run(2), "{level} {way:?}");
    }
}

/// The rows of one sequence of an answer.
fn part(answer: &Answer, batch: usize, of: usize) -> Vec<u32> {
    let (out, lse) = (answer.out.len() / of, answer.lse.len() / of);
    let sequence = Answer {
        out: answer.out[batch * out..(batch + 1) * out].to_vec(),
        lse: answer.lse[batch * lse..(batch + 1) * lse].to_vec(),
    };
    sequence.bits()
}

#[test]
fn the_rest_of_the_batch() {
    let layer = Layer::new(DIMS, [3, 5, 300], 3);
    for (cpu, way) in cpus().flat_map(|cpu| ways().map(move |way| (cpu, way))) {
        let together = layer.run::<f32>(attention(Mask::causal(), cpu), way);
        for batch in 0..layer.batch() {
            let alone = layer.sequence(batch).run::<f32>(attention(Mask::causal(), cpu), way);
            assert!(part(&together, batch, 3) == alone.bits(), "{} {way:?}", cpu.level);
        }
    }
}

#[test]
fn a_batch_beyond_the_rows_of_one_projection() {
    let dims = LatentDims { heads: 2, latent: 16, rope: 4, nope: 6, value: 5 };
    let layer = Layer::new(dims, [70, 1, 9], 4);
    for (cpu, way) in cpus().flat_map(|cpu| ways().map(move |way| (cpu, way))) {
        let together = layer.run::<f32>(attention(Mask::causal(), cpu), way);
        for batch in [0, 63, 64, 69] {
            let alone = layer.sequence(batch).run::<f32>(attention(Mask::causal(), cpu), way);
            assert!(part(&together, batch, 70) == alone.bits(), "{} {way:?}", cpu.level);
        }
    }
}

/// One sequence whose tokens come in pieces, each attending to the rows so far.
fn in_pieces(
    layer: &Layer,
    cuts: &[usize],
    attention: &Attention<'_>,
    way: (LatentForm, Phase),
) -> Vec<u32> {
    let mut cache = LatentCache::<f32>::new((layer.dims.latent, layer.dims.rope), 1024).unwrap();
    let (mut scratch, mut workspace) = (LatentScratch::default(), Workspace::new());
    let own = LatentAttention::new(attention.clone(), layer.dims, layer.matrix()).unwrap();
    let mut bits = vec![];
    for cut in cuts.windows(2) {
        let piece = cut[0]..cut[1];
        cache.append(tokens(&layer.rows, piece.clone())).unwrap();
        let q = tokens(&layer.q, piece);
        let shape = Shape { dim: layer.dims.value, ..q.shape() };
        let mut out = vec![f32::NAN; shape.checked_len().unwrap()];
        let to = foveal::TensorMut::new(&mut out, shape).unwrap();
        let call = LatentCall { q, stores: &[&cache], phase: way.1, form: way.0 };
        own.forward(call, (to, None), &mut scratch, &mut workspace).unwrap();
        bits.extend(out.iter().map(|x| x.to_bits()));
        scratch.poison();
        workspace.poison();
    }
    bits
}

#[test]
fn how_a_prompt_is_cut() {
    let layer = Layer::new(DIMS, [1, 600, 600], 5);
    for (cpu, form) in cpus().flat_map(|cpu| FORMS.map(|form| (cpu, form))) {
        for mask in [Mask::causal(), Mask::window(130)] {
            let attention = attention(mask, cpu);
            let way = (form, Phase::Prompt);
            let whole = in_pieces(&layer, &[0, 600], &attention, way);
            for cuts in [&[0, 1, 600][..], &[0, 255, 257, 513, 600], &[0, 48, 350, 599, 600]] {
                let cut = in_pieces(&layer, cuts, &attention, way);
                assert!(cut == whole, "{} {form:?} {cuts:?}", cpu.level);
            }
        }
    }
}

#[test]
fn how_many_generated_rows_share_a_call() {
    let layer = Layer::new(DIMS, [1, 530, 530], 6);
    for (cpu, form) in cpus().flat_map(|cpu| FORMS.map(|form| (cpu, form))) {
        let attention = attention(Mask::causal(), cpu);
        let cuts = |step: usize| {
            let mut cuts: Vec<usize> = (500..530).step_by(step).chain([530]).collect();
            // All before comes in calls of 50.
            cuts.splice(0..0, (0..500).step_by(50));
            cuts
        };
        let way = (form, Phase::Generated);
        let one = in_pieces(&layer, &cuts(1), &attention, way);
        for step in [2, 7, 30] {
            assert!(
                in_pieces(&layer, &cuts(step), &attention, way) == one,
                "{} {form:?}",
                cpu.level
            );
        }
    }
}

#[test]
fn how_many_heads_are_made_together() {
    // 2040 numbers a head and token, of which 16 MiB hold those of three heads of 600 tokens.
    let dims = LatentDims { heads: 5, latent: 4, rope: 8, nope: 1008, value: 1024 };
    let layer = Layer::new(dims, [1, 2, 600], 7);
    // One head's matrix and queries alone.
    let alone = |head: usize| {
        let bytes = layer.up.len() / dims.heads;
        let q: Vec<f32> = (0..2).flat_map(|t| layer.q.view().row(0, t, head).to_vec()).collect();
        let q = Tensor::from_vec(q, Shape { heads: 1, ..layer.q.shape() }).unwrap();
        let up = layer.up[head * bytes..(head + 1) * bytes].to_vec();
        Layer { dims: LatentDims { heads: 1, ..dims }, up, q, ..layer.clone() }
    };
    let expected = layer.reference::<f32>(&Mask::causal());
    for cpu in cpus() {
        let way = (LatentForm::Plain, Phase::Prompt);
        let together = layer.run::<f32>(attention(Mask::causal(), cpu), way);
        assert!(error(&together.out, &expected.out) <= 5e-6);
        for head in 0..dims.heads {
            let one = alone(head).run::<f32>(attention(Mask::causal(), cpu), way);
            let of_head: Vec<f32> = (0..2)
                .flat_map(|t| {
                    together.out[(t * dims.heads + head) * dims.value..][..dims.value].to_vec()
                })
                .collect();
            assert!(of_head == one.out, "{} head {head}", cpu.level);
        }
    }
}

#[test]
fn a_mask_and_terms_of_each_head() {
    let layer = Layer::new(LatentDims { heads: 3, ..DIMS }, [1, 6, 40], 8);
    let masks = [Mask::window(3), Mask::causal(), Mask::window(20)];
    let mask = Mask::per_head(masks.to_vec());
    let expected = layer.reference::<f32>(&mask);
    let sinks = [0.3f32, -1.0, 2.0];
    for (cpu, way) in cpus().flat_map(|cpu| ways().map(move |way| (cpu, way))) {
        let got = layer.run::<f32>(attention(mask.clone(), cpu), way);
        assert!(error(&got.out, &expected.out) <= 3e-6, "{way:?}");
        // A sink adds its weight to the sum of each row.
        let with = layer.run::<f32>(attention(mask.clone(), cpu).sinks(&sinks), way);
        let sunk: Vec<f64> = expected
            .lse
            .iter()
            .enumerate()
            .map(|(n, lse)| (lse.exp() + f64::from(sinks[n % 3]).exp()).ln())
            .collect();
        assert!(error(&with.lse, &sunk) <= 3e-6, "{way:?}");
    }
}

/// Pages of a pool have the bits of a cache.
fn pages<E: Element>() {
    let layer = Layer::new(DIMS, [1, 3, 700], 9);
    let pool = PagePool::<E>::new(1, (DIMS.row(), 0), 3).unwrap();
    let mut store = pool.create();
    let none = Tensor::<f32>::zeros(Shape { dim: 0, ..layer.rows.shape() }).unwrap();
    store.append(layer.rows.view(), none.view()).unwrap();
    assert_eq!(pool.bytes_per_token(), DIMS.row() * E::DTYPE.size());
    let paged = LatentRows::new(&store, DIMS.latent).unwrap();
    for (cpu, way) in cpus().flat_map(|cpu| ways().map(move |way| (cpu, way))) {
        let got = layer.over(attention(Mask::causal(), cpu), &[&paged], way);
        let expected = layer.run::<E>(attention(Mask::causal(), cpu), way);
        assert!(got.bits() == expected.bits(), "{} {} {way:?}", E::DTYPE, cpu.level);
    }
}

#[test]
fn pages_of_a_pool() {
    pages::<f32>();
    pages::<bf16>();
}

#[test]
fn numbers_that_are_not_finite_reach_those_who_see_them() {
    let mut layer = Layer::new(DIMS, [1, 40, 300], 10);
    let clean = layer.clone();
    let row = DIMS.row();
    // Position 290 is seen by the rows from 30 on.
    let mut rows = layer.rows.clone().into_vec();
    (rows[290 * row + 3], rows[290 * row + DIMS.latent + 1]) = (f32::NAN, f32::INFINITY);
    layer.rows = Tensor::from_vec(rows, layer.rows.shape()).unwrap();
    let width = DIMS.heads * DIMS.value;
    for (cpu, way) in cpus().flat_map(|cpu| ways().map(move |way| (cpu, way))) {
        let got = layer.run::<f32>(attention(Mask::causal(), cpu), way).out;
        let expected = clean.run::<f32>(attention(Mask::causal(), cpu), way).out;
        assert!(got[..30 * width] == expected[..30 * width], "{} {way:?}", cpu.level);
        assert!(got[30 * width..].iter().all(|x| x.is_nan()), "{} {way:?}", cpu.level);
    }
}

#[test]
fn a_window_forgets() {
    let layer = Layer::new(DIMS, [1, 3, 700], 11);
    let mut cache = layer.caches::<f32>().remove(0);
    cache.forget(560);
    assert_eq!((cache.start(), cache.end(), cache.room()), (512, 700, 512));
    for (cpu, way) in cpus().flat_map(|cpu| ways().map(move |way| (cpu, way))) {
        let got = layer.over(attention(Mask::window(130), cpu), &[&cache], way);
        let expected = layer.run::<f32>(attention(Mask::window(130), cpu), way);
        assert!(got.bits() == expected.bits(), "{} {way:?}", cpu.level);
    }
}
