//! What the page shows of each mechanism of the registry: equation, cost, who sees whom, and how long it takes here.

mod measure;

use foveal::registry::{self, MECHANISMS, Mechanism};
use serde_json::{Value, json};

pub(crate) use measure::{Measuring, TOKENS};

/// All mechanisms.
pub(crate) fn all() -> Value {
    let all = MECHANISMS.iter().map(|mechanism| {
        let Mechanism { name, summary, paper, equation, cost, .. } = *mechanism;
        let Mechanism { forward, backward, decode, .. } = *mechanism;
        json!({
            "name": name,
            "group": mechanism.group.name(),
            "summary": summary,
            "paper": paper,
            "forward": forward,
            "backward": backward,
            "decode": decode,
            "equation": equation,
            "cost": cost,
            "picture": registry::picture(name),
        })
    });
    json!({"tokens": registry::PICTURE_TOKENS, "mechanisms": all.collect::<Vec<_>>()})
}
