//! `foveal completions`: what a shell needs to complete this command's options.

use clap_complete::Shell;

use crate::output;

/// Print a script with which a shell completes this command.
///
/// bash: foveal completions bash > ~/.local/share/bash-completion/completions/foveal;
/// zsh: foveal completions zsh > a folder of $fpath, as _foveal;
/// fish: foveal completions fish > ~/.config/fish/completions/foveal.fish
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The shell.
    shell: Shell,
}

pub(crate) fn run(arguments: &Arguments, mut command: clap::Command) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, "foveal", &mut script);
    Ok(output::print(&String::from_utf8_lossy(&script))?)
}
