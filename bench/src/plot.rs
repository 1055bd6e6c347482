//! Pictures of records: share of peak against N, and time against N for each peer.
//!
//! ```text
//! share = operations ÷ best time ÷ multiply-add peak of the same run
//! ```

use crate::record::Row;
use crate::svg::{Line, Panel, Picture, Scale};
use anyhow::{Context, ensure};
use std::path::Path;

/// Calls that are drawn: prompts of one sequence with this many heads, each with keys of its own, in f32.
const HEADS: usize = 8;
const MASKS: [(&str, &str); 2] = [("full", "full"), ("causal", "causal")];
const DIMS: [usize; 2] = [64, 128];

/// Writes `share-of-peak.svg` and `time.svg`.
///
/// # Errors
/// If no row fits, or a file can't be written.
pub(crate) fn write(folder: &Path, rows: &[Row]) -> anyhow::Result<()> {
    let fits = |row: &&Row| {
        let square = row.phase == "forward" && row.seq_q == row.seq_k;
        let plain = row.dtype == "f32" && row.level == "best";
        square && plain && row.heads == HEADS && row.kv_heads == HEADS && DIMS.contains(&row.dim)
    };
    let rows: Vec<&Row> = rows.iter().filter(fits).collect();
    let threads = rows.iter().map(|row| row.threads).min();
    let threads = threads.with_context(|| {
        format!("nothing to draw: no square f32 prompts of {HEADS} heads of {DIMS:?}")
    })?;
    let rows: Vec<&Row> = rows.into_iter().filter(|row| row.threads == threads).collect();
    let names = names(&rows);
    ensure!(names[0] == "foveal", "the records hold no times of ours");
    let about =
        format!("{HEADS} heads, f32, {threads} thread{}", if threads == 1 { "" } else { "s" });
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let pictures = [
        ("share-of-peak.svg", share(&rows, &names, &about)),
        ("time.svg", time(&rows, &names, &about)),
    ];
    for (name, picture) in pictures {
        let file = folder.join(name);
        std::fs::write(&file, picture.draw())
            .with_context(|| format!("cannot write {}", file.display()))?;
        println!("wrote {}", file.display());
    }
    Ok(())
}

/// Contenders, ours first, then in the order in which records have them.
fn names(rows: &[&Row]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for row in rows {
        if !names.contains(&row.contender) {
            names.push(row.contender.clone());
        }
    }
    names.sort_by_key(|name| name != "foveal");
    names
}

fn share<'a>(rows: &[&Row], names: &'a [String], about: &str) -> Picture<'a> {
    let present = |dim: &usize| rows.iter().any(|row| row.dim == *dim);
    let value = |row: &Row| row.flops / row.best / row.peak_flops;
    let panel = |dim: usize, (mask, word): (&str, &str)| Panel {
        title: format!("{word}, D {dim}"),
        label: "share of the multiply-add peak",
        scale: Scale::Share,
        lines: lines(&of(rows, mask, dim), names, value),
    };
    let dims = DIMS.into_iter().filter(present);
    Picture {
        title: format!("Share of peak against N: {about}"),
        names,
        across: "N",
        rows: dims.map(|dim| MASKS.map(|mask| panel(dim, mask)).into()).collect(),
    }
}

fn time<'a>(rows: &[&Row], names: &'a [String], about: &str) -> Picture<'a> {
    let dim = DIMS.into_iter().find(|&dim| rows.iter().any(|row| row.dim == dim));
    let dim = dim.unwrap_or(DIMS[0]);
    let panel = |(mask, word): (&str, &str), label, scale, value: fn(&Row) -> f64| Panel {
        title: word.to_owned(),
        label,
        scale,
        lines: lines(&of(rows, mask, dim), names, value),
    };
    let times = MASKS.map(|mask| panel(mask, "time", Scale::Seconds, |row| row.best));
    let ratios = MASKS
        .map(|mask| panel(mask, "time ÷ ours (above ×1: slower)", Scale::Ratio, |row| row.ratio));
    Picture {
        title: format!("Time against N: {about}, D {dim}"),
        names,
        across: "N",
        rows: vec![times.into(), ratios.into()],
    }
}

fn of<'a>(rows: &[&'a Row], mask: &str, dim: usize) -> Vec<&'a Row> {
    rows.iter().copied().filter(|row| row.mask == mask && row.dim == dim).collect()
}

/// A line for each contender. Where records have a case twice, the last one counts.
fn lines(rows: &[&Row], names: &[String], value: impl Fn(&Row) -> f64) -> Vec<Line> {
    let line = |(name, contender): (usize, &String)| {
        let mut points: Vec<(f64, f64)> = Vec::new();
        for row in rows.iter().rev().filter(|row| row.contender == *contender) {
            let n = row.seq_q as f64;
            if points.iter().all(|point| point.0 != n) {
                points.push((n, value(row)));
            }
        }
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Line { name, points }
    };
    let lines = names.iter().enumerate().map(line);
    lines.filter(|line| !line.points.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::square;

    #[test]
    fn lines_take_the_last_of_a_case_and_go_to_the_right() {
        let rows = [
            square("torch", 512, "full", 9.0),
            square("foveal", 2048, "full", 1.0),
            square("torch", 2048, "full", 4.0),
            square("torch", 512, "full", 2.0),
        ];
        let rows: Vec<&Row> = rows.iter().collect();
        let names = names(&rows);
        assert_eq!(names, ["foveal", "torch"]);
        let lines = lines(&rows, &names, |row| row.ratio);
        assert_eq!(lines[1].points, [(512.0, 2.0), (2048.0, 4.0)]);
        assert_eq!(lines[0], Line { name: 0, points: vec![(2048.0, 1.0)] });
    }

    #[test]
    fn pictures_are_written_or_refused() {
        let folder = std::env::temp_dir().join(format!("foveal-plot-{}", std::process::id()));
        let mut rows = Vec::new();
        for mask in ["full", "causal"] {
            for seq in [16, 512] {
                rows.push(square("foveal", seq, mask, 1.0));
                rows.push(square("torch", seq, mask, 2.0));
            }
        }
        write(&folder, &rows).unwrap();
        for name in ["share-of-peak.svg", "time.svg"] {
            let text = std::fs::read_to_string(folder.join(name)).unwrap();
            assert!(text.starts_with("<svg") && text.contains("torch") && !text.contains("NaN"));
        }
        std::fs::remove_dir_all(&folder).unwrap();
        rows.iter_mut().for_each(|row| row.heads = 3);
        assert!(write(&folder, &rows).is_err());
    }
}
