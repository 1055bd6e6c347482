//! One mechanism on random numbers: a layer of 4 heads of 64 numbers reads a text.

use foveal::linear::{
    DecayForm, Delta, Efficient, Favor, Linear, Recurrence, Recurrent, Retention, ScalarDecay,
    Tokens, VectorDecay,
};
use foveal::memory::infini::{self, Infini};
use foveal::memory::memorizing::{self, Memorizing};
use foveal::plan::Inputs;
use foveal::sparse::{
    AngularHash, Branches, Factors, Longformer, Moba, NativeSizes, NativeSparse, Reformer,
    SparseTransformer, StateHeads, Window,
};
use foveal::testing::normal;
use foveal::{Attention, Cpu, Error, Mask, Phase, Result, Shape, Tensor};

use super::unfused;

pub(crate) const HEADS: usize = 4;
pub(crate) const DIM: usize = 64;
/// Keys of windows, and tokens of segments.
pub(crate) const WINDOW: usize = 256;
/// Tokens of blocks and chunks.
const BLOCK: usize = 64;
/// Entries that a query retrieves.
const TOP: usize = 32;

/// What can be run: the computation that kernels replace, and the mechanisms that need no parameters of their own.
pub(crate) const NAMES: [&str; 17] = [
    "unfused",
    "full",
    "window",
    "sparse_transformer",
    "longformer",
    "lsh",
    "moba",
    "native_sparse",
    "linear",
    "performer",
    "efficient",
    "retention",
    "scalar_decay",
    "gla",
    "gated_delta",
    "infini",
    "memorizing",
];

/// Bytes that a text of so many tokens leaves behind in such a layer, keys and values as f16, matrices as f32.
pub(crate) fn state_bytes(name: &str, tokens: usize) -> usize {
    let row = 2 * HEADS * DIM * 2;
    let matrices = HEADS * DIM * DIM * 4;
    match name {
        "window" => row * tokens.min(WINDOW),
        "longformer" => row * tokens.min(WINDOW + 1),
        "sparse_transformer" => row * tokens,
        "performer" => {
            HEADS
                * Favor::published(DIM, 1)
                    .map_or(0, |favor| favor.features().count() * (DIM + 1) * 4)
        }
        "linear" | "efficient" => matrices + HEADS * DIM * 4,
        "retention" | "scalar_decay" | "gla" | "gated_delta" => matrices,
        "infini" => matrices + HEADS * DIM * 4 + row * tokens.min(WINDOW),
        // Keys as they are, and their compressed ones.
        "native_sparse" => row * tokens + row * tokens / 16,
        _ => row * tokens,
    }
}

/// A text of random numbers.
pub(crate) struct Text {
    q: Tensor<f32>,
    k: Tensor<f32>,
    v: Tensor<f32>,
}

impl Text {
    pub(crate) fn new(tokens: usize) -> Result<Text> {
        let shape = Shape { batch: 1, seq: tokens, heads: HEADS, dim: DIM };
        Ok(Text { q: normal(shape, 1)?, k: normal(shape, 2)?, v: normal(shape, 3)? })
    }

    /// Reads it with a mechanism.
    pub(crate) fn read(&self, name: &str) -> Result<()> {
        let x = Inputs { q: self.q.view(), k: self.k.view(), v: self.v.view() };
        let tokens = self.q.shape().seq;
        match name {
            "unfused" => unfused::causal([&self.q, &self.k, &self.v]).map(drop),
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
            "lsh" => {
                let hash = AngularHash::new(DIM, 2 * tokens.div_ceil(BLOCK), 2, 1)?;
                let buckets = hash.buckets(x.q, Cpu::detect()?)?;
                Reformer::new(BLOCK)?.forward(x.q, x.v, &buckets).map(drop)
            }
            "moba" => {
                let layer = Moba::new(BLOCK, 4)?;
                layer.forward(x, &layer.choose(x.q, x.k)?).map(drop)
            }
            "native_sparse" => native(x),
            "infini" => {
                let gate = [0.0; HEADS];
                let tokens = infini::Tokens::new(x.q, x.k, x.v, &gate);
                let layer = Infini::new(WINDOW)?;
                layer.forward(&tokens, &mut layer.memory(&tokens)?).map(drop)
            }
            "memorizing" => memorizing(x),
            "linear" => recurrent(Linear::new(), x),
            "performer" => recurrent(Favor::published(DIM, 1)?, x),
            "efficient" => recurrent(Efficient::new(), x),
            "retention" => recurrent(Retention::new(HEADS), x),
            "scalar_decay" => recurrent(ScalarDecay::new(), x),
            "gla" => recurrent(VectorDecay::new(), x),
            "gated_delta" => recurrent(Delta::gated(), x),
            found => {
                let (what, expected) =
                    ("mechanism to measure", "one without parameters of its own");
                Err(Error::InvalidParameter { what, expected, got: found.to_owned() })
            }
        }
    }
}

fn masked(x: Inputs<'_, f32, f32>, mask: Mask) -> Result<()> {
    Attention::new().mask(mask).forward(x.q, x.k, x.v).map(drop)
}

fn native(x: Inputs<'_, f32, f32>) -> Result<()> {
    let sizes = NativeSizes { window: WINDOW, ..NativeSizes::default() };
    let layer = NativeSparse::new(sizes)?;
    let means = [layer.pool(x.k)?, layer.pool(x.v)?];
    let gates = Tensor::zeros(Shape { dim: 3, ..x.q.shape() })?;
    let compressed = Inputs { q: x.q, k: means[0].view(), v: means[1].view() };
    let inputs = Branches { compressed, selected: x, window: x };
    layer.forward(inputs, gates.view()).map(drop)
}

fn memorizing(x: Inputs<'_, f32, f32>) -> Result<()> {
    let (gate, scale) = ([0.0; HEADS], [1.0; HEADS]);
    let heads = StateHeads { heads: HEADS, kv_heads: HEADS, key_dim: DIM, value_dim: DIM };
    let layer = Memorizing::new(WINDOW, TOP, x.q.shape().seq.max(1))?;
    let store = layer.store::<f32>(heads)?;
    let tokens = memorizing::Tokens::new(x.q, x.k, x.v, &gate, &scale);
    layer.state(heads, store)?.forward(&tokens, Phase::Prompt).map(drop)
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
    layer.forward(&tokens, &mut layer.state(&tokens)?).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_reads_a_text() {
        let text = Text::new(200).unwrap();
        for name in NAMES {
            text.read(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(state_bytes(name, 4096) > 0);
        }
        assert!(text.read("nothing").is_err());
    }
}
