//! Line charts as SVG: panels side by side, one legend, readable on light and on dark pages.

use anyhow::Context;
use std::fmt::Write;
use std::path::Path;

const PANEL: (f64, f64) = (400.0, 250.0);
/// Room around a panel: left, top, right, bottom.
const MARGIN: (f64, f64, f64, f64) = (68.0, 30.0, 24.0, 42.0);
/// Room for the title, and for each line of the legend.
const HEAD: f64 = 44.0;
const LEGEND: f64 = 20.0;
/// Middle tones, which stand out from white and from black.
const COLOURS: [&str; 9] = [
    "#e4572e", "#2e86ab", "#7b6cd9", "#2a9d5c", "#c08a00", "#b8559f", "#3fa7a0", "#8c6d46",
    "#7a8491",
];

/// Draws a record into a file.
///
/// # Errors
/// If the record isn't one, or a file can't be read or written.
pub(crate) fn write(
    record: &Path,
    file: &Path,
    draw: impl FnOnce(&str) -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(record)
        .with_context(|| format!("cannot read {}", record.display()))?;
    std::fs::write(file, draw(&text)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    println!("wrote {}", file.display());
    Ok(())
}

/// How numbers become heights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From 0 to 100 %.
    Share,
    /// Seconds, in powers of ten.
    Seconds,
    /// Ratios, in powers of two.
    Ratio,
}

/// A line of a panel: the number of its name in the legend, and points from left to right.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Line {
    pub(crate) name: usize,
    pub(crate) points: Vec<(f64, f64)>,
}

/// A pair of axes, the horizontal one in powers of two.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Panel {
    pub(crate) title: String,
    /// What the heights are.
    pub(crate) label: &'static str,
    pub(crate) scale: Scale,
    pub(crate) lines: Vec<Line>,
}

/// A picture: rows of panels, all of the same number and, in a row, of the same scale.
#[derive(Debug)]
pub(crate) struct Picture<'a> {
    pub(crate) title: String,
    /// Names of the lines, ours first.
    pub(crate) names: &'a [String],
    /// What goes to the right.
    pub(crate) across: &'a str,
    pub(crate) rows: Vec<Vec<Panel>>,
}

impl Picture<'_> {
    /// The text of the file.
    pub(crate) fn draw(&self) -> String {
        let cell = (MARGIN.0 + PANEL.0 + MARGIN.2, MARGIN.1 + PANEL.1 + MARGIN.3);
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = cell.0 * columns as f64;
        let (places, head_height) = self.legend_places(width);
        let height = head_height + cell.1 * self.rows.len() as f64;
        let mut text = head(width, height);
        let _ = writeln!(text, "<title>{}</title>", escaped(&self.title));
        let _ = writeln!(text, r#"<rect class="page" width="{width}" height="{height}"/>"#);
        let _ =
            writeln!(text, r#"<text class="big" x="14" y="24">{}</text>"#, escaped(&self.title));
        for (n, (name, (x, y))) in self.names.iter().zip(places).enumerate() {
            let (end, name) = (x + 22.0, escaped(name));
            let _ = writeln!(text, r#"<path class="{}" d="M{x} {y}H{end}"/>"#, class(n));
            let _ = writeln!(text, r#"<text x="{}" y="{}">{name}</text>"#, end + 6.0, y + 4.0);
        }
        for (r, row) in self.rows.iter().enumerate() {
            let axes = Axes::of(row);
            for (c, panel) in row.iter().enumerate() {
                let left = cell.0 * c as f64 + MARGIN.0;
                let top = head_height + cell.1 * r as f64 + MARGIN.1;
                let _ = writeln!(text, r#"<g transform="translate({left} {top})">"#);
                panel.draw(&mut text, axes, self.across);
                text += "</g>\n";
            }
        }
        text + "</svg>\n"
    }

    /// Where the legend's lines begin, in as many rows as fit the width; the height of all above the panels.
    fn legend_places(&self, width: f64) -> (Vec<(f64, f64)>, f64) {
        let (mut x, mut y) = (14.0, HEAD);
        let place = |name: &String| {
            let needed = 46.0 + 7.0 * name.chars().count() as f64;
            if x > 14.0 && x + needed > width {
                (x, y) = (14.0, y + LEGEND);
            }
            let at = (x, y);
            x += needed;
            at
        };
        let places = self.names.iter().map(place).collect();
        (places, y + LEGEND)
    }
}

/// What the panels of a row have in common, so that they can be compared.
#[derive(Debug, Clone, Copy)]
struct Axes {
    across: (f64, f64),
    up: (f64, f64),
}

impl Axes {
    fn of(row: &[Panel]) -> Axes {
        let points = || {
            row.iter().flat_map(|panel| {
                panel.lines.iter().flat_map(|line| &line.points).map(|point| (panel.scale, point))
            })
        };
        let up = span(points().map(|(scale, point)| scale.height(point.1)));
        let scale = row.first().map_or(Scale::Share, |panel| panel.scale);
        Axes { across: span(points().map(|(_, point)| point.0.log2())), up: scale.range(up) }
    }
}

impl Panel {
    fn draw(&self, text: &mut String, Axes { across, up }: Axes, what: &str) {
        let x = |value: f64| PANEL.0 * (value.log2() - across.0) / (across.1 - across.0);
        let y = |height: f64| PANEL.1 * (up.1 - height) / (up.1 - up.0);
        let (width, height) = PANEL;
        let _ = writeln!(text, r#"<text class="bold" y="-10">{}</text>"#, escaped(&self.title));
        for (at, label) in self.scale.ticks(up) {
            let (y, class) = (y(at), if label == "×1" { "even" } else { "grid" });
            let _ = writeln!(text, r#"<path class="{class}" d="M0 {y:.1}H{width}"/>"#);
            let _ = writeln!(text, r#"<text class="end" x="-8" y="{:.1}">{label}</text>"#, y + 4.0);
        }
        for power in (across.0.ceil() as i32..=across.1 as i32).filter(|n| n % 2 == 0) {
            let x = x(f64::from(power).exp2());
            let _ = writeln!(text, r#"<path class="grid" d="M{x:.1} 0V{height}"/>"#);
            let value = 1_u64 << power;
            let _ = writeln!(
                text,
                r#"<text class="mid" x="{x:.1}" y="{}">{value}</text>"#,
                height + 17.0
            );
        }
        let _ = writeln!(
            text,
            r#"<text class="mid dim" x="{}" y="{}">{} (log₂)</text>"#,
            width / 2.0,
            height + 34.0,
            escaped(what)
        );
        let middle = height / 2.0;
        let _ = writeln!(
            text,
            r#"<text class="mid dim" transform="translate(-56 {middle}) rotate(-90)">{}</text>"#,
            escaped(self.label)
        );
        // Ours comes last, above the others.
        for line in self.lines.iter().rev() {
            draw_line(text, line, |(n, value)| (x(n), y(self.scale.height(value))));
        }
    }
}

fn draw_line(text: &mut String, line: &Line, place: impl Fn((f64, f64)) -> (f64, f64)) {
    let places: Vec<(f64, f64)> = line.points.iter().map(|&point| place(point)).collect();
    let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
    let class = class(line.name);
    let _ = writeln!(text, r#"<path class="{class}" d="M{}"/>"#, path.join("L"));
    for (x, y) in places {
        let _ = writeln!(text, r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="2.6"/>"#);
    }
}

impl Scale {
    fn height(self, value: f64) -> f64 {
        match self {
            Scale::Share => value,
            Scale::Seconds => value.log10(),
            Scale::Ratio => value.log2(),
        }
    }

    /// Whole steps around what has to be shown.
    fn range(self, (low, high): (f64, f64)) -> (f64, f64) {
        match self {
            Scale::Share => (0.0, 1.0),
            Scale::Seconds => (low.floor(), high.ceil()),
            Scale::Ratio => (low.floor().min(-1.0), high.ceil().max(1.0)),
        }
    }

    fn ticks(self, (low, high): (f64, f64)) -> Vec<(f64, String)> {
        let whole = || low as i32..=high as i32;
        match self {
            Scale::Share => {
                (0..=5).map(|n| (f64::from(n) / 5.0, format!("{} %", 20 * n))).collect()
            }
            Scale::Seconds => whole().map(|n| (f64::from(n), seconds(n))).collect(),
            Scale::Ratio => {
                let label = |n: i32| match n {
                    0.. => format!("×{}", 1_u64 << n),
                    _ => format!("×1/{}", 1_u64 << -n),
                };
                whole().map(|n| (f64::from(n), label(n))).collect()
            }
        }
    }
}

/// A power of ten of seconds.
fn seconds(power: i32) -> String {
    let (unit, rest) = match power {
        0.. => ("s", power),
        -3..0 => ("ms", power + 3),
        -6..-3 => ("µs", power + 6),
        _ => ("ns", power + 9),
    };
    format!("{} {unit}", 10_f64.powi(rest))
}

/// The least and the most, apart from each other.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let start = (f64::INFINITY, f64::NEG_INFINITY);
    let (low, high) = values.fold(start, |(low, high), x| (low.min(x), high.max(x)));
    if low < high { (low, high) } else { (low - 1.0, low + 1.0) }
}

fn class(name: usize) -> String {
    format!("l c{}", name % COLOURS.len())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn head(width: f64, height: f64) -> String {
    let mut text = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<style>
text {{ font: 12px system-ui, sans-serif; fill: #24292f }}
.big {{ font-size: 15px; font-weight: 600 }} .bold {{ font-weight: 600 }} .dim {{ fill: #57606a }}
.end {{ text-anchor: end }} .mid {{ text-anchor: middle }}
.page {{ fill: #ffffff }} .grid {{ stroke: #d8dee4 }} .even {{ stroke: #57606a; stroke-dasharray: 4 3 }}
.l {{ fill: none; stroke-width: 1.6 }}
circle.l {{ stroke: none }} .c0 {{ stroke-width: 3 }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }} .dim {{ fill: #9da7b3 }} .page {{ fill: #0d1117 }} .grid {{ stroke: #30363d }} .even {{ stroke: #9da7b3 }}
}}
"#
    );
    for (n, colour) in COLOURS.iter().enumerate() {
        let _ = writeln!(text, ".c{n} {{ stroke: {colour} }} circle.c{n} {{ fill: {colour} }}");
    }
    text + "</style>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_hold_every_point() {
        let lines = vec![
            Line { name: 0, points: vec![(1.0, 2e-6), (8192.0, 3.0)] },
            Line { name: 1, points: vec![(16.0, 5e-5)] },
        ];
        let panel = Panel { title: "a < b".into(), label: "time", scale: Scale::Seconds, lines };
        let names = ["foveal".to_owned(), "torch".to_owned()];
        let text =
            Picture { title: "t".into(), names: &names, across: "N", rows: vec![vec![panel]] };
        let text = text.draw();
        assert!(text.contains("a &lt; b") && text.contains(">1 µs<") && text.contains(">10 s<"));
        assert!(text.contains(">4096<") && !text.contains("NaN") && !text.contains("inf"));
        assert_eq!(text.matches("<circle").count(), 3);
        // Seven decades: 3 s is half a decade below the top.
        assert!(text.contains(r#"cx="400.0" cy="18.7""#), "{text}");
    }

    #[test]
    fn a_legend_that_is_too_wide_goes_on_below() {
        let names = ["a".repeat(60), "b".repeat(60)];
        let picture = Picture { title: String::new(), names: &names, across: "N", rows: vec![] };
        assert_eq!(picture.legend_places(2000.0).0[1].1, HEAD);
        let (places, height) = picture.legend_places(500.0);
        assert_eq!((places[1], height), ((14.0, HEAD + LEGEND), HEAD + 2.0 * LEGEND));
    }

    #[test]
    fn ratios_show_where_they_are_even() {
        assert_eq!(Scale::Ratio.range((0.3, 2.1)), (-1.0, 3.0));
        let labels: Vec<String> =
            Scale::Ratio.ticks((-1.0, 2.0)).into_iter().map(|(_, label)| label).collect();
        assert_eq!(labels, ["×1/2", "×1", "×2", "×4"]);
        assert_eq!(seconds(-4), "100 µs");
    }
}
