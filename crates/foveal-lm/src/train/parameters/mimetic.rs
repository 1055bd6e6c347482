//! Recurrent layers that copy from the first step on.
//!
//! ```text
//! q_t = P x_t     k_t = P x_{t−1}     v_t = V x_t     out_t = s Vᵀ o_t
//! ```
//!
//! A layer of gated delta rules with these matrices and convolutions is an induction head (Olsson et al. 2022): it finds where the
//! token of now stood before, and writes what came behind it, which a head tied to the embedding takes for the next token. What
//! training from random numbers seldom finds is there at once, to be refined. That queries and keys are read alike and little is
//! forgotten is mimetic initialisation (Trockman et al. 2024, of Mamba); keys a token late and Vᵀ make a head of it that copies.
//! Head 0 looks for one token, head h for the last h + 1 together, as far as the convolution reaches.
//!
//! The gates of such a layer have no biases, and random ones would give each channel another sign. So all embeddings get a common
//! direction, ±1 by channel, which the gates read and P and V don't; heads forget at rates of 0.001 to 0.02 a token.

use std::f32::consts::SQRT_2;

use super::{Initial, Parameters};
use crate::config::{Mechanism, ModelConfig};
use crate::names::{self, Form, Part, Place};
use crate::train::Error;
use crate::weights;

/// The size of a convolution's taps: small, so that the SiLU behind them is all but linear.
const TAP: f32 = 0.3;
/// What gates see of the common direction: σ of it is 0.82, SiLU 1.23.
const GATE: f32 = 1.5;
/// What is left of gates' random matrices.
const REST: f32 = 0.3;
/// The first and the last head's rate of forgetting.
const RATES: [f32; 2] = [0.001, 0.02];
/// What a layer writes, beside embeddings: `s` in units of their deviation.
const OUTPUT: f32 = 1.5;

impl Parameters {
    /// Makes induction heads of layers of gated delta rules, counted from 0: q_t = P x_t, k_t = P x_{t−1}, v_t = V x_t and the
    /// output Vᵀ, so that what stood behind the last tokens before is what comes next (after Trockman et al. 2024,
    /// arXiv:2410.11135). All embeddings get a common direction, which the gates of these layers read. The random numbers are those
    /// of the seed; without layers nothing changes. Allocates two matrices of a layer.
    ///
    /// # Errors
    /// [`Error::Config`] for a layer that the model hasn't, one of another mechanism or of several, one without convolutions or
    /// with grouped heads, and a head that is not tied to the embedding.
    pub fn copy_from_the_start(
        &mut self,
        config: &ModelConfig,
        layers: &[usize],
        seed: u64,
    ) -> Result<(), Error> {
        let taps = layers.iter().map(|&layer| taps(config, layer));
        let taps: Vec<usize> = taps.collect::<Result<_, _>>()?;
        if layers.is_empty() {
            return Ok(());
        }
        let mut direction = vec![0.0; config.width];
        Initial::Uniform(1.0).fill(&mut direction, seed, "common direction");
        direction.iter_mut().for_each(|x| *x = x.signum());
        let embedding = Place::Embedding.name(config, Form::HuggingFace);
        let table = self.named(&embedding)?;
        let size = (dot(table, table) / table.len().max(1) as f64).sqrt() as f32;
        for row in table.chunks_exact_mut(config.width) {
            remove(row, &direction);
            row.iter_mut().zip(&direction).for_each(|(x, m)| *x += size * m);
        }
        for (&layer, taps) in layers.iter().zip(taps) {
            Copier { config, layer, taps, direction: &direction, size, seed }.write(self)?;
        }
        Ok(())
    }

    fn named(&mut self, name: &str) -> Result<&mut [f32], Error> {
        let entry = self.entries.iter().find(|entry| entry.name == name);
        let missing = || weights::Error::MissingTensor { name: name.to_owned() };
        let range = entry.ok_or_else(|| crate::Error::from(missing()))?.range.clone();
        Ok(&mut self.values[range])
    }
}

/// The taps of a layer that can be made a copier.
fn taps(config: &ModelConfig, layer: usize) -> Result<usize, Error> {
    let error = |found: String, expected: &str| Error::config("model.copying", found, expected);
    let Some(found) = config.layers.get(layer) else {
        let last = config.layers.len().saturating_sub(1);
        let expected = format!("layers from 0 to {last}");
        return Err(Error::config("model.copying", layer, expected));
    };
    let heads = config.attention;
    if heads.q_dim() != heads.kv_dim() {
        return Err(error("grouped heads".to_owned(), "model.kv_heads as many as model.heads"));
    }
    if !config.tied_head {
        return Err(error("a head of its own".to_owned(), "model.tied_head = true"));
    }
    match &found.sections[..] {
        [section] => match section.mechanism {
            Mechanism::GatedDelta { conv, .. } if conv >= 2 => Ok(conv),
            _ => {
                let expected = "layers of gated_delta with convolutions (conv) of 2 at least";
                Err(error(format!("layer {layer}, which is another"), expected))
            }
        },
        _ => Err(error(format!("layer {layer} of several mixers"), "layers of gated_delta alone")),
    }
}

/// One layer.
struct Copier<'a> {
    config: &'a ModelConfig,
    layer: usize,
    taps: usize,
    direction: &'a [f32],
    /// The deviation of the embedding.
    size: f32,
    seed: u64,
}

impl Copier<'_> {
    fn write(&self, parameters: &mut Parameters) -> Result<(), Error> {
        let Copier { config, layer, .. } = *self;
        let (width, channels) = (config.width, config.attention.q_dim());
        let matrix = |part| Place::Layer(layer, part, "weight").name(config, Form::HuggingFace);
        let both = self.projection(&matrix(Part::Query), channels);
        parameters.named(&matrix(Part::Query))?.copy_from_slice(&both);
        parameters.named(&matrix(Part::Key))?.copy_from_slice(&both);
        let values = self.projection(&matrix(Part::Value), channels);
        parameters.named(&matrix(Part::Value))?.copy_from_slice(&values);
        let output = parameters.named(&matrix(Part::AttentionOutput))?;
        for (at, row) in output.chunks_exact_mut(channels).enumerate() {
            let column = values.iter().skip(at).step_by(width);
            row.iter_mut().zip(column).for_each(|(o, v)| *o = OUTPUT * self.size * v);
        }
        let own = |part: &str| names::section(layer, 0, part, Form::HuggingFace);
        for (name, late, heads) in [("q_conv", 0, true), ("k_conv", 1, true), ("v_conv", 0, false)]
        {
            self.convolution(parameters.named(&own(&format!("{name}.weight")))?, late, heads);
        }
        // A row of the common direction: what each gate reads is the same for all tokens, but for its random rest.
        let length = width as f32 / SQRT_2;
        for (name, reads) in [("gate_proj", GATE), ("beta_proj", GATE), ("decay_proj", 0.0)] {
            let rows = parameters.named(&own(&format!("{name}.weight")))?;
            for row in rows.chunks_exact_mut(width) {
                let both = row.iter_mut().zip(self.direction);
                both.for_each(|(x, m)| *x = REST * *x + reads / length * m);
            }
        }
        parameters.named(&own("a_log"))?.fill(0.0);
        let steps = parameters.named(&own("dt_bias"))?;
        let last = steps.len().saturating_sub(1).max(1) as f32;
        for (head, step) in steps.iter_mut().enumerate() {
            let rate = RATES[0] * (RATES[1] / RATES[0]).powf(head as f32 / last);
            *step = rate.exp_m1().ln();
        }
        Ok(())
    }

    /// Orthogonal rows of length 1 that don't read the common direction; from the channel that is the last such one on, others.
    fn projection(&self, name: &str, rows: usize) -> Vec<f32> {
        let width = self.config.width;
        let mut all = vec![0.0; rows * width];
        Initial::Normal(1.0).fill(&mut all, self.seed, &format!("{name}, copying"));
        for block in all.chunks_mut((width - 1).max(1) * width) {
            for row in 0..block.len() / width {
                let (done, rest) = block.split_at_mut(row * width);
                let own = &mut rest[..width];
                remove(own, self.direction);
                // Twice is enough for orthogonality to the last bits (Giraud et al. 2005).
                (0..2).for_each(|_| done.chunks_exact(width).for_each(|other| remove(own, other)));
                // Of width 1 nothing is left.
                let length = dot(own, own).sqrt().max(f64::MIN_POSITIVE);
                own.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
            }
        }
        all
    }

    /// Takes the token `late` places back, and with `more` those before it too, more by the head.
    fn convolution(&self, taps: &mut [f32], late: usize, more: bool) {
        let (dim, reach) = (self.config.attention.head_dim, self.taps - late);
        for (channel, own) in taps.chunks_exact_mut(self.taps).enumerate() {
            let count = if more { (channel / dim + 1).min(self.taps - 1) } else { 1 };
            own.fill(0.0);
            own[reach - count..reach].fill(TAP / (count as f32).sqrt());
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Takes from a vector what lies along another.
fn remove(from: &mut [f32], along: &[f32]) {
    let share = dot(from, along) / dot(along, along);
    from.iter_mut().zip(along).for_each(|(x, a)| *x -= (share * f64::from(*a)) as f32);
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use serde_json::{Value, json};

    use super::Parameters;
    use crate::Model;
    use crate::config::ModelConfig;
    use crate::evaluate::token_nll;
    use crate::train::Error;
    use foveal::random::Random;

    const VOCAB: usize = 500;

    fn config(change: impl FnOnce(&mut Value)) -> (Value, ModelConfig) {
        let mut json = json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 128, "intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
            "max_position_embeddings": 256, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
            "tie_word_embeddings": true, "hidden_act": "silu", "torch_dtype": "float32",
            "foveal": {"mixer": [{"name": "gated_delta"}, {"name": "window", "tokens": 8}]},
        });
        change(&mut json);
        let config = ModelConfig::from_json(&json).unwrap();
        (json, config)
    }

    #[test]
    fn what_is_seen_a_second_time_costs_less_before_any_training() {
        let mut random = Random::new(5);
        let once: Vec<u32> = (0..60).map(|_| random.below(VOCAB) as u32).collect();
        let text = [&once[..], &once[..]].concat();
        // What a token costs less the second time: nats, the mean of all but the first ones.
        let gain = |copying: &[usize]| {
            let (json, config) = config(|_| ());
            let mut parameters = Parameters::initial(&config, 1).unwrap();
            parameters.copy_from_the_start(&config, copying, 1).unwrap();
            let model = Model::new(&parameters.weights(&json).unwrap()).unwrap();
            let mut state = model.state().unwrap();
            let mut watch = |_| ControlFlow::Continue(());
            let nll = token_nll(&model, &text, &mut state, &mut watch).unwrap();
            let pairs = nll[1..].iter().zip(&nll[once.len() + 1..]).skip(2);
            pairs.clone().map(|(first, second)| first - second).sum::<f32>() / pairs.count() as f32
        };
        let (without, with) = (gain(&[]), gain(&[0]));
        assert!(without.abs() < 0.05, "{without}");
        assert!(with > 0.15, "{with}");
    }

    #[test]
    fn only_layers_of_gated_delta_rules_can_be_made_copiers() {
        let refused = |layer: usize, what: &str, change: fn(&mut Value)| {
            let (_, config) = config(change);
            let mut parameters = Parameters::initial(&config, 1).unwrap();
            let before = parameters.clone();
            match parameters.copy_from_the_start(&config, &[0, layer], 1) {
                Err(Error::Config { key, found, .. }) => {
                    assert_eq!((&*key, &*found), ("model.copying", what));
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(parameters, before);
        };
        refused(1, "layer 1, which is another", |_| ());
        refused(2, "2", |_| ());
        refused(0, "a head of its own", |json| json["tie_word_embeddings"] = false.into());
        refused(0, "grouped heads", |json| json["num_key_value_heads"] = 2.into());
        refused(0, "layer 0, which is another", |json| {
            json["foveal"]["mixer"] =
                json!([{"name": "gated_delta", "conv": 0}, {"name": "window", "tokens": 8}]);
        });
    }
}
