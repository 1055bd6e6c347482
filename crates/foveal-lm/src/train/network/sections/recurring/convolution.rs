//! Short causal convolutions of queries, keys and values, channel by channel, with SiLU behind them.
//!
//! ```text
//! y_t = silu(Σ_i w_i ∘ x_{t−K+1+i})        each sequence for itself, on from its last K − 1 inputs
//! ```
//!
//! Source: [`foveal::nn::short_conv`]. The arena holds taps as files do, `[channels, 1, K]`; kernels take them tap by tap. Sums
//! over sequences are joined in their order.

use std::ops::Range;

use foveal::Gradient;
use foveal::nn::{self, ConvBackward, ConvGradients, ShortConv};

use super::SectionPlace;
use crate::Error;
use crate::train::network::tools::{Tools, range, same};

/// One of them.
#[derive(Debug)]
pub(super) struct Convolution {
    taps: Range<usize>,
    channels: usize,
}

impl Convolution {
    pub(super) fn new(
        name: &str,
        channels: usize,
        place: SectionPlace<'_>,
    ) -> Result<Convolution, Error> {
        let taps = range(place.ranges, &place.name(name))?;
        let convolution = Convolution { taps, channels };
        convolution.view(&vec![0.0; convolution.taps.len()]).state_len()?;
        Ok(convolution)
    }

    fn count(&self) -> usize {
        self.taps.len() / self.channels.max(1)
    }

    /// Numbers of the last inputs of a sequence.
    pub(super) fn state(&self) -> usize {
        self.taps.len().saturating_sub(self.channels)
    }

    /// Tap by tap.
    fn by_tap(&self, parameters: &[f32], tools: &mut Tools<'_>) -> Vec<f32> {
        let (count, by_channel) = (self.count(), &parameters[self.taps.clone()]);
        let mut taps = tools.pool.take(by_channel.len());
        for (n, tap) in taps.chunks_mut(self.channels.max(1)).enumerate() {
            tap.iter_mut().zip(by_channel.iter().skip(n).step_by(count)).for_each(|(t, x)| *t = *x);
        }
        taps
    }

    fn view<'a>(&self, taps: &'a [f32]) -> ShortConv<'a> {
        ShortConv { weight: taps, bias: None, channels: self.channels, silu: true }
    }

    /// What it gives of the rows of all sequences, whose last inputs go on.
    pub(super) fn forward(
        &self,
        parameters: &[f32],
        x: &[f32],
        last: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<Vec<f32>, Error> {
        let taps = self.by_tap(parameters, tools);
        let mut y = tools.pool.take(x.len());
        let (sequences, own) = (last.len() / self.state().max(1), self.state().max(1));
        same("last inputs of a convolution", sequences * self.state(), last.len())?;
        let rows = (x.len() / sequences.max(1)).max(1);
        let (conv, level) = (self.view(&taps), tools.cpu.level);
        let items = x.chunks(rows).zip(y.chunks_mut(rows)).zip(last.chunks_mut(own));
        tools.cpu.for_each(items, |((x, y), last)| {
            nn::short_conv(conv, x, last, y, level).expect("whole rows and a state");
        });
        tools.pool.give(taps);
        Ok(y)
    }

    /// From the gradient of the results to that of `x`; `last` are the inputs before them.
    pub(super) fn backward(
        &self,
        (parameters, gradients): (&[f32], &mut [f32]),
        (x, last): (&[f32], &[f32]),
        d_y: &[f32],
        tools: &mut Tools<'_>,
    ) -> Result<Vec<f32>, Error> {
        same("gradient of convolved rows", x.len(), d_y.len())?;
        let taps = self.by_tap(parameters, tools);
        let own = self.state().max(1);
        let sequences = last.len() / own;
        let rows = (x.len() / sequences.max(1)).max(1);
        let mut d_x = tools.pool.take(x.len());
        let mut sums = tools.pool.take(sequences * taps.len());
        let mut d_last = tools.pool.zeros(last.len());
        let (conv, level) = (self.view(&taps), tools.cpu.level);
        let inputs = x.chunks(rows).zip(last.chunks(own)).zip(d_y.chunks(rows));
        let places = d_x.chunks_mut(rows).zip(sums.chunks_mut(taps.len().max(1)));
        let items = inputs.zip(places).zip(d_last.chunks_mut(own));
        tools.cpu.for_each(items, |((((x, initial), d_y), (d_x, sums)), d_last)| {
            let places = ConvGradients {
                d_x: Gradient::Write(d_x),
                d_weight: Gradient::Write(sums),
                d_bias: Gradient::Skip,
            };
            let rows = ConvBackward { x, initial, d_y };
            nn::short_conv_backward(conv, rows, places, d_last, level)
                .expect("whole rows and a state");
        });
        self.add(&sums, &mut gradients[self.taps.clone()]);
        [taps, sums, d_last].into_iter().for_each(|buffer| tools.pool.give(buffer));
        Ok(d_x)
    }

    /// Adds the sums of all sequences to where taps lie channel by channel.
    fn add(&self, sums: &[f32], to: &mut [f32]) {
        let (count, channels) = (self.count(), self.channels.max(1));
        for sums in sums.chunks(to.len().max(1)) {
            for (n, tap) in sums.chunks(channels).enumerate() {
                let to = to.iter_mut().skip(n).step_by(count);
                to.zip(tap).for_each(|(to, sum)| *to += sum);
            }
        }
    }
}
