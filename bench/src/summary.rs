//! A whole matrix in a few lines: geometric means by kind of call, and every loss by name.
//!
//! ```text
//! mean(kind) = exp(1/n Σ ln ratio)      ratio: peer's time ÷ ours, the median over rounds
//! ```

use crate::record::Row;
use crate::report::LOSS;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Calls with fewer queries are told by their losses alone.
const LEAST: usize = 100;

/// What calls are put together.
fn kind(row: &Row) -> String {
    let mask = match row.mask.as_str() {
        "causalmask" => "causal as a mask",
        mask if mask.starts_with("random") => "random mask",
        mask if mask.starts_with("window") => "window",
        mask => mask,
    };
    match (row.phase.as_str(), row.dtype.as_str()) {
        ("forward", "f32") => mask.to_owned(),
        ("forward", dtype) => dtype.to_owned(),
        ("decode", dtype) => format!("decode, {dtype}"),
        (phase, "f32") => format!("{phase}, {mask}"),
        (phase, dtype) => format!("{phase}, {dtype}"),
    }
}

/// Ratios of one peer in one kind.
#[derive(Debug, Default)]
struct Group {
    ratios: Vec<f64>,
}

impl Group {
    fn mean(&self) -> f64 {
        let logarithms: f64 = self.ratios.iter().map(|ratio| ratio.ln()).sum();
        (logarithms / self.ratios.len() as f64).exp()
    }

    fn least(&self) -> f64 {
        self.ratios.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn most(&self) -> f64 {
        self.ratios.iter().copied().fold(0.0, f64::max)
    }
}

/// Means over the calls of at least 100 queries (all of decoding) in Markdown, then the calls of any length
/// in which a peer is faster by more than 3 %, the worst first.
pub(crate) fn summary(rows: &[Row]) -> String {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.contender != "foveal").collect();
    let mut groups: BTreeMap<(&str, usize, String), Group> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.seq_q >= LEAST || row.phase == "decode") {
        let group = groups.entry((&row.contender, row.threads, kind(row))).or_default();
        group.ratios.push(row.ratio);
    }
    let mut text = format!(
        "Peer's time ÷ ours, medians over rounds, calls of N ≥ {LEAST}:\n\n\
         | peer | threads | kind | calls | geometric mean | least | most |\n|---|---|---|---|---|---|---|\n"
    );
    for ((peer, threads, kind), group) in &groups {
        let (calls, mean) = (group.ratios.len(), group.mean());
        let (least, most) = (group.least(), group.most());
        let _ = writeln!(
            text,
            "| {peer} | {threads} | {kind} | {calls} | {mean:.2} | {least:.2} | {most:.2} |"
        );
    }
    let mut losses: Vec<&Row> = rows.iter().copied().filter(|row| row.ratio < LOSS).collect();
    losses.sort_by(|a, b| a.ratio.total_cmp(&b.ratio));
    let (lost, all) = (losses.len(), rows.len());
    let _ = writeln!(text, "\nLosses (median below 1 ÷ 1.03): {lost} of {all}.\n");
    for row in losses {
        let _ = writeln!(text, "- {}: {} {:.2}", row.case, row.contender, row.ratio);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::square;

    #[test]
    fn means_are_geometric_and_losses_are_named() {
        let rows = [
            square("foveal", 512, "full", 1.0),
            square("torch", 512, "full", 2.0),
            square("torch", 2048, "full", 0.5),
            square("torch", 7, "full", 0.9),
            square("torch", 512, "causalmask", 3.0),
            Row { dtype: "bf16".to_owned(), ..square("torch", 512, "causal", 4.0) },
        ];
        let text = summary(&rows);
        assert!(text.contains("| torch | 1 | full | 2 | 1.00 | 0.50 | 2.00 |"), "{text}");
        assert!(text.contains("| torch | 1 | causal as a mask | 1 | 3.00 |"), "{text}");
        assert!(text.contains("| torch | 1 | bf16 | 1 | 4.00 |"), "{text}");
        assert!(text.contains("2 of 5.\n\n- test/n2048-full: torch 0.50\n- test/n7"), "{text}");
    }
}
