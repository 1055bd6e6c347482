//! Texts of any length through the command: a run that is killed is taken up to the bit, memories on disk are found again.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use foveal::projection::Format;
use foveal_lm::testing::{Tiny, TinySizes, byte_tokenizer};
use serde_json::{Value, json};

fn foveal(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_foveal")).args(arguments).output().unwrap()
}

fn stdout(arguments: &[&str]) -> String {
    let output = foveal(arguments);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {message}");
    String::from_utf8(output.stdout).unwrap()
}

fn figures(arguments: &[&str]) -> Value {
    serde_json::from_str(&stdout(arguments)).unwrap()
}

/// A model of two layers that sees across segments, and a text.
fn model(name: &str) -> (PathBuf, String, String) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    let sizes = TinySizes { vocab: 256, layers: 2, width: 16, inner: 16, ..TinySizes::default() };
    let mixer = json!([
        [{"name": "transformer_xl", "segment": 32, "memory": 64, "heads": 2}, {"name": "infini", "segment": 64, "heads": 2}],
        {"name": "memorizing", "segment": 256, "top": 4, "capacity": 1024},
    ]);
    Tiny::mixed(sizes, &mixer, 64).save_folder(&folder, Format::F32, 1).unwrap();
    std::fs::write(folder.join("tokenizer.json"), byte_tokenizer().to_string()).unwrap();
    let text: String = (0..6_000).map(|n| format!("{} lines {}\n", n % 1009, n * n % 97)).collect();
    let path = folder.join("text.txt");
    std::fs::write(&path, text).unwrap();
    let texts = [&folder, &path].map(|path| path.to_str().unwrap().to_owned());
    let [model, text] = texts;
    (folder, model, text)
}

#[test]
fn a_killed_stream_is_taken_up_to_the_bit() {
    let (folder, model, text) = model("stream-killed");
    let stream = [
        "eval", "-m", &model, "--text", &text, "--tokens", "30000", "--stream", "--piece", "3000",
        "--json",
    ];
    let once = figures(&stream);
    let whole = figures(&["eval", "-m", &model, "--text", &text, "--tokens", "30000", "--json"]);
    let differ = (once["mean_nll"].as_f64().unwrap() - whole["mean_nll"].as_f64().unwrap()).abs();
    assert!(differ < 1e-9, "{differ}");
    assert_eq!(once["tokens"], whole["tokens"]);
    assert_eq!(once["bytes"], whole["bytes"]);
    for memory in [false, true] {
        let state = folder.join(format!("state-{memory}")).to_str().unwrap().to_owned();
        let entries = folder.join("entries").to_str().unwrap().to_owned();
        let mut saved = [&stream[..], &["--state", &state, "--save-every", "1"]].concat();
        if memory {
            saved.extend(["--memory", &entries]);
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_foveal"))
            .args(&saved)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while !Path::new(&state).exists() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        let _ = child.kill();
        child.wait().unwrap();
        let rest = figures(&saved);
        for key in ["digest", "mean_nll", "by_position", "tokens", "predicted", "bytes"] {
            assert_eq!(rest[key], once[key], "{key}, memory {memory}");
        }
        if memory {
            assert!(rest["memory_file_bytes"].as_u64().unwrap() > 0);
        }
    }
    // Of another model's state, or in the place of a text: refused, and left as it is.
    let state = folder.join("state-false");
    let before = std::fs::read(&state).unwrap();
    let other = ["--state", state.to_str().unwrap(), "--kv-cache", "f32"];
    let refused = foveal(&[&stream[..], &other].concat());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("it was made by"));
    assert!(!refused.status.success() && std::fs::read(&state).unwrap() == before);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_prompt_of_any_length_is_continued_as_a_whole_one() {
    let (folder, model, text) = model("stream-prompt");
    let prompt = std::fs::read_to_string(&text).unwrap()[..66_000].to_owned();
    let generate = ["generate", "-m", &model, "-n", "12", "-t", "0", "--json", "-"];
    let run = |more: &[&str]| -> Value {
        let mut child = Command::new(env!("CARGO_BIN_EXE_foveal"))
            .args([&generate[..], more].concat())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, prompt.as_bytes()).unwrap();
        drop(input);
        serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap()
    };
    let whole = run(&[]);
    let streamed = run(&["--stream"]);
    assert_eq!((&streamed["text"], &streamed["tokens"]), (&whole["text"], &whole["tokens"]));
    assert_eq!(streamed["prompt_tokens"], whole["prompt_tokens"]);
    let memory = folder.join("entries").to_str().unwrap().to_owned();
    let kept = run(&["--stream", "--memory", &memory]);
    assert_eq!(kept["tokens"], whole["tokens"]);
    // The next text finds them, and is another one for it.
    let short = ["generate", "-m", &model, "-n", "40", "-t", "0", "--json", "ab"];
    let tokens = |text: &[u8]| serde_json::from_slice::<Value>(text).unwrap()["tokens"].clone();
    let alone = tokens(stdout(&short).as_bytes());
    let found = foveal(&[&short[..], &["--memory", &memory]].concat());
    let message = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(message.contains("are remembered"), "{message}");
    assert_ne!(tokens(&found.stdout), alone);
    let refused = foveal(&["generate", "--memory", &memory, "ab"]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && message.contains("memorizing"), "{message}");
    std::fs::remove_dir_all(&folder).unwrap();
}
