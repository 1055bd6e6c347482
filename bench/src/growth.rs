//! A picture of how time grows with the number of tokens, from a record of `sparse_speed csv`.
//!
//! ```text
//! pattern,way,tokens,seconds
//! ```
//!
//! Both axes are logarithmic, so that a power of the number of tokens is a straight line.

use crate::svg::{self, Line, Panel, Picture, Scale};
use anyhow::{Context, ensure};
use std::path::Path;

/// One time.
#[derive(Debug, Clone, PartialEq)]
struct Point<'a> {
    pattern: &'a str,
    way: &'a str,
    tokens: f64,
    seconds: f64,
}

/// Draws the record into `sparse-growth.svg`.
///
/// # Errors
/// If the record isn't one, or a file can't be read or written.
pub(crate) fn write(record: &Path, folder: &Path) -> anyhow::Result<()> {
    svg::write(record, &folder.join("sparse-growth.svg"), draw)
}

fn draw(record: &str) -> anyhow::Result<String> {
    let lines = record.lines().skip(1);
    let points = lines.map(|line| point(line).with_context(|| format!("not a time: {line:?}")));
    let points = points.collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(!points.is_empty(), "the record holds no times");
    let mut names: Vec<String> = vec![];
    for point in &points {
        if !names.iter().any(|name| name == point.pattern) {
            names.push(point.pattern.to_owned());
        }
    }
    let line = |way: &str, name: usize| Line {
        name,
        points: points
            .iter()
            .filter(|point| point.way == way && point.pattern == names[name])
            .map(|point| (point.tokens, point.seconds))
            .collect(),
    };
    let panel = |way: &str| Panel {
        title: way.to_owned(),
        label: "time",
        scale: Scale::Seconds,
        lines: (0..names.len()).map(|name| line(way, name)).collect(),
    };
    let title = "Time against tokens: one head, D 64, f32, one thread".to_owned();
    let rows = vec![["forward", "backward"].map(panel).into()];
    Ok(Picture { title, names: &names, across: "N", rows }.draw())
}

/// The fields of a line; names of patterns may hold commas.
fn point(line: &str) -> Option<Point<'_>> {
    let mut fields = line.rsplitn(4, ',');
    let seconds = fields.next()?.parse().ok().filter(|&x: &f64| x > 0.0)?;
    let tokens = fields.next()?.parse().ok().filter(|&x: &f64| x > 0.0)?;
    let way = fields.next()?;
    Some(Point { pattern: fields.next()?, way, tokens, seconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_drawn_or_refused() {
        let record = "pattern,way,tokens,seconds\nfixed, l = √N,forward,2048,0.001\nfixed, l = √N,forward,4096,0.003\n\
            window,forward,2048,0.002\nwindow,backward,2048,0.004\n";
        let text = draw(record).unwrap();
        assert!(
            text.starts_with("<svg") && text.contains("fixed, l = √N") && !text.contains("NaN")
        );
        for bad in ["", "pattern,way,tokens,seconds\nfixed,forward,2048\n", "\nfixed,forward,0,1\n"]
        {
            assert!(draw(bad).is_err(), "{bad}");
        }
    }
}
