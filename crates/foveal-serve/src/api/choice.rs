//! What completions and chats have in common: how tokens are chosen, when a text ends, how many there are.

use foveal_lm::generate::Options;
use foveal_lm::sample::Sampling;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::App;
use super::failure::Failure;

/// The most texts of one request.
pub(crate) const MOST_TEXTS: usize = 64;
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;

/// One string or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Strings {
    One(String),
    Several(Vec<String>),
}

impl Strings {
    pub(crate) fn into_vec(self) -> Vec<String> {
        match self {
            Strings::One(string) => vec![string],
            Strings::Several(strings) => strings,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// Whether a last chunk says how many tokens there were.
    #[serde(default)]
    pub(crate) include_usage: bool,
}

/// The fields of a request that say how to answer.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct Choice {
    /// The model's name; may be left out.
    pub(crate) model: Option<String>,
    /// The most tokens of an answer.
    pub(crate) max_tokens: Option<u64>,
    /// The same.
    pub(crate) max_completion_tokens: Option<u64>,
    /// 0 takes the most probable token; 1 if left out.
    pub(crate) temperature: Option<f32>,
    /// Keep the most probable tokens with this probability together; 1 if left out.
    pub(crate) top_p: Option<f32>,
    /// Keep so many of the most probable tokens; all if left out.
    pub(crate) top_k: Option<i64>,
    /// Keep tokens with this share of the greatest probability; 0 if left out.
    pub(crate) min_p: Option<f32>,
    /// Divide the logits of the last 64 tokens by this; 1 if left out.
    pub(crate) repeat_penalty: Option<f32>,
    /// The same seed gives the same text.
    pub(crate) seed: Option<i64>,
    /// Strings that end an answer.
    pub(crate) stop: Option<Strings>,
    /// How many answers, each with the next seed.
    pub(crate) n: Option<u64>,
    /// Whether the answer comes piece by piece, as server-sent events.
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    /// Everything else.
    #[serde(flatten)]
    #[schema(ignore)]
    pub(crate) rest: Map<String, Value>,
}

/// Fields that would change the answer, and that this server does not know.
const UNSUPPORTED: &[&str] = &[
    "audio",
    "best_of",
    "echo",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "modalities",
    "prediction",
    "presence_penalty",
    "response_format",
    "suffix",
    "tool_choice",
    "tools",
    "web_search_options",
];

impl Choice {
    /// How many answers each prompt gets.
    pub(crate) fn answers(&self) -> Result<usize, Failure> {
        let found = self.n.unwrap_or(1);
        let n = usize::try_from(found).ok().filter(|n| (1..=MOST_TEXTS).contains(n));
        n.ok_or_else(|| Failure::bad("n", format!("n is {found}, expected 1 to {MOST_TEXTS}")))
    }

    pub(crate) fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    pub(crate) fn include_usage(&self) -> bool {
        self.stream_options.is_some_and(|options| options.include_usage)
    }

    /// Refuses what is asked for and can't be done: null, false, 0, "auto" and the like ask for nothing.
    pub(crate) fn check(&self, app: &App) -> Result<(), Failure> {
        app.check_model(self.model.as_deref())?;
        for &name in UNSUPPORTED {
            if self.rest.get(name).is_some_and(|value| !asks_for_nothing(name, value)) {
                return Err(Failure::unsupported(name, format!("{name} is not supported here")));
            }
        }
        if self.stream_options.is_some() && !self.streams() {
            let message = "stream_options needs \"stream\": true";
            return Err(Failure::bad("stream_options", message));
        }
        Ok(())
    }

    /// The options of the text of this number; `room` is how many tokens the context has behind the prompt.
    pub(crate) fn options(
        &self,
        (number, seed): (usize, u64),
        (usual, room): (usize, usize),
        logprobs: Option<usize>,
    ) -> Result<Options, Failure> {
        let wanted = self.max_completion_tokens.or(self.max_tokens);
        let wanted = wanted.map_or(usual, |wanted| usize::try_from(wanted).unwrap_or(usize::MAX));
        let seed = self.seed.map_or(seed, |seed| seed as u64).wrapping_add(number as u64);
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.map_or(0, |k| usize::try_from(k).unwrap_or(0)),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repeat_penalty: self.repeat_penalty.unwrap_or(1.0),
            seed,
            ..Sampling::default()
        };
        // A temporary one says what is out of range.
        foveal_lm::sample::Sampler::new(sampling)?;
        let stop = self.stop.clone().map_or_else(Vec::new, Strings::into_vec);
        if stop.len() > MOST_STOPS || stop.iter().any(|stop| stop.len() > LONGEST_STOP) {
            let message =
                format!("expected up to {MOST_STOPS} strings of up to {LONGEST_STOP} bytes");
            return Err(Failure::bad("stop", message));
        }
        Ok(Options { max_tokens: wanted.min(room), stop, sampling, logprobs })
    }
}

fn asks_for_nothing(name: &str, value: &Value) -> bool {
    match (name, value) {
        (_, Value::Null | Value::Bool(false)) => true,
        ("best_of", value) => value.as_u64() == Some(1),
        ("response_format", value) => value["type"] == "text",
        ("tool_choice", value) => value == "none" || value == "auto",
        ("function_call", value) => value == "none",
        ("modalities", value) => *value == serde_json::json!(["text"]),
        (_, Value::Number(number)) => number.as_f64() == Some(0.0),
        (_, Value::String(text)) => text.is_empty(),
        (_, Value::Array(list)) => list.is_empty(),
        (_, Value::Object(map)) => map.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_asks_for_nothing_is_let_through() {
        for (name, value) in [
            ("tools", json!([])),
            ("tools", json!(null)),
            ("tool_choice", json!("auto")),
            ("presence_penalty", json!(0.0)),
            ("response_format", json!({"type": "text"})),
            ("echo", json!(false)),
            ("best_of", json!(1)),
            ("logit_bias", json!({})),
            ("suffix", json!("")),
        ] {
            assert!(asks_for_nothing(name, &value), "{name}");
        }
        for (name, value) in [
            ("tools", json!([{}])),
            ("tool_choice", json!("required")),
            ("presence_penalty", json!(0.5)),
            ("response_format", json!({"type": "json_object"})),
            ("echo", json!(true)),
            ("best_of", json!(2)),
            ("logit_bias", json!({"1": 2})),
        ] {
            assert!(!asks_for_nothing(name, &value), "{name}");
        }
    }
}
