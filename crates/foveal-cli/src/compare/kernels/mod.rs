//! `foveal compare --kernels-only`: mechanisms over lengths of context, time and memory, and where one overtakes another.

mod mechanism;
mod unfused;

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use foveal::testing::alone::Text;
use serde::{Deserialize, Serialize};

use super::choice::{Candidate, Need};
use super::report::{columns, html_table, page_of};
use super::write;
use crate::chart::escaped;
use crate::plot::{Axis, Plot, Series, short};
use crate::{interrupt, numbers, output};

pub(crate) use mechanism::{DIM, HEADS, NAMES, WINDOW, state_bytes};

/// What is compared where nothing is named.
const USUAL: [&str; 9] = [
    "unfused",
    "full",
    "window",
    "sparse_transformer",
    "moba",
    "linear",
    "gated_delta",
    "infini",
    "memorizing",
];
/// Lengths of context.
const LENGTHS: [usize; 7] = [128, 256, 512, 1024, 2048, 4096, 8192];
/// Rounds of a measurement: as many as fit into a second, of these.
const ROUNDS: std::ops::RangeInclusive<usize> = 3..=25;

/// One mechanism on a text of one length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Point {
    pub(crate) tokens: usize,
    /// The best round.
    pub(crate) seconds: f64,
    /// The most that the process held beyond the text, where the system says so.
    pub(crate) peak_bytes: Option<usize>,
}

/// A mechanism over lengths.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) points: Vec<Point>,
}

impl Curve {
    /// Seconds for a length: on the line through neighbours, of logarithms.
    fn seconds(&self, tokens: usize) -> Option<f64> {
        let last = self.points.len().checked_sub(1)?;
        if last == 0 {
            return self.points.first().map(|one| one.seconds);
        }
        let upper = self.points.iter().position(|one| one.tokens >= tokens).unwrap_or(last).max(1);
        let at = |n: usize| ((self.points[n].tokens as f64).ln(), self.points[n].seconds.ln());
        let ((x0, y0), (x1, y1)) = (at(upper - 1), at(upper));
        Some((y0 + (y1 - y0) * ((tokens as f64).ln() - x0) / (x1 - x0)).exp())
    }

    /// From which length on `self` is faster than `other`, to the longest that both have; `None` if it is not there.
    fn overtakes(&self, other: &Curve) -> Option<f64> {
        let both = self.points.iter().filter_map(|a| {
            let b = other.points.iter().find(|b| b.tokens == a.tokens)?;
            Some((a.tokens as f64, (a.seconds / b.seconds).ln()))
        });
        let both: Vec<(f64, f64)> = both.collect();
        // The last length at which it is not faster, and the one behind.
        let Some(n) = both.iter().rposition(|&(_, ratio)| ratio >= 0.0) else {
            return both.first().map(|first| first.0);
        };
        let ((x0, y0), &(x1, y1)) = (both[n], both.get(n + 1)?);
        Some((x0.ln() + (x1 / x0).ln() * y0 / (y0 - y1)).exp())
    }
}

/// Measures and writes the page.
pub(super) fn run(
    names: &[String],
    lengths: &[usize],
    (out, need): (&Path, &Need),
) -> anyhow::Result<()> {
    let names = chosen(names)?;
    let mut lengths = if lengths.is_empty() { LENGTHS.to_vec() } else { lengths.to_vec() };
    lengths.sort_unstable();
    lengths.dedup();
    let longest = lengths.last().copied().unwrap_or(0);
    ensure!(longest <= 1 << 20, "lengths of at most 1048576 tokens, not {longest}");
    let curves = curves(&names, &lengths)?;
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    write(&out.join("kernels.html"), &page(&curves, need))?;
    write(&out.join("kernels.csv"), &csv(&curves))?;
    let (head, rows) = table(&curves);
    output::print(&columns(&head.iter().map(String::as_str).collect::<Vec<_>>(), &rows))?;
    let words: Vec<String> =
        crossings(&curves).into_iter().chain([choice(&curves, need)]).collect();
    output::print(&format!("\n{}\n", words.join("\n")))?;
    output::note(&format!("the page is {}", out.join("kernels.html").display()));
    Ok(())
}

fn chosen(names: &[String]) -> anyhow::Result<Vec<String>> {
    let all = names.iter().flat_map(|names| names.split(',')).filter(|name| !name.is_empty());
    let mut all: Vec<String> = all.map(str::to_owned).collect();
    if all.is_empty() {
        all = USUAL.map(str::to_owned).to_vec();
    }
    match all.iter().find(|name| !NAMES.contains(&name.as_str())) {
        Some(name) => bail!("{name:?} can't be measured alone; there are {}", NAMES.join(", ")),
        None => Ok(all),
    }
}

/// Every name at every length, the names by turns.
fn curves(names: &[String], lengths: &[usize]) -> anyhow::Result<Vec<Curve>> {
    let curve = |name: &String| Curve { name: name.clone(), points: vec![] };
    let mut curves: Vec<Curve> = names.iter().map(curve).collect();
    for &tokens in lengths {
        for curve in &mut curves {
            if curve.name == "unfused" && tokens * tokens > unfused::MOST {
                continue;
            }
            curve.points.push(measure(&curve.name, tokens)?);
            if interrupt::asked() {
                return Err(foveal_lm::Error::Interrupted.into());
            }
        }
        output::note(&format!("{tokens} tokens are done"));
    }
    Ok(curves)
}

/// In a process of its own, so that the peak of memory is that of nothing else; in this one where that can't be started.
pub(crate) fn measure(name: &str, tokens: usize) -> anyhow::Result<Point> {
    let own = std::env::current_exe().ok();
    let own = own.filter(|path| path.file_stem().is_some_and(|stem| stem == "foveal"));
    let Some(own) = own else { return Ok(Point { peak_bytes: None, ..here(name, tokens)? }) };
    let threads = rayon::current_num_threads().to_string();
    let mut command = Command::new(own);
    command.args([
        "compare",
        "--kernels-only",
        "--threads",
        &threads,
        "--one",
        &format!("{name}:{tokens}"),
    ]);
    let answer = command.output().context("cannot start a measurement")?;
    ensure!(
        answer.status.success(),
        "the measurement of {name} failed: {}",
        output::one_line(String::from_utf8_lossy(&answer.stderr).trim())
    );
    serde_json::from_slice(&answer.stdout).context("a measurement's answer is no JSON")
}

/// Answers [`measure`].
pub(super) fn answer(one: &str) -> anyhow::Result<()> {
    let parts = one.split_once(':').and_then(|(name, tokens)| Some((name, tokens.parse().ok()?)));
    let (name, tokens) = parts.context("a measurement is NAME:TOKENS")?;
    Ok(output::print(&serde_json::to_string(&here(name, tokens)?)?)?)
}

fn here(name: &str, tokens: usize) -> anyhow::Result<Point> {
    let text = Text::new(tokens)?;
    let mut point = Point { tokens, seconds: f64::INFINITY, peak_bytes: None };
    let timed = &mut |run: &dyn Fn() -> foveal::Result<()>| {
        let (before, begin) = (numbers::resident_bytes(), Instant::now());
        for round in 1..=*ROUNDS.end() {
            let start = Instant::now();
            run()?;
            point.seconds = point.seconds.min(start.elapsed().as_secs_f64());
            if round >= *ROUNDS.start() && begin.elapsed().as_secs_f64() > 1.0 {
                break;
            }
        }
        let after = before.zip(numbers::resident_bytes());
        point.peak_bytes = after.map(|(before, after)| after.saturating_sub(before));
        Ok(())
    };
    match name {
        "unfused" => timed(&|| unfused::causal(text.tensors()).map(drop))?,
        _ => text.read(name, timed)?,
    }
    Ok(point)
}

/// Sentences about where one curve passes another: the kernel and the computation it replaces, and the others and the kernel.
fn crossings(curves: &[Curve]) -> Vec<String> {
    let named = |name: &str| curves.iter().find(|curve| curve.name == name);
    let mut words = vec![];
    let mut say = |faster: &Curve, slower: &Curve| {
        let (a, b) = (&faster.name, &slower.name);
        let first = faster.points.first().map_or(0, |one| one.tokens);
        words.push(match faster.overtakes(slower) {
            Some(at) if at <= first as f64 => format!("{a} is faster than {b} at all lengths."),
            Some(at) => format!("{a} is faster than {b} from about {at:.0} tokens on."),
            None => format!("{a} is not faster than {b} at the longest of these lengths."),
        });
    };
    if let Some(full) = named("full") {
        named("unfused").into_iter().for_each(|unfused| say(full, unfused));
        let others =
            curves.iter().filter(|curve| !matches!(curve.name.as_str(), "full" | "unfused"));
        others.for_each(|other| say(other, full));
    }
    words
}

fn choice(curves: &[Curve], need: &Need) -> String {
    let candidate = |curve: &Curve| {
        let cost = 1e3 * curve.seconds(need.length)?;
        Some(Candidate {
            name: curve.name.clone(),
            cost,
            bytes: state_bytes(&curve.name, need.length) as f64,
        })
    };
    let able = curves.iter().filter(|curve| curve.name != "unfused");
    need.choose(able.filter_map(candidate).collect(), "ms a layer for reading it")
}

/// Milliseconds, and the peak at the longest.
fn table(curves: &[Curve]) -> (Vec<String>, Vec<Vec<String>>) {
    let mut lengths: Vec<usize> =
        curves.iter().flat_map(|curve| &curve.points).map(|one| one.tokens).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let head = ["ms for tokens".to_owned()]
        .into_iter()
        .chain(lengths.iter().map(usize::to_string))
        .chain(["memory at peak".to_owned(), "left behind".to_owned()]);
    let row = |curve: &Curve| {
        let at = |&tokens: &usize| {
            let point = curve.points.iter().find(|one| one.tokens == tokens);
            point.map_or_else(|| "–".to_owned(), |one| short(1e3 * one.seconds))
        };
        let last = curve.points.last();
        let peak = last.and_then(|last| last.peak_bytes);
        let peak = peak.map_or_else(|| "?".to_owned(), |peak| numbers::bytes(peak).to_string());
        let left = state_bytes(&curve.name, last.map_or(0, |last| last.tokens));
        let row = std::iter::once(curve.name.clone()).chain(lengths.iter().map(at));
        row.chain([peak, numbers::bytes(left).to_string()]).collect()
    };
    (head.collect(), curves.iter().map(row).collect())
}

fn page(curves: &[Curve], need: &Need) -> String {
    let mut text = String::from("<h1>Mechanisms alone</h1>\n");
    let _ = writeln!(text, "<p>{}</p>", escaped(&choice(curves, need)));
    let _ = writeln!(
        text,
        "<p class=\"soft\">A layer of {HEADS} heads of {DIM} numbers reads a text, f32, causal, {} threads; windows and segments of \
         {WINDOW} tokens. The best of several rounds. Memory is what the process held at its peak beyond the text; left behind are keys and values as \
         f16, matrices as f32, of the longest text.</p>\n<ul>",
        rayon::current_num_threads()
    );
    crossings(curves).iter().for_each(|words| text += &format!("<li>{}</li>\n", escaped(words)));
    text += "</ul>\n";
    let (head, rows) = table(curves);
    text += &html_table(&head.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
    text += "<div class=\"panels\">\n";
    for plot in pictures(curves) {
        let _ = writeln!(text, "<section>{}</section>", plot.draw());
    }
    page_of("Mechanisms alone", &(text + "</div>\n"))
}

pub(crate) fn pictures(curves: &[Curve]) -> Vec<Plot<'static>> {
    let series = |value: &dyn Fn(&Curve, &Point) -> Option<f64>| -> Vec<Series> {
        let line = |curve: &Curve| Series {
            name: curve.name.clone(),
            points: curve
                .points
                .iter()
                .filter_map(|one| Some((one.tokens as f64, value(curve, one)?)))
                .collect(),
        };
        curves.iter().map(line).collect()
    };
    let plot = |title, y, series| Plot { title, x: Axis::log("tokens"), y: Axis::log(y), series };
    vec![
        plot("Reading a text", "milliseconds", series(&|_, one| Some(1e3 * one.seconds))),
        plot(
            "Memory at its peak beyond the text",
            "bytes",
            series(&|_, one| one.peak_bytes.map(|bytes| bytes.max(4096) as f64)),
        ),
        plot(
            "What a text leaves behind",
            "bytes",
            series(&|curve, one| {
                (curve.name != "unfused").then(|| state_bytes(&curve.name, one.tokens) as f64)
            }),
        ),
    ]
}

fn csv(curves: &[Curve]) -> String {
    let mut text = String::from("mechanism,tokens,seconds,peak_bytes,left_bytes\n");
    for curve in curves {
        for one in &curve.points {
            let peak = one.peak_bytes.map_or_else(String::new, |bytes| bytes.to_string());
            let left = state_bytes(&curve.name, one.tokens);
            let _ = writeln!(text, "{},{},{},{peak},{left}", curve.name, one.tokens, one.seconds);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(name: &str, seconds: impl Fn(f64) -> f64) -> Curve {
        let point =
            |tokens: usize| Point { tokens, seconds: seconds(tokens as f64), peak_bytes: None };
        Curve { name: name.to_owned(), points: [100, 200, 400, 800].map(point).to_vec() }
    }

    #[test]
    fn curves_cross_where_their_lines_do() {
        let (square, line) = (curve("full", |n| n * n), curve("linear", |n| 300.0 * n));
        let at = line.overtakes(&square).unwrap();
        assert!((at - 300.0).abs() < 1e-6, "{at}");
        // At 100 tokens the square is faster, at the longest it is not.
        assert_eq!(square.overtakes(&line), None);
        assert_eq!(curve("x", |n| n).overtakes(&square), Some(100.0));
        assert!((square.seconds(300).unwrap() - 9e4).abs() < 1e-6);
        let words = crossings(&[square, line]);
        assert_eq!(words, ["linear is faster than full from about 300 tokens on."]);
    }
}
