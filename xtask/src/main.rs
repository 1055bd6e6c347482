//! The project's own commands: `cargo xtask`.

#![forbid(unsafe_code)]

mod bench;
mod c;
mod ci;
mod docs;
mod fuzz;
mod header;
mod mpi;
mod page;
mod pictures;
mod python;
mod rules;
mod run;
mod survey;
mod test;

use std::process::ExitCode;

const USAGE: &str = "\
cargo xtask COMMAND

  test [FILTER...]           all tests: the workspace, its examples in the documentation, the kernels without threads,
                             the kernels with each forced level, the example in C; with FILTER, the workspace's tests
                             of these names; with --torch or FOVEAL_TORCH=1 the wheel's tests with PyTorch and Transformers too
  ci                         what .ci/run runs: format, lints, documentation, rules, package, tests
  rules                      what no lint checks: where intrinsics, unsafe and machine paths may be, how long files are
  docs [--check]             write the README's table of mechanisms and the header of the C interface (or only
                             compare them)
  fuzz [TARGET...] [--runs N] [--time SECONDS]
                             run libFuzzer on all targets or some, a million inputs each
  mpi                        run ring attention and training on two processes with MPI, against one (installs Open MPI where
                             apt-get can; says so where there is none)
  python                     build the wheel, install it into a fresh environment, test what was installed
  page                       check the types of the server's page and click through it, where there are npm and Chromium
  bench [ARGS...]            run the benchmarks (foveal-bench ARGS...)
  pictures MODEL             write the README's pictures of the terminal, with SmolLM2's file
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next();
    let rest: Vec<String> = arguments.collect();
    let done = match command.as_deref() {
        Some("test") => test::run(&rest),
        Some("ci") => ci::run(&rest),
        Some("rules") => rules::run(&rest),
        Some("docs") => docs::run(&rest),
        Some("fuzz") => fuzz::run(&rest),
        Some("pictures") => pictures::run(&rest),
        Some("mpi") => mpi::run(&rest),
        Some("page") => page::run(&rest),
        Some("python") => python::run(&rest),
        Some("bench") => bench::run(&rest),
        Some("help" | "--help" | "-h") | None => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Some(other) => Err(anyhow::anyhow!("there is no command {other:?}\n\n{USAGE}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
