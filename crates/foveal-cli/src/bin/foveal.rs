//! The `foveal` command.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(foveal_cli::main(std::env::args_os()))
}
