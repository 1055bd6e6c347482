//! What an answer begins with, whole or in chunks.

use serde_json::{Value, json};

use super::answer::Usage;
use super::{App, seconds_since_1970};

/// The members that all chunks of an answer have in common.
pub(crate) struct Head {
    id: String,
    object: &'static str,
    created: u64,
    pub(crate) app: App,
}

impl Head {
    /// Of an answer with a name of its own, which begins with `kind`.
    pub(crate) fn new(app: &App, kind: &str, object: &'static str) -> Head {
        Head { id: app.name(kind), object, created: seconds_since_1970(), app: app.clone() }
    }

    /// With its choices, and how many tokens it took.
    pub(crate) fn body(&self, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        let mut body = json!({
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.app.served.name,
        });
        body["choices"] = Value::Array(choices);
        if let Some(usage) = usage {
            body["usage"] = usage.body();
        }
        body
    }

    /// A chunk; where a last one tells how many tokens it took, the others say so with a null.
    pub(crate) fn chunk(&self, choice: Value, include_usage: bool) -> Value {
        let mut body = self.body(vec![choice], None);
        if include_usage {
            body["usage"] = Value::Null;
        }
        body
    }
}
