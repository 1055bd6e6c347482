//! `cargo xtask docs`: the README's table of mechanisms and what the survey shows of them, from the registry, and the header of
//! the C interface, from its crate.

use crate::{header, run, survey};
use anyhow::{Context, Result, bail};
use foveal::registry::MECHANISMS;
use std::fs;

const BEGIN: &str = "<!-- mechanisms -->\n";
const END: &str = "<!-- /mechanisms -->";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let check = match arguments {
        [] => false,
        [flag] if flag == "--check" => true,
        _ => bail!("docs takes --check or nothing"),
    };
    header::update(check)?;
    survey::update(check)?;
    let path = run::root().join("README.md");
    let text = fs::read_to_string(&path).context("README.md")?;
    let (before, rest) = text.split_once(BEGIN).context("README.md has no <!-- mechanisms -->")?;
    let (_, after) = rest.split_once(END).context("README.md has no <!-- /mechanisms -->")?;
    let fresh = format!("{before}{BEGIN}{}{END}{after}", table());
    if fresh == text {
        return Ok(());
    }
    if check {
        bail!("README.md's table of mechanisms is not the registry's; run `cargo xtask docs`");
    }
    fs::write(&path, fresh).context("README.md")
}

fn table() -> String {
    let mut table = String::from(
        "| mechanism | group | forward | backward | decode | source |\n|---|---|---|---|---|---|\n",
    );
    for mechanism in MECHANISMS {
        let mark = |there: bool| if there { "yes" } else { "" };
        table += &format!(
            "| `{}`: {} | {} | {} | {} | {} | {} |\n",
            mechanism.name,
            mechanism.summary,
            mechanism.group.name(),
            mark(mechanism.forward),
            mark(mechanism.backward),
            mark(mechanism.decode),
            mechanism.paper,
        );
    }
    table
}
