//! Records as they are read again, for summaries and pictures.

use anyhow::{Context, ensure};
use std::path::Path;

/// A contender's results in one case of attention.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) contender: String,
    /// Seconds of the best execution.
    pub(crate) best: f64,
    /// Floating-point operations, and the most that the machine does in a second.
    pub(crate) flops: f64,
    pub(crate) peak_flops: f64,
    /// How many times longer than ours it takes, the median over rounds.
    pub(crate) ratio: f64,
    pub(crate) phase: String,
    pub(crate) seq_q: usize,
    pub(crate) seq_k: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) mask: String,
    pub(crate) dtype: String,
    pub(crate) level: String,
    pub(crate) threads: usize,
}

/// The attention cases of a record; contenders that were absent have no row.
///
/// # Errors
/// If a line does not fit the record's own heading.
pub(crate) fn parse(text: &str) -> anyhow::Result<Vec<Row>> {
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    let names = fields(lines.next().context("the record is empty")?);
    let mut rows = Vec::new();
    for line in lines {
        let values = fields(line);
        let (values, wanted) = (values, names.len());
        ensure!(values.len() == wanted, "{} fields instead of {wanted}: {line}", values.len());
        let fields = Fields { names: &names, values: &values };
        if fields.text("phase")?.is_empty() || fields.text("best_s")?.is_empty() {
            continue;
        }
        rows.push(row(&fields).with_context(|| format!("in the line: {line}"))?);
    }
    Ok(rows)
}

/// The rows of several files, one after the other.
///
/// # Errors
/// If one can't be read.
pub(crate) fn read(files: &[impl AsRef<Path>]) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for file in files.iter().map(AsRef::as_ref) {
        let text = std::fs::read_to_string(file);
        let parsed = text.map_err(anyhow::Error::from).and_then(|text| parse(&text));
        rows.extend(parsed.with_context(|| format!("cannot read {}", file.display()))?);
    }
    Ok(rows)
}

struct Fields<'a> {
    names: &'a [String],
    values: &'a [String],
}

impl Fields<'_> {
    fn text(&self, name: &str) -> anyhow::Result<&str> {
        let at = self.names.iter().position(|field| field == name);
        let at = at.with_context(|| {
            format!("the record has no field {name}: an older runner made it; measure again")
        })?;
        Ok(&self.values[at])
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> anyhow::Result<T> {
        let text = self.text(name)?;
        text.parse().ok().with_context(|| format!("{name} is {text:?}, not a number"))
    }
}

fn row(fields: &Fields<'_>) -> anyhow::Result<Row> {
    let text = |name| fields.text(name).map(str::to_owned);
    Ok(Row {
        case: text("case")?,
        contender: text("contender")?,
        best: fields.number("best_s")?,
        flops: fields.number("flops")?,
        peak_flops: fields.number("peak_flops")?,
        ratio: fields.number("ratio_median")?,
        phase: text("phase")?,
        seq_q: fields.number("seq_q")?,
        seq_k: fields.number("seq_k")?,
        heads: fields.number("heads")?,
        kv_heads: fields.number("kv_heads")?,
        dim: fields.number("dim")?,
        mask: text("mask")?,
        dtype: text("dtype")?,
        level: text("level")?,
        threads: fields.number("threads")?,
    })
}

/// Fields between commas; quotes hold commas together.
fn fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            _ => fields.last_mut().expect("there is a field").push(c),
        }
    }
    fields
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A row of a square call with 8 heads, of one thread.
    pub(crate) fn square(contender: &str, seq: usize, mask: &str, ratio: f64) -> Row {
        Row {
            case: format!("test/n{seq}-{mask}"),
            contender: contender.to_owned(),
            best: 1e-6 * (seq * seq) as f64 * ratio,
            flops: 1e5 * (seq * seq) as f64,
            peak_flops: 2e11,
            ratio,
            phase: "forward".to_owned(),
            seq_q: seq,
            seq_k: seq,
            heads: 8,
            kv_heads: 8,
            dim: 64,
            mask: mask.to_owned(),
            dtype: "f32".to_owned(),
            level: "best".to_owned(),
            threads: 1,
        }
    }

    #[test]
    fn quotes_hold_commas_and_absent_sides_have_no_row() {
        assert_eq!(fields("a,\"b, c\",,d"), ["a", "b, c", "", "d"]);
        assert!(parse("# nothing but a comment\n").is_err());
        assert!(parse("case,contender\nn1\n").is_err());
        let error = parse("case,contender\nn1,foveal\n").unwrap_err().to_string();
        assert!(error.contains("no field phase"), "{error}");
    }
}
