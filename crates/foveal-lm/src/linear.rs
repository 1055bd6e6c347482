//! Projections `y = x Wᵀ + b` with weights in the form in which their file stores them.

use foveal::projection::{Matrix, project};
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

    /// Projects each row of `x`, `[rows, in_features]`, into `y`, `[rows, out_features]`.
    pub(crate) fn forward(&self, x: &[f32], y: &mut [f32], run: &mut Run<'_>) -> Result<(), Error> {
        let (out_features, in_features) = (self.weight.out_features(), self.weight.in_features());
        let matrix =
            Matrix::new(self.weight.format(), out_features, in_features, self.weight.bytes())?;
        project(&matrix, x, y, run.phase, run.cpu, run.workspace)?;
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(out_features) {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
        Ok(())
    }
}
