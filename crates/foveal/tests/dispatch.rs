//! What a plan says will run, for every level and phase, and the level that the environment names.

use foveal::plan::Kernel;
use foveal::{Attention, Cpu, Level, Mask, Shape, Threads};
use std::process::Command;

#[test]
fn plans_say_what_runs() {
    let q = Shape { batch: 2, seq: 3, heads: 4, dim: 64 };
    let kv = Shape { seq: 1000, heads: 2, ..q };
    for level in Level::available() {
        let cpu = Cpu { level, threads: Threads::ONE };
        let attention = Attention::new().mask(Mask::window(9)).cpu(cpu);
        let prompt = attention.plan(q, kv, kv).unwrap().explain();
        assert_eq!((prompt.kernel, prompt.level), (Kernel::Tiled, level.name()));
        // Two sequences times two key/value heads, each less than one tile of rows.
        assert_eq!((prompt.parts, prompt.threads, prompt.group), (4, 1, 2));
        assert_eq!(prompt.mask, "window 9");
        let generated = attention.plan_decode(q, kv, kv).unwrap().explain();
        assert_eq!((generated.kernel, generated.level), (Kernel::Rows, level.name()));
        // Each in two spans of 512 positions.
        assert_eq!(generated.parts, 8);
    }
}

#[test]
fn the_environment_chooses_the_level() {
    let named = std::env::var("FOVEAL_SIMD").ok().filter(|name| !name.is_empty());
    let expected = match &named {
        Some(name) => Level::named(name),
        None => Ok(Level::available().last().unwrap()),
    };
    assert_eq!(Level::detect(), expected);
    let shape = Shape { batch: 1, seq: 1, heads: 1, dim: 1 };
    let attention = Attention::new();
    let planned = attention.plan(shape, shape, shape).map(|plan| plan.explain().level);
    assert_eq!(planned, expected.map(Level::name));
}

/// The level is read once per process, so each name needs one of its own: this test again.
#[test]
fn every_level_in_the_environment_is_obeyed_or_refused() {
    for name in ["", "portable", "avx2", "avx512", "avx512bf16", "nonsense"] {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_environment_chooses_the_level"])
            .env("FOVEAL_SIMD", name)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains("1 passed"), "{name:?}: {said}");
    }
}

#[test]
fn an_unknown_level_is_refused_with_the_names_that_work() {
    let message = Level::named("sse9").unwrap_err().to_string();
    assert!(message.contains("sse9") && message.contains("portable"), "{message}");
}
