//! The encoder–decoder of "Attention Is All You Need" (Vaswani et al. 2017), as training computes it.
//!
//! ```text
//! e = √d · E[source] + P           e ← e + attention(e), e + ffn(e)                       for each layer of the encoder
//! x = √d · E[tokens] + P           x ← x + attention(x), x + attention(x, e), x + ffn(x)  for each layer of the decoder
//! loss = mean −log softmax(x Eᵀ)_target, smoothed                                         ffn(x) = max(0, x W₁ + b₁) W₂ + b₂
//! ```
//!
//! Each sum has a LayerNorm: behind it as published (§3.1), or before what is added, with one more at each end (Xiong et al.
//! 2020, arXiv:2002.04745). Positions P are sinusoids (§3.5) or learned. The decoder sees tokens before it and all of the source;
//! one matrix E serves both texts and the output (§3.4). Label smoothing and dropout are those of [`StepOptions`].
//!
//! Sources of a batch have one length, and so have targets; [`IGNORED`](super::IGNORED) targets end shorter ones. Names are those
//! of BART's safetensors, whose layers these are.

mod export;
mod greedy;
mod layer;
mod run;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::head::Head;
use super::tools::{Ranges, range};
use crate::Error;
use crate::train::parameters::{Declared, Parameters, entries};
use layer::{Attending, Feeding, Normal};

/// Where norms are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlace {
    /// Behind every sum, as published.
    #[default]
    Post,
    /// Before what is added.
    Pre,
}

/// What tells positions apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionKind {
    /// sin and cos of position / 10000^(2i/d).
    #[default]
    Sinusoidal,
    /// A table for each of the two texts.
    Learned,
}

/// The sizes of an encoder–decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderDecoderConfig {
    /// Tokens of the vocabulary, which both texts share.
    pub vocab: usize,
    /// d: numbers of a token.
    pub width: usize,
    /// Inner width of feed-forward networks.
    pub inner: usize,
    /// Heads; they divide the width.
    pub heads: usize,
    /// Layers of the encoder and of the decoder.
    pub layers: [usize; 2],
    /// The most tokens of a text.
    pub context: usize,
    /// Where norms are.
    pub norms: NormPlace,
    /// What tells positions apart.
    pub positions: PositionKind,
}

/// Pairs of texts.
#[derive(Clone, Copy, Debug)]
pub struct Pairs<'a> {
    /// How many.
    pub sequences: usize,
    /// `[sequences, S]`.
    pub source: &'a [u32],
    /// What the decoder reads, `[sequences, T]`.
    pub tokens: &'a [u32],
    /// What it is to say after each of them, or [`IGNORED`](super::IGNORED): `[sequences, T]`.
    pub targets: &'a [u32],
}

/// An encoder–decoder without its numbers; the calls are those of [`Network`](super::Network).
///
/// ```
/// use foveal::Cpu;
/// use foveal_lm::train::{EncoderDecoder, EncoderDecoderConfig, Pairs, Scratch, StepOptions};
///
/// # fn main() -> Result<(), foveal_lm::Error> {
/// let config = EncoderDecoderConfig {
///     vocab: 10, width: 8, inner: 16, heads: 2, layers: [1, 1], context: 16,
///     norms: Default::default(), positions: Default::default(),
/// };
/// let network = EncoderDecoder::new(config)?;
/// let parameters = network.initial(1)?;
/// let mut gradients = parameters.zeros();
/// let mut scratch = Scratch::new();
/// let mut options = StepOptions::new(Cpu::detect()?, &mut scratch);
/// options.smoothing = 0.1;
/// let pairs =
///     Pairs { sequences: 1, source: &[3, 4, 5], tokens: &[0, 3, 4], targets: &[3, 4, 5] };
/// let loss = network.gradients(parameters.values(), &pairs, &mut gradients, &mut options)?;
/// assert_eq!(loss.targets, 3);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct EncoderDecoder {
    config: EncoderDecoderConfig,
    numbers: usize,
    shared: Range<usize>,
    /// Learned positions of sources and of targets.
    positions: Option<[Range<usize>; 2]>,
    encoder: Vec<Layer>,
    decoder: Vec<Layer>,
    /// At the end of each, where norms come first.
    ends: Option<[Normal; 2]>,
    head: Head,
}

/// A layer of either; that of an encoder has no attention to another text.
#[derive(Debug)]
struct Layer {
    own: (Attending, Normal),
    across: Option<(Attending, Normal)>,
    feeding: (Feeding, Normal),
}

/// The two halves, by the names of their tensors.
const HALVES: [&str; 2] = ["encoder", "decoder"];

impl EncoderDecoder {
    /// The network of such sizes.
    ///
    /// # Errors
    /// [`Error::Config`] for a size of 0 or beyond all models, and for heads that do not divide the width.
    pub fn new(config: EncoderDecoderConfig) -> Result<EncoderDecoder, Error> {
        config.check()?;
        let entries = entries(&config.declared())?;
        let numbers = entries.last().map_or(0, |last| last.range.end);
        let ranges: Ranges = entries.into_iter().map(|entry| (entry.name, entry.range)).collect();
        let half = |half: usize| {
            let layer = |n| Layer::new(&config, &ranges, (half, n));
            (0..config.layers[half]).map(layer).collect::<Result<Vec<Layer>, Error>>()
        };
        let end = |half: &str| Normal::new(&ranges, &format!("model.{half}.layer_norm"));
        let table = |half: &str| range(&ranges, &format!("model.{half}.embed_positions.weight"));
        let [first, second] = HALVES;
        Ok(EncoderDecoder {
            config,
            numbers,
            shared: range(&ranges, "model.shared.weight")?,
            positions: match config.positions {
                PositionKind::Learned => Some([table(first)?, table(second)?]),
                PositionKind::Sinusoidal => None,
            },
            encoder: half(0)?,
            decoder: half(1)?,
            ends: match config.norms {
                NormPlace::Pre => Some([end(first)?, end(second)?]),
                NormPlace::Post => None,
            },
            head: Head::plain(range(&ranges, "model.shared.weight")?, config.vocab, config.width),
        })
    }

    /// What the network computes.
    pub fn config(&self) -> &EncoderDecoderConfig {
        &self.config
    }

    /// Initial values: matrices normal with deviation 0.02, the embedding with 1/√d, norms 1, biases 0.
    ///
    /// # Errors
    /// [`Error::Config`] for more numbers than can be addressed.
    pub fn initial(&self, seed: u64) -> Result<Parameters, Error> {
        Parameters::of(&self.config.declared(), seed)
    }
}

impl EncoderDecoderConfig {
    fn check(&self) -> Result<(), Error> {
        let EncoderDecoderConfig { vocab, width, inner, heads, layers, context, .. } = *self;
        for (key, found, limit) in [
            ("vocabulary size", vocab, 1 << 24),
            ("embedding length", width, 1 << 20),
            ("feed-forward length", inner, 1 << 22),
            ("number of heads", heads, 1 << 12),
            ("number of layers of the encoder", layers[0], 1 << 12),
            ("number of layers of the decoder", layers[1], 1 << 12),
            ("context length", context, 1 << 30),
        ] {
            if found == 0 || found > limit {
                return Err(Error::config(key, found, format!("1 to {limit}")));
            }
        }
        if !width.is_multiple_of(2 * heads) {
            let expected = format!("a divisor of half the width {width}");
            return Err(Error::config("number of heads", heads, expected));
        }
        Ok(())
    }

    /// All parameters, in the order in which they lie.
    fn declared(&self) -> Vec<Declared> {
        let EncoderDecoderConfig { vocab, width, context, .. } = *self;
        let deviation = 1.0 / (width as f32).sqrt();
        let shared = "model.shared.weight".to_owned();
        let mut all = vec![Declared::spread(shared, [vocab, width], deviation)];
        for (half, name) in HALVES.into_iter().enumerate() {
            if self.positions == PositionKind::Learned {
                let table = format!("model.{name}.embed_positions.weight");
                all.push(Declared::matrix(table, [context, width]));
            }
            for layer in 0..self.layers[half] {
                layer::declared(self, half == 1, &format!("model.{name}.layers.{layer}"), &mut all);
            }
            if self.norms == NormPlace::Pre {
                layer::declare_norm(width, &format!("model.{name}.layer_norm"), &mut all);
            }
        }
        all
    }
}

impl Layer {
    fn new(
        config: &EncoderDecoderConfig,
        ranges: &Ranges,
        (half, n): (usize, usize),
    ) -> Result<Layer, Error> {
        let prefix = format!("model.{}.layers.{n}", HALVES[half]);
        let attention = |name: &str, causal| {
            let attending = Attending::new(config, ranges, &format!("{prefix}.{name}"), causal)?;
            let norm = Normal::new(ranges, &format!("{prefix}.{name}_layer_norm"))?;
            Ok::<_, Error>((attending, norm))
        };
        Ok(Layer {
            own: attention("self_attn", half == 1)?,
            across: if half == 1 { Some(attention("encoder_attn", false)?) } else { None },
            feeding: (
                Feeding::new(config, ranges, &prefix)?,
                Normal::new(ranges, &format!("{prefix}.final_layer_norm"))?,
            ),
        })
    }
}
