//! Each mechanism of the registry by itself, on random numbers: a layer of 4 heads of 64 numbers reads a text.

mod parameters;

use super::normal;
use crate::linear::{
    DecayForm, Delta, Efficient, Favor, Linear, Recurrence, Recurrent, Retention, ScalarDecay,
    Tokens, VectorDecay,
};
use crate::memory::infini::{self, Infini};
use crate::plan::Inputs;
use crate::sparse::{
    AngularHash, BigBird, BlockPlan, Factors, Longformer, Moba, Reformer, SparseTransformer, Window,
};
use crate::{Attention, Cpu, Error, Mask, Result, Shape, Tensor};

/// Heads of the layer.
pub const HEADS: usize = 4;
/// Numbers of a head.
pub const DIM: usize = 64;
/// Keys of windows, and tokens of segments.
pub const WINDOW: usize = 256;
/// Tokens of blocks and chunks.
const BLOCK: usize = 64;

/// Runs what is to be measured, as often as is needed, and nothing else.
pub type Timed<'t> = &'t mut dyn FnMut(&dyn Fn() -> Result<()>) -> Result<()>;

/// A text of random numbers.
#[derive(Debug, Clone)]
pub struct Text([Tensor<f32>; 3]);

impl Text {
    /// Queries, keys and values of so many tokens.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`].
    pub fn new(tokens: usize) -> Result<Text> {
        let shape = Shape { batch: 1, seq: tokens, heads: HEADS, dim: DIM };
        Ok(Text([normal(shape, 1)?, normal(shape, 2)?, normal(shape, 3)?]))
    }

    /// Queries, keys and values, `[1, tokens, 4, 64]`.
    pub fn tensors(&self) -> [&Tensor<f32>; 3] {
        self.0.each_ref()
    }

    /// Hands the reading by the mechanism of this name to `timed`; parameters are made before.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a name that the registry does not have; what `timed` returns.
    pub fn read(&self, name: &str, timed: Timed<'_>) -> Result<()> {
        let [q, k, v] = &self.0;
        let x = Inputs { q: q.view(), k: k.view(), v: v.view() };
        match name {
            "differential" => parameters::differential(x, timed),
            "mla" => parameters::latent(x, timed),
            "transformer_xl" => parameters::transformer_xl(x, timed),
            "linformer" => parameters::linformer(x, timed),
            "native_sparse" => parameters::native_sparse(x, timed),
            "memorizing" => parameters::memorizing(x, timed),
            _ => timed(&|| once(name, x)),
        }
    }
}

/// A mechanism without parameters of its own.
fn once(name: &str, x: Inputs<'_, f32, f32>) -> Result<()> {
    let tokens = x.q.shape().seq;
    match name {
        "full" => masked(x, Mask::causal()),
        "window" => masked(x, Mask::window(WINDOW)),
        "sparse_transformer" => {
            let stride = tokens.isqrt().max(1);
            let pattern = Factors::Strided { stride, window: Window::Paper };
            SparseTransformer::new(pattern)?.forward(x).map(drop)
        }
        "longformer" => {
            let layer = Longformer::new(WINDOW - 1).causal().global(vec![vec![0]]);
            layer.forward(x, x).map(drop)
        }
        "bigbird" => {
            let plan = BlockPlan::published([HEADS, tokens.div_ceil(BLOCK), 3], 1)?;
            masked(x, BigBird { block: BLOCK, plan, causal: false }.mask()?)
        }
        "lsh" => {
            let hash = AngularHash::new(DIM, 2 * tokens.div_ceil(BLOCK), 2, 1)?;
            let buckets = hash.buckets(x.q, Cpu::detect()?)?;
            Reformer::new(BLOCK)?.forward(x.q, x.v, &buckets).map(drop)
        }
        "moba" => {
            let layer = Moba::new(BLOCK, 4)?;
            layer.forward(x, &layer.choose(x.q, x.k)?).map(drop)
        }
        "infini" => {
            let gate = [0.0; HEADS];
            let tokens = infini::Tokens::new(x.q, x.k, x.v, &gate);
            let layer = Infini::new(WINDOW)?;
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
    let all = |shape: Shape, value: f32| {
        Tensor::from_vec(vec![value; shape.batch * shape.seq * shape.heads * shape.dim], shape)
    };
    let log_decay = match form.decay {
        DecayForm::None => None,
        DecayForm::Scalar => Some(all(shape.per_row(), -0.05)?),
        DecayForm::Vector => Some(all(shape, -0.05)?),
    };
    let beta = form.beta.then(|| all(shape.per_row(), 0.01)).transpose()?;
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
    use crate::registry::MECHANISMS;

    #[test]
    fn every_mechanism_of_the_registry_reads_a_text_and_nothing_else_does() {
        let text = Text::new(256).unwrap();
        for mechanism in MECHANISMS {
            let mut runs = 0;
            let read = text.read(mechanism.name, &mut |run| {
                runs += 1;
                run()
            });
            assert_eq!((read, runs), (Ok(()), 1), "{}", mechanism.name);
        }
        let other = text.read("nothing", &mut |run| run());
        assert!(matches!(other, Err(Error::InvalidParameter { .. })));
    }
}
