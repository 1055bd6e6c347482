//! `foveal train`: every mixer, runs that are killed and run out of disk, and models that are converted and trained on.

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use foveal_lm::config::Mechanism;
use serde_json::Value;
use support::{Folder, assert_fails, foveal, run, stderr, stdout};

const TEXT: &str = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be \
    in want of a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, \
    this truth is so well fixed in the minds of the surrounding families.\n";
const SMALL: &str = r#"
[model]
layers = 1
width = 32
heads = 2
feed_forward = 32

[data]
train = ["text.txt"]
tokenizer = "bytes"
sequence = 32
batch = 2

[optimizer]
learning_rate = 1e-2

[schedule]
steps = 4

[train]
evaluate_every = 2
evaluate_batches = 2
sample_every = 4
sample_tokens = 8
prompt = "It is"
checkpoint_every = 2
"#;

/// A folder with a text and a configuration for it, and the path of the latter.
fn small(name: &str) -> (Folder, String) {
    let folder = Folder::new(name);
    folder.write("text.txt", TEXT.repeat(20).as_bytes());
    let config = folder.write("small.toml", SMALL.as_bytes());
    (folder, config)
}

fn path(folder: &Folder, name: &str) -> String {
    folder.0.join(name).to_str().unwrap().to_owned()
}

#[track_caller]
fn succeeds(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    stderr(&output).to_owned()
}

fn read(folder: &str, name: &str) -> Vec<u8> {
    std::fs::read(Path::new(folder).join(name)).unwrap()
}

/// The measurements without what the machine had to do with.
fn metrics(folder: &str) -> Vec<Value> {
    let text = String::from_utf8(read(folder, "metrics.jsonl")).unwrap();
    let record = |line: &str| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        record.as_object_mut().unwrap().remove("seconds");
        record
    };
    text.lines().map(record).collect()
}

/// What each mechanism needs to be named.
fn mixer(name: &str) -> &'static str {
    match name {
        "window" => "{name = 'window', tokens = 8}",
        "sparse_transformer" => "{name = 'sparse_transformer', pattern = 'fixed', stride = 8}",
        "longformer" => "{name = 'longformer', reach = 8, global = [0]}",
        "bigbird" => "{name = 'bigbird', block = 8, random = 1}",
        "moba" => "{name = 'moba', block = 8, top = 2}",
        "native_sparse" => {
            "{name = 'native_sparse', length = 8, stride = 4, block = 8, top = 4, window = 8}"
        }
        "lsh" => "{name = 'lsh', chunk = 8, buckets = 4}",
        "linformer" => "{name = 'linformer', rank = 8, shared = true}",
        "performer" => "{name = 'performer', features = 16}",
        "transformer_xl" => "{name = 'transformer_xl', segment = 16, memory = 16}",
        "infini" => "{name = 'infini', segment = 16}",
        "memorizing" => "{name = 'memorizing', segment = 16, top = 4, capacity = 64}",
        _ => "",
    }
}

#[test]
fn every_mixer_is_trained_and_runs_at_once() {
    let (folder, config) = small("train-mixers");
    for name in Mechanism::NAMES {
        let out = path(&folder, name);
        let mixer = match mixer(name) {
            "" => format!("model.mixer={{name = '{name}'}}"),
            mixer => format!("model.mixer={mixer}"),
        };
        let arguments = ["train", &config, "--set", &mixer, "--out", &out, "--threads", "1"];
        let output = run(&arguments);
        if name == "linformer" {
            // It has no causal form.
            assert_fails(&output, 1, &[name, "train it with hidden tokens"]);
            continue;
        }
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        let losses = metrics(&out);
        assert!(losses.iter().filter(|record| record["loss"].is_f64()).count() == 4, "{name}");
        assert!(losses.iter().any(|record| record["sample"].is_string()), "{name}");
        let page = String::from_utf8(read(&out, "report.html")).unwrap();
        assert!(
            page.contains("<svg") && !page.contains("NaN") && !page.contains("<script"),
            "{name}"
        );
        let text = run(&["generate", "--model", &out, "-n", "5", "It is"]);
        assert!(text.status.success() && !stdout(&text).is_empty(), "{name}: {}", stderr(&text));
    }
}

/// Kills a run as soon as it has said so many lines.
fn kill_after(arguments: &[&str], lines: usize) {
    let mut child = foveal(arguments).stderr(Stdio::piped()).spawn().unwrap();
    let said = BufReader::new(child.stderr.take().unwrap());
    let _ = said.lines().take(lines).count();
    let _ = child.kill();
    child.wait().unwrap();
}

#[test]
fn runs_that_are_killed_lose_nothing() {
    let (folder, config) = small("train-killed");
    let (whole, killed) = (path(&folder, "whole"), path(&folder, "killed"));
    let sets = [
        "--set",
        "schedule.steps=40",
        "--set",
        "train.checkpoint_every=3",
        "--set",
        "train.dropout=0.1",
        "--set",
        "data.order=streams",
        "--set",
        "model.mixer=[[{name='full', heads=1}, {name='linear', heads=1}]]",
        "--set",
        "train.accumulate=2",
        "--set",
        "train.sample_every=0",
    ];
    let start = |out| [&["train", &config, "--out", out][..], &sets].concat();
    succeeds(&start(&whole));
    let mut seed = 12345u32;
    let mut random = move || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 16) as usize
    };
    // A process that is killed before it has made its folder has begun no run.
    kill_after(&start(&killed), 2);
    for _ in 0..20 {
        kill_after(&["train", "--resume", &killed], 1 + random() % 9);
    }
    succeeds(&["train", "--resume", &killed, "--threads", "1"]);
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        assert!(read(&killed, name) == read(&whole, name), "{name}");
    }
    assert_eq!(metrics(&killed), metrics(&whole));
    let left = std::fs::read_dir(&killed).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");
    // What is over stays so, unless more steps are asked for.
    succeeds(&["train", "--resume", &killed]);
    assert_eq!(metrics(&killed), metrics(&whole));
    succeeds(&["train", "--resume", &killed, "--set", "schedule.steps=42"]);
    assert!(metrics(&killed).len() > metrics(&whole).len());
}

#[test]
fn an_encoder_decoder_is_trained_on_pairs() {
    let folder = Folder::new("train-pairs");
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/train-translation.toml");
    let small = [
        "model.encoder_layers=1",
        "model.layers=1",
        "model.width=16",
        "schedule.steps=6",
        "schedule.warmup=2",
        "data.batch=8",
        "train.evaluate_every=3",
        "train.evaluate_batches=2",
        "train.sample_every=6",
        "train.checkpoint_every=2",
    ];
    let small: Vec<&str> = small.iter().flat_map(|set| ["--set", set]).collect();
    let start = |out| [&["train", example, "--out", out][..], &small].concat();
    let (whole, cut) = (path(&folder, "whole"), path(&folder, "cut"));
    assert!(succeeds(&start(&whole)).contains("8 pairs a step"));
    kill_after(&start(&cut), 3);
    succeeds(&["train", "--resume", &cut, "--threads", "1"]);
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        assert!(read(&cut, name) == read(&whole, name), "{name}");
    }
    assert_eq!(metrics(&cut), metrics(&whole));
    let samples = metrics(&whole);
    assert!(samples.iter().any(|r| r["sample"].as_str().is_some_and(|s| s.contains(" → "))));
    assert!(String::from_utf8(read(&whole, "report.html")).unwrap().contains("<svg"));
    // What is made is no decoder, and says so.
    let decoder = "encoder–decoder, which only training computes";
    assert_fails(&run(&["generate", "--model", &whole, "x"]), 1, &[decoder]);
    let gguf = path(&folder, "model.gguf");
    assert_fails(&run(&["convert", &whole, &gguf, "--attention", "mqa"]), 1, &[decoder]);
    assert!(!Path::new(&gguf).exists());
    // Pairs of a file; the prompt is what is translated.
    let pairs =
        folder.write("pairs.tsv", "one\teins\ntwo\tzwei\nthree\tdrei\n".repeat(9).as_bytes());
    let out = path(&folder, "file");
    let text = std::fs::read_to_string(example).unwrap().replace("task = \"reverse\"", "");
    let config = folder.write("file.toml", text.as_bytes());
    let named = format!("data.train=['{pairs}']");
    let own = ["--set", &named, "--set", "train.prompt=one", "--out", &out];
    succeeds(&[&["train", &config][..], &small, &own].concat());
    let said = metrics(&out);
    assert!(said.iter().any(|r| r["sample"].as_str().is_some_and(|s| s.starts_with("one → "))));
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    let (folder, config) = small("train-full");
    let (whole, full) = (path(&folder, "whole"), path(&folder, "full"));
    let steps = ["--set", "train.sample_every=0"];
    succeeds(&[&["train", &config, "--out", &whole][..], &steps].concat());
    // The first two steps, and a checkpoint of them.
    let two = ["--set", "schedule.steps=2", "--set", "schedule.warmup=0"];
    succeeds(&[&["train", &config, "--out", &full][..], &steps, &two].concat());
    let before = read(&full, "checkpoint.safetensors");
    // Files larger than 8 KiB can't be written any more: the system says so, as it does for a full disk.
    let limited = format!(
        "trap '' XFSZ; ulimit -f 16; exec '{}' train --resume '{full}' --set schedule.steps=4",
        env!("CARGO_BIN_EXE_foveal")
    );
    let output = std::process::Command::new("sh").args(["-c", &limited]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let words = ["checkpoint of step 2", "cannot write", "--resume"];
    assert!(words.iter().all(|word| stderr(&output).contains(word)), "{}", stderr(&output));
    assert!(read(&full, "checkpoint.safetensors") == before);
    succeeds(&["train", "--resume", &full, "--set", "schedule.steps=4"]);
    assert_eq!(metrics(&full).len(), metrics(&whole).len());
}

#[test]
fn a_model_is_converted_and_trained_on() {
    let (folder, config) = small("train-converted");
    let first = path(&folder, "first");
    succeeds(&["train", &config, "--out", &first, "--set", "model.layers=2"]);
    let kinds: [(&str, &[&str]); 4] = [
        ("mqa", &["--attention", "mqa"]),
        ("window", &["--attention", "window", "--tokens", "8", "--layers", "1"]),
        ("gated_delta", &["--attention", "gated_delta", "--layers", "0"]),
        ("infini", &["--attention", "infini", "--segment", "16"]),
    ];
    for (name, how) in kinds {
        let (second, third) = (path(&folder, name), path(&folder, &format!("{name}-on")));
        succeeds(&[&["convert", &first, &second][..], how].concat());
        let text = run(&["generate", "--model", &second, "-n", "5", "It is"]);
        assert!(text.status.success(), "{name}: {}", stderr(&text));
        let from = format!("model.from={second}");
        let arguments =
            ["train", &config, "--set", &from, "--out", &third, "--set", "data.tokenizer=bytes"];
        let output = run(&arguments);
        assert!(
            output.status.success() || stderr(&output).contains("can't be trained"),
            "{name}: {}",
            stderr(&output)
        );
    }
    let gguf = path(&folder, "mqa.gguf");
    succeeds(&["convert", &first, &gguf, "--attention", "mqa", "--type", "f32"]);
    let generate = |model: &str| {
        let text = run(&[
            "generate",
            "--model",
            model,
            "-n",
            "8",
            "-t",
            "0",
            "--activations",
            "f32",
            "It is",
        ]);
        stdout(&text).to_owned()
    };
    assert_eq!(generate(&gguf), generate(&path(&folder, "mqa")));
    // Mixers by name go into such files too.
    let named = path(&folder, "infini.gguf");
    succeeds(&[
        "convert",
        &first,
        &named,
        "--attention",
        "infini",
        "--segment",
        "16",
        "--type",
        "f32",
    ]);
    assert_eq!(generate(&named), generate(&path(&folder, "infini")));
    let refused =
        run(&["convert", &first, &path(&folder, "x"), "--attention", "gqa", "--kv-heads", "3"]);
    assert_fails(&refused, 1, &["key/value heads is 3", "divisor"]);
}

#[test]
fn what_is_wrong_is_said_in_one_line() {
    let (folder, config) = small("train-wrong");
    let out = path(&folder, "out");
    let fails = |more: &[&str], words: &[&str]| {
        assert_fails(&run(&[&["train", &config, "--out", &out], more].concat()), 1, words);
    };
    fails(&["--set", "optimizer.learning_rat=1"], &["learning_rat"]);
    fails(&["--set", "model.mixer={name='flash'}"], &["flash", "linear"]);
    fails(&["--set", "data.sequence=5000"], &["tokens, expected 10000"]);
    fails(&["--set", "data.train=['none.txt']"], &["none.txt"]);
    // Decay alone makes parameters 99 times as large each step.
    let wild = [
        "optimizer.learning_rate=1e3",
        "optimizer.clip=0",
        "schedule.steps=40",
        "schedule.warmup=0",
    ];
    let wild: Vec<&str> = wild.iter().flat_map(|set| ["--set", set]).collect();
    let output = run(&[&["train", &config, "--out", &out][..], &wild].concat());
    let last = stderr(&output).trim_end().lines().next_back().unwrap_or_default();
    assert_eq!(output.status.code(), Some(1), "{last}");
    let words = ["before the first checkpoint", "optimizer.learning_rate"];
    assert!(words.iter().all(|word| last.contains(word)), "{last}");
    fails(&[], &["holds a training run"]);
    assert_fails(&run(&["train", "--resume", &path(&folder, "none")]), 1, &["train.toml"]);
    assert_fails(
        &run(&["train", "--resume", &out, "--set", "model.layers=3"]),
        1,
        &["model.layers"],
    );
}

/// Two processes that do not know of each other would write to the same folder.
#[cfg(not(feature = "mpi"))]
#[test]
fn a_build_for_one_process_is_no_part_of_several() {
    let (folder, config) = small("train-several");
    let out = path(&folder, "out");
    let mut command = foveal(&["train", &config, "--out", &out]);
    let output = command.env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap();
    assert_fails(&output, 1, &["2 processes", "--features mpi"]);
    assert!(!Path::new(&out).exists());
}
