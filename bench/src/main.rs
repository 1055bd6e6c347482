//! The benchmark runner behind `cargo xtask bench`.
//!
//! ```text
//! for each case:   inputs → results of all sides, checked against f64 → peaks → rounds A B A B → peaks
//! ```
//!
//! A case whose result is wrong is named and not timed, and the run fails. Cases are the tables in
//! `cases/`, peaks are measured in the same process right before and after a case, and losses are
//! reported as wins are.

#![deny(unsafe_code)]

mod attention;
mod backward;
mod case;
mod contender;
mod data;
mod growth;
mod machine;
mod mask;
mod model;
mod peaks;
mod peer;
mod plot;
mod prepared;
#[cfg(feature = "unfused")]
#[allow(unsafe_code)] // the crate's function takes pointers
mod product;
mod projection;
mod recall;
mod record;
mod report;
mod summary;
mod svg;
#[cfg(feature = "unfused")]
mod unfused;
mod verify;
mod worker;

use anyhow::{Context, bail};
use case::{Case, Kind, Selection};
use clap::Parser;
use contender::Effort;
use machine::Machine;
use peaks::Peaks;
use peer::{Peer, Peers};
use prepared::Work;
use record::Row;
use report::Outcome;
use std::path::{Path, PathBuf};

/// Measure Foveal against what the machine can do and against others.
#[derive(Debug, Parser)]
struct Arguments {
    /// Parts of case names, one of which a case must have; everything if left out.
    filters: Vec<String>,

    /// Whom to compare with; may be given several times.
    #[arg(long = "peer", value_name = "NAME", default_values = ["unfused"])]
    peers: Vec<Peer>,

    /// Threads for all cases, instead of each case's own number.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,

    /// Rounds of a comparison.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,

    /// The least milliseconds of each side's turn in a round.
    #[arg(long, value_name = "MS", default_value_t = 30)]
    turn: u16,

    /// Print the table in Markdown as well.
    #[arg(long)]
    markdown: bool,

    /// Write the record to this CSV file.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Write records to bench/record/CPU/DATE-FAMILY.csv (…-tN.csv with --threads N).
    #[arg(long)]
    record: bool,

    /// Print geometric means by kind of call, and all losses.
    #[arg(long)]
    summary: bool,

    /// Draw share of peak and time against N into this folder.
    #[arg(long, value_name = "FOLDER")]
    plot: Option<PathBuf>,

    /// Draw a record of `sparse_speed csv` into the folder of --plot, and measure nothing.
    #[arg(long, value_name = "FILE", requires = "plot")]
    growth: Option<PathBuf>,

    /// Draw a record of `index_recall` into the folder of --plot, and measure nothing.
    #[arg(long, value_name = "FILE", requires = "plot")]
    recall: Option<PathBuf>,

    /// Take results from this record and measure nothing; may be given several times.
    #[arg(long = "from", value_name = "FILE")]
    records: Vec<PathBuf>,

    /// Name the cases and do nothing.
    #[arg(long)]
    list: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let (Some(record), Some(folder)) = (&arguments.growth, &arguments.plot) {
        return growth::write(record, folder);
    }
    if let (Some(record), Some(folder)) = (&arguments.recall, &arguments.plot) {
        return recall::write(record, folder);
    }
    if !arguments.records.is_empty() {
        return show(&arguments, &record::read(&arguments.records)?);
    }
    let home = Path::new(env!("CARGO_MANIFEST_DIR"));
    let threads = arguments.threads.map(usize::from);
    let selection = Selection { filters: &arguments.filters, threads };
    let cases = case::load(&home.join("cases"), &selection)?;
    if cases.is_empty() {
        bail!("no case has any of {:?} in its name; --list names all", arguments.filters);
    }
    if arguments.list {
        cases.iter().for_each(|case| println!("{}", case.name));
        return Ok(());
    }
    let most = cases.iter().map(|case| case.kind.threads()).max().unwrap_or(1);
    rayon::ThreadPoolBuilder::new().num_threads(most).build_global()?;
    let folder = home.join("peers");
    let (peers, versions) = Peers::start(&arguments.peers, &folder, most)?;
    let machine = Machine::describe(home, &versions);
    machine.description.iter().for_each(|line| println!("{line}"));
    let mut runner = Runner::new(&arguments, peers);
    println!("\n{}", report::header());
    cases.iter().for_each(|case| runner.run(case));
    runner.finish(&arguments, &machine, home)
}

/// Prints and draws what is asked for.
fn show(arguments: &Arguments, rows: &[Row]) -> anyhow::Result<()> {
    if arguments.summary {
        println!("\n{}", summary::summary(rows));
    }
    match &arguments.plot {
        Some(folder) => plot::write(folder, rows),
        None => Ok(()),
    }
}

struct Runner {
    peers: Peers,
    peaks: Peaks,
    effort: Effort,
    outcomes: Vec<Outcome>,
    /// Cases that were refused, and why.
    refused: Vec<(String, String)>,
}

impl Runner {
    fn new(arguments: &Arguments, peers: Peers) -> Runner {
        Runner {
            peers,
            peaks: Peaks::default(),
            effort: Effort {
                rounds: arguments.rounds.into(),
                turn: f64::from(arguments.turn) / 1e3,
            },
            outcomes: Vec::new(),
            refused: Vec::new(),
        }
    }

    /// Measures a case and prints its line, or says why not.
    fn run(&mut self, case: &Case) {
        match self.measure(case) {
            Ok(outcomes) => {
                outcomes.iter().for_each(|outcome| println!("{}", outcome.line()));
                self.outcomes.extend(outcomes);
            }
            Err(error) => {
                let reason = format!("{error:#}");
                println!("{:<42} NOT TIMED: {reason}", case.name);
                self.refused.push((case.name.clone(), reason));
            }
        }
    }

    fn measure(&mut self, case: &Case) -> anyhow::Result<Vec<Outcome>> {
        let (mut prepared, call) = match &case.kind {
            Kind::Attention(call) => (attention::prepare(call, &self.peers)?, Some(call)),
            Kind::Projection(projection) => (projection::prepare(projection, &self.peers)?, None),
            Kind::Model(model) => return self.measure_model(case, model),
        };
        let before = self.peaks.measure(prepared.roof);
        let samples = contender::compete(&mut prepared.contenders, self.effort)?;
        let peak = before.or(self.peaks.measure(prepared.roof));
        Ok(vec![Outcome {
            family: case.family.clone(),
            name: case.name.clone(),
            call: call.cloned(),
            work: prepared.work,
            peak,
            samples,
            absent: prepared.absent,
        }])
    }

    fn measure_model(&self, case: &Case, model: &case::ModelCase) -> anyhow::Result<Vec<Outcome>> {
        let parts = model::compete(model, &self.peers, self.effort.rounds)?;
        let outcome = |(part, samples): (model::Part, _)| Outcome {
            family: case.family.clone(),
            name: format!("{}-{}", case.name, part.name()),
            call: None,
            work: Work::default(),
            peak: peaks::Peak::default(),
            samples,
            absent: Vec::new(),
        };
        Ok(parts.into_iter().map(outcome).collect())
    }

    fn finish(self, arguments: &Arguments, machine: &Machine, home: &Path) -> anyhow::Result<()> {
        if arguments.markdown {
            println!("\n{}", report::markdown(&self.outcomes));
        }
        if let Some(file) = &arguments.out {
            let text = report::csv(machine, self.outcomes.iter());
            std::fs::write(file, text)
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        if arguments.record {
            report::record(&home.join("record"), machine, &self.outcomes, arguments.threads)?;
        }
        let text = report::csv(machine, self.outcomes.iter());
        show(arguments, &record::parse(&text)?)?;
        let lost = self.outcomes.iter().filter(|outcome| outcome.lost()).count();
        println!("\n{} results, {lost} with a faster peer", self.outcomes.len());
        if self.refused.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = self.refused.iter().map(|(name, _)| name.as_str()).collect();
        bail!("not timed: {}", names.join(", "))
    }
}
