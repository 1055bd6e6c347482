//! A layer as training computes it: attention and a feed-forward network, each on a normalised input and added to the stream.
//!
//! ```text
//! m = x + drop(post₁(attention(norm₁(x))))
//! y = m + drop(post₂(down(act(gate(h)) · up(h))))      h = norm₂(m)
//! ```
//!
//! Kept for backward: x, m, what attention and the feed-forward network keep, and their results where post-norms follow.
//! Normalised rows are made again. With recomputation, x alone is kept, and the layer is run once more.

use foveal::nn;
use foveal::{Cpu, Dropout};

use super::attention::{self, AttentionLayer, Tokens};
use super::carried::SectionCarried;
use super::feed_forward::FeedForward;
use super::tools::{Normed, Ranges, Tools, range};
use super::{Objective, place_seed};
use crate::Error;
use crate::config::ModelConfig;

/// Rows that are dropped at a time.
const ROWS: usize = 64;

/// One layer.
#[derive(Debug)]
pub(super) struct Block {
    attention_norm: Normed,
    pub(super) attention: AttentionLayer,
    post_attention_norm: Option<Normed>,
    feed_forward_norm: Normed,
    feed_forward: FeedForward,
    post_feed_forward_norm: Option<Normed>,
}

/// What a layer keeps.
#[derive(Debug)]
pub(super) struct Saved {
    /// What came in.
    pub(super) x: Vec<f32>,
    /// The rest; `None` where it is made again.
    made: Option<Made>,
}

#[derive(Debug)]
struct Made {
    attention: attention::Saved,
    /// What attention gave, where a norm follows.
    attended: Option<Vec<f32>>,
    middle: Vec<f32>,
    gate_up: Vec<f32>,
    /// What the feed-forward network gave, where a norm follows.
    fed: Option<Vec<f32>>,
}

/// How much a forward pass keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    Nothing,
    Inputs,
    All,
}

impl Block {
    pub(super) fn new(
        (config, objective): (&ModelConfig, Objective),
        ranges: &Ranges,
        (layer, rope): (usize, usize),
    ) -> Result<Block, Error> {
        let norm = |name: &str| {
            let range = range(ranges, &format!("model.layers.{layer}.{name}.weight"))?;
            let (epsilon, offset) = (config.norm_epsilon, config.norm_offset);
            Ok::<_, Error>(Normed { range, epsilon, offset })
        };
        let post = |name: &str| config.post_norms.then(|| norm(name)).transpose();
        // Hugging Face names the norm before the feed-forward layer after what precedes it, unless there are post-norms.
        let before = match config.post_norms {
            true => "pre_feedforward_layernorm",
            false => "post_attention_layernorm",
        };
        Ok(Block {
            attention_norm: norm("input_layernorm")?,
            attention: AttentionLayer::new((config, objective), ranges, (layer, rope))?,
            post_attention_norm: post("post_attention_layernorm")?,
            feed_forward_norm: norm(before)?,
            feed_forward: FeedForward::new(config, ranges, layer)?,
            post_feed_forward_norm: post("post_feedforward_layernorm")?,
        })
    }

    /// The layer's results, and what it keeps.
    pub(super) fn forward(
        &self,
        x: Vec<f32>,
        of: Tokens<'_>,
        carried: Option<&mut [SectionCarried]>,
        keep: Keep,
        tools: &mut Tools<'_>,
    ) -> Result<(Vec<f32>, Option<Saved>), Error> {
        let (y, made) = self.run(&x, of, carried, keep == Keep::All, tools)?;
        if keep == Keep::Nothing {
            tools.pool.give(x);
            return Ok((y, None));
        }
        Ok((y, Some(Saved { x, made })))
    }

    fn run(
        &self,
        x: &[f32],
        of: Tokens<'_>,
        carried: Option<&mut [SectionCarried]>,
        keep: bool,
        tools: &mut Tools<'_>,
    ) -> Result<(Vec<f32>, Option<Made>), Error> {
        let mut normed = tools.pool.take(x.len());
        let mut added = tools.pool.take(x.len());
        self.attention_norm.forward(of.parameters, x, &mut normed, tools)?;
        let rows = (&normed[..], &mut added[..]);
        let attention = self.attention.forward(rows, of, carried, keep, tools)?;
        let (middle, attended) =
            self.joined((x, added), of, (&self.post_attention_norm, keep, 0), tools)?;
        let mut added = tools.pool.take(x.len());
        self.feed_forward_norm.forward(of.parameters, &middle, &mut normed, tools)?;
        let rows = (&normed[..], &mut added[..]);
        let gate_up = self.feed_forward.forward(of.parameters, rows, tools)?;
        tools.pool.give(normed);
        let (y, fed) =
            self.joined((&middle, added), of, (&self.post_feed_forward_norm, keep, 1), tools)?;
        let made = Made { attention, attended, middle, gate_up, fed };
        if keep {
            return Ok((y, Some(made)));
        }
        made.give(tools);
        Ok((y, None))
    }

    /// `x + drop(norm(y))`, and `y` where backward needs it.
    fn joined(
        &self,
        (x, mut y): (&[f32], Vec<f32>),
        of: Tokens<'_>,
        (norm, keep, place): (&Option<Normed>, bool, u64),
        tools: &mut Tools<'_>,
    ) -> Result<(Vec<f32>, Option<Vec<f32>>), Error> {
        let mut kept = None;
        if let Some(norm) = norm {
            let mut normed = tools.pool.take(y.len());
            norm.forward(of.parameters, &y, &mut normed, tools)?;
            let plain = std::mem::replace(&mut y, normed);
            match keep {
                true => kept = Some(plain),
                false => tools.pool.give(plain),
            }
        }
        drop_rows(of, place, &mut y, tools.cpu)?;
        tools.add(&mut y, x)?;
        Ok((y, kept))
    }

    /// Turns the gradient `d` of the layer's results into that of its inputs.
    pub(super) fn backward(
        &self,
        mut d: Vec<f32>,
        of: Tokens<'_>,
        (saved, carried): (Saved, Option<&mut [SectionCarried]>),
        gradients: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<Vec<f32>, Error> {
        let Saved { x, made } = saved;
        let made = match made {
            Some(made) => made,
            None => {
                let (y, made) = self.run(&x, of, carried, true, tools)?;
                tools.pool.give(y);
                made.ok_or(Error::SectionState)?
            }
        };
        let Made { attention, attended, middle, gate_up, fed } = made;
        let mut normed = tools.pool.take(d.len());
        let mut d_normed = tools.pool.take(d.len());
        let norm = &self.post_feed_forward_norm;
        let d_y = self.parted((&d, fed), of, (norm, 1), gradients, tools)?;
        self.feed_forward_norm.forward(of.parameters, &middle, &mut normed, tools)?;
        let rows = (&normed[..], d_y.as_deref().unwrap_or(&d));
        let arenas = (of.parameters, &mut *gradients);
        self.feed_forward.backward(arenas, rows, gate_up, &mut d_normed, tools)?;
        let arenas = (of.parameters, &mut *gradients);
        self.feed_forward_norm.backward(arenas, (&middle, &d_normed), &mut d, tools)?;
        d_y.into_iter().chain([middle]).for_each(|buffer| tools.pool.give(buffer));

        let norm = &self.post_attention_norm;
        let d_y = self.parted((&d, attended), of, (norm, 0), gradients, tools)?;
        self.attention_norm.forward(of.parameters, &x, &mut normed, tools)?;
        d_normed.fill(0.0);
        let rows = (&normed[..], d_y.as_deref().unwrap_or(&d));
        let places = (&mut d_normed[..], &mut *gradients);
        self.attention.backward(rows, of, attention, places, tools)?;
        let arenas = (of.parameters, &mut *gradients);
        self.attention_norm.backward(arenas, (&x, &d_normed), &mut d, tools)?;
        let buffers = d_y.into_iter().chain([x, normed, d_normed]);
        buffers.for_each(|buffer| tools.pool.give(buffer));
        Ok(d)
    }

    /// The gradient of what was added, from that of the sum; `None` where they are the same.
    fn parted(
        &self,
        (d, kept): (&[f32], Option<Vec<f32>>),
        of: Tokens<'_>,
        (norm, place): (&Option<Normed>, u64),
        gradients: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<Option<Vec<f32>>, Error> {
        if norm.is_none() && of.dropout.is_none() {
            return Ok(None);
        }
        let mut d_y = tools.pool.copy(d);
        drop_rows(of, place, &mut d_y, tools.cpu)?;
        let (Some(norm), Some(kept)) = (norm, kept) else { return Ok(Some(d_y)) };
        let mut d_kept = tools.pool.zeros(d.len());
        norm.backward((of.parameters, gradients), (&kept, &d_y), &mut d_kept, tools)?;
        tools.pool.give(kept);
        tools.pool.give(d_y);
        Ok(Some(d_kept))
    }
}

/// Drops numbers of rows, if any are to be dropped: the same ones forward and backward.
pub(super) fn drop_rows(of: Tokens<'_>, place: u64, x: &mut [f32], cpu: Cpu) -> Result<(), Error> {
    let Some(Dropout { rate, seed }) = of.dropout else { return Ok(()) };
    let dropout = Dropout { rate, seed: place_seed(seed, place) };
    let width = x.len() / (of.sequences * of.tokens).max(1);
    nn::dropout(dropout, &mut [], (0, width), cpu.level)?;
    let pieces = x.chunks_mut((ROWS * width).max(1)).enumerate();
    cpu.for_each(pieces, |(n, rows)| {
        nn::dropout(dropout, rows, (n * ROWS, width), cpu.level).expect("checked before");
    });
    Ok(())
}

impl Made {
    fn give(self, tools: &mut Tools<'_>) {
        let Made { attention, attended, middle, gate_up, fed } = self;
        attention.give(tools);
        let rest = attended.into_iter().chain(fed);
        [middle, gate_up].into_iter().chain(rest).for_each(|buffer| tools.pool.give(buffer));
    }
}

impl Saved {
    /// The first place of the layer with a number that is not finite, in the order of computation.
    pub(super) fn not_finite(&self) -> Option<&'static str> {
        let bad = |x: &[f32]| x.iter().any(|x| !x.is_finite());
        if bad(&self.x) {
            return Some("what comes in");
        }
        let made = self.made.as_ref()?;
        if let Some(place) = made.attention.not_finite() {
            return Some(place);
        }
        let rest = [
            ("the sum with attention", &made.middle[..]),
            ("gate and up of the feed-forward network", &made.gate_up),
        ];
        rest.into_iter().find(|(_, x)| bad(x)).map(|(place, _)| place)
    }
}
