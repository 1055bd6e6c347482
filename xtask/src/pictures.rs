//! `cargo xtask pictures MODEL`: the README's pictures of the terminal, made of what the command really prints.

use crate::run::{self, cargo, root};
use anyhow::{Context, Result, bail};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};

/// Columns of the terminal.
const COLUMNS: usize = 92;
/// A character's width and a line's height, in the font size of the style.
const CELL: (f64, f64) = (8.4, 19.0);
const MARGIN: f64 = 14.0;

const QUESTIONS: [&str; 2] =
    ["What is the capital of France?", "Write one sentence about that city."];
const SENTENCE: &str = "The cat sat on the mat because it was tired";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let [model] = arguments else { bail!("pictures takes one argument, a model's file") };
    run::run(&mut cargo(&["build", "--release", "-p", "foveal-cli"]))?;
    let folder = root().join("docs/pictures");
    fs::write(folder.join("chat.svg"), draw("foveal chat", &chat(model)?))?;
    fs::write(folder.join("look.svg"), draw("foveal look", &look(model)?))?;
    println!("wrote chat.svg and look.svg to {}", folder.display());
    Ok(())
}

fn foveal(arguments: &[&str]) -> Command {
    let mut command = Command::new(root().join("target/release/foveal"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What the command prints for some input: results and everything else.
fn output(mut command: Command, input: &str) -> Result<[String; 2]> {
    let mut child = command.spawn().context("cannot start foveal")?;
    child.stdin.take().context("no standard input")?.write_all(input.as_bytes())?;
    let done = child.wait_with_output()?;
    let errors = String::from_utf8(done.stderr)?;
    if !done.status.success() {
        bail!("foveal failed: {errors}");
    }
    Ok([String::from_utf8(done.stdout)?, errors])
}

/// A conversation as a terminal shows it. Questions and answers are those that the command itself saves.
fn chat(model: &str) -> Result<String> {
    let saved = std::env::temp_dir().join(format!("foveal-chat-{}.json", std::process::id()));
    let name = saved.to_str().context("a temporary folder whose name is no text")?;
    let command = foveal(&["chat", "--model", model, "--temperature", "0", "--figures"]);
    let [_, errors] = output(command, &format!("{}\n/save {name}\n", QUESTIONS.join("\n")))?;
    let messages: serde_json::Value = serde_json::from_slice(&fs::read(&saved)?)?;
    fs::remove_file(&saved)?;
    let mut figures = errors.lines().filter(|line| line.starts_with("held: "));
    let mut screen = "$ foveal chat --model SmolLM2-135M-Instruct.Q4_1.gguf --figures\n".to_owned();
    for message in messages.as_array().context("no messages were saved")? {
        let content = message["content"].as_str().unwrap_or_default();
        match message["role"].as_str() {
            Some("user") => writeln!(screen, "> {content}")?,
            Some("assistant") => {
                let figures = figures.next().context("an answer without figures")?;
                writeln!(screen, "{content}\n\x1b[38;5;245m{figures}\x1b[0m")?;
            }
            _ => {}
        }
    }
    Ok(screen)
}

fn look(model: &str) -> Result<String> {
    let arguments =
        ["look", "--model", model, SENTENCE, "--token", "it", "--top", "3", "--keys", "4"];
    let mut command = foveal(&arguments);
    command.env("CLICOLOR_FORCE", "1");
    let [table, _] = output(command, "")?;
    let table = table.replace(model, "SmolLM2-135M-Instruct.Q4_1.gguf");
    Ok(format!(
        "$ foveal look --model SmolLM2-135M-Instruct.Q4_1.gguf --token it \\\n    {SENTENCE:?}\n{table}"
    ))
}

/// A terminal's screen as SVG; dark on light pages and on dark ones, as terminals are.
fn draw(title: &str, screen: &str) -> String {
    let lines: Vec<Vec<(String, Option<u8>)>> = screen.lines().flat_map(wrap).collect();
    let width = COLUMNS as f64 * CELL.0 + 2.0 * MARGIN;
    let height = lines.len() as f64 * CELL.1 + 2.0 * MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\">\n\
         <title>{title} in a terminal</title>\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#17181b\"/>\n\
         <g font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" font-size=\"14\" \
         fill=\"#e8e8ea\" xml:space=\"preserve\">\n"
    );
    for (n, line) in lines.iter().enumerate() {
        let y = MARGIN + (n as f64 + 0.75) * CELL.1;
        let mut column = 0;
        for (text, colour) in line {
            let (columns, x) = (text.chars().count(), MARGIN + column as f64 * CELL.0);
            column += columns;
            if text.trim().is_empty() {
                continue;
            }
            let fill = colour.map_or_else(String::new, |c| format!(" fill=\"{}\"", hexadecimal(c)));
            // Fonts differ in their widths, terminals don't.
            let length = columns as f64 * CELL.0;
            let text = escaped(text);
            // Writing to a string can't fail.
            let _ = writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{y:.1}\" textLength=\"{length:.1}\"{fill}>{text}</text>"
            );
        }
    }
    svg + "</g>\n</svg>\n"
}

/// The parts of a line, each with its colour of 256, on as many lines of the screen as they need.
fn wrap(line: &str) -> Vec<Vec<(String, Option<u8>)>> {
    let mut lines = vec![Vec::new()];
    let (mut colour, mut column) = (None, 0);
    for (n, part) in line.split('\x1b').enumerate() {
        let text = match (n, part.split_once('m')) {
            (0, _) | (_, None) => part,
            (_, Some((code, text))) => {
                colour = code.strip_prefix("[38;5;").and_then(|number| number.parse().ok());
                text
            }
        };
        let mut word = String::new();
        for character in text.chars() {
            if column == COLUMNS {
                let last = lines.len() - 1;
                lines[last].push((std::mem::take(&mut word), colour));
                lines.push(Vec::new());
                column = 0;
            }
            word.push(character);
            column += 1;
        }
        let last = lines.len() - 1;
        lines[last].push((word, colour));
    }
    lines
}

/// One of a terminal's 256 colours: a cube of six levels a channel, then greys.
fn hexadecimal(colour: u8) -> String {
    let level = |n: u8| if n == 0 { 0 } else { 55 + 40 * n };
    let [r, g, b] = match colour {
        16..232 => {
            let n = colour - 16;
            [n / 36, n / 6 % 6, n % 6].map(level)
        }
        232.. => [8 + 10 * (colour - 232); 3],
        _ => [232; 3],
    };
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_those_of_terminals() {
        assert_eq!(hexadecimal(16), "#000000");
        assert_eq!(hexadecimal(231), "#ffffff");
        assert_eq!(hexadecimal(66), "#5f8787");
        assert_eq!(hexadecimal(245), "#8a8a8a");
    }

    #[test]
    fn lines_are_cut_at_the_edge_and_keep_their_colours() {
        let line = format!("{}\x1b[38;5;66mab\x1b[0mc", "x".repeat(COLUMNS - 1));
        let lines = wrap(&line);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0][1], ("a".to_owned(), Some(66)));
        assert_eq!(lines[1], [("b".to_owned(), Some(66)), ("c".to_owned(), None)]);
        assert!(draw("x", "a < b").contains("a &lt; b</text>"));
    }
}
