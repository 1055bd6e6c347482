//! Random calls of recurrences, their definition in f64, and its gradients by differences.

use super::{Random, differences};
use foveal::linear::reference::{Sequences, States, forward, forward_bidirectional};
use foveal::linear::{
    DecayForm, Gradients, Recurrence, Recurrent, RecurrentBackward, Results, State, StateShape,
    Tokens, Upstream,
};
use foveal::reference::Input;
use foveal::{Cpu, Element, Shape, Tensor, Workspace};

/// The sizes of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub batch: usize,
    pub seq: usize,
    pub groups: usize,
    pub heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
}

/// A call with everything that a mechanism asks for.
#[derive(Debug, Clone)]
pub struct Call<E> {
    pub q: Tensor<E>,
    pub k: Tensor<E>,
    pub v: Tensor<E>,
    pub log_decay: Option<Tensor<f32>>,
    pub beta: Option<Tensor<f32>>,
    pub present: Option<Vec<bool>>,
    pub cuts: Option<Vec<usize>>,
    /// The gradient of the outputs.
    pub d_out: Tensor<E>,
    /// What the state begins with, and the gradient of the final one.
    pub initial: State,
    pub d_final: State,
}

impl<E: Element> Call<E> {
    /// Random numbers: keys are short enough for any delta rule, decays from hardly to nearly everything.
    pub fn random<R: Recurrence>(mechanism: &R, sizes: Sizes, random: &mut Random) -> Call<E> {
        let Sizes { batch, seq, groups, heads, key_dim, value_dim } = sizes;
        let form = mechanism.form();
        let keys = Shape { batch, seq, heads: groups, dim: key_dim };
        let values = Shape { heads, dim: value_dim, ..keys };
        let scale = if form.beta { (key_dim as f32).powf(-0.5) } else { 1.0 };
        let mut gate = |shape, lowest: f32, highest: f32| {
            let x: Tensor<f32> = random.tensor(shape, 1.0);
            let middle = (lowest + highest) / 2.0;
            let spread = (highest - lowest) / 2.0;
            Tensor::from_vec(x.as_slice().iter().map(|x| middle + spread * x).collect(), shape)
                .unwrap()
        };
        let log_decay = match form.decay {
            DecayForm::None => None,
            DecayForm::Scalar => Some(gate(values.per_row(), -1.5, 0.0)),
            DecayForm::Vector => Some(gate(Shape { dim: key_dim, ..values }, -1.5, 0.0)),
        };
        let beta = form.beta.then(|| gate(values.per_row(), 0.0, 2.0));
        let rows = mechanism.mapped_dim(key_dim).unwrap();
        let shape = StateShape { sequences: batch, heads, key_dim: rows, value_dim };
        let mut call = Call {
            q: random.tensor(keys, 1.0),
            k: random.tensor(keys, scale),
            v: random.tensor(values, 1.0),
            log_decay,
            beta,
            present: None,
            cuts: None,
            d_out: random.tensor(values, 1.0),
            initial: State::zeros(shape, form.sums).unwrap(),
            d_final: State::zeros(shape, form.sums).unwrap(),
        };
        call.fill_states(random);
        call
    }

    /// Sums of each key channel.
    fn sums(&self) -> usize {
        let StateShape { sequences, heads, key_dim, .. } = self.initial.shape();
        self.initial.key_sums().len() / (sequences * heads * key_dim).max(1)
    }

    fn fill_states(&mut self, random: &mut Random) {
        self.initial.matrices_mut().iter_mut().for_each(|x| *x = random.number());
        self.d_final.matrices_mut().iter_mut().for_each(|x| *x = random.number());
        // A sum of features is not negative; it is divided by, and differences of 1/z need room.
        self.initial.key_sums_mut().iter_mut().for_each(|x| *x = 0.1 + random.number().abs());
        self.d_final.key_sums_mut().iter_mut().for_each(|x| *x = random.number());
    }

    /// Packs the tokens of a batch of 1 into sequences.
    pub fn packed(mut self, cuts: Vec<usize>, random: &mut Random) -> Call<E> {
        let shape = StateShape { sequences: cuts.len() - 1, ..self.initial.shape() };
        let sums = self.sums();
        self.initial = State::zeros(shape, sums).unwrap();
        self.d_final = State::zeros(shape, sums).unwrap();
        self.cuts = Some(cuts);
        self.fill_states(random);
        self
    }

    pub fn tokens(&self) -> Tokens<'_, E> {
        let mut tokens = Tokens::new(self.q.view(), self.k.view(), self.v.view());
        if let Some(log_decay) = &self.log_decay {
            tokens = tokens.log_decay(log_decay.view());
        }
        if let Some(beta) = &self.beta {
            tokens = tokens.beta(beta.view());
        }
        if let Some(present) = &self.present {
            tokens = tokens.present(present);
        }
        if let Some(cuts) = &self.cuts {
            tokens = tokens.cuts(cuts);
        }
        tokens
    }

    /// Outputs, reads and final state, from poisoned outputs and workspace.
    pub fn forward<R: Recurrence + Clone>(
        &self,
        mechanism: &R,
        cpu: Cpu,
    ) -> (Tensor<E>, Tensor<f32>, State) {
        let shape = self.v.shape();
        let len = shape.checked_len().unwrap();
        let mut out = Tensor::from_vec(vec![E::from_f32(f32::NAN); len], shape).unwrap();
        let mut reads = Tensor::from_vec(vec![f32::NAN; len], shape).unwrap();
        let mut state = self.initial.clone();
        let delta = mechanism.form().beta;
        let results = Results { out: out.view_mut(), reads: delta.then(|| reads.view_mut()) };
        let recurrent = Recurrent::new(mechanism.clone()).cpu(cpu);
        let mut workspace = poisoned();
        recurrent.forward_into(&self.tokens(), results, &mut state, &mut workspace).unwrap();
        (out, reads, state)
    }

    /// Gradients and that of the initial state, from poisoned outputs and workspace.
    pub fn backward<R: Recurrence + Clone>(
        &self,
        mechanism: &R,
        cpu: Cpu,
    ) -> (RecurrentBackward, State) {
        let nan = |shape: Shape| {
            Tensor::from_vec(vec![f32::NAN; shape.checked_len().unwrap()], shape).unwrap()
        };
        let mut gradients = RecurrentBackward {
            d_q: nan(self.q.shape()),
            d_k: nan(self.k.shape()),
            d_v: nan(self.v.shape()),
            d_log_decay: self.log_decay.as_ref().map(|x| nan(x.shape())),
            d_beta: self.beta.as_ref().map(|x| nan(x.shape())),
        };
        let (_, reads, _) = self.forward(mechanism, cpu);
        let reads = mechanism.form().beta.then(|| reads.view());
        let upstream = Upstream { d_out: self.d_out.view(), initial: &self.initial, reads };
        let to = Gradients {
            d_q: gradients.d_q.view_mut(),
            d_k: gradients.d_k.view_mut(),
            d_v: gradients.d_v.view_mut(),
            d_log_decay: gradients.d_log_decay.as_mut().map(Tensor::view_mut),
            d_beta: gradients.d_beta.as_mut().map(Tensor::view_mut),
        };
        let mut d_state = self.d_final.clone();
        let recurrent = Recurrent::new(mechanism.clone()).cpu(cpu);
        recurrent
            .backward_into(&self.tokens(), upstream, to, &mut d_state, &mut poisoned())
            .unwrap();
        (gradients, d_state)
    }

    pub fn widen(&self) -> Wide {
        let wide = |x: &Tensor<E>| {
            (x.shape(), x.as_slice().iter().map(|x| f64::from(x.to_f32())).collect())
        };
        let gate = |x: &Option<Tensor<f32>>| {
            x.as_ref().map(|x| (x.shape(), x.as_slice().iter().map(|&x| f64::from(x)).collect()))
        };
        Wide {
            q: wide(&self.q),
            k: wide(&self.k),
            v: wide(&self.v),
            log_decay: gate(&self.log_decay),
            beta: gate(&self.beta),
            present: self.present.clone(),
            cuts: self.cuts.clone(),
            initial: states(&self.initial),
            all_keys: false,
        }
    }
}

fn poisoned() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.reserve(1 << 18);
    workspace.poison();
    workspace
}

pub fn states(state: &State) -> States {
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect();
    States { matrices: wide(state.matrices()), key_sums: wide(state.key_sums()) }
}

type Array = (Shape, Vec<f64>);

/// A call in f64.
#[derive(Debug, Clone)]
pub struct Wide {
    pub q: Array,
    pub k: Array,
    pub v: Array,
    pub log_decay: Option<Array>,
    pub beta: Option<Array>,
    pub present: Option<Vec<bool>>,
    pub cuts: Option<Vec<usize>>,
    pub initial: States,
    /// Whether queries read all keys.
    pub all_keys: bool,
}

/// Which numbers of a call a gradient belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Q,
    K,
    V,
    LogDecay,
    Beta,
    Matrices,
    KeySums,
}

impl Wide {
    /// Outputs and final states by the definition.
    pub fn forward<R: Recurrence>(&self, mechanism: &R) -> (Vec<f64>, States) {
        fn input(x: &Array) -> Input<'_> {
            Input { shape: x.0, data: &x.1 }
        }
        let sequences = Sequences {
            q: input(&self.q),
            k: input(&self.k),
            v: input(&self.v),
            log_decay: self.log_decay.as_ref().map(input),
            beta: self.beta.as_ref().map(input),
            present: self.present.as_deref(),
            cuts: self.cuts.as_deref(),
        };
        let mut states = self.initial.clone();
        let out = match self.all_keys {
            true => forward_bidirectional(mechanism, &sequences, &mut states),
            false => forward(mechanism, &sequences, &mut states),
        };
        (out, states)
    }

    fn part(&mut self, part: Part) -> &mut [f64] {
        let none: &mut [f64] = &mut [];
        match part {
            Part::Q => &mut self.q.1,
            Part::K => &mut self.k.1,
            Part::V => &mut self.v.1,
            Part::LogDecay => self.log_decay.as_mut().map_or(none, |x| &mut x.1),
            Part::Beta => self.beta.as_mut().map_or(none, |x| &mut x.1),
            Part::Matrices => &mut self.initial.matrices,
            Part::KeySums => &mut self.initial.key_sums,
        }
    }

    /// The gradient of Σ out · d_out + Σ final · d_final by central differences.
    pub fn gradient<R: Recurrence>(
        &self,
        mechanism: &R,
        part: Part,
        (d_out, d_final): (&[f64], &States),
    ) -> Vec<f64> {
        let numbers = self.clone().part(part).to_vec();
        let loss = |call: &Wide| {
            let (out, last) = call.forward(mechanism);
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
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
