//! The `foveal` command as a user meets it: what it prints where, its exit codes, and files that are damaged.

mod support;

use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::Value;
use support::{Folder, SMALL, assert_fails, built_in, foveal, run, stderr, stdout};

const PROMPT: &str = "Alice was beginning to";
/// The small model's most probable continuation.
const GREEDY: &str = " the\nQueen to the Queen, and she found it was saying to herself, and";

fn greedy(more: &[&str]) -> Output {
    run(&[&["generate", "--temperature", "0", "--max-tokens", "40"], more].concat())
}

#[test]
fn standard_output_has_the_continuation_alone() {
    let output = greedy(&[PROMPT]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).starts_with(GREEDY), "{:?}", stdout(&output));
    for figure in ["prompt: ", "generated: 40 tokens", "tok/s", "max_tokens", "keys and values"] {
        assert!(stderr(&output).contains(figure), "{figure}: {}", stderr(&output));
    }
}

#[test]
fn a_prompt_may_come_from_standard_input() {
    let mut command = foveal(&["generate", "--temperature", "0", "--max-tokens", "40", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(PROMPT.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output), stdout(&greedy(&[PROMPT])));
}

#[test]
fn a_prompt_that_is_not_text_is_refused() {
    let mut command = foveal(&["generate", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"caf\xe9").unwrap();
    assert_fails(&child.wait_with_output().unwrap(), 1, &["UTF-8"]);
}

#[test]
fn json_is_one_object_with_the_same_text() {
    let output = greedy(&["--json", PROMPT]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["text"], stdout(&greedy(&[PROMPT])));
    assert_eq!(json["tokens"].as_array().unwrap().len(), 40);
    assert_eq!(json["stop"], "max_tokens");
    for key in ["prompt_tokens", "kv_bytes"] {
        assert!(json[key].as_u64().unwrap() > 0, "{key}");
    }
    for key in ["prompt_seconds", "generate_seconds"] {
        assert!(json[key].as_f64().unwrap() > 0.0, "{key}");
    }
}

#[test]
fn keys_and_values_take_what_their_storage_takes() {
    let bytes = |more: &[&str]| {
        let output = greedy(&[&["--json"], more].concat());
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["tokens"].as_array().unwrap().len(), 40, "{more:?}");
        json["kv_bytes"].as_u64().unwrap()
    };
    let f32 = bytes(&["--kv-cache", "f32", PROMPT]);
    for storage in ["f16", "bf16", "q8", "q4"] {
        // So few tokens are no codes yet.
        assert_eq!(bytes(&["--kv-cache", storage, PROMPT]), f32 / 2, "{storage}");
    }
    assert_eq!(bytes(&[PROMPT]), f32 / 2);
    // Of 600 tokens, 256 are codes.
    let long = |storage| bytes(&["--context", "2000", "--kv-cache", storage, &PROMPT.repeat(100)]);
    let (half, q8, q4) = (long("f16"), long("q8"), long("q4"));
    assert!(q4 < q8 && q8 < half, "{q4} {q8} {half}");
}

#[test]
fn a_context_is_obeyed_or_refused() {
    let text = |more: &[&str]| stdout(&greedy(&[more, &[PROMPT]].concat())).to_owned();
    assert_eq!(text(&["--context", "128"]), text(&[]));
    assert_ne!(text(&["--context", "4"]), text(&[]));
    let output = run(&["generate", "--context", "500", "-n", "300", PROMPT]);
    assert!(stderr(&output).contains("trained with a context of 128"), "{}", stderr(&output));
}

#[test]
fn keys_may_be_given_up() {
    let bytes = |more: &[&str]| {
        let arguments = ["--json", "--max-tokens", "60", &PROMPT.repeat(150)];
        let output = run(&[&["generate"], more, &arguments].concat());
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        json["kv_bytes"].as_u64().unwrap()
    };
    let all = bytes(&["--context", "2000"]);
    for way in [
        &["--window", "60"][..],
        &["--window", "60", "--sinks", "0", "--kv-cache", "q4"],
        &["--evict", "h2o:64"],
        &["--evict", "snapkv:64"],
    ] {
        let left = bytes(way);
        assert!(0 < left && left < all, "{way:?}: {left} of {all}");
    }
    let output = run(&["generate", "--window", "20", "-n", "30", PROMPT]);
    assert!(stderr(&output).contains("the first 4 and the newest 20"), "{}", stderr(&output));
    for (wrong, code, words) in [
        (&["--window", "125"][..], 1, &["129", "128"]),
        (&["--evict", "h2o:129"], 1, &["129", "128"]),
        (&["--evict", "h2o:12", "--kv-cache", "q8"], 1, &["q8", "f16"]),
        (&["--evict", "h2o:12", "--window", "12"], 2, &["--evict", "--window"]),
    ] {
        let output = run(&[&["generate", "-n", "3"], wrong, &[PROMPT]].concat());
        assert_fails(&output, code, words);
    }
}

#[test]
fn stop_strings_end_the_text() {
    let output = greedy(&["--stop", "nowhere", "--stop", "Queen,", "--json", PROMPT]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (json["text"].as_str(), &json["stop"]),
        (Some(" the\nQueen to the "), &"stop_string".into())
    );
}

#[test]
fn seeds_and_threads() {
    let text = |more: &[&str]| {
        let output = run(&[&["generate", "-n", "60", PROMPT], more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output).to_owned()
    };
    let one = text(&["--threads", "1"]);
    assert_eq!(text(&["--threads", "3"]), one);
    assert_eq!(text(&["--seed", "0"]), one);
    assert_ne!(text(&["--seed", "1"]), one);
}

#[test]
fn a_text_beyond_the_context_is_announced_once() {
    let output = run(&["generate", "-n", "300", PROMPT]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stderr(&output).matches("with a context of 128").count(), 1);
    assert!(!stderr(&greedy(&[PROMPT])).contains("context"));
}

#[test]
fn mechanisms_that_are_named_see_what_they_see() {
    let output =
        built_in(&["generate", "-n", "600", PROMPT]).stderr(Stdio::piped()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("trained with a context of 512"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("newest"), "{}", stderr(&output));
    let output = built_in(&["generate", "-n", "9", "--window", "20", PROMPT]).output().unwrap();
    assert_fails(&output, 1, &["Rolling", "all that its mechanism sees"]);
    assert!(!stderr(&output).contains("newest"), "{}", stderr(&output));
}

#[test]
fn usage_errors_are_refused_by_name() {
    for (flag, bad) in [
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "-1"),
        ("--temperature", "warm"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--min-p", "1"),
        ("--repeat-penalty", "0"),
        ("--repeat-penalty", "-inf"),
        ("--top-k", "-1"),
        ("--threads", "0"),
        ("--threads", "100000"),
        ("--kv-cache", "q2"),
        ("--context", "many"),
        ("--context", "0"),
        ("--window", "0"),
        ("--sinks", "-1"),
        ("--evict", "h2o"),
        ("--evict", "snapkv:0"),
        ("--evict", "lru:100"),
        ("--max-tokens", "many"),
        ("--seed", "x"),
    ] {
        let argument = format!("{flag}={bad}");
        assert_fails(&run(&["generate", &argument, PROMPT]), 2, &[flag]);
    }
    for wrong in [&["generate"][..], &["generate", "a", "b"], &["fly"], &[], &["inspect", "--jsn"]]
    {
        assert_eq!(run(wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn help_and_version_are_results() {
    for arguments in [&["--help"][..], &["generate", "--help"], &["--version"]] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(stdout(&output).contains("foveal"), "{}", stdout(&output));
        assert_eq!(stderr(&output), "");
    }
}

#[test]
fn a_closed_standard_output_is_no_failure() {
    for arguments in [&["generate", "-n", "500", PROMPT][..], &["inspect"], &["list"], &["--help"]]
    {
        let mut command = foveal(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
        assert!(!stderr(&output).contains("error"), "{}", stderr(&output));
    }
}

#[test]
fn what_is_no_model_is_refused_in_one_sentence() {
    let folder = Folder::new("no-model");
    let (text, empty) =
        (folder.write("text.txt", b"Hello, world!"), folder.write("empty.gguf", b""));
    let here = folder.0.to_str().unwrap();
    for (path, words) in [
        ("/no/such/model.gguf", "No such file"),
        (&text, "is not a model"),
        (&empty, "is not a model"),
        (here, "config.json"),
    ] {
        assert_fails(&run(&["generate", "--model", path, PROMPT]), 1, &["foveal: ", path, words]);
        assert_fails(&run(&["inspect", path]), 1, &["foveal: ", path, words]);
    }
}

#[test]
fn damaged_files_are_refused_or_run() {
    let (folder, whole) = (Folder::new("damaged"), std::fs::read(SMALL).unwrap());
    for length in [10, 500, 20_000, whole.len() / 2, whole.len() - 1] {
        let path = folder.write("short.gguf", &whole[..length]);
        assert_fails(&run(&["generate", "--model", &path, PROMPT]), 1, &["foveal: "]);
    }
    for at in (0..3000).step_by(61) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x41;
        let path = folder.write("flipped.gguf", &bytes);
        for arguments in
            [&["generate", "-n", "3", "--model", &path, PROMPT][..], &["inspect", &path]]
        {
            let output = run(arguments);
            match output.status.code() {
                Some(0) => assert!(!stderr(&output).contains("foveal: "), "{}", stderr(&output)),
                _ => assert_fails(&output, 1, &["foveal: "]),
            }
        }
    }
}

#[test]
fn inspect_shows_the_model() {
    let output = run(&["inspect", SMALL]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for words in
        ["llama", "4 heads, 2 key/value heads", "4 × full", "128 tokens", "token_embd.weight"]
    {
        assert!(stdout(&output).contains(words), "{words}: {}", stdout(&output));
    }
    let json: Value = serde_json::from_slice(&run(&["inspect", SMALL, "--json"]).stdout).unwrap();
    assert_eq!(json["config"]["kv_heads"], 2);
    assert_eq!(json["config"]["layers"], serde_json::json!(["full", "full", "full", "full"]));
    // Two vectors of 2 · 32 numbers in each of four layers.
    assert_eq!(json["config"]["kv_bytes_per_token"], 2 * 64 * 4 * 4);
    assert_eq!(json["parameters"], 852_608);
    let embedding = json["tensors"].as_array().unwrap().iter();
    let embedding = embedding.filter(|tensor| tensor["name"] == "token_embd.weight");
    let embedding: Vec<&Value> = embedding.collect();
    assert_eq!(embedding[0]["shape"], serde_json::json!([1024, 128]));
    assert_eq!(embedding[0]["format"], "F16");
}

#[test]
fn list_shows_the_registry() {
    let text = run(&["list"]);
    let json: Value = serde_json::from_slice(&run(&["list", "--json"]).stdout).unwrap();
    let mechanisms = json.as_array().unwrap();
    assert_eq!(mechanisms.len(), foveal::registry::MECHANISMS.len());
    assert_eq!(stdout(&text).lines().count(), mechanisms.len());
    for (mechanism, line) in mechanisms.iter().zip(stdout(&text).lines()) {
        assert!(line.starts_with(mechanism["name"].as_str().unwrap()), "{line}");
    }
}

#[test]
fn latent_attention_is_inspected_with_the_bytes_that_a_token_takes() {
    let folder = Folder::new("inspect-latent");
    // DeepSeek-V2-Lite without its experts.
    folder.write(
        "config.json",
        br#"{"architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 27,
            "num_attention_heads": 16, "intermediate_size": 10944, "vocab_size": 102400,
            "max_position_embeddings": 163840, "q_lora_rank": null, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": null}"#,
    );
    let header = br#"{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#;
    let length = (header.len() as u64).to_le_bytes();
    let file = folder.write("model.safetensors", &[&length[..], header, &[0; 4]].concat());
    let path = Path::new(&file).parent().unwrap().to_str().unwrap();
    let output = run(&["inspect", path]);
    let heads = "16 heads of 128 + 64 for keys and 128 for values, latent rows of 512 + 64";
    assert!(stdout(&output).contains(heads), "{}", stdout(&output));
    let output = run(&["inspect", path, "--json"]);
    let json: Value = serde_json::from_str(stdout(&output)).unwrap();
    assert_eq!(json["config"]["kv_bytes_per_token"], 27 * 576 * 4);
    assert_eq!(json["config"]["latent"]["compressed"], 512);
}

#[test]
fn a_prompt_cache_changes_nothing_but_the_time() {
    let folder = Folder::new("prompt-cache");
    let path = folder.0.join("cache").to_str().unwrap().to_owned();
    let prompt = "The king said that the queen had gone to the wood, and that nobody knew why.";
    for storage in ["f16", "q8"] {
        let plain = ["generate", "--json", "-n", "20", "--kv-cache", storage, prompt];
        let cached = [&plain[..], &["--prompt-cache", &path]].concat();
        let value = |arguments: &[&str]| -> serde_json::Value {
            let output = run(arguments);
            assert!(output.status.success(), "{}", stderr(&output));
            serde_json::from_str(stdout(&output)).unwrap()
        };
        let (expected, cold, warm) = (value(&plain), value(&cached), value(&cached));
        for found in [&cold, &warm] {
            assert_eq!(
                (&found["text"], &found["tokens"]),
                (&expected["text"], &expected["tokens"])
            );
        }
        let count = expected["prompt_tokens"].as_u64().unwrap();
        assert_eq!(cold["prompt_tokens_cached"], 0);
        assert_eq!(warm["prompt_tokens_cached"], count - 1);
        let other = [&cached[..], &["--context", "50"]].concat();
        assert_fails(&run(&other), 1, &["prompt cache", "context 50", "delete it"]);
        std::fs::remove_file(&path).unwrap();
    }
    let evicting = ["generate", "--evict", "h2o:20", "--prompt-cache", &path, "Once"];
    assert_fails(&run(&evicting), 2, &["--prompt-cache", "--evict"]);
}

#[test]
fn pattern_draws_counts_and_says_what_is_reached() {
    let fixed = run(&["pattern", "fixed", "--n", "6", "--stride", "3"]);
    assert_eq!(fixed.status.code(), Some(0), "{}", stderr(&fixed));
    let expected = "#\n##\n###\n..##\n..###\n..####\n\
        15 of 21 pairs live (71.4 %), 2.5 keys a query\n\
        every earlier token is reached after 2 layers\n";
    assert_eq!(stdout(&fixed), expected);
    let layers = run(&["pattern", "strided", "--n", "16", "--combine", "layers", "--json"]);
    let json: Value = serde_json::from_slice(&layers.stdout).unwrap();
    assert_eq!(json["reached_after_layers"], 2);
    assert_eq!(json["layers"].as_array().unwrap().len(), 2);
    let alone = run(&["pattern", "window", "--n", "9", "--window", "1"]);
    assert!(
        stdout(&alone).ends_with("every earlier token is not reached in any number of layers\n")
    );
    for name in [
        "full",
        "window",
        "strided",
        "fixed",
        "longformer",
        "bigbird",
        "lsh",
        "moba",
        "native_sparse",
    ] {
        let output = run(&["pattern", name]);
        assert_eq!(stdout(&output).lines().count(), 66, "{name}: {}", stderr(&output));
    }
    let bad = [
        (&["pattern", "fixed", "--summary", "99"][..], "1 to the stride"),
        (&["pattern", "strided", "--stride", "0"], "at least 1"),
        (&["pattern", "longformer", "--global", "64"], "beyond the last"),
        (&["pattern", "bigbird", "--block", "0"], "0 tokens"),
        (&["pattern", "moba", "--block", "0"], "tokens of a block"),
        (&["pattern", "native_sparse", "--top", "2"], "at least 3"),
        (&["pattern", "native_sparse", "--block", "0"], "at least 1"),
        (&["pattern", "lsh", "--block", "0"], "tokens of a chunk"),
        (&["pattern", "lsh", "--rounds", "0"], "rounds of hashing"),
        (&["pattern", "window", "--n", "5000"], "at most 4096"),
        (&["pattern", "full", "--n", "0"], "0 tokens"),
    ];
    for (arguments, words) in bad {
        assert_fails(&run(arguments), 1, &[words]);
    }
}
