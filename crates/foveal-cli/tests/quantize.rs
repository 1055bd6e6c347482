//! `foveal quantize`: what it writes, and what it says.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use foveal_lm::testing::{Tiny, TinySizes};

fn foveal(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_foveal")).args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn built_in() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../foveal-lm/tests/assets/glassllm-en.gguf").to_owned()
}

#[test]
fn a_quantised_model_writes_text() {
    let out = folder("quantized").join("q8.gguf");
    let out = out.to_str().unwrap();
    let output = foveal(&["quantize", &built_in(), out, "--type", "q8_0"]);
    assert!(output.status.success() && output.stdout.is_empty(), "{}", stderr(&output));
    let note = stderr(&output);
    // Rows of 341 are no whole blocks.
    assert!(note.contains("4 tensors are F16, because their rows are no whole blocks"), "{note}");
    assert!(note.contains("Q8_0") && note.contains("F32"), "{note}");
    let text = foveal(&["generate", "-n", "12", "-t", "0", "-m", out, "Alice was beginning to"]);
    assert!(text.status.success());
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.starts_with(" the\nQueen"), "{text:?}");
    let again = folder("quantized-again").join("q4.gguf");
    let again = again.to_str().unwrap();
    let output = foveal(&["quantize", out, again, "--type", "Q4_0"]);
    assert!(output.status.success());
    assert!(stderr(&output).contains("were rounded before"), "{}", stderr(&output));
}

#[test]
fn failures_leave_the_old_file() {
    let folder = folder("quantize-failures");
    let out = folder.join("out.gguf");
    std::fs::write(&out, "old").unwrap();
    let mut model = Tiny::new("llama", TinySizes::default());
    let matrix = model.tensors.iter_mut().find(|tensor| tensor.gguf == "blk.5.ffn_up.weight");
    matrix.unwrap().values[3] = f32::NAN;
    model.save_folder(&folder.join("nan"), foveal::projection::Format::F32, 1).unwrap();
    let nan = folder.join("nan");
    for (input, word) in
        [(nan.to_str().unwrap(), "element 3 is NaN"), ("/nowhere", "cannot quantise")]
    {
        let output = foveal(&["quantize", input, out.to_str().unwrap(), "--type", "Q8_0"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2, "no file is left over");
    let output = foveal(&["quantize", "in", "out", "--type", "Q3_K"]);
    assert_eq!(output.status.code(), Some(2));
    let output = foveal(&["quantize", "in", "out"]);
    assert_eq!(output.status.code(), Some(2));
}
