//! A recurrent language model without attention: long short-term memory, as a baseline for those with it.
//!
//! ```text
//! x = E[tokens]      for each layer, token by token from h = c = 0:
//!     [i f g o] = x Wᵀ + h Uᵀ + b      c ← σ(f + 1) c + σ(i) tanh(g)      h ← σ(o) tanh(c)      the next layer reads h
//! loss = mean −log softmax(h Eᵀ)_target
//! ```
//!
//! The forget gate begins open (Gers, Schmidhuber and Cummins 2000; the 1 is Jozefowicz et al.'s, 2015). 16 · width² operations a token and layer,
//! one token after the other: rows that share a product are those of the batch. Sequences begin with nothing carried. Inside, rows are in the
//! order `[T, sequences]`. Hochreiter and Schmidhuber 1997.

mod cell;

use std::ops::Range;

use foveal::Gradient;
use foveal::nn::{self, IGNORED};
use foveal::projection::{Matrix, MatrixShape, embed};

use super::head::{Head, Objection};
use super::tools::{Projected, Ranges, Tools, range, same};
use super::{Batch, Loss, StepOptions};
use crate::Error;
use crate::train::Group;
use crate::train::parameters::{Declared, Initial, Parameters, entries};

/// The sizes of a recurrent model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LstmConfig {
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Numbers of a token between layers, and of a state.
    pub width: usize,
    /// Layers.
    pub layers: usize,
}

/// The model, without its numbers.
#[derive(Debug)]
pub struct Lstm {
    config: LstmConfig,
    numbers: usize,
    embedding: Range<usize>,
    layers: Vec<Layer>,
    head: Head,
}

/// One layer's projections to its gates.
#[derive(Debug)]
struct Layer {
    input: Projected,
    state: Projected,
}

/// What a layer leaves for its backward pass, `[T, sequences, …]`.
struct Saved {
    x: Vec<f32>,
    /// Gates after their functions, `4 · width` numbers a row.
    gates: Vec<f32>,
    /// c.
    cells: Vec<f32>,
    /// h.
    out: Vec<f32>,
}

impl LstmConfig {
    fn declared(&self) -> Vec<Declared> {
        let LstmConfig { vocab, width, layers } = *self;
        let embedding = "embed_tokens.weight".to_owned();
        let mut all = vec![Declared::matrix(embedding, [vocab, width])];
        // As the reference implementations begin.
        let initial = Initial::Uniform((width as f32).powf(-0.5));
        for layer in 0..layers {
            for name in ["input", "state"] {
                let name = format!("layers.{layer}.{name}_proj.weight");
                let shape = vec![4 * width, width];
                all.push(Declared { name, shape, group: Group::Matrix, initial });
            }
            let name = format!("layers.{layer}.input_proj.bias");
            all.push(Declared::vector(name, 4 * width, Initial::Constant(0.0)));
        }
        all
    }

    /// Initial values: of the embedding as those of [`Parameters`], of other matrices uniform within ±1/√width, of biases 0.
    ///
    /// # Errors
    /// [`Error::Config`] for more numbers than can be addressed, and for a size of 0.
    pub fn initial(&self, seed: u64) -> Result<Parameters, Error> {
        self.check()?;
        Parameters::of(&self.declared(), seed)
    }

    fn check(&self) -> Result<(), Error> {
        let LstmConfig { vocab, width, layers } = *self;
        for (what, size) in [("vocab", vocab), ("width", width), ("layers", layers)] {
            if !(1..=1 << 20).contains(&size) {
                return Err(Error::config(&format!("recurrent {what}"), size, "1 to 1048576"));
            }
        }
        Ok(())
    }
}

impl Lstm {
    /// The model of a configuration.
    ///
    /// # Errors
    /// Those of [`LstmConfig::initial`].
    pub fn new(config: LstmConfig) -> Result<Lstm, Error> {
        config.check()?;
        let entries = entries(&config.declared())?;
        let numbers = entries.last().map_or(0, |last| last.range.end);
        let ranges: Ranges = entries.into_iter().map(|entry| (entry.name, entry.range)).collect();
        let shape = [4 * config.width, config.width];
        let layer = |n: usize| {
            let own = |name: &str, biased| {
                Projected::new(&ranges, &format!("layers.{n}.{name}_proj"), shape, biased)
            };
            Ok(Layer { input: own("input", true)?, state: own("state", false)? })
        };
        let embedding = range(&ranges, "embed_tokens.weight")?;
        Ok(Lstm {
            config,
            numbers,
            layers: (0..config.layers).map(layer).collect::<Result<_, Error>>()?,
            head: Head::plain(embedding.clone(), config.vocab, config.width),
            embedding,
        })
    }

    /// Adds the gradients of the mean loss of a batch to `gradients`, which are laid out as the parameters. Dropout, smoothing
    /// and recomputation of the options do not count here.
    ///
    /// # Errors
    /// [`Error::Token`] for a token that there is not; [`Error::Kernel`] for lengths that do not fit each other.
    pub fn gradients(
        &self,
        parameters: &[f32],
        batch: &Batch<'_>,
        gradients: &mut [f32],
        options: &mut StepOptions<'_>,
    ) -> Result<Loss, Error> {
        same("gradients of all parameters", self.numbers, gradients.len())?;
        let (steps, targets) = self.checked(parameters, batch)?;
        let scale = options.scale;
        let (mut tools, _) = options.scratch.begin(options.cpu, options.precision);
        let (x, mut saved) = self.forward(parameters, batch, steps, &mut tools)?;
        let objection = Objection { targets: &targets, smoothing: 0.0, scale: Some(scale) };
        let arena = Some(&mut *gradients);
        let (loss, d) = self.head.loss(parameters, (&x, objection), arena, &mut tools)?;
        let mut d = d.ok_or(Error::SectionState)?;
        for layer in self.layers.iter().rev() {
            let saved = saved.pop().ok_or(Error::SectionState)?;
            d = layer.backward((parameters, gradients), (d, saved), batch.sequences, &mut tools)?;
        }
        let width = self.config.width;
        let table = &mut gradients[self.embedding.clone()];
        for (place, d) in d.chunks_exact(width).enumerate() {
            let token = batch.tokens[batch_place(place, (batch.sequences, steps))] as usize;
            nn::add(&mut table[token * width..][..width], d, tools.cpu.level)?;
        }
        tools.pool.give(d);
        Ok(loss)
    }

    /// The loss of a batch.
    ///
    /// # Errors
    /// Those of [`Lstm::gradients`].
    pub fn loss(
        &self,
        parameters: &[f32],
        batch: &Batch<'_>,
        options: &mut StepOptions<'_>,
    ) -> Result<Loss, Error> {
        let (steps, targets) = self.checked(parameters, batch)?;
        let (mut tools, _) = options.scratch.begin(options.cpu, options.precision);
        let (x, _) = self.forward(parameters, batch, steps, &mut tools)?;
        let objection = Objection { targets: &targets, smoothing: 0.0, scale: None };
        Ok(self.head.loss(parameters, (&x, objection), None, &mut tools)?.0)
    }

    /// The likeliest next token wherever a batch has a target, in the order of the batch.
    ///
    /// # Errors
    /// Those of [`Lstm::gradients`].
    pub fn likeliest(
        &self,
        parameters: &[f32],
        batch: &Batch<'_>,
        options: &mut StepOptions<'_>,
    ) -> Result<Vec<u32>, Error> {
        let (steps, targets) = self.checked(parameters, batch)?;
        let (mut tools, _) = options.scratch.begin(options.cpu, options.precision);
        let (x, _) = self.forward(parameters, batch, steps, &mut tools)?;
        let found = self.head.likeliest(parameters, (&x, &targets), &mut tools)?;
        let with = (0..targets.len()).filter(|&place| targets[place] != IGNORED);
        let place = |place: usize| batch_place(place, (batch.sequences, steps));
        let mut placed: Vec<(usize, u32)> = with.map(place).zip(found).collect();
        placed.sort_unstable();
        Ok(placed.into_iter().map(|(_, token)| token).collect())
    }

    /// Tokens of a sequence, and the targets in the order of rows.
    fn checked(&self, parameters: &[f32], batch: &Batch<'_>) -> Result<(usize, Vec<u32>), Error> {
        let Batch { sequences, tokens, targets } = *batch;
        same("parameters of the network", self.numbers, parameters.len())?;
        same("targets of a batch", tokens.len(), targets.len())?;
        let steps = tokens.len() / sequences.max(1);
        same("whole sequences of a batch", steps * sequences, tokens.len())?;
        let vocab = self.config.vocab;
        let known = targets.iter().filter(|&&target| target != IGNORED);
        if let Some(&found) = tokens.iter().chain(known).find(|&&token| token as usize >= vocab) {
            return Err(Error::Token { found, vocab });
        }
        let place = |place| targets[batch_place(place, (sequences, steps))];
        Ok((steps, (0..tokens.len()).map(place).collect()))
    }

    /// The rows that meet the head, and what layers leave for backward.
    fn forward(
        &self,
        parameters: &[f32],
        batch: &Batch<'_>,
        steps: usize,
        tools: &mut Tools<'_>,
    ) -> Result<(Vec<f32>, Vec<Saved>), Error> {
        let LstmConfig { vocab, width, .. } = self.config;
        let token = |place| batch.tokens[batch_place(place, (batch.sequences, steps))];
        let tokens: Vec<u32> = (0..batch.tokens.len()).map(token).collect();
        let mut x = tools.pool.take(tokens.len() * width);
        let shape = MatrixShape { out_features: vocab, in_features: width };
        let table = Matrix::from_floats(shape, &parameters[self.embedding.clone()])?;
        embed(&table, &tokens, &mut x, tools.cpu.level)?;
        let mut all = vec![];
        for layer in &self.layers {
            let saved = layer.forward(parameters, x, batch.sequences, tools)?;
            x = tools.pool.copy(&saved.out);
            all.push(saved);
        }
        Ok((x, all))
    }
}

/// Where the row `place` of `[T, sequences]` lies in `[sequences, T]`.
fn batch_place(place: usize, (sequences, steps): (usize, usize)) -> usize {
    place % sequences * steps + place / sequences
}

impl Layer {
    fn forward(
        &self,
        parameters: &[f32],
        x: Vec<f32>,
        sequences: usize,
        tools: &mut Tools<'_>,
    ) -> Result<Saved, Error> {
        let width = self.state.shape.in_features;
        let (step, rows) = (sequences * width, x.len() / width);
        let mut gates = tools.pool.take(rows * 4 * width);
        self.input.forward(parameters, &x, &mut gates, tools)?;
        let [mut cells, mut out] = [0; 2].map(|_| tools.pool.take(x.len()));
        let mut more = tools.pool.take(4 * step);
        for t in 0..x.len() / step.max(1) {
            let own = &mut gates[4 * t * step..][..4 * step];
            if t > 0 {
                self.state.forward(parameters, &out[(t - 1) * step..][..step], &mut more, tools)?;
                nn::add(own, &more, tools.cpu.level)?;
            }
            let (before, now) = cells.split_at_mut(t * step);
            let before = before.get((t.max(1) - 1) * step..).unwrap_or(&[]);
            let places = (&mut now[..step], &mut out[t * step..][..step]);
            cell::forward(own, before, places, width);
        }
        tools.pool.give(more);
        Ok(Saved { x, gates, cells, out })
    }

    /// From the gradient of what it gave to that of what it read.
    fn backward(
        &self,
        (parameters, gradients): (&[f32], &mut [f32]),
        (mut d_out, saved): (Vec<f32>, Saved),
        sequences: usize,
        tools: &mut Tools<'_>,
    ) -> Result<Vec<f32>, Error> {
        let width = self.state.shape.in_features;
        let step = sequences * width;
        let steps = d_out.len() / step.max(1);
        // Gradients take the places of the gates.
        let Saved { x, mut gates, cells, out } = saved;
        let mut d_cells = tools.pool.zeros(step);
        for t in (0..steps).rev() {
            let own = &mut gates[4 * t * step..][..4 * step];
            let before = if t > 0 { &cells[(t - 1) * step..][..step] } else { &[] };
            let d = (&d_out[t * step..][..step], &mut d_cells[..]);
            cell::backward(own, (before, &cells[t * step..][..step]), d, width);
            if t > 0 {
                let earlier = Gradient::Add(&mut d_out[(t - 1) * step..][..step]);
                self.state.input_gradient(parameters, own, earlier, tools)?;
            }
        }
        let arenas = (parameters, &mut *gradients);
        self.input.weight_gradient(arenas, (&x, &gates), tools)?;
        if steps > 1 {
            let rows = (&out[..(steps - 1) * step], &gates[4 * step..]);
            self.state.weight_gradient((parameters, gradients), rows, tools)?;
        }
        let d_x = Gradient::Write(&mut d_out[..]);
        self.input.input_gradient(parameters, &gates, d_x, tools)?;
        [x, gates, cells, out, d_cells].into_iter().for_each(|buffer| tools.pool.give(buffer));
        Ok(d_out)
    }
}
