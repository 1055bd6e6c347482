//! A picture of what an inverted file finds and saves, from a record of `index_recall`.
//!
//! ```text
//! keys,entries,lists,probes,recall,segment_seconds,token_seconds        the line with as many probes as lists is exact search
//! ```
//!
//! Recall, and the time of exact search ÷ that of the index for a segment and for a generated token, against the lists that a query
//! searches.

use crate::svg::{self, Line, Panel, Picture, Scale};
use anyhow::{Context, ensure};
use std::path::Path;

/// A line of the record.
#[derive(Debug, Clone, PartialEq)]
struct Measured {
    name: String,
    exact: bool,
    probes: f64,
    recall: f64,
    /// Of a segment, and of a token.
    seconds: [f64; 2],
}

/// Draws the record into `index-recall.svg`.
///
/// # Errors
/// If the record isn't one, or a file can't be read or written.
pub(crate) fn write(record: &Path, folder: &Path) -> anyhow::Result<()> {
    svg::write(record, &folder.join("index-recall.svg"), draw)
}

fn draw(record: &str) -> anyhow::Result<String> {
    let lines = record.lines().skip(1);
    let all = lines.map(|line| read(line).with_context(|| format!("no measurement: {line:?}")));
    let all = all.collect::<anyhow::Result<Vec<_>>>()?;
    let mut names: Vec<String> = all.iter().map(|own| own.name.clone()).collect();
    names.dedup();
    let exact = |name: &str| all.iter().find(|own| own.exact && own.name == name);
    ensure!(!all.is_empty(), "the record holds no measurements");
    for name in &names {
        exact(name).with_context(|| format!("the record has no exact search of {name}"))?;
    }
    let panel = |title: &str, label, scale, value: &dyn Fn(&Measured, &Measured) -> f64| Panel {
        title: title.to_owned(),
        label,
        scale,
        lines: (0..names.len())
            .map(|name| Line {
                name,
                points: all
                    .iter()
                    .filter(|own| !own.exact && own.name == names[name])
                    .filter_map(|own| Some((own.probes, value(own, exact(&own.name)?))))
                    .collect(),
            })
            .collect(),
    };
    let recall =
        panel("recall of the 32 best", "share that is found", Scale::Share, &|own, _| own.recall);
    let faster = |title, n: usize| {
        let ratio = move |own: &Measured, exact: &Measured| exact.seconds[n] / own.seconds[n];
        panel(title, "exact time ÷ time", Scale::Ratio, &ratio)
    };
    let title = "Inverted file of a memory: 9 query and 3 key heads of 64, one thread".to_owned();
    let rows = vec![
        vec![recall],
        vec![faster("a segment of 512 tokens", 0), faster("a generated token", 1)],
    ];
    Ok(Picture { title, names: &names, across: "lists that a query searches", rows }.draw())
}

fn read(line: &str) -> Option<Measured> {
    let fields: Vec<&str> = line.split(',').collect();
    let [keys, entries, lists, numbers @ ..] = &fields[..] else { return None };
    let numbers: Option<Vec<f64>> = numbers.iter().map(|x| x.parse().ok()).collect();
    let [probes, recall, segment, token] = numbers?[..] else { return None };
    let positive = [probes, segment, token].iter().all(|x| *x > 0.0);
    let exact = lists.parse::<f64>().ok()? == probes;
    let name = format!("{keys}, {entries} entries");
    let own = Measured { name, exact, probes, recall, seconds: [segment, token] };
    (positive && (0.0..=1.0).contains(&recall)).then_some(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_drawn_or_refused() {
        let head = "keys,entries,lists,probes,recall,segment_seconds,token_seconds\n";
        let exact = "model,65536,512,512,1,0.4,0.003\n";
        let some = "model,65536,512,8,0.8,0.1,0.001\nmodel,65536,512,16,0.9,0.2,0.002\n";
        let text = draw(&format!("{head}{exact}{some}")).unwrap();
        assert!(text.starts_with("<svg") && text.contains("model, 65536 entries"));
        assert!(text.matches("<circle").count() == 6 && !text.contains("NaN"));
        for bad in [head.to_owned(), format!("{head}{some}"), format!("{head}{exact}a,1,2\n")] {
            assert!(draw(&bad).is_err(), "{bad}");
        }
    }
}
