//! `foveal list`: the attention mechanisms.

use foveal::registry::{MECHANISMS, Mechanism};
use serde_json::json;

use crate::output;

/// List the attention mechanisms, and what there is of each.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.json {
        let all = MECHANISMS.iter().map(as_json).collect();
        return Ok(output::print_json(&serde_json::Value::Array(all))?);
    }
    let mut text = String::new();
    for mechanism in MECHANISMS {
        let Mechanism { name, summary, paper, .. } = mechanism;
        let (group, forms) = (mechanism.group.name(), forms(mechanism).join(", "));
        text += &format!("{name:<18} {group:<8} {forms:<26} {summary} ({paper})\n");
    }
    Ok(output::print(&text)?)
}

fn forms(mechanism: &Mechanism) -> Vec<&'static str> {
    let Mechanism { forward, backward, decode, .. } = *mechanism;
    let forms = [("forward", forward), ("backward", backward), ("decode", decode)];
    forms.into_iter().filter(|(_, there)| *there).map(|(form, _)| form).collect()
}

fn as_json(mechanism: &Mechanism) -> serde_json::Value {
    json!({
        "name": mechanism.name,
        "group": mechanism.group.name(),
        "summary": mechanism.summary,
        "paper": mechanism.paper,
        "forward": mechanism.forward,
        "backward": mechanism.backward,
        "decode": mechanism.decode,
    })
}
