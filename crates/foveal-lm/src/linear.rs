//! Projections `y = x Wᵀ + b` with weights in memory, or in the form in which their file stores them.

use foveal::projection::{
    Activations, Call, Input, Matrix, MatrixShape, Output, Projection, embed, project_many,
    workspace_bytes,
};
use foveal::{Cpu, Phase, Workspace, nn};

use crate::Error;
use crate::weights::Weight;

/// A matrix `[out_features, in_features]`, and a bias or none: numbers, gradients, or a file's weights, as `W` and `V`
/// say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Affine<W, V = W> {
    /// The matrix, row-major.
    pub weight: W,
    /// A number for each of its rows.
    pub bias: Option<V>,
}

/// A projection of a model's file.
pub(crate) type Linear = Affine<Weight, Vec<f32>>;

/// A projection as kernels read it.
pub(crate) type LinearRef<'a> = Affine<Matrix<'a>, &'a [f32]>;

/// How a call runs: what of the machine it uses, which kernels it takes, where it puts intermediate results.
#[derive(Debug)]
pub struct Run<'a> {
    /// Instructions and threads.
    pub cpu: Cpu,
    /// Which kernels.
    pub phase: Phase,
    /// What projections round their inputs to.
    pub activations: Activations,
    /// Scratch memory; it grows as needed.
    pub workspace: &'a mut Workspace,
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

    /// The projection as kernels read it.
    pub(crate) fn view(&self) -> Result<LinearRef<'_>, Error> {
        Ok(LinearRef { weight: self.matrix()?, bias: self.bias.as_deref() })
    }

    /// Projects rows `[rows, in_features]` once, in f32, as a model is loaded. Allocates the result.
    pub(crate) fn rows_of(&self, x: &[f32]) -> Result<Vec<f32>, Error> {
        let mut y = vec![0.0; x.len() / self.in_features().max(1) * self.out_features()];
        let (cpu, mut workspace) = (Cpu::detect()?, Workspace::new());
        let (phase, activations) = (Phase::Prompt, Activations::F32);
        let mut run = Run { cpu, phase, activations, workspace: &mut workspace };
        self.forward(x, &mut y, &mut run)?;
        Ok(y)
    }

    /// Reads the rows of a table of embeddings into `x`, `[tokens, in_features]`.
    pub(crate) fn embed(&self, tokens: &[u32], x: &mut [f32], cpu: Cpu) -> Result<(), Error> {
        Ok(embed(&self.matrix()?, tokens, x, cpu.level)?)
    }

    /// Projects each row of `x`, `[rows, in_features]`, into `y`, `[rows, out_features]`.
    pub(crate) fn forward(&self, x: &[f32], y: &mut [f32], run: &mut Run<'_>) -> Result<(), Error> {
        forward_together(x, [(self.view()?, y)], run)
    }
}

/// Projects the same rows by several matrices, in one go for all threads.
pub(crate) fn forward_together<const N: usize>(
    x: &[f32],
    linears: [(LinearRef<'_>, &mut [f32]); N],
    run: &mut Run<'_>,
) -> Result<(), Error> {
    let Some(stride) = linears.first().map(|(linear, _)| linear.weight.shape().in_features) else {
        return Ok(());
    };
    let rows = x.len() / stride.max(1);
    let call = Call { phase: run.phase, cpu: run.cpu, activations: run.activations };
    let matrices = linears.each_ref().map(|(linear, _)| linear.weight);
    let biases = linears.each_ref().map(|(linear, _)| linear.bias);
    let mut projections = linears.map(|(linear, data)| {
        let stride = linear.weight.shape().out_features;
        Projection { weights: linear.weight, output: Output { data, stride } }
    });
    run.workspace.reserve(workspace_bytes(&matrices, rows, call));
    project_many(&mut projections, Input { data: x, rows, stride }, call, run.workspace)?;
    for (projection, bias) in projections.iter_mut().zip(biases) {
        let Some(bias) = bias else { continue };
        for row in projection.output.data.chunks_mut(bias.len().max(1)) {
            nn::add(row, bias, run.cpu.level)?;
        }
    }
    Ok(())
}
