//! A chart of lines as SVG within a page, whose styles it uses.

use std::fmt::Write;

const SIZE: (f64, f64) = (560.0, 220.0);
/// Room around the lines: left, top, right, bottom.
const MARGIN: (f64, f64, f64, f64) = (60.0, 8.0, 12.0, 28.0);
/// Points of a line; more are drawn as their means.
const POINTS: usize = 400;

/// A line: its style, and points from left to right.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) class: &'static str,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Lines on common axes, with what they are for those who can't see them.
pub(crate) fn draw(label: &str, lines: &[Line]) -> String {
    let lines: Vec<(&str, Vec<(f64, f64)>)> =
        lines.iter().map(|line| (line.class, thinned(&line.points))).collect();
    let all = || lines.iter().flat_map(|(_, points)| points.iter().copied());
    if all().next().is_none() {
        return String::new();
    }
    let (left, right) = span(all().map(|point| point.0));
    let (low, high) = span(all().map(|point| point.1));
    let (width, height) = (SIZE.0 - MARGIN.0 - MARGIN.2, SIZE.1 - MARGIN.1 - MARGIN.3);
    let x = |value: f64| MARGIN.0 + width * (value - left) / (right - left);
    let y = |value: f64| MARGIN.1 + height * (high - value) / (high - low);
    let mut text = String::new();
    let _ = writeln!(
        text,
        r#"<svg viewBox="0 0 {} {}" role="img" aria-label="{}">"#,
        SIZE.0,
        SIZE.1,
        escaped(label)
    );
    for tick in ticks(low, high) {
        let (at, end) = (y(tick), SIZE.0 - MARGIN.2);
        let _ = writeln!(text, r#"<path class="grid" d="M{} {at:.1}H{end}"/>"#, MARGIN.0);
        let _ = writeln!(
            text,
            r#"<text class="end" x="{}" y="{:.1}">{}</text>"#,
            MARGIN.0 - 6.0,
            at + 4.0,
            number(tick)
        );
    }
    for tick in ticks(left, right) {
        let _ = writeln!(
            text,
            r#"<text class="mid" x="{:.1}" y="{}">{}</text>"#,
            x(tick),
            SIZE.1 - 8.0,
            number(tick)
        );
    }
    for (class, points) in &lines {
        let path: Vec<String> =
            points.iter().map(|point| format!("{:.1} {:.1}", x(point.0), y(point.1))).collect();
        let _ = writeln!(text, r#"<path class="{class}" d="M{}"/>"#, path.join("L"));
    }
    text + "</svg>\n"
}

/// At most [`POINTS`], the means of neighbours.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let size = points.len().div_ceil(POINTS).max(1);
    let mean = |part: &[(f64, f64)]| {
        let n = part.len() as f64;
        let sum = part.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / n, sum.1 / n)
    };
    let finite: Vec<(f64, f64)> =
        points.iter().copied().filter(|point| point.1.is_finite()).collect();
    finite.chunks(size).map(mean).collect()
}

/// The least and the most, apart from each other.
pub(crate) fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let start = (f64::INFINITY, f64::NEG_INFINITY);
    let (low, high) = values.fold(start, |(low, high), x| (low.min(x), high.max(x)));
    let least = 1e-9_f64.max(1e-6 * high.abs());
    if high - low > least { (low, high) } else { (low - least, high + least) }
}

/// Round numbers within a range, about five.
pub(crate) fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|&step| step >= rough);
    let step = step.unwrap_or(power);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last.min(first.saturating_add(20))).map(|n| n as f64 * step).collect()
}

pub(crate) fn number(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_owned(),
        size if !(1e-3..1e6).contains(&size) => format!("{x:.1e}"),
        _ => {
            let text = format!("{x:.4}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
    }
}

pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stay_within_their_axes() {
        let points = (0..5000).map(|n| (f64::from(n), 5.0 - f64::from(n) / 1000.0)).collect();
        let lines = [Line { class: "raw", points }];
        let text = draw("loss \"by\" step", &lines);
        assert!(text.contains("&quot;by&quot;") && text.contains(">1000<") && text.contains(">4<"));
        assert_eq!(text.matches('L').count(), 384);
        assert!(!text.contains("NaN") && !text.contains("inf"));
        assert_eq!(draw("nothing", &[]), "");
        let one = draw("one", &[Line { class: "raw", points: vec![(1.0, 2.0), (2.0, f64::NAN)] }]);
        assert!(!one.contains("NaN") && !one.contains("inf"), "{one}");
    }

    #[test]
    fn numbers_are_short() {
        let texts = [0.0, 0.25, 3.0, 1000.0, 1e-5, 2e7].map(number);
        assert_eq!(texts, ["0", "0.25", "3", "1000", "1.0e-5", "2.0e7"]);
    }
}
