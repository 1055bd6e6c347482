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
    let plain = concat!(env!("CARGO_MANIFEST_DIR"), "/../foveal-lm/tests/assets/glassllm-en.gguf");
    let refused = foveal(&["generate", "-m", plain, "--memory", &memory, "ab"]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && message.contains("memorizing"), "{message}");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn documents_are_read_as_if_alone() {
    let (folder, model, _) = model("stream-documents");
    let documents: Vec<String> = [700, 3, 0, 900]
        .iter()
        .map(|&lines| (0..lines).map(|n| format!("{} line {}\n", n * lines % 91, n)).collect())
        .collect();
    let texts = [
        ("text.txt", documents.join("***\n"), ["--separator", "***"]),
        (
            "text.jsonl",
            documents.iter().map(|text| json!({"body": text}).to_string() + "\n").collect(),
            ["--jsonl", "body"],
        ),
    ];
    let alone = documents.iter().filter(|text| !text.is_empty()).map(|text| {
        let path = folder.join("alone.txt");
        std::fs::write(&path, text).unwrap();
        figures(&["eval", "-m", &model, "--text", path.to_str().unwrap(), "--stream", "--json"])
    });
    let alone: Vec<Value> = alone.collect();
    let sum = |of: &dyn Fn(&Value) -> f64| alone.iter().map(of).sum::<f64>();
    let number = |figures: &Value, key: &str| figures[key].as_f64().unwrap();
    for (name, text, how) in texts {
        let path = folder.join(name).to_str().unwrap().to_owned();
        std::fs::write(&path, text).unwrap();
        let read = |more: &[&str]| {
            let own = ["eval", "-m", &model, "--text", &path, "--stream", "--json"];
            figures(&[&own[..], &how, more].concat())
        };
        let all = read(&["--piece", "1000"]);
        assert_eq!(all["documents"], 4);
        for key in ["tokens", "predicted", "bytes"] {
            assert_eq!(number(&all, key), sum(&|one| number(one, key)), "{name} {key}");
        }
        let nll = |figures: &Value| number(figures, "mean_nll") * number(figures, "predicted");
        assert!((nll(&all) - sum(&nll)).abs() < 1e-6 * nll(&all), "{name}");
        // Positions are those within documents, also of entries in files.
        let most = all["by_position"].as_array().unwrap().last().unwrap()["from"].as_u64().unwrap();
        assert!(most < number(&alone[2], "tokens") as u64);
        let entries = folder.join(format!("entries-{name}")).to_str().unwrap().to_owned();
        assert_eq!(read(&["--memory", &entries])["digest"], all["digest"]);
        // The last document is what is continued.
        let continued = |prompt: &str, more: &[&str]| {
            let own = ["generate", "-m", &model, "-n", "9", "-t", "0", "--json", prompt];
            let text = stdout(&[&own[..], more].concat());
            serde_json::from_str::<Value>(&text).unwrap()
        };
        let prompt = std::fs::read_to_string(&path).unwrap();
        let more = [&["--stream"], &how[..]].concat();
        let (last, alone) = (continued(&prompt, &more), continued(&documents[3], &[]));
        assert_eq!(
            (&last["tokens"], &last["prompt_tokens"]),
            (&alone["tokens"], &alone["prompt_tokens"])
        );
    }
    let text = folder.join("text.txt").to_str().unwrap().to_owned();
    let state = folder.join("state").to_str().unwrap().to_owned();
    for refused in [
        &["--separator", "***"][..],
        &["--stream", "--separator", "***", "--state", &state],
        &["--stream", "--separator", "***", "--jsonl", "text"],
        &["--stream", "--separator", " "],
        &["--stream", "--jsonl", "text"],
    ] {
        let own = ["eval", "-m", &model, "--text", &text];
        assert!(!foveal(&[&own[..], refused].concat()).status.success(), "{refused:?}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_memory_of_transformer_xl_may_be_longer_than_it_was_trained() {
    let mixer = |memory: usize, clamp: Value| {
        let mut xl = json!({"name": "transformer_xl", "segment": 16, "memory": memory, "heads": 2});
        if clamp.is_u64() {
            xl["clamp"] = clamp;
        }
        json!([[xl, {"name": "infini", "segment": 16, "heads": 2}], {"name": "full"}])
    };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stream-longer");
    let save = |name: &str, mixer: &Value| {
        let path = folder.join(name);
        let sizes =
            TinySizes { vocab: 256, layers: 2, width: 16, inner: 16, ..TinySizes::default() };
        std::fs::create_dir_all(&path).unwrap();
        Tiny::mixed(sizes, mixer, 64).save_folder(&path, Format::F32, 1).unwrap();
        std::fs::write(path.join("tokenizer.json"), byte_tokenizer().to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let text = folder.join("text.txt");
    let models = [
        save("short", &mixer(16, Value::Null)),
        save("long", &mixer(50, Value::Null)),
        save("clamped", &mixer(50, json!(20))),
    ];
    let lines: String = (0..60).map(|n| format!("{} lines\n", n * n % 97)).collect();
    std::fs::write(&text, lines).unwrap();
    let read = |model: &str, more: &[&str]| {
        let own = ["eval", "-m", model, "--text", text.to_str().unwrap(), "--stream", "--json"];
        figures(&[&own[..], more].concat())["digest"].clone()
    };
    let [short, long, clamped] = models.each_ref().map(|model| read(model, &[]));
    assert!(short != long && long != clamped);
    assert_eq!(read(&models[0], &["--xl-memory", "50"]), long);
    assert_eq!(read(&models[0], &["--xl-memory", "50", "--xl-clamp", "20"]), clamped);
    assert_eq!(read(&models[1], &["--xl-memory", "16"]), short);
    let generated = |model: &str, more: &[&str]| {
        let own = ["generate", "-m", model, "-n", "20", "-t", "0", "--json", "abc abc abc abc abc"];
        serde_json::from_str::<Value>(&stdout(&[&own[..], more].concat())).unwrap()["tokens"]
            .clone()
    };
    assert_eq!(generated(&models[0], &["--xl-memory", "50"]), generated(&models[1], &[]));
    let refused = foveal(&["generate", "--xl-memory", "50", "ab"]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && message.contains("transformer_xl"), "{message}");
    std::fs::remove_dir_all(&folder).unwrap();
}
