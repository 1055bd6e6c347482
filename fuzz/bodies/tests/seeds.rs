//! Replays the seeds of every fuzz target.

use foveal_fuzz_bodies::TARGETS;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

#[test]
fn every_seed_of_every_target() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus-seeds");
    let mut failures = vec![];
    for (target, body) in TARGETS {
        let mut replayed = 0;
        for entry in std::fs::read_dir(seeds.join(target)).expect("every target has seeds") {
            let path = entry.expect("a readable folder").path();
            let bytes = std::fs::read(&path).expect("a readable seed");
            if catch_unwind(AssertUnwindSafe(|| body(&bytes))).is_err() {
                failures.push(path);
            }
            replayed += 1;
        }
        assert!(replayed > 0, "{target} has no seeds");
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn every_target_has_a_program() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).expect("fuzz/Cargo.toml");
    for (target, _) in TARGETS {
        assert!(manifest.contains(&format!("name = \"{target}\"")), "{target}");
        let program = fuzz.join("fuzz_targets").join(format!("{target}.rs"));
        let text = std::fs::read_to_string(program).expect("a program for the target");
        assert!(text.contains(&format!("foveal_fuzz_bodies::{target}(")), "{target}");
    }
}
