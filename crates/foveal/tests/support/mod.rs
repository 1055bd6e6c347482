//! Shared by the integration tests: numbers, a plain f64 attention, comparisons.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod attention;
pub mod backward;
pub mod golden;
pub mod infini;
pub mod layer;
pub mod linear;
pub mod memorizing;
pub mod rope;
pub mod sizes;
pub mod sparse;

use foveal::reference::{Input, Partial};
use foveal::{Cpu, Element, Level, Mask, Shape, Tensor, TensorRef, Threads};

/// Every level of this processor, with one thread.
pub fn cpus() -> impl Iterator<Item = Cpu> {
    Level::available().map(|level| Cpu { level, threads: Threads::ONE })
}

/// The tokens of a range of a tensor of one sequence.
pub fn tokens<E: Element>(x: &Tensor<E>, range: std::ops::Range<usize>) -> TensorRef<'_, E> {
    let Shape { heads, dim, .. } = x.shape();
    let shape = Shape { batch: 1, seq: range.len(), heads, dim };
    TensorRef::new(&x.as_slice()[range.start * heads * dim..range.end * heads * dim], shape)
        .unwrap()
}

/// splitmix64, mapped to (-1, 1).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
    pub fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    pub fn tensor<E: Element>(&mut self, shape: Shape, scale: f32) -> Tensor<E> {
        let len = shape.checked_len().unwrap();
        let data = (0..len).map(|_| E::from_f32(self.number() * scale)).collect();
        Tensor::from_vec(data, shape).unwrap()
    }
}

/// Attention as it is defined, in f64: output and log-sum-exp in row-major order.
pub fn reference<E: Element>(
    (q, k, v): (&Tensor<E>, &Tensor<E>, &Tensor<E>),
    mask: &Mask,
    scale: f64,
) -> (Vec<f64>, Vec<f64>) {
    let shapes = [q.shape(), k.shape(), v.shape()];
    let data = [q, k, v]
        .map(|x| -> Vec<f64> { x.as_slice().iter().map(|x| f64::from(x.to_f32())).collect() });
    let input = |n: usize| Input { data: &data[n], shape: shapes[n] };
    let Partial { out, lse } =
        foveal::reference::attention([input(0), input(1), input(2)], scale, mask).unwrap();
    (out, lse)
}

/// The largest difference relative to 1 + the largest expected number; −∞ must be met exactly.
pub fn error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let size = expected.iter().filter(|x| x.is_finite()).fold(0.0, |m: f64, x| m.max(x.abs()));
    let mut worst = 0.0f64;
    for (n, (&g, &e)) in got.iter().zip(expected).enumerate() {
        if e.is_finite() {
            assert!(g.is_finite(), "number {n} is {g}, expected {e}");
            worst = worst.max((f64::from(g) - e).abs() / (1.0 + size));
        } else {
            assert_eq!(f64::from(g), e, "number {n}");
        }
    }
    worst
}

/// The gradient of a loss by central differences.
pub fn differences(x: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let at = |n: usize, by: f64| {
        let mut x = x.to_vec();
        x[n] += by;
        loss(&x)
    };
    (0..x.len()).map(|n| (at(n, STEP) - at(n, -STEP)) / (2.0 * STEP)).collect()
}
