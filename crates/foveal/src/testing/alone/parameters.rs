//! Mechanisms with parameters of their own: usual sizes and small random numbers, made before anything is timed.

use super::{Timed, WINDOW, normal};
use crate::cache::LatentCache;
use crate::differential::{Differential, Lambda, Pairs};
use crate::latent::{LatentAttention, LatentCall, LatentDims, LatentForm, LatentScratch};
use crate::linear::{Linformer, SequenceMatrix, Sharing};
use crate::memory::memorizing::{self, Memorizing};
use crate::nn::RmsNorm;
use crate::plan::Inputs;
use crate::position::RelativeEncoding;
use crate::projection::{Matrix, MatrixShape};
use crate::sparse::{Branches, NativeSizes, NativeSparse, StateHeads};
use crate::{Attention, Mask, Phase, Result, Shape, Tensor, Workspace};

/// Numbers like those that training begins with.
fn numbers(count: usize, seed: u64) -> Result<Vec<f32>> {
    let shape = Shape { batch: 1, seq: 1, heads: 1, dim: count };
    Ok(normal(shape, seed)?.into_vec().into_iter().map(|x| 0.05 * x).collect())
}

/// Half of each head's numbers to each map; values as wide as both.
pub(super) fn differential(x: Inputs<'_, f32, f32>, timed: Timed<'_>) -> Result<()> {
    let half = Shape { dim: x.q.shape().dim / 2, ..x.q.shape() };
    let [q1, q2, k1, k2] = [normal(half, 1)?, normal(half, 2)?, normal(half, 3)?, normal(half, 4)?];
    let vector = vec![0.1; half.dim];
    let layer = Differential {
        attention: &Attention::new().mask(Mask::causal()),
        lambda: Lambda { first: [&vector; 2], second: [&vector; 2], init: Lambda::init_at(0) },
        norm: RmsNorm { weight: &vec![1.0; x.v.shape().dim], epsilon: 1e-5 },
    };
    let pairs = Pairs { q: [q1.view(), q2.view()], k: [k1.view(), k2.view()], v: x.v };
    timed(&|| layer.forward(pairs).map(drop))
}

/// A quarter of all heads' numbers is what they share of a token; keys and values are made of it.
pub(super) fn latent(x: Inputs<'_, f32, f32>, timed: Timed<'_>) -> Result<()> {
    let Shape { heads, dim, seq, .. } = x.q.shape();
    let (rope, nope) = (dim / 4, dim - dim / 4);
    let dims = LatentDims { heads, latent: heads * dim / 4, rope, nope, value: dim };
    let shape = MatrixShape { out_features: heads * (nope + dim), in_features: dims.latent };
    let up = numbers(shape.out_features * shape.in_features, 5)?;
    let attention = Attention::new().mask(Mask::causal());
    let layer = LatentAttention::new(attention, dims, Matrix::from_floats(shape, &up)?)?;
    let mut cache = LatentCache::<f32>::new((dims.latent, rope), seq)?;
    cache.append(normal(Shape { batch: 1, seq, heads: 1, dim: dims.row() }, 2)?.view())?;
    let (phase, form) = (Phase::Prompt, LatentForm::of(Phase::Prompt));
    timed(&|| {
        let mut out = Tensor::zeros(x.q.shape())?;
        let call = LatentCall { q: x.q, stores: &[&cache], phase, form };
        let outputs = (out.view_mut(), None);
        layer.forward(call, outputs, &mut LatentScratch::default(), &mut Workspace::new())
    })
}

/// Scores by content and by distance, of all earlier tokens up to 1024 of them.
pub(super) fn transformer_xl(x: Inputs<'_, f32, f32>, timed: Timed<'_>) -> Result<()> {
    let Shape { heads, dim, seq, .. } = x.q.shape();
    let distances = seq.min(1024);
    let keys = normal(Shape { batch: 1, seq: distances, heads, dim }, 6)?;
    let bias = numbers(heads * dim, 7)?;
    let encoding = RelativeEncoding::new(keys.view(), &bias, &bias)?;
    let attention = Attention::new().mask(Mask::window(distances)).relative_encoding(encoding);
    timed(&|| attention.forward(x.q, x.k, x.v).map(drop))
}

/// 256 mixtures of all tokens.
pub(super) fn linformer(x: Inputs<'_, f32, f32>, timed: Timed<'_>) -> Result<()> {
    let (rank, length) = (256, x.q.shape().seq);
    let matrix = numbers(rank * length, 8)?;
    let sharing = Sharing::KeyValue(SequenceMatrix::new(&matrix, rank, length)?);
    let layer = Linformer { attention: &Attention::new(), sharing };
    timed(&|| layer.forward(x).map(drop))
}

/// The published sizes but for the window, and means as compressed tokens.
pub(super) fn native_sparse(x: Inputs<'_, f32, f32>, timed: Timed<'_>) -> Result<()> {
    let sizes = NativeSizes { window: WINDOW, ..NativeSizes::default() };
    let layer = NativeSparse::new(sizes)?;
    let gates = normal(Shape { dim: 3, ..x.q.shape() }, 9)?;
    timed(&|| {
        let (k, v) = (layer.pool(x.k)?, layer.pool(x.v)?);
        let compressed = Inputs { q: x.q, k: k.view(), v: v.view() };
        let branches = Branches { compressed, selected: x, window: x };
        layer.forward(branches, gates.view()).map(drop)
    })
}

/// Segments, of whose past each token retrieves 32 keys.
pub(super) fn memorizing(x: Inputs<'_, f32, f32>, timed: Timed<'_>) -> Result<()> {
    let Shape { heads, dim, seq, .. } = x.q.shape();
    let sizes = StateHeads { heads, kv_heads: heads, key_dim: dim, value_dim: dim };
    let layer = Memorizing::new(WINDOW, 32, seq.max(1))?;
    let (gate, scale) = (vec![0.0; heads], vec![10.0; heads]);
    let tokens = memorizing::Tokens::new(x.q, x.k, x.v, &gate, &scale);
    timed(&|| {
        let mut state = layer.state(sizes, layer.store::<f32>(sizes)?)?;
        state.forward(&tokens, Phase::Prompt).map(drop)
    })
}
