//! How long a mechanism takes on this machine: a prompt of each length, best of three, between the steps of texts.

use std::ops::ControlFlow;
use std::time::Instant;

use foveal::linear::{
    DecayForm, Delta, Efficient, Favor, Linear, Recurrence, Recurrent, Retention, ScalarDecay,
    Tokens, VectorDecay,
};
use foveal::memory::infini::{self, Infini};
use foveal::plan::Inputs;
use foveal::sparse::{
    AngularHash, BigBird, BlockPlan, Factors, Longformer, Moba, Reformer, SparseTransformer, Window,
};
use foveal::testing::normal;
use foveal::{Attention, Cpu, Error, Mask, Result, Shape, Tensor};
use tokio::sync::oneshot;

use super::parameters;
use crate::Served;
use crate::engine::Aside;

/// Lengths of prompts.
pub(crate) const TOKENS: [usize; 5] = [256, 512, 1024, 2048, 4096];
const ROUNDS: usize = 3;
const HEADS: usize = 4;
const DIM: usize = 64;

/// Milliseconds of each length.
type Curve = std::result::Result<Vec<f64>, Error>;

/// A measurement on its way: one length a step.
pub(crate) struct Measuring {
    name: String,
    curve: Vec<f64>,
    done: Option<oneshot::Sender<Curve>>,
}

impl Measuring {
    pub(crate) fn new(name: String) -> (Measuring, oneshot::Receiver<Curve>) {
        let (done, receiver) = oneshot::channel();
        (Measuring { name, curve: vec![], done: Some(done) }, receiver)
    }
}

impl Aside for Measuring {
    fn step(&mut self, _: &Served) -> ControlFlow<()> {
        if self.done.as_ref().is_none_or(oneshot::Sender::is_closed) {
            return ControlFlow::Break(());
        }
        let result = match seconds(&self.name, TOKENS[self.curve.len()]) {
            Ok(seconds) => {
                self.curve.push(1e3 * seconds);
                if self.curve.len() < TOKENS.len() {
                    return ControlFlow::Continue(());
                }
                Ok(std::mem::take(&mut self.curve))
            }
            Err(error) => Err(error),
        };
        if let Some(done) = self.done.take() {
            let _ = done.send(result);
        }
        ControlFlow::Break(())
    }
}

/// Seconds of a prompt of so many tokens, 4 heads of 64; without the making of inputs and parameters.
fn seconds(name: &str, tokens: usize) -> Result<f64> {
    let shape = Shape { batch: 1, seq: tokens, heads: HEADS, dim: DIM };
    let [q, k, v] = [normal(shape, 1)?, normal(shape, 2)?, normal(shape, 3)?];
    let x = Inputs { q: q.view(), k: k.view(), v: v.view() };
    let mut best = f64::INFINITY;
    let mut timed = |run: &dyn Fn() -> Result<()>| {
        for _ in 0..ROUNDS {
            let start = Instant::now();
            run()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(())
    };
    match name {
        "differential" => parameters::differential(x, &mut timed),
        "mla" => parameters::latent(x, &mut timed),
        "transformer_xl" => parameters::transformer_xl(x, &mut timed),
        "linformer" => parameters::linformer(x, &mut timed),
        "native_sparse" => parameters::native_sparse(x, &mut timed),
        "memorizing" => parameters::memorizing(x, &mut timed),
        _ => timed(&|| once(name, x)),
    }?;
    Ok(best)
}

/// A mechanism without parameters of its own.
fn once(name: &str, x: Inputs<'_, f32, f32>) -> Result<()> {
    let tokens = x.q.shape().seq;
    match name {
        "full" => masked(x, Mask::causal()),
        "window" => masked(x, Mask::window(256)),
        "sparse_transformer" => {
            let stride = tokens.isqrt();
            let pattern = Factors::Strided { stride, window: Window::Paper };
            SparseTransformer::new(pattern)?.forward(x).map(drop)
        }
        "longformer" => Longformer::new(128).global(vec![vec![0]]).forward(x, x).map(drop),
        "bigbird" => {
            let plan = BlockPlan::published([HEADS, tokens.div_ceil(64), 3], 1)?;
            masked(x, BigBird { block: 64, plan, causal: false }.mask()?)
        }
        "lsh" => {
            let hash = AngularHash::new(DIM, 2 * tokens.div_ceil(64), 2, 1)?;
            let buckets = hash.buckets(x.q, Cpu::detect()?)?;
            Reformer::new(64)?.forward(x.q, x.v, &buckets).map(drop)
        }
        "moba" => {
            let layer = Moba::new(64, 4)?;
            layer.forward(x, &layer.choose(x.q, x.k)?).map(drop)
        }
        "infini" => {
            let gate = [0.0; HEADS];
            let tokens = infini::Tokens::new(x.q, x.k, x.v, &gate);
            let layer = Infini::new(512)?;
            let mut memory = layer.memory(&tokens)?;
            layer.forward(&tokens, &mut memory).map(drop)
        }
        "linear" => recurrent(Linear::new(), x),
        "performer" => recurrent(Favor::published(DIM, 1)?, x),
        "efficient" => recurrent(Efficient::new(), x),
        "retention" => recurrent(Retention::new(HEADS), x),
        "scalar_decay" => recurrent(ScalarDecay::new(), x),
        "gla" => recurrent(VectorDecay::new(), x),
        "delta" => recurrent(Delta::new(), x),
        "gated_delta" => recurrent(Delta::gated(), x),
        found => {
            let (what, expected) = ("mechanism to measure", "one of the registry");
            Err(Error::InvalidParameter { what, expected, got: found.to_owned() })
        }
    }
}

fn masked(x: Inputs<'_, f32, f32>, mask: Mask) -> Result<()> {
    Attention::new().mask(mask).forward(x.q, x.k, x.v).map(drop)
}

fn recurrent(mechanism: impl Recurrence, x: Inputs<'_, f32, f32>) -> Result<()> {
    let (form, shape) = (mechanism.form(), x.q.shape());
    let near = |shape: Shape, value: f32| {
        Tensor::from_vec(vec![value; shape.batch * shape.seq * shape.heads * shape.dim], shape)
    };
    let log_decay = match form.decay {
        DecayForm::None => None,
        DecayForm::Scalar => Some(near(shape.per_row(), -0.05)?),
        DecayForm::Vector => Some(near(shape, -0.05)?),
    };
    let beta = form.beta.then(|| near(shape.per_row(), 0.5)).transpose()?;
    let mut tokens = Tokens::new(x.q, x.k, x.v);
    if let Some(log_decay) = &log_decay {
        tokens = tokens.log_decay(log_decay.view());
    }
    if let Some(beta) = &beta {
        tokens = tokens.beta(beta.view());
    }
    let layer = Recurrent::new(mechanism);
    let mut state = layer.state(&tokens)?;
    layer.forward(&tokens, &mut state).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use foveal::registry::MECHANISMS;

    #[test]
    fn every_mechanism_of_the_registry_is_measured_and_nothing_else() {
        for mechanism in MECHANISMS {
            let ran = seconds(mechanism.name, 256);
            assert!(ran.as_ref().is_ok_and(|&s| s > 0.0), "{}: {ran:?}", mechanism.name);
        }
        assert!(matches!(seconds("nothing", 256), Err(Error::InvalidParameter { .. })));
    }
}
