//! Projections `y = x Wᵀ + b` with weights in the form in which their file stores them.

use foveal::projection::{
    Call, Input, Matrix, MatrixShape, Output, Projection, embed, project_many, workspace_bytes,
};
use foveal::{Cpu, Phase, Workspace};

use crate::Error;
use crate::weights::Weight;

/// A matrix `[out_features, in_features]`, and a bias or none.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    weight: Weight,
    bias: Option<Vec<f32>>,
}

/// How a call runs: what of the machine it uses, which kernels it takes, where it puts intermediate results.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    pub(crate) cpu: Cpu,
    pub(crate) phase: Phase,
    pub(crate) workspace: &'a mut Workspace,
}

impl Linear {
    pub(crate) fn new(weight: Weight, bias: Option<Vec<f32>>) -> Linear {
        Linear { weight, bias }
    }

    /// Numbers of an input row.
    pub(crate) fn in_features(&self) -> usize {
        self.weight.in_features()
    }

    /// Numbers of an output row.
    pub(crate) fn out_features(&self) -> usize {
        self.weight.out_features()
    }

    fn matrix(&self) -> Result<Matrix<'_>, Error> {
        let shape = MatrixShape {
            out_features: self.weight.out_features(),
            in_features: self.weight.in_features(),
        };
        Ok(Matrix::new(self.weight.format(), shape, self.weight.bytes())?)
    }

    /// Reads the rows of a table of embeddings into `x`, `[tokens, in_features]`.
    pub(crate) fn embed(&self, tokens: &[u32], x: &mut [f32], cpu: Cpu) -> Result<(), Error> {
        Ok(embed(&self.matrix()?, tokens, x, cpu.level)?)
    }

    /// Projects each row of `x`, `[rows, in_features]`, into `y`, `[rows, out_features]`.
    pub(crate) fn forward(&self, x: &[f32], y: &mut [f32], run: &mut Run<'_>) -> Result<(), Error> {
        forward_together(x, [(self, y)], run)
    }
}

/// Projects the same rows by several matrices, in one go for all threads.
pub(crate) fn forward_together<const N: usize>(
    x: &[f32],
    linears: [(&Linear, &mut [f32]); N],
    run: &mut Run<'_>,
) -> Result<(), Error> {
    let Some(stride) = linears.first().map(|(linear, _)| linear.in_features()) else {
        return Ok(());
    };
    let rows = x.len() / stride.max(1);
    let call = Call { phase: run.phase, cpu: run.cpu };
    let mut matrices = Vec::with_capacity(N);
    let mut biases = Vec::with_capacity(N);
    let mut projections = Vec::with_capacity(N);
    for (linear, data) in linears {
        let weights = linear.matrix()?;
        matrices.push(weights);
        biases.push(linear.bias.as_deref());
        let stride = linear.out_features();
        projections.push(Projection { weights, output: Output { data, stride } });
    }
    run.workspace.reserve(workspace_bytes(&matrices, rows, call));
    project_many(&mut projections, Input { data: x, rows, stride }, call, run.workspace)?;
    for (projection, bias) in projections.iter_mut().zip(biases) {
        let Some(bias) = bias else { continue };
        for row in projection.output.data.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    }
    Ok(())
}
