//! A small model that is trained on batches which an experiment makes itself.

use foveal::Cpu;
use foveal_lm::config::ModelConfig;
use foveal_lm::train::config::{Family, ModelSection, OptimizerSection, ScheduleSection};
use foveal_lm::train::{
    Batch, IGNORED, Lstm, LstmConfig, Move, Network, Objective, Optimizer, Parameters, Scratch,
    StepOptions, length, schedule,
};
use serde_json::{Value, json};

use super::cell::Cell;
use crate::compare::{Sizes, mixer};
use crate::interrupt;

/// Sequences of a batch, and what each token is to predict.
#[derive(Debug, Default)]
pub(super) struct Examples {
    pub(super) sequences: usize,
    pub(super) tokens: Vec<u32>,
    pub(super) targets: Vec<u32>,
}

impl Examples {
    fn view(&self) -> Batch<'_> {
        Batch { sequences: self.sequences, tokens: &self.tokens, targets: &self.targets }
    }
}

/// What is trained.
enum Kind {
    Attention(Box<Network>),
    Recurrent(Lstm),
}

/// A model in training.
pub(super) struct Learner {
    kind: Kind,
    parameters: Parameters,
    optimizer: Optimizer,
    gradients: Vec<f32>,
    scratch: Scratch,
    cpu: Cpu,
    settings: OptimizerSection,
    schedule: ScheduleSection,
    step: u64,
}

/// What mixes the tokens of a model.
pub(super) enum Mixing {
    /// The attention of the family, or a mixer as in `config.json`.
    Attention(Option<Value>),
    /// Two recurrent layers, with as many parameters as the model of full attention.
    Lstm,
}

impl Mixing {
    /// By the names of `foveal compare`, with parameters that suit the cell's `tokens`; or `lstm`.
    pub(super) fn named(cell: &Cell, name: &str) -> anyhow::Result<Mixing> {
        let mixer = mixer(name, sizes(cell)?);
        match name {
            "lstm" => Ok(Mixing::Lstm),
            "full" => Ok(Mixing::Attention(None)),
            _ if mixer.is_some() => Ok(Mixing::Attention(mixer)),
            _ => anyhow::bail!("there is no attention {name:?}"),
        }
    }

    /// The same in all layers but the first, which is a window of so many tokens: as a short convolution, it puts together what stands side by
    /// side, which attention with rotated positions would need most of its training to learn.
    pub(super) fn behind_window(self, cell: &Cell, tokens: usize) -> anyhow::Result<Mixing> {
        let Mixing::Attention(mixer) = self else { return Ok(Mixing::Lstm) };
        let mixer = mixer.unwrap_or_else(|| json!({"name": "full"}));
        let mut layers = vec![mixer; cell.count("layers")?];
        if let Some(first) = layers.first_mut() {
            *first = json!({"name": "window", "tokens": tokens});
        }
        Ok(Mixing::Attention(Some(Value::Array(layers))))
    }
}

/// The sizes of a model, from a cell: `layers`, `width`, `heads`, `tokens`.
fn sizes(cell: &Cell) -> anyhow::Result<Sizes> {
    let [width, layers, heads, sequence] =
        ["width", "layers", "heads", "tokens"].map(|key| cell.count(key));
    Ok(Sizes { width: width?, layers: layers?, heads: heads?, sequence: sequence? })
}

/// A model with a mixer, for so many tokens of vocabulary.
fn config(mixer: Option<&Value>, sizes: Sizes, vocab: usize) -> anyhow::Result<ModelConfig> {
    let section = ModelSection {
        layers: sizes.layers,
        width: sizes.width,
        heads: sizes.heads,
        // Normalised queries and keys: attention is learned in fewer steps.
        architecture: Family::Qwen3,
        feed_forward: Some(2 * sizes.width),
        mixer: mixer.map(toml::Value::try_from).transpose()?,
        ..ModelSection::default()
    };
    Ok(ModelConfig::from_json(&section.to_json(vocab, sizes.sequence)?)?)
}

impl Learner {
    /// A new model of the cell's `layers`, `width` and `heads`, trained for its `steps` at its `rate`; gates of memories at `gate_rate` times that
    /// where the cell has it.
    pub(super) fn new(cell: &Cell, mixing: &Mixing, vocab: usize) -> anyhow::Result<Learner> {
        let (sizes, seed) = (sizes(cell)?, cell.seed()?);
        let (kind, parameters) = match mixing {
            Mixing::Lstm => {
                let model = config(None, sizes, vocab)?;
                let lstm = lstm_of(Parameters::initial(&model, seed)?.values().len(), vocab);
                (Kind::Recurrent(Lstm::new(lstm)?), lstm.initial(seed)?)
            }
            Mixing::Attention(mixer) => {
                let model = config(mixer.as_ref(), sizes, vocab)?;
                let network = Network::new(&model, Objective::Causal)?;
                (Kind::Attention(Box::new(network)), Parameters::initial(&model, seed)?)
            }
        };
        let (learning_rate, steps) = (cell.number("rate")?, cell.count("steps")? as u64);
        let gate_learning_rate = cell.number("gate_rate").ok().map(|times| times * learning_rate);
        Ok(Learner {
            kind,
            optimizer: Optimizer::new(&parameters),
            gradients: parameters.zeros(),
            parameters,
            scratch: Scratch::new(),
            cpu: Cpu::detect()?,
            settings: OptimizerSection {
                learning_rate,
                gate_learning_rate,
                ..OptimizerSection::default()
            },
            schedule: ScheduleSection { steps, ..ScheduleSection::default() },
            step: 0,
        })
    }

    /// What is learned.
    pub(super) fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// All steps, each on what `next` makes; the mean loss of the last tenth.
    pub(super) fn train(&mut self, mut next: impl FnMut() -> Examples) -> anyhow::Result<f64> {
        let steps = self.schedule.steps;
        let tail = steps - steps / 10;
        let (mut sum, mut count) = (0.0, 0);
        while self.step < steps {
            let loss = self.one(&next())?;
            if self.step >= tail {
                sum += loss;
                count += 1;
            }
            if interrupt::asked() {
                return Err(foveal_lm::Error::Interrupted.into());
            }
        }
        Ok(sum / f64::from(count.max(1)))
    }

    fn one(&mut self, examples: &Examples) -> anyhow::Result<f64> {
        self.gradients.fill(0.0);
        let mut options = StepOptions::new(self.cpu, &mut self.scratch);
        let (values, batch) = (self.parameters.values(), examples.view());
        let gradients = &mut self.gradients;
        let loss = match &self.kind {
            Kind::Attention(network) => {
                network.gradients(values, &batch, None, gradients, &mut options)?
            }
            Kind::Recurrent(lstm) => lstm.gradients(values, &batch, gradients, &mut options)?,
        };
        let length = length(&self.gradients, self.cpu);
        let share = schedule::share(&self.schedule, self.step);
        self.step += 1;
        let by = Move { settings: &self.settings, step: self.step, share, length };
        self.optimizer.step(&by, &mut self.parameters, &self.gradients, self.cpu)?;
        Ok(loss.mean())
    }

    /// The mean loss, in bits.
    pub(super) fn bits(&mut self, examples: &Examples) -> anyhow::Result<f64> {
        let mut options = StepOptions::new(self.cpu, &mut self.scratch);
        let (values, batch) = (self.parameters.values(), examples.view());
        let loss = match &self.kind {
            Kind::Attention(network) => network.loss(values, &batch, None, &mut options)?,
            Kind::Recurrent(lstm) => lstm.loss(values, &batch, &mut options)?,
        };
        Ok(loss.mean() / std::f64::consts::LN_2)
    }

    /// The share of targets that is the likeliest token.
    pub(super) fn accuracy(&mut self, examples: &Examples) -> anyhow::Result<f64> {
        let mut options = StepOptions::new(self.cpu, &mut self.scratch);
        let (values, batch) = (self.parameters.values(), examples.view());
        let found = match &self.kind {
            Kind::Attention(network) => network.likeliest(values, &batch, None, &mut options)?,
            Kind::Recurrent(lstm) => lstm.likeliest(values, &batch, &mut options)?,
        };
        Ok(right(&examples.targets, &found))
    }
}

/// Two recurrent layers of the width that comes nearest to so many parameters.
fn lstm_of(wanted: usize, vocab: usize) -> LstmConfig {
    let of = |width: usize| LstmConfig { vocab, width, layers: 2 };
    let count = |width: usize| vocab * width + 2 * (8 * width * width + 4 * width);
    let near = (1..4096).min_by_key(|&width| count(width).abs_diff(wanted));
    of(near.unwrap_or(1))
}

/// The share of targets that was found.
fn right(targets: &[u32], found: &[u32]) -> f64 {
    let wanted = targets.iter().filter(|&&target| target != IGNORED);
    let pairs = wanted.zip(found);
    let (right, all) =
        pairs.fold((0, 0), |(right, all), (a, b)| (right + u32::from(a == b), all + 1));
    f64::from(right) / f64::from(all.max(1))
}

/// Numbers that look random, of a seed and a place: splitmix64 (Steele et al. 2014).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64, place: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ place.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// From 0 to `n` − 1.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// From 0 to 1.
    pub(super) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// `count` different numbers below `n`, in random order.
    pub(super) fn different(&mut self, count: usize, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        for i in 0..count.min(n) {
            let other = i + self.below(n - i);
            all.swap(i, other);
        }
        all.truncate(count);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_right_is_counted_at_targets_alone() {
        assert_eq!(right(&[IGNORED, 3, IGNORED, 4], &[3, 5]), 0.5);
        assert_eq!(right(&[IGNORED], &[]), 0.0);
        let config = lstm_of(100_000, 50);
        let found = config.initial(1).unwrap().values().len();
        assert!(found.abs_diff(100_000) < 3000, "{found}");
        let mut random = Random::new(1, 2);
        let mut all = random.different(10, 10);
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
    }
}
