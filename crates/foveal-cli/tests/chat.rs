//! `foveal chat` without a terminal, and what Ctrl-C does.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};

use foveal_lm::weights::gguf::{Gguf, OwnedValue, Value as Metadata, Writer};
use serde_json::Value;
use support::{Folder, SMALL, assert_fails, foveal, run, run_with, stderr, stdout};

const CHAT: [&str; 6] = ["chat", "--plain", "--temperature", "0", "-n", "12"];

fn chat(more: &[&str], input: &str) -> std::process::Output {
    run_with(&[&CHAT[..], more].concat(), input)
}

#[test]
fn standard_output_has_one_answer_after_the_other() {
    let output = chat(&[], "Who are you?\n\nsaid the Queen\n");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let first = chat(&[], "Who are you?");
    assert!(stdout(&output).starts_with(stdout(&first)));
    assert!(stdout(&output).len() > stdout(&first).len() + 1);
    assert_eq!(stdout(&chat(&[], "")), "");
    assert_eq!(stdout(&chat(&["--threads", "1"], "Who are you?")), stdout(&first));
}

#[test]
fn a_model_without_a_template_is_named_with_a_way_out() {
    let output = run_with(&["chat"], "Hello\n");
    assert_fails(&output, 1, &[SMALL, "no chat template", "--plain"]);
}

#[test]
fn earlier_messages_are_not_read_again() {
    let output = chat(&["--figures"], "Who are you?\nsaid the Queen\n");
    let figures: Vec<&str> =
        stderr(&output).lines().filter(|line| line.starts_with("held: ")).collect();
    assert_eq!(figures.len(), 2, "{}", stderr(&output));
    assert!(figures[0].starts_with("held: 0 tokens"), "{}", figures[0]);
    assert!(!figures[1].starts_with("held: 0 tokens"), "{}", figures[1]);
}

#[test]
fn commands_do_what_they_say() {
    let folder = Folder::new("chat-commands");
    let path = folder.0.join("saved.json");
    let input = format!(
        "/system Be brief.\n/system\nWho are you?\n/regenerate\n//slash \\\nof two lines\n\
         /save {}\n/fly\n/help\n/reset\n/regenerate\n/save /no/such/folder/file\n/save\n/quit\nnever\n",
        path.display()
    );
    let output = chat(&[], &input);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for words in [
        "Be brief.",
        "saved to",
        "there is no command /fly",
        "/regenerate ",
        "there is no message to answer",
        "cannot write /no/such/folder/file",
        "/save needs",
    ] {
        assert!(stderr(&output).contains(words), "{words}: {}", stderr(&output));
    }
    let saved: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let said: Vec<(&str, &str)> = saved
        .as_array()
        .unwrap()
        .iter()
        .map(|message| (message["role"].as_str().unwrap(), message["content"].as_str().unwrap()))
        .collect();
    assert_eq!(said.len(), 5);
    assert_eq!(said[0], ("system", "Be brief."));
    assert_eq!(said[1], ("user", "Who are you?"));
    assert_eq!(said[3], ("user", "/slash \nof two lines"));
    assert_eq!((said[2].0, said[4].0), ("assistant", "assistant"));
    // At temperature 0 the same answer comes again.
    let answer = format!("{}\n", said[2].1);
    assert!(stdout(&output).starts_with(&answer.repeat(2)), "{:?}", stdout(&output));
}

#[test]
fn another_try_is_another_answer() {
    let chat = ["chat", "--plain", "-n", "30"];
    let output = run_with(&chat, "Who are you?\n/regenerate\n/quit\n");
    let once = run_with(&chat, "Who are you?\n");
    let rest = stdout(&output).strip_prefix(stdout(&once)).unwrap();
    assert!(!rest.is_empty());
    assert_ne!(rest, stdout(&once));
}

/// The small model with a template in its file.
fn with_template(folder: &Folder, template: &str) -> String {
    let file = Gguf::open(SMALL.as_ref()).unwrap();
    let mut writer = Writer::new();
    for key in file.metadata().keys() {
        let value: Metadata<'_> = file.metadata().require(key).unwrap();
        writer.metadata(key, OwnedValue::try_from(value).unwrap()).unwrap();
    }
    writer.metadata("tokenizer.chat_template", template.to_owned()).unwrap();
    let weights: Vec<_> =
        file.tensors().iter().map(|info| file.tensor(&info.name).unwrap()).collect();
    for (info, weight) in file.tensors().iter().zip(&weights) {
        writer.tensor(&info.name, &info.shape, weight.format(), weight.bytes()).unwrap();
    }
    folder.write("model.gguf", &writer.to_bytes())
}

#[test]
fn the_template_of_the_file_is_used_and_its_refusals_shown() {
    let folder = Folder::new("chat-template");
    let template = "{% if messages[0].role == 'system' %}{{ raise_exception('no systems') }}{% endif %}\
        {% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}Assistant:";
    let model = with_template(&folder, template);
    let chat = ["chat", "--temperature", "0", "-n", "12", "--model", &model];
    let output = run_with(&chat, "Who are you?\n/system x\nagain\n");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stdout(&output), stdout(&self::chat(&[], "Who are you?\n")));
    assert!(stderr(&output).contains("no systems"), "{}", stderr(&output));
    let broken = with_template(&folder, "{% for %}");
    assert_fails(&run_with(&["chat", "-m", &broken], "x"), 1, &["chat template"]);
}

#[test]
fn what_is_not_text_is_refused_and_a_closed_pipe_is_the_end() {
    let mut command = foveal(&CHAT);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"caf\xe9\n").unwrap();
    assert_fails(&child.wait_with_output().unwrap(), 1, &["UTF-8"]);
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    child.stdin.take().unwrap().write_all(b"Who are you?\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
}

/// A child that is asked to end, and does not outlive its test.
struct Running(Child);

impl Running {
    fn start(arguments: &[&str]) -> (Running, ChildStdin, BufReader<std::process::ChildStdout>) {
        let mut command = foveal(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        (Running(child), input, BufReader::new(output))
    }

    fn interrupt(&self) {
        let process = self.0.id().to_string();
        assert!(Command::new("kill").args(["-INT", &process]).status().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ctrl-C breaks an answer off; the conversation goes on, and what was said of the answer is part of it.
#[test]
#[cfg(unix)]
fn ctrl_c_ends_an_answer_and_not_the_conversation() {
    let arguments = ["chat", "--plain", "--temperature", "0", "-n", "1000000000"];
    let (mut child, mut input, mut output) = Running::start(&arguments);
    input.write_all(b"Who are you?\n").unwrap();
    // The answer is under way; without an interruption it would hardly end.
    let mut some = [0; 1];
    std::io::Read::read_exact(&mut output, &mut some).unwrap();
    child.interrupt();
    let mut rest = Vec::new();
    let folder = Folder::new("chat-interrupt");
    let path = folder.0.join("saved.json");
    input.write_all(format!("/save {}\n/quit\n", path.display()).as_bytes()).unwrap();
    while output.read_until(b'\n', &mut rest).unwrap() > 0 {}
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
    let saved: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let text = [&some[..], &rest].concat();
    let answer = saved[1]["content"].as_str().unwrap();
    assert_eq!(String::from_utf8(text).unwrap(), format!("{answer}\n"));
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_a_long_text_with_its_figures() {
    let arguments = ["generate", "-n", "1000000000", "Alice was"];
    let (mut child, _, mut output) = Running::start(&arguments);
    let mut some = [0; 1];
    std::io::Read::read_exact(&mut output, &mut some).unwrap();
    child.interrupt();
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut output, &mut rest).unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(130));
}

#[test]
fn every_shell_gets_its_script() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = run(&["completions", shell]);
        assert_eq!(output.status.code(), Some(0));
        for word in ["foveal", "chat", "temperature"] {
            assert!(stdout(&output).contains(word), "{shell}: {word}");
        }
    }
    assert_fails(&run(&["completions", "tcsh"]), 2, &["tcsh"]);
}
