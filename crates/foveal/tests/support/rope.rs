//! Rotary embeddings as golden options describe them.

use foveal::position::{RopeConfig, RopeLayout, RopeScaling, Yarn, YarnAmplitude};
use serde_json::Value;

/// A configuration from options named as in the files of Hugging Face; `context` is the length that
/// dynamic scaling sees.
pub fn rope_config(options: &Value, head_dim: usize, layout: RopeLayout) -> RopeConfig {
    let number = |name: &str| options[name].as_f64();
    let either = |a: &str, b: &str| options.get(a).or(options.get(b)).unwrap();
    let factor = number("factor").unwrap_or(1.0);
    let original_context = number("original_max_position_embeddings");
    let scaling = match either("type", "rope_type").as_str().unwrap() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor },
        "dynamic" => RopeScaling::DynamicNtk {
            factor,
            original_context: number("max_position_embeddings").unwrap(),
            context: number("sequence_length_for_dynamic").unwrap(),
        },
        "llama3" => RopeScaling::Llama3 {
            factor,
            low_freq_factor: number("low_freq_factor").unwrap(),
            high_freq_factor: number("high_freq_factor").unwrap(),
            original_context: original_context.unwrap(),
        },
        "yarn" => RopeScaling::Yarn(yarn(options)),
        other => panic!("unknown RoPE {other:?}"),
    };
    RopeConfig {
        rotary_dim: number("rotary_dim").map_or(head_dim, |x| x as usize),
        theta: either("theta", "rope_theta").as_f64().unwrap(),
        scaling,
        ..RopeConfig::new(head_dim, layout)
    }
}

fn yarn(options: &Value) -> Yarn {
    let number = |name: &str| options[name].as_f64();
    let defaults =
        Yarn::new(number("factor").unwrap(), number("original_max_position_embeddings").unwrap());
    let amplitude = match (number("attention_factor"), number("mscale"), number("mscale_all_dim")) {
        (Some(amplitude), ..) => YarnAmplitude::Fixed(amplitude),
        (None, Some(mscale), Some(mscale_all_dim)) => {
            YarnAmplitude::Mscale { mscale, mscale_all_dim }
        }
        _ => YarnAmplitude::Standard,
    };
    Yarn {
        beta_fast: number("beta_fast").unwrap_or(defaults.beta_fast),
        beta_slow: number("beta_slow").unwrap_or(defaults.beta_slow),
        truncate: options["truncate"].as_bool().unwrap_or(true),
        amplitude,
        ..defaults
    }
}
