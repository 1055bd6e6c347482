//! Small models of every kind, with parameters that make every part of them count.

use std::path::PathBuf;

use foveal::Cpu;
use foveal_lm::Error;
use foveal_lm::config::ModelConfig;
use foveal_lm::train::{
    Batch, Carried, Group, IGNORED, Loss, Network, Objective, Parameters, Scratch, StepOptions,
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// Texts of a batch.
pub(crate) const SEQUENCES: usize = 2;
/// Tokens of a text.
pub(crate) const TOKENS: usize = 20;
const VOCAB: usize = 40;

/// `config.json` of a model of Llama's layers; of all heads' keys where a recurrence needs them.
pub(crate) fn llama(mixer: &Value) -> Value {
    let text = mixer.to_string();
    let recurrent =
        ["\"linear\"", "lsh", "performer", "efficient", "retention", "decay", "gla", "delta"];
    let kv_heads = if recurrent.iter().any(|name| text.contains(name)) { 4 } else { 2 };
    let mut config = family("llama");
    config["num_key_value_heads"] = kv_heads.into();
    config["foveal"] = json!({"mixer": mixer});
    config
}

/// `config.json` of a model of a family.
pub(crate) fn family(name: &str) -> Value {
    json!({
        "model_type": name, "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 28,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    })
}

/// A model with its numbers and a batch.
pub(crate) struct Case {
    pub(crate) config: Value,
    pub(crate) network: Network,
    pub(crate) parameters: Parameters,
    pub(crate) tokens: Vec<u32>,
    pub(crate) targets: Vec<u32>,
}

/// Numbers between −1 and 1 that look random.
pub(crate) fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    }
}

/// Tokens that look random.
pub(crate) fn text(count: usize, seed: u64) -> Vec<u32> {
    let mut noise = noise(seed);
    (0..count).map(|_| ((noise() + 1.0) * 0.5 * VOCAB as f32) as u32 % VOCAB as u32).collect()
}

impl Case {
    pub(crate) fn new(config: Value, objective: Objective) -> Result<Case, Error> {
        let model = ModelConfig::from_json(&config)?;
        let network = Network::new(&model, objective)?;
        let mut parameters = Parameters::initial(&model, 7)?;
        let entries = parameters.entries().to_vec();
        let mut noise = noise(11);
        for entry in entries {
            for x in &mut parameters.values_mut()[entry.range] {
                // Large enough that softmax is far from even, and every vector matters.
                *x = match entry.group {
                    // Mixtures are large enough.
                    Group::Matrix if entry.name.ends_with(".e_proj.weight") => *x,
                    Group::Matrix if entry.name.ends_with(".f_proj.weight") => *x,
                    Group::Matrix => *x * 12.0,
                    _ => *x + 0.3 * noise(),
                };
            }
        }
        let tokens = text(SEQUENCES * TOKENS, 3);
        let mut targets = text(SEQUENCES * TOKENS, 4);
        targets.iter_mut().step_by(7).for_each(|target| *target = IGNORED);
        Ok(Case { config, network, parameters, tokens, targets })
    }

    pub(crate) fn batch(&self) -> Batch<'_> {
        Batch { sequences: SEQUENCES, tokens: &self.tokens, targets: &self.targets }
    }

    /// The mean loss with other parameters.
    pub(crate) fn loss_of(&self, values: &[f32], scratch: &mut Scratch) -> f64 {
        let mut options = StepOptions::new(Cpu::detect().unwrap(), scratch);
        self.network.loss(values, &self.batch(), None, &mut options).unwrap().mean()
    }

    /// The loss and all gradients; buffers are full of NaN before they are written.
    pub(crate) fn gradients(
        &self,
        carried: Option<&mut Carried>,
        set: impl Fn(&mut StepOptions<'_>),
    ) -> (Loss, Vec<f32>) {
        let mut scratch = Scratch::new();
        scratch.poison();
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        set(&mut options);
        let mut gradients = self.parameters.zeros();
        let values = self.parameters.values();
        let loss =
            self.network.gradients(values, &self.batch(), carried, &mut gradients, &mut options);
        (loss.unwrap(), gradients)
    }

    /// Writes the model as a folder that [`foveal_lm::Model`] opens.
    pub(crate) fn save(&self, name: &str) -> PathBuf {
        let folder =
            std::env::temp_dir().join(format!("foveal-train-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        let bytes: Vec<u8> =
            self.parameters.values().iter().flat_map(|x| x.to_le_bytes()).collect();
        let views = self.parameters.entries().iter().map(|entry| {
            let own = &bytes[4 * entry.range.start..4 * entry.range.end];
            let view = TensorView::new(Dtype::F32, entry.shape.clone(), own).unwrap();
            (entry.name.clone(), view)
        });
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
        folder
    }
}
