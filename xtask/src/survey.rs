//! What `docs/survey.md` shows of each mechanism: equation, cost, source and picture, from the registry.

use anyhow::{Context, Result, bail};
use foveal::registry::{MECHANISMS, Mechanism, PICTURE_TOKENS, picture};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::run;

/// Units of a cell of a picture.
const CELL: usize = 4;
const END: &str = "<!-- /mechanism -->";

/// Writes the page and its pictures anew, or complains if that would change them.
pub(crate) fn update(check: bool) -> Result<()> {
    let folder = run::root().join("docs");
    let page = fs::read_to_string(folder.join("survey.md")).context("docs/survey.md")?;
    let mut fresh = page.clone();
    for mechanism in MECHANISMS {
        let name = mechanism.name;
        let file = format!("pictures/survey/{name}.svg");
        write(&folder.join(&file), &drawn(&picture(name)), check)?;
        let begin = format!("<!-- mechanism {name} -->\n");
        let Some((before, rest)) = fresh.split_once(&begin) else {
            bail!("docs/survey.md has no section with {begin}");
        };
        let (_, after) = rest.split_once(END).with_context(|| format!("{name}: no {END}"))?;
        fresh = format!("{before}{begin}{}{END}{after}", shown(mechanism, &file));
    }
    write(&folder.join("survey.md"), &fresh, check)
}

fn write(path: &Path, text: &str, check: bool) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    if check {
        bail!("{} is not the registry's; run `cargo xtask docs`", path.display());
    }
    let folder = path.parent().context("a file without a folder")?;
    fs::create_dir_all(folder)?;
    fs::write(path, text).with_context(|| path.display().to_string())
}

fn shown(mechanism: &Mechanism, file: &str) -> String {
    let Mechanism { name, equation, cost, paper, .. } = mechanism;
    format!(
        "```text\n{equation}\n```\n\n<img src=\"{file}\" width=\"192\" alt=\"Who sees whom under {name}\">\n\nOperations of a head: \
         {cost}. Source: {paper}.\n"
    )
}

/// Rows of digits as squares, neighbours of a shade as one.
fn drawn(rows: &[String]) -> String {
    let size = CELL * PICTURE_TOKENS;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {size} {size}\" shape-rendering=\"crispEdges\">\n\
         <rect width=\"{size}\" height=\"{size}\" fill=\"#f4f1ea\"/>\n<g fill=\"#1d4f7c\">\n"
    );
    for (i, row) in rows.iter().enumerate() {
        let mut column = 0;
        for run in row.as_bytes().chunk_by(|a, b| a == b) {
            let (x, level) = (column, run[0] - b'0');
            column += run.len();
            if level > 0 {
                let (x, y, width) = (CELL * x, CELL * i, CELL * run.len());
                let shade = f64::from(level) / 9.0;
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{CELL}\" opacity=\"{shade:.2}\"/>"
                );
            }
        }
    }
    svg + "</g>\n</svg>\n"
}
