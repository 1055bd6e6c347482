//! `foveal compare`: the same small model with one attention after the other, or the mechanisms alone.

mod choice;
mod contender;
mod figures;
pub(crate) mod kernels;
mod measure;
mod report;
mod training;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use foveal_lm::atomic_file;

use crate::{compute, interrupt, numbers, output, train};
use choice::Need;
use contender::Contender;
pub(crate) use contender::{Sizes, mixer};
use training::{Budget, Text};

/// Where it goes.
const FOLDER: &str = "foveal-compare";

/// Compare attentions on this machine: what they learn of a text, how fast they are, what they keep.
///
/// Trains the same small model with each attention, on the same tokens in the same order and with as many parameters, and
/// measures how well each predicts the end of the text, by position and beyond the length of training; the speed and memory of
/// training, of reading prompts and of making tokens; and the bytes that a text leaves behind. The folder gets a page, index.html, a table,
/// figures.csv, and the models. Without arguments it takes about five minutes on two processors, on the novel that is built in. What
/// is finished is not done again: the same command goes on after Ctrl-C.
///
/// With --kernels-only nothing is trained: mechanisms, and the unfused computation, run on random numbers over lengths of context.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A text file or a folder of them; the novel that is built in if left out.
    #[arg(long, value_name = "FILE", conflicts_with = "kernels_only")]
    text: Option<PathBuf>,

    /// What to compare: names of mechanisms, gqa, mqa or hybrid, NAME/KV_HEADS for fewer key/value heads, or NAME=JSON for a mixer of
    /// your own. May come more than once.
    #[arg(long, value_name = "A,B,…")]
    attention: Vec<String>,

    /// The folder for the page, the table and the models.
    #[arg(long, value_name = "DIR", default_value = FOLDER)]
    out: PathBuf,

    /// Steps of training for each.
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,

    /// Tokens of a sequence; quality is measured up to four times that.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = numbers::tokens)]
    sequence: usize,

    /// Numbers of a token between layers.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = numbers::tokens)]
    width: usize,

    /// Layers.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = numbers::tokens)]
    layers: usize,

    /// Compare mechanisms alone, without training.
    #[arg(long)]
    kernels_only: bool,

    /// With --kernels-only, lengths of context.
    #[arg(long, value_name = "N,…", value_delimiter = ',', requires = "kernels_only", value_parser = numbers::tokens)]
    lengths: Vec<usize>,

    #[command(flatten)]
    need: Need,

    /// Threads to use; all processors if left out.
    #[arg(long, value_name = "N", value_parser = numbers::threads)]
    threads: Option<NonZeroUsize>,

    /// A measurement that another process asks for.
    #[arg(long, hide = true, value_name = "NAME:TOKENS", requires = "kernels_only")]
    one: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    interrupt::catch();
    compute::with_threads(arguments.threads, || match (&arguments.one, arguments.kernels_only) {
        (Some(one), _) => kernels::answer(one),
        (None, true) => {
            let lengths = &arguments.lengths[..];
            kernels::run(&arguments.attention, lengths, (&arguments.out, &arguments.need))
        }
        (None, false) => compare(arguments),
    })
}

fn compare(arguments: &Arguments) -> anyhow::Result<()> {
    let sizes = Sizes {
        width: arguments.width,
        layers: arguments.layers,
        heads: contender::HEADS,
        sequence: arguments.sequence,
    };
    let contenders = Contender::all(&arguments.attention, sizes)?;
    ensure!(arguments.sequence >= 64, "sequences of 64 tokens or more, not {}", arguments.sequence);
    let out = &arguments.out;
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let text = Text::split(arguments.text.as_deref(), train::TEXT, out)?;
    let budget = Budget { sizes, steps: arguments.steps };
    let mut all = vec![];
    for (n, contender) in contenders.iter().enumerate() {
        output::note(&format!("{} ({} of {})", contender.name, n + 1, contenders.len()));
        all.push(training::figures(contender, &budget, (&text, out))?);
        // What is finished can be looked at.
        write(&out.join("index.html"), &report::page(&all, &budget, &arguments.need))?;
        write(&out.join("figures.csv"), &report::csv(&all))?;
    }
    output::print(&report::table(&all))?;
    output::print(&format!("\n{}\n", choice::trained(&all, &arguments.need)))?;
    output::note(&format!("the page is {}", out.join("index.html").display()));
    Ok(())
}

/// Writes a file whole or not at all.
pub(crate) fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    atomic_file::write(path, |out| std::io::Write::write_all(out, text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}
