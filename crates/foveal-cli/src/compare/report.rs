//! The page and the table of a comparison of trained models.

use std::fmt::Write;

use super::choice::{self, Need};
use super::figures::Figures;
use super::training::Budget;
use crate::chart::escaped;
use crate::numbers;
use crate::plot::{Axis, Plot, Series};

/// A page of a title and what is in it.
pub(super) fn page_of(title: &str, content: &str) -> String {
    crate::page::page(title, include_str!("report.css"), content)
}

/// A table of HTML: its head, and its rows.
pub(super) fn html_table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut text = String::from("<div class=\"wide\"><table>\n<tr>");
    head.iter().for_each(|cell| text += &format!("<th>{}</th>", escaped(cell)));
    text += "</tr>\n";
    for row in rows {
        text += "<tr>";
        row.iter().for_each(|cell| text += &format!("<td>{}</td>", escaped(cell)));
        text += "</tr>\n";
    }
    text + "</table></div>\n"
}

pub(super) fn page(all: &[Figures], budget: &Budget, need: &Need) -> String {
    let sizes = budget.sizes;
    let mut text =
        format!("<h1>Attentions compared</h1>\n<p>{}</p>\n", escaped(&choice::trained(all, need)));
    let _ = writeln!(
        text,
        "<p class=\"soft\">{} layers of {} numbers, {} heads, {} tokens of training in sequences of {}; equal tokens, order and \
         (by the inner width) parameters; {} threads. The last tenth of the text is held out. Lower bits per byte are better.</p>",
        sizes.layers,
        sizes.width,
        sizes.heads,
        budget.tokens(),
        sizes.sequence,
        rayon::current_num_threads()
    );
    let rows: Vec<Vec<String>> = all.iter().map(row).collect();
    text += &html_table(&HEAD, &rows);
    text += "<div class=\"panels\">\n";
    for plot in pictures(all) {
        let _ = writeln!(text, "<section>{}</section>", plot.draw());
    }
    text += "</div>\n<h2>Mixers</h2>\n<dl>\n";
    for one in all {
        let settings = escaped(&one.settings);
        let _ = writeln!(
            text,
            "<dt>{}</dt><dd><details><summary>settings</summary><pre>{settings}</pre></details></dd>",
            escaped(&one.name)
        );
    }
    page_of("Attentions compared", &(text + "</dl>\n"))
}

const HEAD: [&str; 10] = [
    "attention",
    "parameters",
    "bits/byte",
    "beyond training",
    "trained, tok/s",
    "training memory",
    "read, tok/s",
    "made, tok/s",
    "left behind",
    "bytes a token",
];

/// A row of [`HEAD`]; speeds are those of the longest texts.
fn row(one: &Figures) -> Vec<String> {
    let bits = |bits: Option<f64>| bits.map_or_else(|| "–".to_owned(), |bits| format!("{bits:.3}"));
    let (read, made, left) =
        one.speed.last().map_or((0.0, 0.0, 0), |one| (one.read, one.made, one.state_bytes));
    vec![
        one.name.clone(),
        one.parameters.to_string(),
        bits(one.within()),
        bits(one.beyond()),
        format!("{:.0}", one.train_tokens_per_second),
        one.train_bytes.map_or_else(|| "–".to_owned(), |bytes| numbers::bytes(bytes).to_string()),
        format!("{read:.0}"),
        format!("{made:.0}"),
        numbers::bytes(left).to_string(),
        format!("{:.0}", one.bytes_per_token()),
    ]
}

fn pictures(all: &[Figures]) -> Vec<Plot<'static>> {
    let lines = |points: &dyn Fn(&Figures) -> Vec<(f64, f64)>| -> Vec<Series> {
        all.iter().map(|one| Series { name: one.name.clone(), points: points(one) }).collect()
    };
    let at = |value: fn(&super::figures::AtLength) -> f64| {
        lines(&|one| one.speed.iter().map(|at| (at.tokens as f64, value(at))).collect())
    };
    let log = |title, y, series| Plot {
        title,
        x: Axis::log("tokens of the text"),
        y: Axis::log(y),
        series,
    };
    vec![
        Plot {
            title: "Training",
            x: Axis::linear("tokens"),
            y: Axis::linear("loss, nats a token"),
            series: lines(&|one| one.losses.clone()),
        },
        Plot {
            title: "Held-out text by position",
            x: Axis::log("position in the text"),
            y: Axis::linear("bits per byte"),
            series: lines(&|one| {
                let middle = |from: usize, to: usize| ((from.max(16) * to) as f64).sqrt();
                one.quality.iter().map(|p| (middle(p.from, p.to), p.bits_per_byte())).collect()
            }),
        },
        log("Reading a prompt", "tokens a second", at(|one| one.read)),
        log("Making tokens behind it", "tokens a second", at(|one| one.made)),
        log("What a text leaves behind", "bytes", at(|one| one.state_bytes as f64)),
    ]
}

/// The table for a terminal.
pub(super) fn table(all: &[Figures]) -> String {
    let rows: Vec<Vec<String>> = all.iter().map(row).collect();
    columns(&HEAD, &rows)
}

/// Columns as wide as what is in them; all but the first to the right.
pub(super) fn columns(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let all = || std::iter::once(&head).chain(rows);
    let width = |n: usize| all().map(|row| row[n].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells: Vec<String> = cells
            .map(|(n, (cell, &width))| match n {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    all().map(line).collect()
}

/// Every figure, a line each.
pub(super) fn csv(all: &[Figures]) -> String {
    let mut text = String::from("attention,figure,from,to,value\n");
    for one in all {
        let name = &one.name;
        let mut line = |figure: &str, from: usize, to: usize, value: f64| {
            let _ = writeln!(text, "{name},{figure},{from},{to},{value}");
        };
        line("parameters", 0, 0, one.parameters as f64);
        line("training tokens", 0, 0, one.tokens as f64);
        line("training tokens a second", 0, 0, one.train_tokens_per_second);
        if let Some(bytes) = one.train_bytes {
            line("training bytes", 0, 0, bytes as f64);
        }
        for part in &one.quality {
            line("bits per byte at positions", part.from, part.to, part.bits_per_byte());
        }
        for at in &one.speed {
            line("tokens read a second", 0, at.tokens, at.read);
            line("tokens made a second", 0, at.tokens, at.made);
            line("bytes left behind", 0, at.tokens, at.state_bytes as f64);
        }
        for &(tokens, loss) in &one.losses {
            line("training loss, nats a token", 0, tokens as usize, loss);
        }
    }
    text
}
