//! Random calls of Infini-attention, their definition in f64, and its gradients by differences.

use super::{Random, differences};
use foveal::linear::{State, StateShape};
use foveal::memory::infini::{Gradients, Infini, InfiniBackward, Tokens, Upstream};
use foveal::memory::reference::{Memories, Segments, infini};
use foveal::memory::{Empty, Update};
use foveal::reference::Input;
use foveal::{Cpu, Element, Scale, Shape, Tensor, Workspace};

/// The sizes of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub batch: usize,
    pub seq: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    pub segment: usize,
}

/// Which numbers of a call a gradient belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Q,
    K,
    V,
    Gate,
    RotatedQ,
    RotatedK,
    Matrices,
    KeySums,
}

pub const SCALE: f32 = 0.4;

/// A call with everything that there can be.
#[derive(Debug, Clone)]
pub struct Call<E> {
    pub sizes: Sizes,
    pub update: Update,
    pub empty: Empty,
    pub q: Tensor<E>,
    pub k: Tensor<E>,
    pub v: Tensor<E>,
    pub rotated: Option<(Tensor<E>, Tensor<E>)>,
    pub gate: Vec<f32>,
    pub d_out: Tensor<E>,
    pub initial: State,
    pub d_final: State,
}

impl<E: Element> Call<E> {
    /// `given`: with a memory that holds something. `rotated`: with other queries and keys for attention.
    pub fn random(
        sizes: Sizes,
        (update, empty): (Update, Empty),
        (given, rotated): (bool, bool),
        random: &mut Random,
    ) -> Call<E> {
        let Sizes { batch, seq, heads, kv_heads, key_dim, value_dim, .. } = sizes;
        let q = Shape { batch, seq, heads, dim: key_dim };
        let k = Shape { heads: kv_heads, ..q };
        let shape = StateShape { sequences: batch, heads: kv_heads, key_dim, value_dim };
        let mut call = Call {
            sizes,
            update,
            empty,
            q: random.tensor(q, 1.0),
            k: random.tensor(k, 1.0),
            v: random.tensor(Shape { dim: value_dim, ..k }, 1.0),
            rotated: rotated.then(|| (random.tensor(q, 1.0), random.tensor(k, 1.0))),
            gate: (0..heads).map(|_| 2.0 * random.number()).collect(),
            d_out: random.tensor(Shape { dim: value_dim, ..q }, 1.0),
            initial: State::zeros(shape, 1).unwrap(),
            d_final: State::zeros(shape, 1).unwrap(),
        };
        if given {
            call.initial.matrices_mut().iter_mut().for_each(|x| *x = random.number());
            // A sum of features is positive.
            call.initial.key_sums_mut().iter_mut().for_each(|x| *x = random.number().abs() + 0.1);
        }
        call.d_final.matrices_mut().iter_mut().for_each(|x| *x = random.number());
        call.d_final.key_sums_mut().iter_mut().for_each(|x| *x = random.number());
        call
    }

    pub fn tokens(&self) -> Tokens<'_, E> {
        let tokens = Tokens::new(self.q.view(), self.k.view(), self.v.view(), &self.gate);
        match &self.rotated {
            Some((q, k)) => tokens.rotated(q.view(), k.view()),
            None => tokens,
        }
    }

    pub fn infini(&self, cpu: Cpu) -> Infini {
        let infini = Infini::new(self.sizes.segment).unwrap();
        infini.update(self.update).empty(self.empty).scale(Scale::Value(SCALE)).cpu(cpu)
    }

    /// Outputs and final memory, from a poisoned output and workspace.
    pub fn forward(&self, cpu: Cpu) -> (Tensor<E>, State) {
        let mut out = nan(self.d_out.shape());
        let mut memory = self.initial.clone();
        let infini = self.infini(cpu);
        infini.forward_into(&self.tokens(), out.view_mut(), &mut memory, &mut poisoned()).unwrap();
        (out, memory)
    }

    /// Gradients and that of the initial memory, from poisoned places.
    pub fn backward(&self, cpu: Cpu) -> (InfiniBackward<E>, State) {
        let mut d = InfiniBackward {
            d_q: nan(self.q.shape()),
            d_k: nan(self.k.shape()),
            d_v: nan(self.v.shape()),
            d_gate: vec![f32::NAN; self.gate.len()],
            d_rotated: self.rotated.as_ref().map(|(q, k)| (nan(q.shape()), nan(k.shape()))),
        };
        let to = Gradients {
            d_q: d.d_q.view_mut(),
            d_k: d.d_k.view_mut(),
            d_v: d.d_v.view_mut(),
            d_gate: &mut d.d_gate,
            d_rotated: d.d_rotated.as_mut().map(|(q, k)| (q.view_mut(), k.view_mut())),
        };
        let upstream = Upstream { d_out: self.d_out.view(), initial: &self.initial };
        let mut d_memory = self.d_final.clone();
        let infini = self.infini(cpu);
        infini.backward_into(&self.tokens(), upstream, to, &mut d_memory, &mut poisoned()).unwrap();
        (d, d_memory)
    }

    pub fn widen(&self) -> Wide {
        let wide = |x: &Tensor<E>| {
            (x.shape(), x.as_slice().iter().map(|x| f64::from(x.to_f32())).collect())
        };
        let (q, k) = self.rotated.as_ref().map_or((&self.q, &self.k), |(q, k)| (q, k));
        Wide {
            sizes: self.sizes,
            update: self.update,
            empty: self.empty,
            plain: [wide(&self.q), wide(&self.k), wide(&self.v)],
            local: [wide(q), wide(k)],
            rotated: self.rotated.is_some(),
            gate: numbers(&self.gate),
            initial: memories(&self.initial),
        }
    }
}

pub fn numbers(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

pub fn memories(state: &State) -> Memories {
    Memories { matrices: numbers(state.matrices()), key_sums: numbers(state.key_sums()) }
}

fn nan<E: Element>(shape: Shape) -> Tensor<E> {
    Tensor::from_vec(vec![E::from_f32(f32::NAN); shape.checked_len().unwrap()], shape).unwrap()
}

fn poisoned() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.reserve(1 << 20);
    workspace.poison();
    workspace
}

type Array = (Shape, Vec<f64>);

/// A call in f64.
#[derive(Debug, Clone)]
pub struct Wide {
    sizes: Sizes,
    update: Update,
    empty: Empty,
    plain: [Array; 3],
    local: [Array; 2],
    /// Whether local queries and keys are others.
    rotated: bool,
    gate: Vec<f64>,
    initial: Memories,
}

impl Wide {
    /// Outputs and final memories by the definition.
    pub fn forward(&self) -> (Vec<f64>, Memories) {
        fn input(x: &Array) -> Input<'_> {
            Input { shape: x.0, data: &x.1 }
        }
        let [q, k, v] = &self.plain;
        let local = if self.rotated { [&self.local[0], &self.local[1]] } else { [q, k] };
        let call = Segments {
            plain: [input(q), input(k), input(v)],
            local: local.map(input),
            gate: &self.gate,
            segment: self.sizes.segment,
            scale: f64::from(SCALE),
            update: self.update,
            empty: self.empty,
        };
        let mut last = self.initial.clone();
        (infini(&call, &mut last).unwrap(), last)
    }

    fn part(&mut self, part: Part) -> &mut [f64] {
        match part {
            Part::Q => &mut self.plain[0].1,
            Part::K => &mut self.plain[1].1,
            Part::V => &mut self.plain[2].1,
            Part::Gate => &mut self.gate,
            Part::RotatedQ if self.rotated => &mut self.local[0].1,
            Part::RotatedK if self.rotated => &mut self.local[1].1,
            Part::RotatedQ | Part::RotatedK => &mut [],
            Part::Matrices => &mut self.initial.matrices,
            Part::KeySums => &mut self.initial.key_sums,
        }
    }

    /// The gradient of Σ out · d_out + Σ final · d_final by central differences.
    pub fn gradient(&self, part: Part, (d_out, d_final): (&[f64], &Memories)) -> Vec<f64> {
        let numbers = self.clone().part(part).to_vec();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let loss = |call: &Wide| {
            let (out, last) = call.forward();
            dot(&out, d_out)
                + dot(&last.matrices, &d_final.matrices)
                + dot(&last.key_sums, &d_final.key_sums)
        };
        differences(&numbers, |x| {
            let mut call = self.clone();
            call.part(part).copy_from_slice(x);
            loss(&call)
        })
    }
}
