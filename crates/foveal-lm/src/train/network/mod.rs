//! A model as training computes it: losses, and gradients of all that is learned.
//!
//! ```text
//! x = scale · embedding[tokens]      x ← blockᵢ(x)      loss = mean −log softmax(cap(head(norm(x))))_target
//! ```
//!
//! The same model as [`Model`](crate::Model), on whole sequences: parameters, gradients and activations are plain slices, and
//! every operator's backward pass is written by hand. A [`Network`] holds no numbers. Matrix products are those of
//! [`foveal::projection`], mechanisms those of [`foveal`].
//!
//! The same parameters, batch and options give the same bits, whatever the number of threads.
//!
//! ```
//! use foveal::Cpu;
//! use foveal_lm::config::ModelConfig;
//! use foveal_lm::train::{Batch, Network, Objective, Parameters, Scratch, StepOptions};
//!
//! # fn main() -> Result<(), foveal_lm::Error> {
//! let config = r#"{
//!     "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
//!     "intermediate_size": 16, "max_position_embeddings": 32, "foveal": {"mixer": {"name": "linear"}}
//! }"#;
//! let config = ModelConfig::from_json(&serde_json::from_str(config).expect("JSON"))?;
//! let mut parameters = Parameters::initial(&config, 1)?;
//! let network = Network::new(&config, Objective::Causal)?;
//! let mut scratch = Scratch::new();
//! let mut options = StepOptions::new(Cpu::detect()?, &mut scratch);
//! let tokens = [1, 2, 3, 4, 5, 6, 7, 8];
//! let batch = Batch { sequences: 2, tokens: &tokens, targets: &[2, 3, 4, 5, 6, 7, 8, 9] };
//! let mut gradients = parameters.zeros();
//! let before =
//!     network.gradients(parameters.values(), &batch, None, &mut gradients, &mut options)?;
//! for (x, d) in parameters.values_mut().iter_mut().zip(&gradients) {
//!     *x -= 0.1 * d;
//! }
//! let after = network.loss(parameters.values(), &batch, None, &mut options)?;
//! assert!(after.mean() < before.mean());
//! # Ok(())
//! # }
//! ```

mod attention;
mod block;
mod carried;
mod embedding;
mod encoder_decoder;
mod feed_forward;
mod head;
mod lstm;
mod scratch;
mod section;
mod sections;
mod tools;

use std::ops::Range;

use foveal::position::Rope;
use foveal::projection::{Matrix, MatrixShape};
use foveal::{Cpu, Dropout};

use self::attention::Tokens;
use self::block::{Block, Keep, Saved, drop_rows};
use self::head::{Head, Objection};
use self::tools::{Tools, range, same};
use super::parameters;
use crate::Error;
use crate::config::ModelConfig;
use crate::ropes::Ropes;

pub use carried::Carried;
pub use encoder_decoder::{EncoderDecoder, EncoderDecoderConfig, NormPlace, Pairs, PositionKind};
pub use foveal::nn::IGNORED;
pub use lstm::{Lstm, LstmConfig};
pub use scratch::Scratch;

/// What a model is trained to predict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Objective {
    /// The next token: tokens see those before them.
    Causal,
    /// Tokens that are hidden: all see all, as far as mechanisms let them (Devlin et al. 2018).
    Masked,
}

/// What products of a step are computed in. Sums, statistics, gradients and parameters are f32 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Numbers of 32 bits.
    #[default]
    F32,
    /// Factors of projections and of exact attention are rounded to bf16, forward and backward, where the processor multiplies
    /// that.
    Bf16,
}

/// Sequences of the same length.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// How many.
    pub sequences: usize,
    /// `[sequences, T]`.
    pub tokens: &'a [u32],
    /// What each token is to predict, or [`IGNORED`]: `[sequences, T]`.
    pub targets: &'a [u32],
}

/// A loss over some targets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// The sum, in nats.
    pub sum: f64,
    /// How many targets there were.
    pub targets: usize,
}

impl Loss {
    /// Nats a target; 0 without any.
    pub fn mean(&self) -> f64 {
        self.sum / self.targets.max(1) as f64
    }
}

/// How a step is computed.
#[derive(Debug)]
pub struct StepOptions<'a> {
    /// Instructions and threads.
    pub cpu: Cpu,
    /// Memory.
    pub scratch: &'a mut Scratch,
    /// What is left out at random: of embeddings, of what layers add, and of weights of softmax attention. None in
    /// [`Network::loss`].
    pub dropout: Option<Dropout>,
    /// Whether layers keep their inputs alone, and are run once more in the backward pass: less memory, a third more time.
    pub recompute: bool,
    /// What products are computed in.
    pub precision: Precision,
    /// What gradients are multiplied by: with several batches to a step, the part of the targets that this one has.
    pub scale: f32,
    /// The part of a target's weight that all tokens share. None in [`Network::loss`].
    pub smoothing: f32,
}

impl<'a> StepOptions<'a> {
    /// In f32, without dropout, recomputation and smoothing.
    pub fn new(cpu: Cpu, scratch: &'a mut Scratch) -> StepOptions<'a> {
        StepOptions {
            cpu,
            scratch,
            dropout: None,
            recompute: false,
            precision: Precision::F32,
            scale: 1.0,
            smoothing: 0.0,
        }
    }
}

/// What a model computes while it is trained, without its numbers.
#[derive(Debug)]
pub struct Network {
    config: ModelConfig,
    numbers: usize,
    embedding: Range<usize>,
    ropes: Vec<Rope>,
    blocks: Vec<Block>,
    head: Head,
}

/// Of a seed, another for one of the places that drop something.
fn place_seed(seed: u64, place: u64) -> u64 {
    let x = (seed ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(place);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 27)
}

impl Network {
    /// The network of a configuration.
    ///
    /// # Errors
    /// [`Error::UnsupportedConfig`] for latent attention; [`Error::UntrainedMechanism`]; [`Error::Config`] for sizes that no
    /// mechanism has.
    pub fn new(config: &ModelConfig, objective: Objective) -> Result<Network, Error> {
        let ranges = parameters::ranges(config)?;
        let mut ropes = Ropes::new(config);
        let block = |layer| {
            let rope = ropes.layer(layer)?;
            Block::new((config, objective), &ranges, (layer, rope))
        };
        let blocks = (0..config.layers.len()).map(block).collect::<Result<_, Error>>()?;
        Ok(Network {
            numbers: ranges.values().map(|range| range.end).max().unwrap_or(0),
            embedding: range(&ranges, "model.embed_tokens.weight")?,
            ropes: ropes.into_all(),
            blocks,
            head: Head::new(config, &ranges)?,
            config: config.clone(),
        })
    }

    /// What the network computes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What so many texts carry from segment to segment, at their beginning.
    ///
    /// # Errors
    /// None today; mechanisms whose states are too large to address.
    pub fn carried(&self, sequences: usize) -> Result<Carried, Error> {
        let sections =
            self.blocks.iter().map(|block| vec![<_>::default(); block.attention.sections()]);
        Ok(Carried { sequences, tokens: 0, layers: sections.collect() })
    }

    /// Adds the gradients of the mean loss of a batch, times [`StepOptions::scale`], to `gradients`, which are laid out as
    /// the parameters.
    ///
    /// With `carried`, sequences follow on from what came before; the gradient ends there.
    ///
    /// # Errors
    /// [`Error::Token`] for a token that there is not; [`Error::Kernel`] for lengths that do not fit each other, and for what
    /// mechanisms refuse; [`Error::NotFinite`], with the place where it arose. After the last, gradients mean nothing,
    /// and what is carried has moved on.
    pub fn gradients(
        &self,
        parameters: &[f32],
        batch: &Batch<'_>,
        carried: Option<&mut Carried>,
        gradients: &mut [f32],
        options: &mut StepOptions<'_>,
    ) -> Result<Loss, Error> {
        same("gradients of all parameters", self.numbers, gradients.len())?;
        let work = Work { network: self, parameters, batch };
        work.run(carried, Some(gradients), options)
    }

    /// The loss of a batch, without gradients.
    ///
    /// # Errors
    /// Those of [`Network::gradients`].
    pub fn loss(
        &self,
        parameters: &[f32],
        batch: &Batch<'_>,
        carried: Option<&mut Carried>,
        options: &mut StepOptions<'_>,
    ) -> Result<Loss, Error> {
        Work { network: self, parameters, batch }.run(carried, None, options)
    }

    /// The likeliest next token wherever a batch has a target, in order; ties go to the last.
    ///
    /// # Errors
    /// Those of [`Network::gradients`].
    pub fn likeliest(
        &self,
        parameters: &[f32],
        batch: &Batch<'_>,
        carried: Option<&mut Carried>,
        options: &mut StepOptions<'_>,
    ) -> Result<Vec<u32>, Error> {
        self.check(parameters, batch, carried.as_deref())?;
        if batch.tokens.is_empty() {
            return Ok(vec![]);
        }
        let work = Work { network: self, parameters, batch };
        let start = carried.as_ref().map_or(0, |carried| carried.tokens);
        let (of, mut tools) = work.prepare(start, options)?;
        let (x, _) = work.forward(of, carried, Keep::Nothing, &mut tools)?;
        self.head.likeliest(parameters, (&x, batch.targets), &mut tools)
    }

    fn check(
        &self,
        parameters: &[f32],
        batch: &Batch<'_>,
        carried: Option<&Carried>,
    ) -> Result<(), Error> {
        let Batch { sequences, tokens, targets } = *batch;
        same("parameters of the network", self.numbers, parameters.len())?;
        same("targets of a batch", tokens.len(), targets.len())?;
        same(
            "whole sequences of a batch",
            tokens.len() / sequences.max(1) * sequences,
            tokens.len(),
        )?;
        let vocab = self.config.vocab;
        let targets = targets.iter().filter(|&&target| target != IGNORED);
        match tokens.iter().chain(targets).find(|&&token| token as usize >= vocab) {
            Some(&found) => Err(Error::Token { found, vocab }),
            None => carried.map_or(Ok(()), |carried| {
                same("texts that are carried", sequences, carried.sequences)?;
                same("layers that are carried", self.blocks.len(), carried.layers.len())
            }),
        }
    }
}

/// One batch through the network.
struct Work<'a> {
    network: &'a Network,
    parameters: &'a [f32],
    batch: &'a Batch<'a>,
}

impl Work<'_> {
    /// The tokens with their positions, and tools for a pass over them.
    fn prepare<'t>(
        &'t self,
        start: usize,
        options: &'t mut StepOptions<'_>,
    ) -> Result<(Tokens<'t>, Tools<'t>), Error> {
        let Work { network, parameters, batch } = *self;
        let tokens = batch.tokens.len() / batch.sequences.max(1);
        let (tools, rotations) = options.scratch.begin(options.cpu, options.precision);
        set_positions(rotations, &network.ropes, start..start + tokens)?;
        let sequences = batch.sequences;
        let of = Tokens { parameters, sequences, tokens, start, rotations, dropout: None };
        Ok((of, tools))
    }

    fn run(
        &self,
        carried: Option<&mut Carried>,
        gradients: Option<&mut [f32]>,
        options: &mut StepOptions<'_>,
    ) -> Result<Loss, Error> {
        let Work { network, parameters, batch } = *self;
        network.check(parameters, batch, carried.as_deref())?;
        if batch.tokens.is_empty() {
            return Ok(Loss { sum: 0.0, targets: 0 });
        }
        let training = gradients.is_some();
        let start = carried.as_ref().map_or(0, |carried| carried.tokens);
        let keep = match (training, options.recompute) {
            (false, _) => Keep::Nothing,
            (true, false) => Keep::All,
            (true, true) => Keep::Inputs,
        };
        let (dropout, smoothing, scale) = (options.dropout, options.smoothing, options.scale);
        let (of, mut tools) = self.prepare(start, options)?;
        let of = Tokens { dropout: dropout.filter(|_| training), ..of };
        // Layers that are run once more begin with what they began with.
        let before = carried.as_deref().filter(|_| keep == Keep::Inputs).cloned();
        let (x, saved) = self.forward(of, carried, keep, &mut tools)?;
        let objection = Objection {
            targets: batch.targets,
            smoothing: if training { smoothing } else { 0.0 },
            scale: training.then_some(scale),
        };
        let Some(gradients) = gradients else {
            let (loss, _) = network.head.loss(parameters, (&x, objection), None, &mut tools)?;
            self.finite(loss, &x, &saved)?;
            tools.pool.give(x);
            return Ok(loss);
        };
        let arena = Some(&mut *gradients);
        let (loss, d) = network.head.loss(parameters, (&x, objection), arena, &mut tools)?;
        self.finite(loss, &x, &saved)?;
        tools.pool.give(x);
        let d = d.ok_or(Error::SectionState)?;
        self.backward(of, (d, saved), before, gradients, &mut tools)?;
        Ok(loss)
    }

    /// The rows that meet the head, and what layers keep.
    fn forward(
        &self,
        of: Tokens<'_>,
        mut carried: Option<&mut Carried>,
        keep: Keep,
        tools: &mut Tools<'_>,
    ) -> Result<(Vec<f32>, Vec<Saved>), Error> {
        let network = self.network;
        let config = &network.config;
        let mut x = tools.pool.take(self.batch.tokens.len() * config.width);
        let shape = MatrixShape { out_features: config.vocab, in_features: config.width };
        let table = Matrix::from_floats(shape, &self.parameters[network.embedding.clone()])?;
        embedding::forward(&table, self.batch.tokens, &mut x, tools.cpu)?;
        if config.embedding_scale != 1.0 {
            x.iter_mut().for_each(|x| *x *= config.embedding_scale);
        }
        drop_rows(self.layer(of, network.blocks.len()), 0, &mut x, tools.cpu)?;
        let mut kept = vec![];
        for (n, block) in network.blocks.iter().enumerate() {
            let own = carried.as_mut().map(|carried| &mut carried.layers[n][..]);
            let (y, saved) = block.forward(x, self.layer(of, n), own, keep, tools)?;
            x = y;
            kept.extend(saved);
        }
        if let Some(carried) = carried {
            carried.tokens += of.tokens;
        }
        Ok((x, kept))
    }

    /// The tokens as layer `n` has them: with random zeros of its own.
    fn layer<'t>(&self, of: Tokens<'t>, n: usize) -> Tokens<'t> {
        let dropout = of.dropout.map(|Dropout { rate, seed }| Dropout {
            rate,
            seed: place_seed(seed, 1000 + n as u64),
        });
        Tokens { dropout, ..of }
    }

    fn backward(
        &self,
        of: Tokens<'_>,
        (mut d, mut saved): (Vec<f32>, Vec<Saved>),
        mut before: Option<Carried>,
        gradients: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let network = self.network;
        for (n, block) in network.blocks.iter().enumerate().rev() {
            let own = saved.pop().ok_or(Error::SectionState)?;
            let carried = before.as_mut().map(|before| &mut before.layers[n][..]);
            d = block.backward(d, self.layer(of, n), (own, carried), gradients, tools)?;
        }
        drop_rows(self.layer(of, network.blocks.len()), 0, &mut d, tools.cpu)?;
        let scale = network.config.embedding_scale;
        if scale != 1.0 {
            d.iter_mut().for_each(|d| *d *= scale);
        }
        let table = &mut gradients[network.embedding.clone()];
        embedding::backward(table, self.batch.tokens, &d, tools.cpu);
        tools.pool.give(d);
        Ok(())
    }

    /// Refuses a loss that is not finite, and says where that arose.
    fn finite(&self, loss: Loss, x: &[f32], saved: &[Saved]) -> Result<(), Error> {
        if loss.sum.is_finite() {
            return Ok(());
        }
        let bad = |x: &[f32]| x.iter().any(|x| !x.is_finite());
        let entries = parameters::ranges(&self.network.config)?;
        let named = entries.iter().filter(|(_, range)| bad(&self.parameters[(*range).clone()]));
        if let Some((name, _)) = named.min_by_key(|(_, range)| range.start) {
            return Err(Error::NotFinite { place: format!("the parameter {name}") });
        }
        let layers = saved.iter().enumerate();
        let mut layers = layers.filter_map(|(n, saved)| Some((n, saved.not_finite()?)));
        let place = match layers.next() {
            Some((n, place)) => format!("layer {n}: {place}"),
            None if bad(x) => "what the last layer gives".to_owned(),
            None => "the logits".to_owned(),
        };
        Err(Error::NotFinite { place })
    }
}

/// Rotations of the positions of a call, for each of a model's rotary embeddings.
fn set_positions(
    tables: &mut Vec<foveal::position::RopeTable>,
    ropes: &[Rope],
    positions: Range<usize>,
) -> Result<(), Error> {
    if tables.iter().map(foveal::position::RopeTable::rope).ne(ropes) {
        let made = ropes.iter().map(|rope| rope.table(positions.clone()));
        *tables = made.collect::<Result<_, _>>()?;
        return Ok(());
    }
    for table in tables {
        table.set_positions(positions.clone())?;
    }
    Ok(())
}
