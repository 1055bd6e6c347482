//! A model's description as a `config.json`.

use foveal::position::YarnAmplitude;
use serde_json::{Value, json};

use super::{FULL, WINDOWED};
use crate::Error;
use crate::config::{
    Activation, Architecture, LayerConfig, ModelConfig, Reach, RopeLayout, RopeScaling, sections,
};

/// The `config.json` of a model that was read from a GGUF file, whose rows of queries and keys and whose norms are to be
/// written as folders have them.
///
/// # Errors
///
/// [`Error::UnsupportedConfig`] for what it has no key for.
pub(crate) fn to_json(config: &ModelConfig) -> Result<Value, Error> {
    let (class, kind) = class(config)?;
    let attention = &config.attention;
    let gemma = config.architecture.is_gemma();
    let mut json = json!({
        "architectures": [class],
        "model_type": kind,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers.len(),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": config.context,
        "vocab_size": config.vocab,
        "rms_norm_eps": shortest(config.norm_epsilon),
        "tie_word_embeddings": config.tied_head,
    });
    let activation = match config.activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    json[if gemma { "hidden_activation" } else { "hidden_act" }] = activation.into();
    if gemma {
        json["query_pre_attn_scalar"] = (1.0 / f64::from(attention.scale).powi(2)).round().into();
        json["attn_logit_softcapping"] = attention.softcap.map(shortest).into();
        json["final_logit_softcapping"] = config.logit_softcap.map(shortest).into();
    } else if attention.output_bias {
        json["attention_bias"] = true.into();
    }
    layers(config, &mut json)?;
    if let Some(foveal) = sections::write(&config.layers)? {
        json["foveal"] = foveal;
    }
    verify(config, &json)?;
    Ok(json)
}

/// What comes back from the text has to be what was meant.
fn verify(config: &ModelConfig, json: &Value) -> Result<(), Error> {
    let mut meant = config.clone();
    meant.attention.rope_layout = RopeLayout::HalfSplit;
    meant.norm_offset = if config.architecture.is_gemma() { 1.0 } else { 0.0 };
    let found = ModelConfig::from_json(json)?;
    if meant.architecture == Architecture::Llama && found.architecture == Architecture::Mistral {
        meant.architecture = Architecture::Mistral;
    }
    if found == meant {
        return Ok(());
    }
    let found = format!("{:?}", meant.attention);
    Err(Error::UnsupportedConfig { key: "what config.json has no key for".to_owned(), found })
}

/// A number as it is written shortest: 1e-5 in f32 is 1e-5 in f64.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| f64::from(x))
}

fn class(config: &ModelConfig) -> Result<(&'static str, &'static str), Error> {
    let windowed = config.layers.iter().all(|layer| layer.reach != Reach::Full);
    Ok(match config.architecture {
        Architecture::Llama if windowed => ("MistralForCausalLM", "mistral"),
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Mistral => ("MistralForCausalLM", "mistral"),
        Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        Architecture::Gemma2 => ("Gemma2ForCausalLM", "gemma2"),
        Architecture::Gemma3 => ("Gemma3ForCausalLM", "gemma3_text"),
        Architecture::GptOss => ("GptOssForCausalLM", "gpt_oss"),
        other => {
            let (key, found) = ("the architecture".to_owned(), other.to_string());
            return Err(Error::UnsupportedConfig { key, found });
        }
    })
}

fn layers(config: &ModelConfig, json: &mut Value) -> Result<(), Error> {
    let full = config.layers.iter().find(|layer| layer.reach == Reach::Full);
    let local = config.layers.iter().find(|layer| layer.reach != Reach::Full);
    if let Some(LayerConfig { reach: Reach::Window(window), rope, .. }) = local {
        json["sliding_window"] = (*window).into();
        let kinds = config.layers.iter().map(|layer| match layer.reach {
            Reach::Full => FULL,
            Reach::Window(_) => WINDOWED,
        });
        json["layer_types"] = kinds.collect::<Vec<_>>().into();
        if config.architecture == Architecture::Gemma3 {
            json["rope_local_base_freq"] = rope.base.into();
        }
    }
    let Some(layer) = full.or(local) else { return Ok(()) };
    json["rope_theta"] = layer.rope.base.into();
    match &layer.rope.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            json["rope_scaling"] = json!({"rope_type": "linear", "factor": factor});
        }
        RopeScaling::Llama3 { factor, low, high, original_context } => {
            json["rope_scaling"] = json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original_context,
            });
        }
        RopeScaling::Yarn(yarn) => {
            let mut scaling = json!({
                "rope_type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
                "original_max_position_embeddings": yarn.original_context as u64, "truncate": yarn.truncate,
            });
            if let YarnAmplitude::Fixed(amplitude) = yarn.amplitude {
                scaling["attention_factor"] = amplitude.into();
            }
            json["rope_scaling"] = scaling;
        }
        RopeScaling::Divisors(_) => {
            let (key, found) =
                ("divisors of frequencies".to_owned(), "rope_freqs.weight".to_owned());
            return Err(Error::UnsupportedConfig { key, found });
        }
    }
    Ok(())
}
