//! The output head with its loss: logits and their gradient live for a block of rows only.
//!
//! ```text
//! loss = Σ_r −log softmax(cap(norm(x_r) Eᵀ))_target
//! ```
//!
//! Rows without a target never meet the head. The gradient of the logits takes their place, and goes back through the head at
//! once: forward and backward are one pass. 6 · rows · vocab · width operations; memory for a block of logits.

use std::ops::Range;

use foveal::Gradient;
use foveal::nn::{CrossEntropy, IGNORED, cross_entropy};
use foveal::projection::MatrixShape;

use super::Loss;
use super::tools::{Normed, Projected, Ranges, Tools, range};
use crate::Error;
use crate::config::ModelConfig;

/// Logits of a block, about.
const LOGITS: usize = 1 << 22;
/// Blocks are multiples of this many rows: as many as weight gradients sum up in one run.
const ROWS: usize = 256;

/// The norm and the projection to logits.
#[derive(Debug)]
pub(super) struct Head {
    /// `None` where rows come as the head reads them.
    norm: Option<Normed>,
    projection: Projected,
    cap: Option<f32>,
}

/// What is done with the loss.
#[derive(Clone, Copy, Debug)]
pub(super) struct Objection<'a> {
    pub(super) targets: &'a [u32],
    pub(super) smoothing: f32,
    /// What the gradient of the mean is multiplied by; `None` for no gradient.
    pub(super) scale: Option<f32>,
}

impl Head {
    pub(super) fn new(config: &ModelConfig, ranges: &Ranges) -> Result<Head, Error> {
        let name = if config.tied_head { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let shape = MatrixShape { out_features: config.vocab, in_features: config.width };
        let norm = range(ranges, "model.norm.weight")?;
        Ok(Head {
            norm: Some(Normed {
                range: norm,
                epsilon: config.norm_epsilon,
                offset: config.norm_offset,
            }),
            projection: Projected { weight: range(ranges, name)?, bias: None, shape },
            cap: config.logit_softcap,
        })
    }

    /// A projection alone.
    pub(super) fn plain(weight: Range<usize>, vocab: usize, width: usize) -> Head {
        let shape = MatrixShape { out_features: vocab, in_features: width };
        Head { norm: None, projection: Projected { weight, bias: None, shape }, cap: None }
    }

    /// The loss of rows `x`; with a gradient, theirs, and those of the parameters are added to `gradients`.
    pub(super) fn loss(
        &self,
        parameters: &[f32],
        (x, of): (&[f32], Objection<'_>),
        mut gradients: Option<&mut [f32]>,
        tools: &mut Tools<'_>,
    ) -> Result<(Loss, Option<Vec<f32>>), Error> {
        let width = self.projection.shape.in_features;
        let with: Vec<usize> =
            (0..of.targets.len()).filter(|&n| of.targets[n] != IGNORED).collect();
        let mut d_x = gradients.is_some().then(|| tools.pool.zeros(x.len()));
        let rows = (LOGITS / self.projection.shape.out_features.max(1)).next_multiple_of(ROWS);
        let rows = rows.clamp(ROWS, 4 * ROWS);
        let factor = of.scale.map(|scale| scale / with.len().max(1) as f32);
        let wanted = CrossEntropy { smoothing: of.smoothing, cap: self.cap, gradient: factor };
        let mut sum = 0.0;
        for block in with.chunks(rows) {
            let targets: Vec<u32> = block.iter().map(|&row| of.targets[row]).collect();
            let range = block[0] * width..(block[block.len() - 1] + 1) * width;
            let arenas = (parameters, gradients.as_deref_mut());
            if range.len() == block.len() * width {
                // Neighbours are read and written where they lie.
                let d_own = d_x.as_mut().map(|d_x| &mut d_x[range.clone()]);
                sum += self.block(arenas, (&x[range], &targets, d_own), wanted, tools)?;
                continue;
            }
            let mut own = tools.pool.take(block.len() * width);
            for (own, &row) in own.chunks_exact_mut(width).zip(block) {
                own.copy_from_slice(&x[row * width..(row + 1) * width]);
            }
            let mut d_own = d_x.is_some().then(|| tools.pool.zeros(own.len()));
            let rows = (&own[..], &targets[..], d_own.as_deref_mut());
            sum += self.block(arenas, rows, wanted, tools)?;
            if let (Some(d_x), Some(d_own)) = (&mut d_x, d_own) {
                for (d_own, &row) in d_own.chunks_exact(width).zip(block) {
                    d_x[row * width..(row + 1) * width].copy_from_slice(d_own);
                }
                tools.pool.give(d_own);
            }
            tools.pool.give(own);
        }
        Ok((Loss { sum, targets: with.len() }, d_x))
    }

    /// The logits of rows, into `logits`; without norm and cap, which a head that is [plain](Head::plain) has not.
    pub(super) fn logits(
        &self,
        parameters: &[f32],
        x: &[f32],
        logits: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        self.projection.forward(parameters, x, logits, tools)
    }

    /// The likeliest token of each row with a target, in order.
    pub(super) fn likeliest(
        &self,
        parameters: &[f32],
        (x, targets): (&[f32], &[u32]),
        tools: &mut Tools<'_>,
    ) -> Result<Vec<u32>, Error> {
        let MatrixShape { out_features: vocab, in_features: width } = self.projection.shape;
        let rows = x.chunks_exact(width).zip(targets).filter(|(_, target)| **target != IGNORED);
        let x: Vec<f32> = rows.flat_map(|(row, _)| row).copied().collect();
        let mut likeliest = Vec::with_capacity(x.len() / width.max(1));
        let block = (LOGITS / vocab.max(1)).clamp(1, 4 * ROWS);
        for x in x.chunks(block * width) {
            let mut normed = tools.pool.copy(x);
            if let Some(norm) = &self.norm {
                norm.forward(parameters, x, &mut normed, tools)?;
            }
            let mut logits = tools.pool.take(x.len() / width * vocab);
            self.projection.forward(parameters, &normed, &mut logits, tools)?;
            // A cap changes no order.
            let best = |row: &[f32]| (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            likeliest.extend(logits.chunks_exact(vocab).filter_map(best).map(|n| n as u32));
            [normed, logits].into_iter().for_each(|buffer| tools.pool.give(buffer));
        }
        Ok(likeliest)
    }

    /// The loss of rows; their gradients are added to those that are given.
    fn block(
        &self,
        (parameters, gradients): (&[f32], Option<&mut [f32]>),
        (x, targets, d_x): (&[f32], &[u32], Option<&mut [f32]>),
        wanted: CrossEntropy,
        tools: &mut Tools<'_>,
    ) -> Result<f64, Error> {
        let mut normed = tools.pool.take(x.len());
        match &self.norm {
            Some(norm) => norm.forward(parameters, x, &mut normed, tools)?,
            None => normed.copy_from_slice(x),
        }
        let mut logits = tools.pool.take(targets.len() * self.projection.shape.out_features);
        self.projection.forward(parameters, &normed, &mut logits, tools)?;
        let loss = cross_entropy(wanted, &mut logits, targets, tools.cpu)?;
        if let (Some(gradients), Some(d_x)) = (gradients, d_x) {
            let arenas = (parameters, &mut *gradients);
            self.projection.weight_gradient(arenas, (&normed, &logits), tools)?;
            let d_normed = Gradient::Write(&mut normed[..]);
            self.projection.input_gradient(parameters, &logits, d_normed, tools)?;
            match &self.norm {
                Some(norm) => norm.backward((parameters, gradients), (x, &normed), d_x, tools)?,
                None => tools.add(d_x, &normed)?,
            }
        }
        [normed, logits].into_iter().for_each(|buffer| tools.pool.give(buffer));
        Ok(loss)
    }
}
