//! One page with the curves of a run.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use foveal_lm::atomic_file;
use foveal_lm::train::{METRICS, Trainer};
use serde_json::Value;

use crate::chart::{Line, draw, escaped};
use crate::page::page;

/// The share of a new loss in the mean that is drawn.
const SMOOTH: f64 = 0.05;

/// What a line of the measurements has.
fn field(record: &Value, name: &str) -> Option<(f64, f64)> {
    Some((record.get("step")?.as_f64()?, record.get(name)?.as_f64()?))
}

/// Writes `report.html` into the folder of a run.
pub(super) fn write(folder: &Path, trainer: &Trainer) -> anyhow::Result<()> {
    let metrics =
        std::fs::read_to_string(folder.join(METRICS)).context("cannot read the measurements")?;
    let records = metrics.lines().map(serde_json::from_str::<Value>);
    let records: Vec<Value> =
        records.collect::<Result<_, _>>().context("a measurement is no JSON")?;
    let content = content(folder, trainer, &records);
    let page = page("A training run", include_str!("report.css"), &content);
    let path = folder.join("report.html");
    atomic_file::write(&path, |out| std::io::Write::write_all(out, page.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn content(folder: &Path, trainer: &Trainer, records: &[Value]) -> String {
    let points = |name: &str| -> Vec<(f64, f64)> {
        records.iter().filter_map(|record| field(record, name)).collect()
    };
    let loss = points("loss");
    let validation = points("validation");
    let seconds = points("seconds");
    let pace = records.iter().filter_map(|record| {
        let (step, seconds) = field(record, "seconds")?;
        Some((step, field(record, "tokens")?.1 / seconds.max(1e-9)))
    });
    let state = trainer.state();
    let mut text = String::new();
    let name =
        folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let _ = writeln!(text, "<h1>{}</h1>", escaped(&name));
    let _ = writeln!(
        text,
        "<p class=\"soft\">{} parameters, step {} of {}, {} tokens, {:.0} s</p>",
        trainer.parameters().values().len(),
        state.step,
        trainer.config().schedule.steps,
        state.tokens,
        seconds.iter().map(|point| point.1).sum::<f64>(),
    );
    if let (Some(best), Some(step)) = (state.best_loss(), state.best_step()) {
        let perplexity = best.exp();
        let _ = writeln!(
            text,
            "<p>Best validation: <b>{best:.4}</b> nats a token (perplexity {perplexity:.2}) at step {step}</p>"
        );
    }
    let smooth = smoothed(&loss);
    let panels = [
        (
            "Loss, nats a token: <i class=\"raw\">steps</i>, <i class=\"mean\">their mean</i>, <i class=\"valid\">validation</i>",
            vec![
                Line { class: "raw", points: loss },
                Line { class: "mean", points: smooth },
                Line { class: "valid", points: validation },
            ],
        ),
        ("Length of the gradient", vec![Line { class: "mean", points: points("gradient") }]),
        ("Learning rate", vec![Line { class: "mean", points: points("learning_rate") }]),
        ("Tokens a second", vec![Line { class: "mean", points: pace.collect() }]),
    ];
    text += "<div class=\"panels\">\n";
    for (title, lines) in panels {
        let label = title.split(':').next().unwrap_or(title);
        let _ = writeln!(text, "<section><h2>{title}</h2>\n{}</section>", draw(label, &lines));
    }
    text += "</div>\n";
    samples(records, &mut text);
    let config = trainer.config().to_text().unwrap_or_default();
    let _ = writeln!(text, "<h2>Configuration</h2>\n<pre>{}</pre>", escaped(&config));
    text
}

fn samples(records: &[Value], text: &mut String) {
    let samples: Vec<(u64, &str)> = records
        .iter()
        .filter_map(|record| Some((record["step"].as_u64()?, record["sample"].as_str()?)))
        .collect();
    if samples.is_empty() {
        return;
    }
    *text += "<h2>Samples</h2>\n<dl>\n";
    // The newest first: the others show the way there.
    for (step, sample) in samples.iter().rev().take(20) {
        let _ = writeln!(text, "<dt>Step {step}</dt><dd>{}</dd>", escaped(sample));
    }
    *text += "</dl>\n";
}

fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut mean = None;
    let next = |&(step, loss): &(f64, f64)| {
        let smooth = mean.map_or(loss, |mean| (1.0 - SMOOTH) * mean + SMOOTH * loss);
        mean = Some(smooth);
        (step, smooth)
    };
    points.iter().map(next).collect()
}
