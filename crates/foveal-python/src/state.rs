//! What a mechanism that chooses keys or remembers segments holds of one sequence between calls.
//!
//! A call of one token takes the kernels of generated tokens, a longer one those of prompts. A state is locked while a call
//! changes it, and nobody waits for the lock (see `cache`).

use crate::call::{Given, Mechanism, cpu};
use crate::error::{Error, Result};
use crate::memory::{Documents, Segments};
use crate::output::Output;
use crate::sparse::{Chosen, Factorised, Hashed, Native};
use foveal::cache::ContiguousCache;
use foveal::memory::infini::InfiniState;
use foveal::memory::memorizing::MemorizingState;
use foveal::plan::Inputs;
use foveal::sparse::{
    AngularHash, Branches, LshState, LshTokens, MobaState, NativeState, SparseState, StateHeads,
};
use foveal::{Element, Forward, Phase, Tensor, TensorRef};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use std::any::Any;
use std::sync::{Mutex, MutexGuard, TryLockError};

/// A mechanism with a state.
pub(crate) trait Stateful: Mechanism {
    /// What it holds, for a storage type.
    type Held<E: Element>: Any + Send;

    /// What it holds of a sequence that has not begun, whose first tokens are these.
    fn begin<E: Element>(&self, given: &Given<'_>) -> Result<Self::Held<E>>;

    /// Takes tokens in; the results of their rows.
    fn step<E: Element>(&self, held: &mut Self::Held<E>, given: &Given<'_>) -> Result<Vec<Output>>;
}

/// What is held, of any mechanism and storage type.
#[derive(Debug, Default)]
pub(crate) struct Held {
    state: Option<Box<dyn Any + Send>>,
    tokens: usize,
}

impl Held {
    /// Takes tokens in.
    pub(crate) fn step<M: Stateful, E: Element>(
        &mut self,
        mechanism: &M,
        given: &Given<'_>,
    ) -> Result<Vec<Output>> {
        let fresh = self.state.is_none();
        let mut state = match self.state.take() {
            Some(state) => state,
            None => Box::new(mechanism.begin::<E>(given)?),
        };
        let outputs = match state.downcast_mut::<M::Held<E>>() {
            Some(held) => mechanism.step(held, given),
            None => {
                let expected = "one that has not begun, or begun with this mechanism and dtype";
                Err(Error::Option { what: "state", expected, got: "another's".to_owned() })
            }
        };
        if !fresh || outputs.is_ok() {
            self.state = Some(state);
        }
        let outputs = outputs?;
        self.tokens += given.view(0)?.shape().get(1).copied().unwrap_or(0);
        Ok(outputs)
    }
}

/// What a mechanism holds of one sequence; nothing before its first call.
#[pyclass(frozen, module = "foveal._native")]
#[derive(Debug, Default)]
pub(crate) struct State(Mutex<Held>);

impl State {
    /// The state, of which nobody else has hold.
    pub(crate) fn lock(&self) -> PyResult<MutexGuard<'_, Held>> {
        self.0.try_lock().map_err(|error| {
            PyRuntimeError::new_err(match error {
                TryLockError::WouldBlock => "the state is in use by another thread",
                TryLockError::Poisoned(_) => {
                    "the state is unusable: a call on it has failed inside"
                }
            })
        })
    }
}

#[pymethods]
impl State {
    #[new]
    fn new() -> State {
        State::default()
    }

    /// Tokens taken in.
    fn tokens(&self) -> PyResult<usize> {
        Ok(self.lock()?.tokens)
    }

    /// Forgets everything.
    fn clear(&self) -> PyResult<()> {
        *self.lock()? = Held::default();
        Ok(())
    }
}

fn inputs<'a, E: Element>(given: &Given<'a>) -> Result<Inputs<'a, E, E>> {
    Ok(Inputs { q: given.tensor(0)?, k: given.tensor(1)?, v: given.tensor(2)? })
}

fn heads<E: Element>(given: &Given<'_>) -> Result<StateHeads> {
    let Inputs { q, k, v } = inputs::<E>(given)?;
    let (q, k, v) = (q.shape(), k.shape(), v.shape());
    Ok(StateHeads { heads: q.heads, kv_heads: k.heads, key_dim: k.dim, value_dim: v.dim })
}

fn phase(tokens: usize) -> Phase {
    if tokens == 1 { Phase::Generated } else { Phase::Prompt }
}

fn rows<E: Element>(forward: Forward<E>) -> Vec<Output> {
    vec![Output::tensor(forward.out), Output::per_row(forward.lse)]
}

impl Stateful for Factorised {
    type Held<E: Element> = SparseState<E>;

    fn begin<E: Element>(&self, given: &Given<'_>) -> Result<SparseState<E>> {
        Ok(self.0.state(heads::<E>(given)?)?)
    }

    fn step<E: Element>(
        &self,
        held: &mut SparseState<E>,
        given: &Given<'_>,
    ) -> Result<Vec<Output>> {
        let inputs = inputs::<E>(given)?;
        held.set_cpu(cpu()?);
        if phase(inputs.q.shape().seq) == Phase::Prompt {
            return Ok(rows(held.prompt(inputs)?));
        }
        held.append(inputs.k, inputs.v)?;
        Ok(rows(held.attend(inputs.q)?))
    }
}

impl Stateful for Chosen {
    type Held<E: Element> = MobaState<E>;

    fn begin<E: Element>(&self, given: &Given<'_>) -> Result<MobaState<E>> {
        Ok(self.0.state(heads::<E>(given)?)?)
    }

    fn step<E: Element>(&self, held: &mut MobaState<E>, given: &Given<'_>) -> Result<Vec<Output>> {
        let inputs = inputs::<E>(given)?;
        held.set_cpu(cpu()?);
        if phase(inputs.q.shape().seq) == Phase::Prompt {
            return Ok(rows(held.prompt(inputs)?));
        }
        held.append(inputs.k, inputs.v)?;
        Ok(rows(held.attend(inputs.q)?))
    }
}

impl Stateful for Hashed {
    type Held<E: Element> = LshState<E>;

    fn begin<E: Element>(&self, given: &Given<'_>) -> Result<LshState<E>> {
        let (qk, v) = (given.tensor::<E>(0)?.shape(), given.tensor::<E>(1)?.shape());
        let heads = qk.heads;
        let shape = StateHeads { heads, kv_heads: v.heads, key_dim: qk.dim, value_dim: v.dim };
        let hash = AngularHash::new(qk.dim, self.buckets, self.rounds, self.seed)?;
        Ok(self.layer.state(hash, shape)?)
    }

    fn step<E: Element>(&self, held: &mut LshState<E>, given: &Given<'_>) -> Result<Vec<Output>> {
        if given.optional(2).is_some() {
            let (what, expected) = ("buckets", "a number of them where there is a state");
            return Err(Error::Option { what, expected, got: "an array".to_owned() });
        }
        let (qk, v) = (given.tensor::<E>(0)?, given.tensor(1)?);
        held.set_cpu(cpu()?);
        let phase = phase(qk.shape().seq);
        Ok(rows(held.forward(LshTokens { hashed: qk, qk, v }, phase)?))
    }
}

impl Stateful for Native {
    type Held<E: Element> = NativeState<E>;

    fn begin<E: Element>(&self, given: &Given<'_>) -> Result<NativeState<E>> {
        Ok(self.0.state(heads::<E>(given)?)?)
    }

    fn step<E: Element>(
        &self,
        held: &mut NativeState<E>,
        given: &Given<'_>,
    ) -> Result<Vec<Output>> {
        held.set_cpu(cpu()?);
        let selected = inputs::<E>(given)?;
        let means = self.means(held, selected)?;
        let tokens = self.arrange(given, means.each_ref().map(Some))?;
        let gates = given.tensor(Native::GATES)?;
        if phase(selected.q.shape().seq) == Phase::Prompt {
            return Ok(vec![Output::tensor(held.prompt(tokens, gates)?.out)]);
        }
        let Branches { compressed, selected, window } = tokens;
        held.append(
            Branches { compressed: compressed.k, selected: selected.k, window: window.k },
            Branches { compressed: compressed.v, selected: selected.v, window: window.v },
        )?;
        let q = Branches { compressed: compressed.q, selected: selected.q, window: window.q };
        Ok(vec![Output::tensor(held.attend(q, gates)?.out)])
    }
}

impl Native {
    /// The compressed tokens that these bring, as means of keys and of values.
    fn means<E: Element>(
        &self,
        held: &NativeState<E>,
        tokens: Inputs<'_, E, E>,
    ) -> Result<[Tensor<E>; 2]> {
        let before = held.tokens();
        let bring = held.compressed_by(tokens.k.shape().seq);
        let done = self.0.compressed_tokens(before + tokens.k.shape().seq) - bring;
        let first = (done * self.stride()).min(before);
        let [keys, values] = held.rows();
        let mean = |own: &[E], new: TensorRef<'_, E>| -> Result<Tensor<E>> {
            let shape = new.shape();
            let width = shape.heads * shape.dim;
            let mut rows = own.get(first * width..before * width).unwrap_or_default().to_vec();
            for t in 0..shape.seq {
                (0..shape.heads).for_each(|head| rows.extend_from_slice(new.row(0, t, head)));
            }
            let seq = rows.len() / width.max(1);
            let all = Tensor::from_vec(rows, foveal::Shape { batch: 1, seq, ..shape })?;
            Ok(self.0.pool(all.view())?)
        };
        Ok([mean(keys, tokens.k)?, mean(values, tokens.v)?])
    }
}

impl Stateful for Segments {
    type Held<E: Element> = InfiniState<E>;

    fn begin<E: Element>(&self, given: &Given<'_>) -> Result<InfiniState<E>> {
        let rotated = given.optional(Segments::ROTATED).is_some();
        Ok(self.0.clone().cpu(cpu()?).state(heads::<E>(given)?, rotated)?)
    }

    fn step<E: Element>(
        &self,
        held: &mut InfiniState<E>,
        given: &Given<'_>,
    ) -> Result<Vec<Output>> {
        if given.optional(Segments::MEMORY).is_some() {
            let (what, expected) = ("memory", "none where there is a state, which holds it");
            return Err(Error::Option { what, expected, got: "arrays".to_owned() });
        }
        let tokens = Segments::tokens::<E>(given)?;
        let out = held.forward(&tokens, phase(tokens.q.shape().seq))?;
        let [matrices, sums] = Segments::given_back(held.memory());
        Ok(vec![Output::tensor(out), matrices, sums])
    }
}

impl Stateful for Documents {
    type Held<E: Element> = MemorizingState<ContiguousCache<f32>>;

    fn begin<E: Element>(
        &self,
        given: &Given<'_>,
    ) -> Result<MemorizingState<ContiguousCache<f32>>> {
        let (layer, shape) = (self.0.clone().cpu(cpu()?), heads::<E>(given)?);
        Ok(layer.state(shape, layer.store::<f32>(shape)?)?)
    }

    fn step<E: Element>(
        &self,
        held: &mut MemorizingState<ContiguousCache<f32>>,
        given: &Given<'_>,
    ) -> Result<Vec<Output>> {
        let Inputs { q, k, v } = inputs::<E>(given)?;
        let tokens = Documents::tokens((q, k, v), given)?;
        Ok(vec![Output::tensor(held.forward(&tokens, phase(q.shape().seq))?.out)])
    }
}
