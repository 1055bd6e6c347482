//! What is compared: attentions by name, with parameters that suit the length of training.

use anyhow::{Context, bail};
use foveal_lm::config::Mechanism;
use serde_json::{Value, json};

/// Query heads of the models.
pub(super) const HEADS: usize = 4;
/// What is compared where nothing is named: one of each kind.
const USUAL: [&str; 7] =
    ["full", "gqa", "window", "sparse_transformer", "gated_delta", "infini", "hybrid"];

/// The size of the models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) width: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    /// Tokens of a sequence of training.
    pub(crate) sequence: usize,
}

/// An attention and what it is called.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Contender {
    pub(crate) name: String,
    /// As in `config.json` under `foveal`; none for attention to all.
    pub(crate) mixer: Option<Value>,
    pub(crate) kv_heads: usize,
}

impl Contender {
    /// Those of the arguments; one of each kind for none.
    pub(crate) fn all(arguments: &[String], sizes: Sizes) -> anyhow::Result<Vec<Contender>> {
        let mut names: Vec<&str> = vec![];
        for argument in arguments {
            // A mixer of one's own has commas.
            match argument.contains('=') {
                true => names.push(argument),
                false => names.extend(argument.split(',').filter(|name| !name.is_empty())),
            }
        }
        if names.is_empty() {
            names.extend(USUAL);
        }
        let mut all: Vec<Contender> = vec![];
        for name in names {
            let one = Contender::named(name, sizes)?;
            if all.iter().any(|other| other.name == one.name) {
                bail!("{} is named twice; give one of them another name: NAME=JSON", one.name);
            }
            all.push(one);
        }
        Ok(all)
    }

    fn named(text: &str, sizes: Sizes) -> anyhow::Result<Contender> {
        if let Some((name, mixer)) = text.split_once('=') {
            let (name, kv_heads) = kv_heads(name, sizes)?;
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
                bail!("the name of a mixer is letters, digits, - and _, not {name:?}");
            }
            let mixer = serde_json::from_str(mixer)
                .with_context(|| format!("the mixer of {name} is no JSON; see docs/mixers.md"))?;
            let name = name.to_owned();
            return Ok(Contender { name, mixer: Some(mixer), kv_heads });
        }
        let (name, kv_heads) = kv_heads(text, sizes)?;
        let found = match name {
            "full" => Some((None, kv_heads)),
            "gqa" => Some((None, (sizes.heads / 2).max(1))),
            "mqa" => Some((None, 1)),
            "hybrid" => Some((mixer("hybrid", sizes), (sizes.heads / 2).max(1))),
            name => mixer(name, sizes).map(|mixer| (Some(mixer), kv_heads)),
        };
        let Some((mixer, kv_heads)) = found else {
            let all: Vec<&str> =
                ["full", "gqa", "mqa", "hybrid"].into_iter().chain(mixers()).collect();
            bail!("there is no attention {name:?}; there are {}, and NAME=JSON", all.join(", "));
        };
        Ok(Contender { name: text.replace('/', "-"), mixer, kv_heads })
    }

    /// Whether nothing can be read beyond the tokens of training: the plan of BigBird ends there.
    pub(crate) fn ends_with_context(&self) -> bool {
        self.mixer.as_ref().is_some_and(|mixer| mixer.to_string().contains("\"bigbird\""))
    }
}

/// `NAME/KV_HEADS`.
fn kv_heads(text: &str, sizes: Sizes) -> anyhow::Result<(&str, usize)> {
    let Some((name, count)) = text.split_once('/') else { return Ok((text, sizes.heads)) };
    let heads = sizes.heads;
    let count = count.parse().ok().filter(|&count| count > 0 && heads.is_multiple_of(count));
    match count {
        Some(count) => Ok((name, count)),
        None => bail!("key/value heads divide the {heads} heads: NAME/1, NAME/2; found {text:?}"),
    }
}

/// The names that [`mixer`] knows, but for `hybrid`.
pub(crate) fn mixers() -> impl Iterator<Item = &'static str> {
    // Linformer reads whole texts at once and continues none.
    Mechanism::NAMES.into_iter().filter(|name| !matches!(*name, "full" | "linformer"))
}

/// A mixer with parameters that suit sequences of so many tokens.
pub(crate) fn mixer(name: &str, sizes: Sizes) -> Option<Value> {
    let tokens = sizes.sequence;
    let (quarter, root) = (tokens / 4, tokens.isqrt());
    let window = || json!({"name": "window", "tokens": quarter});
    // The last layer but one remembers; the others have positions.
    let among_windows = |one: Value| {
        let at = sizes.layers.saturating_sub(2);
        let layer = |n: usize| if n == at { one.clone() } else { window() };
        json!((0..sizes.layers).map(layer).collect::<Vec<Value>>())
    };
    let memorizing =
        || json!({"name": "memorizing", "segment": quarter, "top": 16, "capacity": 16 * tokens});
    Some(match name {
        "window" => window(),
        "sparse_transformer" => {
            json!({"name": name, "pattern": "fixed", "stride": root, "width": (root / 8).max(1)})
        }
        "longformer" => json!({"name": name, "reach": quarter, "global": [0]}),
        "bigbird" => json!({"name": name, "block": root, "random": 2}),
        "moba" => json!({"name": name, "block": root, "top": 4}),
        "native_sparse" => json!({
            "name": name, "length": root, "stride": root, "block": root, "top": 4, "window": quarter,
        }),
        // Twice as many tokens as a bucket has on average.
        "lsh" => json!({"name": name, "chunk": root, "buckets": 2 * tokens / root.max(1)}),
        "performer" => json!({"name": name, "features": 2 * sizes.width / sizes.heads}),
        "scalar_decay" => json!({"name": name, "conv": 4}),
        "linear" | "efficient" | "retention" | "gla" | "delta" | "gated_delta" => {
            json!({"name": name})
        }
        "transformer_xl" => json!({"name": name, "segment": quarter, "memory": quarter}),
        "infini" => json!({"name": name, "segment": quarter}),
        "memorizing" | "hybrid" => among_windows(memorizing()),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use foveal_lm::config::ModelConfig;

    const SIZES: Sizes = Sizes { width: 64, layers: 3, heads: 4, sequence: 256 };

    #[test]
    fn every_name_makes_a_model() {
        let names: Vec<String> = ["full", "gqa", "mqa", "hybrid"]
            .into_iter()
            .chain(mixers())
            .map(str::to_owned)
            .collect();
        for one in Contender::all(&names, SIZES).unwrap() {
            let mut config = json!({
                "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": one.kv_heads, "intermediate_size": 64,
                "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
            });
            if let Some(mixer) = &one.mixer {
                config["foveal"] = json!({"mixer": mixer});
            }
            ModelConfig::from_json(&config).unwrap_or_else(|error| panic!("{}: {error}", one.name));
        }
    }

    #[test]
    fn names_heads_and_mixers_of_ones_own_are_told_apart() {
        let text = |text: &str| vec![text.to_owned()];
        let names = Contender::all(&text("full,window/2,mqa"), SIZES).unwrap();
        let heads: Vec<(&str, usize)> =
            names.iter().map(|one| (one.name.as_str(), one.kv_heads)).collect();
        assert_eq!(heads, [("full", 4), ("window-2", 2), ("mqa", 1)]);
        let own =
            Contender::all(&text("mine/2={\"name\": \"window\", \"tokens\": 7}"), SIZES).unwrap();
        assert_eq!((own[0].name.as_str(), own[0].kv_heads), ("mine", 2));
        assert_eq!(own[0].mixer.as_ref().unwrap()["tokens"], 7);
        for wrong in ["nothing", "full/3", "full,full", "../x={}", "x={", "linformer"] {
            assert!(Contender::all(&text(wrong), SIZES).is_err(), "{wrong}");
        }
    }
}
