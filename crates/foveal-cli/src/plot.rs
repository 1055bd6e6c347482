//! A picture with named lines and their legend as SVG that stands by itself: in a page, in a file, on light and dark paper.

use std::fmt::Write;

use crate::chart::{escaped, number, span, ticks};

/// Colours that are told apart by those who see few of them (Okabe and Ito 2008), on light and on dark paper.
const COLOURS: [[&str; 2]; 8] = [
    ["#0072b2", "#56b4e9"],
    ["#d55e00", "#ff8c42"],
    ["#009e73", "#2fd6a3"],
    ["#cc79a7", "#e8a3c9"],
    ["#8a6d00", "#f0e442"],
    ["#3b3b3b", "#d0d0d0"],
    ["#7b3fbf", "#b58cf0"],
    ["#b3123f", "#ff6f91"],
];
/// Strokes of further rounds through the colours.
const DASHES: [&str; 3] = ["", "6 3", "2 3"];
/// The box of lines: left, top, width, height.
const BOX: (f64, f64, f64, f64) = (62.0, 30.0, 400.0, 220.0);
/// Room for the legend.
const LEGEND: f64 = 200.0;

/// How an axis is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    Linear,
    Log,
}

/// An axis.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis<'a> {
    pub(crate) title: &'a str,
    pub(crate) scale: Scale,
}

impl<'a> Axis<'a> {
    pub(crate) fn linear(title: &'a str) -> Axis<'a> {
        Axis { title, scale: Scale::Linear }
    }

    pub(crate) fn log(title: &'a str) -> Axis<'a> {
        Axis { title, scale: Scale::Log }
    }

    /// Where a number lies before it is stretched; `None` for what the axis can't have.
    fn place(self, x: f64) -> Option<f64> {
        let place = match self.scale {
            Scale::Linear => x,
            Scale::Log => x.log10(),
        };
        Some(place).filter(|place| place.is_finite())
    }

    /// Round numbers and their places.
    fn ticks(self, low: f64, high: f64) -> Vec<(f64, String)> {
        let round = |at: &f64| (*at, number(self.value(*at)));
        match self.scale {
            Scale::Linear => ticks(low, high).iter().map(round).collect(),
            Scale::Log => {
                let decades = high - low;
                let steps: &[f64] = match decades {
                    0.0..1.2 => &[1.0, 2.0, 5.0],
                    1.2..2.5 => &[1.0, 3.0],
                    _ => &[1.0],
                };
                let powers = low.floor() as i32..=high.ceil() as i32;
                let all = powers.flat_map(|power| {
                    steps.iter().map(move |step| f64::from(power) + step.log10())
                });
                let within = |at: &f64| (low - 1e-9..=high + 1e-9).contains(at);
                all.filter(within).map(|at| (at, short(self.value(at)))).collect()
            }
        }
    }

    fn value(self, place: f64) -> f64 {
        match self.scale {
            Scale::Linear => place,
            Scale::Log => 10f64.powf(place),
        }
    }
}

/// A number in few characters: thousands, millions and billions by letter.
pub(crate) fn short(x: f64) -> String {
    let size = x.abs();
    let (unit, letter) = match size {
        _ if size >= 999.5e6 => (1e9, "G"),
        _ if size >= 999.5e3 => (1e6, "M"),
        _ if size >= 9995.0 => (1e3, "k"),
        _ => (1.0, ""),
    };
    let x = x / unit;
    let text = match x.abs() {
        0.0 => return "0".to_owned(),
        size if size < 1e-3 => return format!("{x:.0e}"),
        size if size < 10.0 => format!("{x:.3}"),
        size if size < 100.0 => format!("{x:.1}"),
        _ => format!("{x:.0}"),
    };
    let text =
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{letter}")
}

/// A line and what it is called.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// A picture: what it shows, its axes, its lines.
#[derive(Debug)]
pub(crate) struct Plot<'a> {
    pub(crate) title: &'a str,
    pub(crate) x: Axis<'a>,
    pub(crate) y: Axis<'a>,
    pub(crate) series: Vec<Series>,
}

/// From numbers to places of the picture.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let (left, top, width, height) = BOX;
        let across = (x - self.x.0) / (self.x.1 - self.x.0);
        let up = (y - self.y.0) / (self.y.1 - self.y.0);
        (left + width * across, top + height * (1.0 - up))
    }
}

impl Plot<'_> {
    /// The picture; nothing where there is no point to draw.
    pub(crate) fn draw(&self) -> String {
        let place = |&(x, y): &(f64, f64)| Some((self.x.place(x)?, self.y.place(y)?));
        let lines: Vec<Vec<(f64, f64)>> =
            self.series.iter().map(|one| one.points.iter().filter_map(place).collect()).collect();
        let all = || lines.iter().flatten().copied();
        if all().next().is_none() {
            return String::new();
        }
        let frame = Frame { x: span(all().map(|p| p.0)), y: padded(span(all().map(|p| p.1))) };
        let height = (BOX.1 + BOX.3 + 42.0).max(BOX.1 + 18.0 * self.series.len() as f64 + 8.0);
        let mut text = self.head(height);
        self.axes(&frame, &mut text);
        for (n, (series, points)) in self.series.iter().zip(&lines).enumerate() {
            line(n, series, &points.iter().map(|&p| frame.at(p)).collect::<Vec<_>>(), &mut text);
        }
        text + "</svg>\n"
    }

    fn head(&self, height: f64) -> String {
        let width = BOX.0 + BOX.2 + LEGEND;
        let title = escaped(self.title);
        let mut styles = [String::new(), String::new()];
        for (n, colours) in COLOURS.iter().enumerate() {
            for (style, colour) in styles.iter_mut().zip(colours) {
                let _ = write!(style, ".c{n}{{stroke:{colour}}}.f{n}{{fill:{colour}}}");
            }
        }
        let [light, dark] = styles;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
             aria-label=\"{title}\">\n<style>.plot text{{font:12px system-ui,sans-serif;fill:#55555c}}.plot .t{{font-weight:600}}\
             .plot path{{fill:none;stroke-width:1.8}}.plot .g{{stroke:#d6d6d0;stroke-width:1}}.plot .e{{text-anchor:end}}\
             .plot .m{{text-anchor:middle}}{light}@media(prefers-color-scheme:dark){{.plot text{{fill:#b4b4ba}}\
             .plot .g{{stroke:#3c3d42}}{dark}}}</style>\n<text class=\"t\" x=\"{}\" y=\"16\">{title}</text>\n",
            BOX.0
        )
    }

    fn axes(&self, frame: &Frame, text: &mut String) {
        let (left, top, width, height) = BOX;
        let bottom = top + height;
        for (tick, label) in self.y.ticks(frame.y.0, frame.y.1) {
            let y = frame.at((frame.x.0, tick)).1;
            let _ = writeln!(text, "<path class=\"g\" d=\"M{left} {y:.1}h{width}\"/>");
            let _ = writeln!(
                text,
                "<text class=\"e\" x=\"{}\" y=\"{:.1}\">{label}</text>",
                left - 6.0,
                y + 4.0
            );
        }
        for (tick, label) in self.x.ticks(frame.x.0, frame.x.1) {
            let x = frame.at((tick, frame.y.0)).0;
            let _ = writeln!(text, "<path class=\"g\" d=\"M{x:.1} {bottom}v4\"/>");
            let _ = writeln!(
                text,
                "<text class=\"m\" x=\"{x:.1}\" y=\"{}\">{label}</text>",
                bottom + 17.0
            );
        }
        let middle = (left + width / 2.0, top + height / 2.0);
        let _ = writeln!(
            text,
            "<text class=\"m\" x=\"{}\" y=\"{}\">{}</text>",
            middle.0,
            bottom + 34.0,
            escaped(self.x.title)
        );
        let _ = writeln!(
            text,
            "<text class=\"m\" transform=\"translate(14 {}) rotate(-90)\">{}</text>",
            middle.1,
            escaped(self.y.title)
        );
    }
}

/// A line, a mark at each of its points if they are few, and its name.
fn line(n: usize, series: &Series, points: &[(f64, f64)], text: &mut String) {
    let (colour, dash) = (n % COLOURS.len(), DASHES[n / COLOURS.len() % DASHES.len()]);
    let dash =
        if dash.is_empty() { String::new() } else { format!(" stroke-dasharray=\"{dash}\"") };
    if points.len() > 1 {
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        let _ = writeln!(text, "<path class=\"c{colour}\"{dash} d=\"M{}\"/>", path.join("L"));
    }
    if points.len() <= 24 {
        for (x, y) in points {
            let _ = writeln!(
                text,
                "<circle class=\"f{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\"/>"
            );
        }
    }
    let (x, y) = (BOX.0 + BOX.2 + 14.0, BOX.1 + 8.0 + 18.0 * n as f64);
    let _ = writeln!(text, "<path class=\"c{colour}\"{dash} d=\"M{x} {y}h20\"/>");
    let name = escaped(&series.name);
    let _ = writeln!(text, "<text x=\"{}\" y=\"{}\">{name}</text>", x + 26.0, y + 4.0);
}

/// A little room above and below.
fn padded((low, high): (f64, f64)) -> (f64, f64) {
    let room = 0.04 * (high - low);
    (low - room, high + room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_have_every_line_and_only_finite_places() {
        let series = |n: usize| Series {
            name: format!("a<{n}"),
            points: vec![(0.0, 1.0), (10.0, 1.0 + n as f64), (100.0, f64::NAN), (1000.0, 0.5)],
        };
        let (x, y) = (Axis::log("tokens"), Axis::linear("loss"));
        let plot = Plot { title: "t & u", x, y, series: (0..10).map(series).collect() };
        let text = plot.draw();
        assert!(text.contains("a&lt;9") && text.contains("t &amp; u"));
        assert!(!text.contains("NaN") && !text.contains("inf"));
        // Points at 0 and at NaN have no place on these axes.
        assert_eq!(text.matches("<circle").count(), 20);
        assert_eq!(Plot { title: "", x, y, series: vec![] }.draw(), "");
    }

    #[test]
    fn numbers_are_short() {
        let texts = [0.0, 0.25, 3.0, 1000.0, 16384.0, 2e7, 1e-5, 65536.0, 4.19e6].map(short);
        assert_eq!(texts, ["0", "0.25", "3", "1000", "16.4k", "20M", "1e-5", "65.5k", "4.19M"]);
    }
}
