//! The `foveal` command: runs and inspects language models.

#![forbid(unsafe_code)]

mod batch;
mod bench;
mod chat;
mod completions;
mod compute;
mod evaluate;
mod generate;
mod input;
mod inspect;
mod interrupt;
mod kv;
mod list;
mod look;
mod numbers;
mod output;
mod pattern;
mod progress;
mod quantize;
mod sampling;
mod serve;
mod session;
mod source;

use std::process::ExitCode;

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
    Completions(completions::Arguments),
    Eval(evaluate::Arguments),
    Generate(generate::Arguments),
    Inspect(inspect::Arguments),
    List(list::Arguments),
    Look(look::Arguments),
    Quantize(quantize::Arguments),
    Pattern(pattern::Arguments),
    Serve(serve::Arguments),
}

impl Command {
    fn run(&self) -> anyhow::Result<()> {
        match self {
            Command::Batch(arguments) => batch::run(arguments),
            Command::Bench(arguments) => bench::run(arguments),
            Command::Chat(arguments) => chat::run(arguments),
            Command::Completions(arguments) => completions::run(arguments, Arguments::command()),
            Command::Eval(arguments) => evaluate::run(arguments),
            Command::Generate(arguments) => generate::run(arguments),
            Command::Inspect(arguments) => inspect::run(arguments),
            Command::List(arguments) => list::run(arguments),
            Command::Look(arguments) => look::run(arguments),
            Command::Quantize(arguments) => quantize::run(arguments),
            Command::Pattern(arguments) => pattern::run(arguments),
            Command::Serve(arguments) => serve::run(arguments),
        }
    }
}

/// The exit code of a failure at run time. Usage errors have clap's 2.
const FAILURE: u8 = 1;
/// The exit code of a fault of the program itself, as in BSD's `sysexits.h`.
const INTERNAL: u8 = 70;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|fault| {
        let fault = output::one_line(&fault.to_string());
        output::note(&format!("foveal: internal error, please report it: {fault}"));
    }));
    std::panic::catch_unwind(run).unwrap_or(ExitCode::from(INTERNAL))
}

fn run() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // A closed pipe is nothing to complain about to it.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(FAILURE));
        }
    };
    match arguments.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough.
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if interrupt::is_cause_of(&error) => ExitCode::from(interrupt::EXIT),
        Err(error) => {
            output::note(&format!("foveal: {}", output::sentence(&error)));
            ExitCode::from(FAILURE)
        }
    }
}
