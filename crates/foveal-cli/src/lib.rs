//! The `foveal` command: runs, inspects and trains language models. The binary and the Python wheel's entry point call [`main`].

#![forbid(unsafe_code)]

mod batch;
mod bench;
mod chart;
mod chat;
mod compare;
mod completions;
mod compute;
mod convert;
mod documents;
mod evaluate;
mod experiment;
mod generate;
mod input;
mod inspect;
mod interrupt;
mod kv;
mod list;
mod look;
mod memory;
mod numbers;
mod output;
mod page;
mod pattern;
mod plot;
mod progress;
mod quantize;
mod sampling;
mod serve;
mod session;
mod source;
mod train;

use std::ffi::OsString;

use clap::{CommandFactory, Parser, Subcommand};

/// Language models with any attention, on the CPU.
#[derive(Debug, Parser)]
#[command(name = "foveal", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Batch(batch::Arguments),
    Bench(bench::Arguments),
    Chat(chat::Arguments),
    Compare(compare::Arguments),
    Completions(completions::Arguments),
    Convert(convert::Arguments),
    Eval(evaluate::Arguments),
    Experiment(experiment::Arguments),
    Generate(generate::Arguments),
    Inspect(inspect::Arguments),
    List(list::Arguments),
    Look(look::Arguments),
    Quantize(quantize::Arguments),
    Pattern(pattern::Arguments),
    Serve(serve::Arguments),
    Train(train::Arguments),
}

impl Command {
    fn run(&self) -> anyhow::Result<()> {
        match self {
            Command::Batch(arguments) => batch::run(arguments),
            Command::Bench(arguments) => bench::run(arguments),
            Command::Chat(arguments) => chat::run(arguments),
            Command::Compare(arguments) => compare::run(arguments),
            Command::Completions(arguments) => completions::run(arguments, Arguments::command()),
            Command::Convert(arguments) => convert::run(arguments),
            Command::Eval(arguments) => evaluate::run(arguments),
            Command::Experiment(arguments) => experiment::run(arguments),
            Command::Generate(arguments) => generate::run(arguments),
            Command::Inspect(arguments) => inspect::run(arguments),
            Command::List(arguments) => list::run(arguments),
            Command::Look(arguments) => look::run(arguments),
            Command::Quantize(arguments) => quantize::run(arguments),
            Command::Pattern(arguments) => pattern::run(arguments),
            Command::Serve(arguments) => serve::run(arguments),
            Command::Train(arguments) => train::run(arguments),
        }
    }
}

/// The exit code of a command that did what it was told.
const SUCCESS: u8 = 0;
/// The exit code of a failure at run time. Usage errors have clap's 2.
const FAILURE: u8 = 1;
/// The exit code of a fault of the program itself, as in BSD's `sysexits.h`.
const INTERNAL: u8 = 70;

/// Runs the command with its name and arguments; the exit code.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    std::panic::set_hook(Box::new(|fault| {
        let fault = output::one_line(&fault.to_string());
        output::note(&format!("foveal: internal error, please report it: {fault}"));
    }));
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    std::panic::catch_unwind(|| run(arguments)).unwrap_or(INTERNAL)
}

fn run(arguments: Vec<OsString>) -> u8 {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // A closed pipe is nothing to complain about to it.
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(FAILURE);
        }
    };
    match arguments.command.run() {
        Ok(()) => SUCCESS,
        // Whoever read the output has seen enough.
        Err(error) if output::is_closed_pipe(&error) => SUCCESS,
        Err(error) if interrupt::is_cause_of(&error) => interrupt::EXIT,
        Err(error) => {
            output::note(&format!("foveal: {}", output::sentence(&error)));
            FAILURE
        }
    }
}
