//! Projections and norms whose numbers lie in the arena of parameters: forward, and backward into the arena of gradients.

use std::collections::BTreeMap;
use std::ops::Range;

use foveal::nn::{self, NormBackward, NormGradients, RmsNorm, rms_norm, rms_norm_backward};
use foveal::projection::{
    Activations, Input, Matrix, MatrixShape, Output, ProjectionBackward, ProjectionGradients,
    backward_workspace_bytes, project_backward_as,
};
use foveal::{Cpu, Gradient, Phase, Workspace};

use super::scratch::Pool;
use crate::Error;
use crate::linear::{Affine, LinearRef, Run, forward_together};

/// Rows that are normalised at a time: sums over rows are joined in the order of such pieces.
const ROWS: usize = 64;

/// What a call works with.
#[derive(Debug)]
pub(crate) struct Tools<'a> {
    pub(crate) cpu: Cpu,
    /// What projections round their inputs to.
    pub(crate) activations: Activations,
    pub(crate) workspace: &'a mut Workspace,
    pub(crate) pool: &'a mut Pool,
}

impl Tools<'_> {
    /// Whether factors are rounded to bf16 before they are multiplied.
    pub(crate) fn rounds(&self) -> bool {
        self.activations != Activations::F32 && self.cpu.level.multiplies_bf16()
    }

    /// The same as models that are run take it.
    pub(crate) fn run(&mut self) -> Run<'_> {
        Run {
            cpu: self.cpu,
            phase: Phase::Prompt,
            activations: self.activations,
            workspace: self.workspace,
        }
    }

    /// `x += y`.
    pub(crate) fn add(&self, x: &mut [f32], y: &[f32]) -> Result<(), Error> {
        same("rows that are added", x.len(), y.len())?;
        const PIECE: usize = 1 << 14;
        let level = self.cpu.level;
        self.cpu.for_each(x.chunks_mut(PIECE).zip(y.chunks(PIECE)), |(x, y)| {
            nn::add(x, y, level).expect("pieces of the same length");
        });
        Ok(())
    }
}

/// Where the tensors of a model lie, by name.
pub(crate) type Ranges = BTreeMap<String, Range<usize>>;

/// The range of a tensor that is known to be there.
pub(crate) fn range(ranges: &Ranges, name: &str) -> Result<Range<usize>, Error> {
    let missing = || crate::weights::Error::MissingTensor { name: name.to_owned() };
    Ok(ranges.get(name).cloned().ok_or_else(missing)?)
}

/// A projection `y = x Wᵀ + b`.
#[derive(Clone, Debug)]
pub(crate) struct Projected {
    pub(crate) weight: Range<usize>,
    pub(crate) bias: Option<Range<usize>>,
    pub(crate) shape: MatrixShape,
}

impl Projected {
    /// The matrix of this name, `[out_features, in_features]`, and its bias where it is asked for: `name.weight`,
    /// `name.bias`.
    pub(crate) fn new(
        ranges: &Ranges,
        name: &str,
        [out_features, in_features]: [usize; 2],
        biased: bool,
    ) -> Result<Projected, Error> {
        let weight = range(ranges, &format!("{name}.weight"))?;
        same("numbers of a matrix", out_features * in_features, weight.len())?;
        let bias = biased.then(|| range(ranges, &format!("{name}.bias"))).transpose()?;
        Ok(Projected { weight, bias, shape: MatrixShape { out_features, in_features } })
    }

    /// This one and the next, which lie side by side, as one.
    pub(crate) fn with(self, next: &Projected) -> Result<Projected, Error> {
        same("numbers before a neighbouring matrix", self.weight.end, next.weight.start)?;
        let out_features = self.shape.out_features + next.shape.out_features;
        let weight = self.weight.start..next.weight.end;
        Ok(Projected { weight, bias: None, shape: MatrixShape { out_features, ..self.shape } })
    }

    /// As kernels read it.
    pub(crate) fn view<'a>(&self, parameters: &'a [f32]) -> Result<LinearRef<'a>, Error> {
        let weight = Matrix::from_floats(self.shape, &parameters[self.weight.clone()])?;
        Ok(Affine { weight, bias: self.bias.clone().map(|bias| &parameters[bias]) })
    }

    /// Rows of `x` projected into `y`.
    pub(crate) fn forward(
        &self,
        parameters: &[f32],
        x: &[f32],
        y: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        forward_together(x, [(self.view(parameters)?, y)], &mut tools.run())
    }

    /// Gradients of its parameters are added to `gradients`, those of its inputs go to `d_x`.
    pub(crate) fn backward(
        &self,
        (parameters, gradients): (&[f32], &mut [f32]),
        (x, d_y): (&[f32], &[f32]),
        d_x: Gradient<&mut [f32]>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        self.input_gradient(parameters, d_y, d_x, tools)?;
        self.weight_gradient((parameters, gradients), (x, d_y), tools)
    }

    /// The gradient of inputs alone.
    pub(crate) fn input_gradient(
        &self,
        parameters: &[f32],
        d_y: &[f32],
        d_x: Gradient<&mut [f32]>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let stride = self.shape.in_features;
        let d_x = d_x.map(|data| Output { data, stride });
        let places = ProjectionGradients { d_x, ..ProjectionGradients::default() };
        self.gradient(parameters, (&[], d_y), places, tools)
    }

    /// The gradients of the matrix and of the bias are added to `gradients`.
    pub(crate) fn weight_gradient(
        &self,
        (parameters, gradients): (&[f32], &mut [f32]),
        (x, d_y): (&[f32], &[f32]),
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let bias = self.bias.clone().unwrap_or(0..0);
        let [d_weights, d_bias] = gradients
            .get_disjoint_mut([self.weight.clone(), bias])
            .map_err(|_| lengths("gradients of a projection", self.weight.end, 0))?;
        let places = ProjectionGradients {
            d_weights: Gradient::Add(d_weights),
            d_bias: if self.bias.is_some() { Gradient::Add(d_bias) } else { Gradient::Skip },
            ..ProjectionGradients::default()
        };
        self.gradient(parameters, (x, d_y), places, tools)
    }

    fn gradient(
        &self,
        parameters: &[f32],
        (x, d_y): (&[f32], &[f32]),
        places: ProjectionGradients<'_>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let MatrixShape { out_features, in_features } = self.shape;
        let rows = d_y.len() / out_features.max(1);
        let x = Input { data: x, rows, stride: in_features };
        let d_y = Input { data: d_y, rows, stride: out_features };
        let weights = self.view(parameters)?.weight;
        tools.workspace.reserve(backward_workspace_bytes(tools.cpu));
        let projection = ProjectionBackward { weights, x, d_y };
        let how = (tools.cpu, tools.activations);
        Ok(project_backward_as(projection, places, how, tools.workspace)?)
    }
}

/// A norm over rows of `range.len()` numbers.
#[derive(Clone, Debug)]
pub(crate) struct Normed {
    pub(crate) range: Range<usize>,
    pub(crate) epsilon: f32,
    /// What is added to every stored weight.
    pub(crate) offset: f32,
}

impl Normed {
    fn weight(&self, parameters: &[f32], tools: &mut Tools<'_>) -> Vec<f32> {
        let mut weight = tools.pool.copy(&parameters[self.range.clone()]);
        weight.iter_mut().for_each(|weight| *weight += self.offset);
        weight
    }

    /// Normalises each row of `x` into `y`.
    pub(crate) fn forward(
        &self,
        parameters: &[f32],
        x: &[f32],
        y: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let width = self.range.len().max(1);
        same("normalised rows", x.len(), y.len())?;
        same("whole rows to normalise", x.len() / width * width, x.len())?;
        let weight = self.weight(parameters, tools);
        let norm = RmsNorm { weight: &weight, epsilon: self.epsilon };
        let level = tools.cpu.level;
        tools.cpu.for_each(x.chunks(ROWS * width).zip(y.chunks_mut(ROWS * width)), |(x, y)| {
            rms_norm(norm, x, y, level).expect("whole rows of the same length");
        });
        tools.pool.give(weight);
        Ok(())
    }

    /// Adds the gradient of the weights to `gradients`, and that of the rows to `d_x`.
    pub(crate) fn backward(
        &self,
        (parameters, gradients): (&[f32], &mut [f32]),
        (x, d_y): (&[f32], &[f32]),
        d_x: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let width = self.range.len().max(1);
        same("gradient of normalised rows", x.len(), d_y.len())?;
        same("gradient of rows to normalise", x.len(), d_x.len())?;
        same("whole rows to normalise", x.len() / width * width, x.len())?;
        let piece = ROWS * width;
        let weight = self.weight(parameters, tools);
        let norm = RmsNorm { weight: &weight, epsilon: self.epsilon };
        let mut sums = tools.pool.take(x.len().div_ceil(piece) * width);
        let rows = x.chunks(piece).zip(d_y.chunks(piece)).zip(d_x.chunks_mut(piece));
        let level = tools.cpu.level;
        tools.cpu.for_each(rows.zip(sums.chunks_mut(width)), |(((x, d_y), d_x), sums)| {
            let places = NormGradients {
                d_x: Gradient::Add(d_x),
                d_weight: Gradient::Write(sums),
                d_bias: Gradient::Skip,
            };
            rms_norm_backward(norm, NormBackward { x, d_y }, places, level)
                .expect("whole rows of the same length");
        });
        for sums in sums.chunks(width) {
            nn::add(&mut gradients[self.range.clone()], sums, level)?;
        }
        tools.pool.give(sums);
        tools.pool.give(weight);
        Ok(())
    }
}

/// Refuses two lengths that differ.
pub(crate) fn same(what: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if expected == got { Ok(()) } else { Err(lengths(what, expected, got)) }
}

fn lengths(what: &'static str, expected: usize, got: usize) -> Error {
    foveal::Error::LengthMismatch { what, expected, got }.into()
}
