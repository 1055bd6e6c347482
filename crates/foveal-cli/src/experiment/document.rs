//! The page of all experiments and their pictures, made from grids and result files alone.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use super::Experiment;
use super::cell::{Grid, Size};
use super::judge::{Judgement, Table};
use super::results::Results;
use crate::compare::write as write_file;

const HEAD: &str = "# Experiments

What papers say of attention, repeated at a size that two processors can pay in hours. Every number below comes from a result file in
[experiments](experiments), made by the command that stands above it; verdicts are computed from these files by the rule that is
stated, and a test makes this page again and compares. A claim that is not seen at this size is a result too. `foveal experiment NAME --out DIR` runs the
cells that DIR has no result of; `--full` runs a larger grid, `--tiny` a few cells to see that everything works.

";

/// Writes the page and the pictures into `out`.
pub(super) fn write(out: &Path, all: &[Experiment]) -> anyhow::Result<()> {
    let mut text = HEAD.to_owned();
    let mut summary = String::from("| | claim | verdict |\n|---|---|---|\n");
    let mut sections = String::new();
    for one in all {
        let grid = Grid::parse(one.grid)?;
        let results = Results::read(out, one.name, &grid)?;
        let judgement = (one.judge)(&results);
        let verdict = judgement.verdict(results.all.is_empty());
        let _ = writeln!(summary, "| {} | {} | {verdict} |", one.name, grid.words.title);
        sections += &section(one.name, (&grid, &results), &judgement);
        pictures(out, one.name, &judgement)?;
    }
    text += &summary;
    text += &sections;
    write_file(&out.join("experiments.md"), &text)
}

fn pictures(out: &Path, name: &str, judgement: &Judgement) -> anyhow::Result<()> {
    let folder = out.join("experiments");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    for (n, plot) in judgement.plots.iter().enumerate() {
        let picture = plot.draw();
        if !picture.is_empty() {
            write_file(&folder.join(file(name, n)), &picture)?;
        }
    }
    Ok(())
}

fn file(name: &str, n: usize) -> String {
    match n {
        0 => format!("{name}.svg"),
        n => format!("{name}-{}.svg", n + 1),
    }
}

fn section(name: &str, (grid, results): (&Grid, &Results), judgement: &Judgement) -> String {
    let words = &grid.words;
    let mut text = format!("\n## {name}: {}\n\n", words.title);
    let verdict = judgement.verdict(results.all.is_empty());
    let _ = writeln!(text, "**Claim.** {} ({})\n", words.claim, words.source);
    let _ = writeln!(text, "**Here.** {}\n", words.method);
    let cells = grid.cells(Size::Default);
    let models = match cells.iter().any(|cell| cell.word("model").is_ok()) {
        true => " --models DIR",
        false => "",
    };
    let cells = cells.len();
    let _ = writeln!(
        text,
        "**Command.** `foveal experiment {name}{models} --out docs`: {cells} cells{}; {:.0} seconds in all for {} results.\n",
        match results.missing {
            0 => String::new(),
            missing => format!(", of which {missing} have not run"),
        },
        results.seconds(),
        results.all.len()
    );
    for (n, plot) in judgement.plots.iter().enumerate() {
        if !plot.draw().is_empty() {
            let _ = writeln!(text, "![{}](experiments/{})\n", plot.title, file(name, n));
        }
    }
    text += &markdown(&judgement.table);
    let _ = writeln!(text, "**Verdict: {verdict}.** {}\n", words.rule);
    for check in &judgement.checks {
        let _ = writeln!(text, "- {check}");
    }
    text
}

fn markdown(table: &Table) -> String {
    if table.rows.is_empty() {
        return String::new();
    }
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rule = vec!["---".to_owned(); table.head.len()];
    let rows: String = table.rows.iter().map(|row| line(row)).collect();
    format!("{}{}{rows}\n", line(&table.head), line(&rule).replace(' ', ""))
}
