//! A run's results as an aligned table, as Markdown, and as records.

use crate::case::{AttentionCase, Phase};
use crate::contender::Samples;
use crate::machine::Machine;
use crate::peaks::Peak;
use crate::prepared::{Absent, Work};
use anyhow::Context;
use std::fmt::Write;
use std::path::Path;

/// Median ratios below this are losses: ours takes more than 1.03 times as long.
pub(crate) const LOSS: f64 = 1.0 / 1.03;

/// What came of a case.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) family: String,
    pub(crate) name: String,
    /// The call, where it is one of attention.
    pub(crate) call: Option<AttentionCase>,
    pub(crate) work: Work,
    pub(crate) peak: Peak,
    /// Ours first.
    pub(crate) samples: Vec<Samples>,
    pub(crate) absent: Vec<Absent>,
}

const HEADERS: [&str; 8] =
    ["case", "best", "median", "med/best", "GF/s", "% peak", "GB/s", "% read"];

impl Outcome {
    /// The cells of [`HEADERS`], and one for the peers.
    fn cells(&self) -> Vec<String> {
        let ours = &self.samples[0];
        let rate = |amount: f64, unit: f64| {
            if amount == 0.0 {
                String::new()
            } else {
                format!("{:.1}", amount / ours.best() / unit)
            }
        };
        let share = |amount: f64, peak: f64| {
            if amount == 0.0 || peak == 0.0 {
                return String::new();
            }
            let of = |seconds: f64| 100.0 * amount / seconds / peak;
            format!("{:.0} / {:.0}", of(ours.best()), of(ours.median()))
        };
        let bytes = if self.peak.bandwidth == 0.0 { 0.0 } else { self.work.bytes };
        vec![
            self.name.clone(),
            duration(ours.best()),
            duration(ours.median()),
            format!("{:.2}", ours.median() / ours.best()),
            rate(self.work.flops, 1e9),
            share(self.work.flops, self.peak.flops),
            rate(bytes, 1e9),
            share(bytes, self.peak.bandwidth),
            self.peers(),
        ]
    }

    /// `name best/best [median of ratios]` of each peer: how many times longer it takes than ours.
    fn peers(&self) -> String {
        let ours = &self.samples[0];
        let present = self.samples[1..].iter().map(|peer| {
            let (best, median) = peer.ratios(ours);
            let loss = if median < LOSS { " LOSS" } else { "" };
            format!("{} {best:.2} [{median:.2}]{loss}", peer.name)
        });
        let absent = self.absent.iter().map(|absent| format!("{} –", absent.name));
        present.chain(absent).collect::<Vec<_>>().join(", ")
    }

    /// Whether a peer is faster than ours.
    pub(crate) fn lost(&self) -> bool {
        self.samples[1..].iter().any(|peer| peer.ratios(&self.samples[0]).1 < LOSS)
    }

    /// The line of the aligned table.
    pub(crate) fn line(&self) -> String {
        aligned(&self.cells())
    }

    /// Rows of the record, one a contender.
    fn csv(&self, out: &mut String) {
        let call = self.call.as_ref().map_or_else(|| ",".repeat(CALL - 1), call);
        for samples in &self.samples {
            let (best, median) = samples.ratios(&self.samples[0]);
            let note = samples.note.replace(['"', '\n'], "'");
            let _ = write!(out, "{},{},\"{note}\",{}", self.name, samples.name, samples.iterations);
            let seconds = [samples.best(), samples.median(), samples.worst()];
            for number in seconds {
                let _ = write!(out, ",{number:.4e}");
            }
            let Work { flops, bytes } = self.work;
            for number in [flops, bytes, self.peak.flops, self.peak.bandwidth] {
                let _ = write!(out, ",{number:.5e}");
            }
            let _ = write!(out, ",{best:.4},{median:.4},{call}");
            let all: Vec<String> = samples.seconds.iter().map(|s| format!("{s:.4e}")).collect();
            let _ = writeln!(out, ",{}", all.join(" "));
        }
        for Absent { name, reason } in &self.absent {
            let reason = reason.replace(['"', '\n'], "'");
            let _ = writeln!(out, "{},{name},\"absent: {reason}\",0,,,,,,,,,,{call},", self.name);
        }
    }
}

/// The number of fields that describe a call.
const CALL: usize = 11;

fn call(case: &AttentionCase) -> String {
    let phase = match case.phase {
        Phase::Forward => "forward",
        Phase::Decode => "decode",
        Phase::Backward => "backward",
    };
    let AttentionCase { batch, seq_q, seq_k, heads, kv_heads, dim, mask, dtype, .. } = case;
    let (dtype, threads, level) = (dtype.name(), case.threads, &case.level);
    format!(
        "{phase},{batch},{seq_q},{seq_k},{heads},{kv_heads},{dim},{mask},{dtype},{level},\
         {threads}"
    )
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.2} µs", s * 1e6),
        s if s < 1.0 => format!("{:.3} ms", s * 1e3),
        s => format!("{s:.3} s"),
    }
}

fn aligned(cells: &[String]) -> String {
    let widths = [42, 11, 11, 8, 8, 10, 7, 10];
    let mut line = format!("{:<1$}", cells[0], widths[0]);
    for (cell, width) in cells[1..].iter().zip(&widths[1..]) {
        let _ = write!(line, " {cell:>width$}");
    }
    let _ = write!(line, "  {}", cells.last().map_or("", String::as_str));
    line.trim_end().to_owned()
}

/// The aligned table's first line.
pub(crate) fn header() -> String {
    let peers = "peer time / ours: best/best [median of ratios]";
    aligned(&HEADERS.iter().copied().chain([peers]).map(str::to_owned).collect::<Vec<_>>())
}

/// The whole table in Markdown.
pub(crate) fn markdown(outcomes: &[Outcome]) -> String {
    let mut table = format!(
        "| {} | peer time ÷ ours: best/best \\[median of ratios\\] |\n",
        HEADERS.join(" | ")
    );
    table += &format!("|{}\n", "---|".repeat(HEADERS.len() + 1));
    for outcome in outcomes {
        let _ = writeln!(table, "| {} |", outcome.cells().join(" | "));
    }
    table
}

/// The record: the machine in comments, then a row for each contender of each case.
pub(crate) fn csv<'a>(machine: &Machine, outcomes: impl Iterator<Item = &'a Outcome>) -> String {
    let mut text = String::new();
    for line in &machine.description {
        let _ = writeln!(text, "# {line}");
    }
    text += "case,contender,note,iterations,best_s,median_s,worst_s,flops,bytes,peak_flops,\
             peak_bytes_per_s,ratio_best,ratio_median,phase,batch,seq_q,seq_k,heads,kv_heads,dim,\
             mask,dtype,level,threads,samples_s\n";
    outcomes.for_each(|outcome| outcome.csv(&mut text));
    text
}

/// Writes `FOLDER/CPU/DATE-FAMILY.csv` for each family that was run, `DATE-FAMILY-tTHREADS.csv` where all
/// cases were given one number of threads.
pub(crate) fn record(
    folder: &Path,
    machine: &Machine,
    outcomes: &[Outcome],
    threads: Option<u16>,
) -> anyhow::Result<()> {
    let end = threads.map_or_else(String::new, |threads| format!("-t{threads}"));
    let folder = folder.join(&machine.folder);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let mut families: Vec<&str> = outcomes.iter().map(|outcome| outcome.family.as_str()).collect();
    families.dedup();
    for family in families {
        let file = folder.join(format!("{}-{family}{end}.csv", machine.date));
        let text = csv(machine, outcomes.iter().filter(|outcome| outcome.family == family));
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record;

    #[test]
    fn records_can_be_read_again() {
        let samples = |name: &str, seconds: &[f64]| Samples {
            name: name.to_owned(),
            note: "a \"note\", with commas".to_owned(),
            iterations: 2,
            seconds: seconds.to_vec(),
        };
        let mut outcome = Outcome {
            family: "test".to_owned(),
            name: "test/n1".to_owned(),
            call: Some(AttentionCase::smallest()),
            work: Work { flops: 4.0, bytes: 0.0 },
            peak: Peak { flops: 1e9, bandwidth: 0.0 },
            samples: vec![samples("foveal", &[1.0, 2.0]), samples("torch", &[3.0, 3.0])],
            absent: vec![Absent::new("ggml", "it is \"absent\"")],
        };
        let machine = Machine {
            folder: String::new(),
            date: String::new(),
            description: vec!["machine".to_owned()],
        };
        let rows = record::parse(&csv(&machine, [&outcome].into_iter())).unwrap();
        assert_eq!(rows.len(), 2);
        let theirs = &rows[1];
        assert_eq!((theirs.contender.as_str(), theirs.best, theirs.ratio), ("torch", 3.0, 2.25));
        assert_eq!(
            (theirs.mask.as_str(), theirs.dtype.as_str(), theirs.threads),
            ("full", "f32", 1)
        );
        // What is no call of attention has no row.
        outcome.call = None;
        assert!(record::parse(&csv(&machine, [&outcome].into_iter())).unwrap().is_empty());
    }
}
