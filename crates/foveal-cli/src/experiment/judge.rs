//! Verdicts: what was claimed, checked against results by rules that are stated.

use std::fmt::{self, Display};

use super::results::Results;
use crate::plot::{Plot, Series};

/// One thing that should be so.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Check {
    /// What should be.
    words: String,
    /// Whether it is; `None` where results are missing.
    holds: Option<bool>,
    /// The numbers.
    found: String,
}

/// What the checks come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Seen,
    Partly,
    NotSeen,
    NotRun,
}

/// Rows under a head.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) head: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

/// What results come to.
#[derive(Debug)]
pub(super) struct Judgement {
    pub(super) checks: Vec<Check>,
    pub(super) table: Table,
    pub(super) plots: Vec<Plot<'static>>,
}

/// Numbers of several seeds: their mean and standard deviation.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) mean: f64,
    pub(super) deviation: f64,
    pub(super) count: usize,
}

impl Sample {
    /// `None` for none.
    pub(super) fn of(numbers: &[f64]) -> Option<Sample> {
        let count = numbers.len();
        if count == 0 {
            return None;
        }
        let mean = numbers.iter().sum::<f64>() / count as f64;
        let squares = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
        let deviation = (squares / (count - 1).max(1) as f64).sqrt();
        Some(Sample { mean, deviation, count })
    }

    /// What a table says of numbers; a dash for none.
    pub(super) fn words(numbers: &[f64]) -> String {
        Sample::of(numbers).map_or_else(|| "–".to_owned(), |sample| sample.to_string())
    }

    /// Two standard deviations of a difference of one of these and one of those.
    fn margin(&self, other: &Sample) -> f64 {
        2.0 * self.deviation.hypot(other.deviation)
    }

    /// Greater by more than the margin.
    fn beyond(&self, other: &Sample) -> bool {
        self.mean - other.mean > self.margin(other)
    }
}

impl Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count {
            1 => write!(f, "{}", digits(self.mean)),
            _ => write!(f, "{} ± {}", digits(self.mean), digits(self.deviation)),
        }
    }
}

/// Three digits or so.
pub(super) fn digits(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_owned(),
        size if size < 1e-3 => format!("{x:.1e}"),
        size if size < 9.9995 => format!("{x:.3}"),
        size if size < 99.995 => format!("{x:.2}"),
        _ => format!("{x:.0}"),
    }
}

impl Check {
    /// A check of numbers that may not be there yet.
    pub(super) fn new(words: &str, found: Option<(bool, String)>) -> Check {
        let (holds, found) = match found {
            Some((holds, found)) => (Some(holds), found),
            None => (None, "not run".to_owned()),
        };
        Check { words: words.to_owned(), holds, found }
    }

    /// `a` is greater than `b` beyond two standard deviations of seeds.
    pub(super) fn greater(words: &str, a: &[f64], b: &[f64]) -> Check {
        let both = Sample::of(a).zip(Sample::of(b));
        Check::new(words, both.map(|(a, b)| (a.beyond(&b), format!("{a} against {b}"))))
    }

    /// The cost `a` is not above `b` by more than `slack` and two standard deviations of seeds.
    pub(super) fn as_good(words: &str, (a, b): (&[f64], &[f64]), slack: f64) -> Check {
        let both = Sample::of(a).zip(Sample::of(b));
        let holds = |a: &Sample, b: &Sample| a.mean - b.mean <= slack.max(a.margin(b));
        Check::new(words, both.map(|(a, b)| (holds(&a, &b), format!("{a} against {b}"))))
    }

    /// The mean lies in a range.
    pub(super) fn within(
        words: &str,
        numbers: &[f64],
        range: std::ops::RangeInclusive<f64>,
    ) -> Check {
        let sample = Sample::of(numbers);
        Check::new(words, sample.map(|one| (range.contains(&one.mean), format!("{one}"))))
    }
}

impl Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.holds {
            Some(true) => "yes",
            Some(false) => "no",
            None => "not run",
        };
        write!(f, "{mark}: {} ({})", self.words, self.found)
    }
}

impl Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Seen => "seen",
            Verdict::Partly => "partly seen",
            Verdict::NotSeen => "not seen at this size",
            Verdict::NotRun => "not run",
        })
    }
}

impl Judgement {
    /// Seen where every check holds, not seen where none does.
    pub(super) fn verdict(&self, empty: bool) -> Verdict {
        let known: Vec<bool> = self.checks.iter().filter_map(|check| check.holds).collect();
        match known.iter().filter(|&&holds| holds).count() {
            _ if empty || known.is_empty() => Verdict::NotRun,
            0 => Verdict::NotSeen,
            holding if holding == self.checks.len() => Verdict::Seen,
            _ => Verdict::Partly,
        }
    }
}

/// A table of means: a row for each value of one key, a column for each of another.
pub(super) fn cross(results: &Results, [down, across]: [&str; 2], number: &str) -> Table {
    let columns = results.values(across);
    let mut head = vec![down.to_owned()];
    head.extend(columns.iter().map(|value| format!("{across} {value}")));
    let row = |value: String| {
        let at = |column: &String| {
            let own = results.numbers(&[(down, &value), (across, column)], number);
            Sample::words(&own)
        };
        let cells: Vec<String> = columns.iter().map(at).collect();
        std::iter::once(value).chain(cells).collect()
    };
    Table { head, rows: results.values(down).into_iter().map(row).collect() }
}

/// Lines of means: one for each value of a key, over counts of another.
pub(super) fn lines(results: &Results, [each, over]: [&str; 2], number: &str) -> Vec<Series> {
    let line = |value: String| {
        let point = |count: usize| {
            let own = results.numbers(&[(each, &value), (over, &count.to_string())], number);
            Some((count as f64, Sample::of(&own)?.mean))
        };
        let points = results.counts(over).into_iter().filter_map(point).collect();
        Series { name: value, points }
    };
    results.values(each).into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_count_beyond_two_standard_deviations() {
        let holds = |a: &[f64], b: &[f64]| Check::greater("", a, b).holds;
        assert_eq!(holds(&[1.0, 1.1, 0.9], &[0.5, 0.6, 0.4]), Some(true));
        assert_eq!(holds(&[1.0, 1.1, 0.9], &[0.8, 0.9, 0.7]), Some(false));
        assert_eq!(holds(&[1.0], &[0.9]), Some(true));
        assert_eq!(holds(&[1.0], &[1.0]), Some(false));
        assert_eq!(holds(&[], &[1.0]), None);
        let good = |a: f64| Check::as_good("", (&[a, a], &[1.0, 1.0]), 0.02).holds;
        assert_eq!((good(1.01), good(1.03), good(0.5)), (Some(true), Some(false), Some(true)));
    }

    #[test]
    fn verdicts_follow_from_checks() {
        let verdict = |holds: &[Option<bool>]| {
            let check =
                |&holds: &Option<bool>| Check::new("", holds.map(|holds| (holds, String::new())));
            let checks = holds.iter().map(check).collect();
            Judgement { checks, table: Table::default(), plots: vec![] }.verdict(false)
        };
        assert_eq!(verdict(&[Some(true), Some(true)]), Verdict::Seen);
        assert_eq!(verdict(&[Some(true), Some(false)]), Verdict::Partly);
        assert_eq!(verdict(&[Some(true), None]), Verdict::Partly);
        assert_eq!(verdict(&[Some(false)]), Verdict::NotSeen);
        assert_eq!(verdict(&[None]), Verdict::NotRun);
        assert_eq!(Sample::of(&[1.0, 3.0]).unwrap().to_string(), "2.000 ± 1.414");
    }
}
