//! `/metrics`: what Prometheus collects, in its text format.

use std::fmt::Write as _;
use std::sync::atomic::Ordering::Relaxed;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::App;
use crate::engine::Histogram;

/// Numbers for Prometheus.
#[utoipa::path(get, path = "/metrics", responses((status = 200, description = "Prometheus' text format.")))]
pub(crate) async fn all(State(app): State<App>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, text(&app)).into_response()
}

fn text(app: &App) -> String {
    let gauges = app.engine.gauges();
    let mut text = String::new();
    for (name, help, value) in [
        ("waiting", "Texts that have not begun.", app.engine.waiting()),
        ("reading", "Texts whose prompts are being read.", gauges.reading.load(Relaxed)),
        ("running", "Texts that go on.", gauges.running.load(Relaxed)),
        ("pages", "Pages for keys and values.", gauges.pages.load(Relaxed)),
        ("free_pages", "Pages that no text holds.", gauges.free_pages.load(Relaxed)),
        ("kv_bytes", "Bytes of keys and values.", gauges.kv_bytes.load(Relaxed)),
    ] {
        number(&mut text, (name, "gauge"), help, value as u64);
    }
    for (name, help, value) in [
        ("prompt_tokens_total", "Tokens of prompts of finished texts.", &gauges.prompt_tokens),
        ("shared_tokens_total", "Those of them that needed no reading.", &gauges.shared_tokens),
        ("made_tokens_total", "Tokens made.", &gauges.made_tokens),
        ("finished_total", "Texts that are whole.", &gauges.finished),
        ("failed_total", "Texts with an error.", &gauges.failed),
        ("abandoned_total", "Texts that nobody waited for any more.", &gauges.abandoned),
        ("requests_refused_total", "Responses with a status from 400 on.", &app.refused),
    ] {
        number(&mut text, (name, "counter"), help, value.load(Relaxed));
    }
    histogram(&mut text, "step_seconds", "Steps of the batch.", &gauges.steps);
    let first = "From a request to its first token.";
    histogram(&mut text, "first_token_seconds", first, &gauges.first_token);
    histogram(&mut text, "text_seconds", "From a request to its last token.", &gauges.whole);
    text
}

/// Writing to a string can't fail.
fn number(text: &mut String, (name, kind): (&str, &str), help: &str, value: u64) {
    let name = format!("foveal_{name}");
    let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n");
}

fn histogram(text: &mut String, name: &str, help: &str, histogram: &Histogram) {
    let name = format!("foveal_{name}");
    let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} histogram\n");
    for (end, count) in histogram.cumulative() {
        let _ = writeln!(text, "{name}_bucket{{le=\"{end}\"}} {count}");
    }
    let (count, sum) = (histogram.count(), histogram.seconds());
    let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {count}");
    let _ = write!(text, "{name}_sum {sum}\n{name}_count {count}\n");
}
