//! The computation that attention kernels replace: all scores as a matrix, its softmax, its product with the values.
//!
//! ```text
//! for each head:   S = Q Kᵀ [T, T]     P = softmax_rows(scale · S, keys at or before the row)     O = P V
//! ```
//!
//! Products are those of [`foveal::projection`], rows go to threads. 4 T² D operations and 4 T² bytes a head.

use foveal::projection::{
    Activations, Call, Input, Matrix, MatrixShape, Output, project, workspace_bytes,
};
use foveal::{Cpu, Phase, Result, Shape, Tensor, Workspace, nn};
use rayon::prelude::*;

/// The largest S, in numbers.
pub(crate) const MOST: usize = 1 << 28;

/// The output of causal attention, one sequence.
pub(crate) fn causal([q, k, v]: [&Tensor<f32>; 3]) -> Result<Tensor<f32>> {
    let Shape { seq: tokens, heads, dim, .. } = q.shape();
    let cpu = Cpu::detect()?;
    let call = Call { phase: Phase::Prompt, cpu, activations: Activations::F32 };
    let mut workspace = Workspace::new();
    let mut out = vec![0.0; tokens * heads * dim];
    let mut scores = vec![0.0; tokens * tokens];
    let [mut keys, mut values] = [0; 2].map(|_| vec![0.0; tokens * dim]);
    let stride = heads * dim;
    for head in 0..heads {
        for (i, row) in keys.chunks_exact_mut(dim).enumerate() {
            row.copy_from_slice(k.view().row(0, i, head));
            for (d, &value) in v.view().row(0, i, head).iter().enumerate() {
                values[d * tokens + i] = value;
            }
        }
        let shape = MatrixShape { out_features: tokens, in_features: dim };
        let of = Matrix::from_floats(shape, &keys)?;
        workspace.reserve(workspace_bytes(&[of], tokens, call));
        let x = Input { data: &q.as_slice()[head * dim..], rows: tokens, stride };
        project(&of, x, Output { data: &mut scores, stride: tokens }, call, &mut workspace)?;
        softmax(&mut scores, tokens, (dim as f32).powf(-0.5), cpu);
        let shape = MatrixShape { out_features: dim, in_features: tokens };
        let of = Matrix::from_floats(shape, &values)?;
        workspace.reserve(workspace_bytes(&[of], tokens, call));
        let x = Input { data: &scores, rows: tokens, stride: tokens };
        let own = &mut out[head * dim..];
        project(&of, x, Output { data: own, stride }, call, &mut workspace)?;
    }
    Tensor::from_vec(out, q.shape())
}

fn softmax(scores: &mut [f32], tokens: usize, scale: f32, cpu: Cpu) {
    scores.par_chunks_exact_mut(tokens).enumerate().for_each(|(i, row)| {
        let (seen, later) = row.split_at_mut(i + 1);
        seen.iter_mut().for_each(|score| *score *= scale);
        nn::softmax(seen, cpu.level);
        later.fill(0.0);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use foveal::testing::normal;
    use foveal::{Attention, Mask};

    #[test]
    fn it_gives_what_the_kernel_gives() {
        let shape = Shape { batch: 1, seq: 77, heads: 3, dim: 16 };
        let [q, k, v] = [1, 2, 3].map(|seed| normal(shape, seed).unwrap());
        let expected = Attention::new().mask(Mask::causal());
        let expected = expected.forward(q.view(), k.view(), v.view()).unwrap().out;
        let found = causal([&q, &k, &v]).unwrap();
        for (a, b) in found.as_slice().iter().zip(expected.as_slice()) {
            assert!((a - b).abs() < 2e-6, "{a} {b}");
        }
    }
}
