//! What a record has to say about the machine it was made on, and about the peers.

use std::path::Path;
use std::process::Command;

/// The machine and the build.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The processor, as a folder name.
    pub(crate) folder: String,
    /// `2026-01-31`, UTC.
    pub(crate) date: String,
    /// Lines for the head of a report.
    pub(crate) description: Vec<String>,
}

impl Machine {
    /// Asks the system; `peers` are those of the run, with versions.
    pub(crate) fn describe(repository: &Path, peers: &[String]) -> Machine {
        let lscpu = output("lscpu", &[]);
        let field = |name: &str| {
            let line = lscpu.lines().find_map(|line| line.trim().strip_prefix(name));
            line.and_then(|rest| rest.trim().strip_prefix(':')).map_or("?", str::trim).to_owned()
        };
        let folder = repository.to_string_lossy();
        let commit = output("git", &["-C", &folder, "describe", "--always", "--dirty"]);
        let date = output("date", &["-u", "+%F"]);
        let levels: Vec<&str> = foveal::Level::available().map(foveal::Level::name).collect();
        let [name, family, model] = ["Model name", "CPU family", "Model"].map(field);
        let mut description = vec![
            format!("{name}, family {family} model {model}, {} processors", field("CPU(s)")),
            format!(
                "caches: L1d {}, L2 {}, L3 {}",
                field("L1d cache"),
                field("L2 cache"),
                field("L3 cache")
            ),
            format!("levels: {}; hypervisor: {}", levels.join(" "), field("Hypervisor vendor")),
            format!("features: {}", features(&field("Flags"))),
            format!("{}; foveal {commit}; {date}", output("rustc", &["--version"])),
        ];
        if !peers.is_empty() {
            description.push(format!("peers: {}", peers.join("; ")));
        }
        let words = format!("{name} family {family} model {model}").to_lowercase();
        let words: Vec<&str> = words
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|word| !word.is_empty())
            .collect();
        Machine { folder: words.join("-"), date, description }
    }
}

/// The instructions that matter here.
fn features(flags: &str) -> String {
    let wanted = |flag: &&str| {
        ["avx", "fma", "f16c", "amx", "neon", "asimd", "sve"].iter().any(|x| flag.starts_with(x))
    };
    flags.split_whitespace().filter(wanted).collect::<Vec<_>>().join(" ")
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.ok().filter(|text| !text.is_empty()).unwrap_or_else(|| "?".to_owned())
}
