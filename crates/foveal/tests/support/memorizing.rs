//! Random calls of Memorizing Transformers, their definition in f64, and its gradients by differences.

use super::{Random, differences, error};
use foveal::cache::ContiguousCache;
use foveal::memory::MemorizingState;
use foveal::memory::memorizing::{Memorizing, MemorizingForward, Selected, Tokens};
use foveal::memory::reference::{Memorized, Retrieved, memorizing};
use foveal::reference::Input;
use foveal::sparse::StateHeads;
use foveal::{Cpu, Element, Phase, Shape, Tensor, TensorRef};

/// The sizes and options of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub seq: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    pub segment: usize,
    pub top: usize,
    pub capacity: usize,
    pub previous: bool,
    pub bias: bool,
}

pub const SMALL: Sizes = Sizes {
    seq: 14,
    heads: 2,
    kv_heads: 1,
    key_dim: 5,
    value_dim: 7,
    segment: 4,
    top: 3,
    capacity: 100,
    previous: false,
    bias: false,
};

#[derive(Debug, Clone)]
pub struct Call<E> {
    pub sizes: Sizes,
    pub q: Tensor<E>,
    pub k: Tensor<E>,
    pub v: Tensor<E>,
    pub d_out: Tensor<E>,
    pub gate: Vec<f32>,
    pub scale: Vec<f32>,
    pub bias: Option<Tensor<f32>>,
}

impl<E: Element> Call<E> {
    pub fn random(sizes: Sizes, random: &mut Random) -> Call<E> {
        let Sizes { seq, heads, kv_heads, key_dim, value_dim, segment, .. } = sizes;
        let q = Shape { batch: 1, seq, heads, dim: key_dim };
        let k = Shape { heads: kv_heads, ..q };
        let dim = if sizes.previous { 2 * segment } else { segment };
        let bias = Shape { batch: 1, seq: segment, heads, dim };
        Call {
            sizes,
            q: random.tensor(q, 1.0),
            k: random.tensor(k, 1.0),
            v: random.tensor(Shape { dim: value_dim, ..k }, 1.0),
            d_out: random.tensor(Shape { dim: value_dim, ..q }, 1.0),
            gate: (0..heads).map(|_| random.number()).collect(),
            // Of either sign, and far from 0.
            scale: (0..heads).map(|n| [2.0, -3.0][n % 2] + random.number()).collect(),
            bias: sizes.bias.then(|| random.tensor(bias, 1.0)),
        }
    }

    pub fn heads(&self) -> StateHeads {
        let Sizes { heads, kv_heads, key_dim, value_dim, .. } = self.sizes;
        StateHeads { heads, kv_heads, key_dim, value_dim }
    }

    pub fn options(&self, cpu: Cpu) -> Memorizing {
        let Sizes { segment, top, capacity, previous, .. } = self.sizes;
        Memorizing::new(segment, top, capacity).unwrap().previous(previous).cpu(cpu)
    }

    pub fn state<S: Element>(&self, cpu: Cpu) -> MemorizingState<ContiguousCache<S>> {
        let options = self.options(cpu);
        options.state(self.heads(), options.store(self.heads()).unwrap()).unwrap()
    }

    pub fn tokens(&self) -> Tokens<'_, E> {
        self.with([self.q.view(), self.k.view(), self.v.view()])
    }

    pub fn with<'a>(&'a self, [q, k, v]: [TensorRef<'a, E>; 3]) -> Tokens<'a, E> {
        let tokens = Tokens::new(q, k, v, &self.gate, &self.scale);
        match &self.bias {
            Some(bias) => tokens.bias(bias.view()),
            None => tokens,
        }
    }

    pub fn forward(&self, cpu: Cpu) -> MemorizingForward<E> {
        self.state::<f32>(cpu).forward(&self.tokens(), Phase::Prompt).unwrap()
    }

    pub fn wide(&self) -> Wide {
        let wide = |x: &Tensor<E>| {
            (x.shape(), x.as_slice().iter().map(|x| f64::from(x.to_f32())).collect())
        };
        let tokens = [wide(&self.q), wide(&self.k), wide(&self.v)];
        Wide {
            sizes: self.sizes,
            past: [tokens[1].clone(), tokens[2].clone()],
            tokens,
            gate: numbers(&self.gate),
            scale: numbers(&self.scale),
            bias: self.bias.as_ref().map(|bias| numbers(bias.as_slice())),
            selected: None,
        }
    }
}

pub fn numbers(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

pub fn narrow<E: Element>(x: &Tensor<E>) -> Vec<f32> {
    x.as_slice().iter().map(|x| x.to_f32()).collect()
}

pub type Array = (Shape, Vec<f64>);

/// A call in f64.
#[derive(Debug, Clone)]
pub struct Wide {
    pub sizes: Sizes,
    pub tokens: [Array; 3],
    pub past: [Array; 2],
    pub gate: Vec<f64>,
    pub scale: Vec<f64>,
    pub bias: Option<Vec<f64>>,
    pub selected: Option<Vec<Option<usize>>>,
}

impl Wide {
    pub fn forward(&self) -> Retrieved {
        fn input(x: &Array) -> Input<'_> {
            Input { shape: x.0, data: &x.1 }
        }
        let Sizes { segment, top, capacity, previous, .. } = self.sizes;
        memorizing(&Memorized {
            tokens: self.tokens.each_ref().map(input),
            past: self.past.each_ref().map(input),
            gate: &self.gate,
            scale: &self.scale,
            bias: self.bias.as_deref(),
            selected: self.selected.as_deref(),
            segment,
            top,
            capacity,
            previous,
        })
    }

    pub fn part(&mut self, part: usize) -> &mut [f64] {
        match part {
            0..=2 => &mut self.tokens[part].1,
            3 => &mut self.gate,
            4 => &mut self.scale,
            _ => self.bias.as_deref_mut().unwrap_or(&mut []),
        }
    }

    /// By central differences; what is remembered and what is retrieved stay.
    pub fn gradient(&self, part: usize, d_out: &[f64]) -> Vec<f64> {
        let numbers = self.clone().part(part).to_vec();
        let loss =
            |call: &Wide| call.forward().out.iter().zip(d_out).map(|(a, b)| a * b).sum::<f64>();
        differences(&numbers, |x| {
            let mut call = self.clone();
            call.part(part).copy_from_slice(x);
            loss(&call)
        })
    }
}

/// As the definition has them.
pub fn listed(selected: &Selected, sizes: Sizes) -> Vec<Option<usize>> {
    let sites = (0..sizes.seq).flat_map(|t| (0..sizes.heads).map(move |head| (t, head)));
    sites
        .flat_map(|(t, head)| {
            let mut own: Vec<Option<usize>> = selected.of(t, head).map(Some).collect();
            own.resize(sizes.top, None);
            own
        })
        .collect()
}

pub fn close(what: &str, got: &[f32], expected: &[f64], bound: f64) {
    let error = error(got, expected);
    assert!(error <= bound, "{what}: error {error:e} > {bound:e}");
}
