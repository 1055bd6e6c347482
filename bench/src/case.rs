//! Cases as data: the tables of `cases/*.toml`, multiplied out.
//!
//! A file holds arrays of tables `[[attention]]`, `[[projection]]` and `[[model]]`; its name is the
//! family. Where a field is a list, there is one case for each of its entries, in all combinations.

use crate::mask::MaskSpec;
use crate::peer::Peer;
use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One or several values of a field.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Many<T> {
    One(T),
    List(Vec<T>),
}

impl<T: Clone> Many<T> {
    fn all(&self) -> Vec<T> {
        match self {
            Many::One(value) => vec![value.clone()],
            Many::List(values) => values.clone(),
        }
    }
}

fn one<T: From<u8>>() -> Many<T> {
    Many::One(T::from(1))
}

/// Which kernels a case runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    /// Many rows against tensors.
    Forward,
    /// A few rows against a cache.
    Decode,
    /// Gradients of many rows, keys and values.
    Backward,
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DType {
    #[default]
    F32,
    F16,
    Bf16,
}

impl DType {
    pub(crate) fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        }
    }

    pub(crate) fn bytes(self) -> usize {
        if self == DType::F32 { 4 } else { 2 }
    }
}

/// One attention call.
#[derive(Debug, Clone)]
pub(crate) struct AttentionCase {
    pub(crate) phase: Phase,
    pub(crate) batch: usize,
    pub(crate) seq_q: usize,
    pub(crate) seq_k: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) mask: MaskSpec,
    pub(crate) dtype: DType,
    pub(crate) threads: usize,
    /// `best`, or the name of a [`foveal::Level`].
    pub(crate) level: String,
    pub(crate) peers: Vec<Peer>,
    /// Caches that decoding goes through in turn, so that each is found out of the processor's.
    pub(crate) copies: usize,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AttentionGrid {
    phase: Phase,
    #[serde(default = "one")]
    batch: Many<u32>,
    seq_q: Many<u32>,
    /// Like `seq_q` where left out.
    seq_k: Option<Many<u32>>,
    heads: Many<u32>,
    /// Like `heads` where left out.
    kv_heads: Option<Many<u32>>,
    dim: Many<u32>,
    mask: Many<MaskSpec>,
    #[serde(default = "stored_as_f32")]
    dtype: Many<DType>,
    #[serde(default = "one")]
    threads: Many<u32>,
    #[serde(default = "best_level")]
    level: Many<String>,
    #[serde(default)]
    peers: Vec<Peer>,
    #[serde(default = "one")]
    copies: Many<u32>,
}

fn stored_as_f32() -> Many<DType> {
    Many::One(DType::F32)
}

fn best_level() -> Many<String> {
    Many::One("best".to_owned())
}

impl AttentionGrid {
    fn cases(&self) -> Vec<AttentionCase> {
        let peers = self.peers.clone();
        let start = AttentionCase { phase: self.phase, peers, ..AttentionCase::smallest() };
        let mut cases = vec![start];
        multiply(&mut cases, &self.batch, |case, n| case.batch = n as usize);
        multiply(&mut cases, &self.seq_q, |case, n| {
            (case.seq_q, case.seq_k) = (n as usize, n as usize);
        });
        if let Some(seq_k) = &self.seq_k {
            multiply(&mut cases, seq_k, |case, n| case.seq_k = n as usize);
        }
        multiply(&mut cases, &self.heads, |case, n| {
            (case.heads, case.kv_heads) = (n as usize, n as usize);
        });
        if let Some(kv_heads) = &self.kv_heads {
            multiply(&mut cases, kv_heads, |case, n| case.kv_heads = n as usize);
        }
        multiply(&mut cases, &self.dim, |case, n| case.dim = n as usize);
        multiply(&mut cases, &self.mask, |case, mask| case.mask = mask);
        multiply(&mut cases, &self.dtype, |case, dtype| case.dtype = dtype);
        multiply(&mut cases, &self.copies, |case, n| case.copies = n as usize);
        multiply(&mut cases, &self.level, |case, level| case.level = level);
        multiply(&mut cases, &self.threads, |case, n| case.threads = n as usize);
        cases
    }
}

/// Replaces each case by one for each value.
fn multiply<C: Clone, T: Clone>(cases: &mut Vec<C>, values: &Many<T>, set: impl Fn(&mut C, T)) {
    let values = values.all();
    *cases = cases
        .iter()
        .flat_map(|case| {
            values.iter().map(|value| {
                let mut case = case.clone();
                set(&mut case, value.clone());
                case
            })
        })
        .collect();
}

impl AttentionCase {
    /// One query and one key of one number.
    pub(crate) fn smallest() -> AttentionCase {
        AttentionCase {
            phase: Phase::Forward,
            batch: 1,
            seq_q: 1,
            seq_k: 1,
            heads: 1,
            kv_heads: 1,
            dim: 1,
            mask: MaskSpec::Full,
            dtype: DType::F32,
            threads: 1,
            level: "best".to_owned(),
            peers: Vec::new(),
            copies: 1,
        }
    }

    fn name(&self) -> String {
        let mut name = match (self.phase, self.seq_q == self.seq_k) {
            (Phase::Forward | Phase::Backward, true) => format!("n{}", self.seq_q),
            (Phase::Forward | Phase::Backward, false) => format!("t{}-s{}", self.seq_q, self.seq_k),
            (Phase::Decode, _) if self.seq_q == 1 => format!("s{}", self.seq_k),
            (Phase::Decode, _) => format!("s{}-rows{}", self.seq_k, self.seq_q),
        };
        name += &format!("-d{}-h{}", self.dim, self.heads);
        if self.kv_heads != self.heads {
            name += &format!(":{}", self.kv_heads);
        }
        if self.batch != 1 {
            name += &format!("-b{}", self.batch);
        }
        if self.phase != Phase::Decode || !matches!(self.mask, MaskSpec::Full | MaskSpec::Causal) {
            name += &format!("-{}", self.mask);
        }
        name += &format!("-{}", self.dtype.name());
        if self.copies != 1 {
            name += "-cold";
        }
        if self.level != "best" {
            name += &format!("-{}", self.level);
        }
        name + &format!("-t{}", self.threads)
    }

    fn check(&self) -> anyhow::Result<()> {
        let sizes = [self.batch, self.seq_q, self.seq_k, self.heads, self.kv_heads, self.dim];
        ensure!(sizes.iter().all(|&n| n > 0), "a size is 0; sizes begin at 1");
        ensure!(self.threads > 0 && self.copies > 0, "threads and copies begin at 1");
        ensure!(
            self.heads.is_multiple_of(self.kv_heads),
            "{} heads don't fall into {} groups",
            self.heads,
            self.kv_heads
        );
        let few = self.seq_q <= foveal::MAX_GENERATED_ROWS;
        ensure!(self.phase != Phase::Decode || few, "{} rows are too many to decode", self.seq_q);
        let gradients = self.peers.iter().all(|&peer| peer == Peer::Torch);
        ensure!(self.phase != Phase::Backward || gradients, "only torch has gradients");
        let whole = self.peers.iter().any(|peer| matches!(peer, Peer::Llama | Peer::None));
        ensure!(!whole, "llama and none are no peers of a call");
        Ok(())
    }
}

/// Activations times one stored matrix.
#[derive(Debug, Clone)]
pub(crate) struct ProjectionCase {
    pub(crate) rows: usize,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    /// The name of a [`foveal::projection::Format`].
    pub(crate) format: String,
    pub(crate) threads: usize,
    pub(crate) level: String,
    /// Matrices that calls go through in turn.
    pub(crate) copies: usize,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProjectionGrid {
    rows: Many<u32>,
    /// `[out_features, in_features]` of each matrix.
    matrix: Vec<[u32; 2]>,
    format: Many<String>,
    #[serde(default = "one")]
    threads: Many<u32>,
    #[serde(default = "best_level")]
    level: Many<String>,
    #[serde(default = "one")]
    copies: Many<u32>,
}

impl ProjectionGrid {
    fn cases(&self) -> Vec<ProjectionCase> {
        let start = ProjectionCase {
            rows: 0,
            out_features: 0,
            in_features: 0,
            format: String::new(),
            threads: 1,
            level: String::new(),
            copies: 1,
        };
        let mut cases = vec![start];
        multiply(&mut cases, &Many::List(self.matrix.clone()), |case, [out, width]| {
            (case.out_features, case.in_features) = (out as usize, width as usize);
        });
        multiply(&mut cases, &self.rows, |case, n| case.rows = n as usize);
        multiply(&mut cases, &self.format, |case, format| case.format = format);
        multiply(&mut cases, &self.copies, |case, n| case.copies = n as usize);
        multiply(&mut cases, &self.level, |case, level| case.level = level);
        multiply(&mut cases, &self.threads, |case, n| case.threads = n as usize);
        cases
    }
}

impl ProjectionCase {
    fn name(&self) -> String {
        let Self { rows, out_features, in_features, format, threads, .. } = self;
        let mut name = format!("{}-{out_features}x{in_features}-rows{rows}", format.to_lowercase());
        if self.level != "best" {
            name += &format!("-{}", self.level);
        }
        name + &format!("-t{threads}")
    }

    fn check(&self) -> anyhow::Result<()> {
        let Self { rows, out_features, in_features, threads, copies, .. } = *self;
        let sizes = [rows, out_features, in_features, threads, copies];
        ensure!(sizes.iter().all(|&n| n > 0), "a size is 0; sizes begin at 1");
        Ok(())
    }
}

/// A whole model against llama.cpp.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelCase {
    /// What the report calls it.
    pub(crate) name: String,
    /// The file's name in the model cache, in the folder of its hash.
    pub(crate) file: String,
    pub(crate) sha256: String,
    pub(crate) prompt_tokens: usize,
    pub(crate) generated_tokens: usize,
    pub(crate) threads: usize,
}

/// What a case runs.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Attention(AttentionCase),
    Projection(ProjectionCase),
    Model(ModelCase),
}

impl Kind {
    pub(crate) fn threads(&self) -> usize {
        match self {
            Kind::Attention(case) => case.threads,
            Kind::Projection(case) => case.threads,
            Kind::Model(case) => case.threads,
        }
    }

    fn set_threads(&mut self, threads: usize) {
        match self {
            Kind::Attention(case) => case.threads = threads,
            Kind::Projection(case) => case.threads = threads,
            Kind::Model(case) => case.threads = threads,
        }
    }

    fn name(&self) -> String {
        match self {
            Kind::Attention(case) => case.name(),
            Kind::Projection(case) => case.name(),
            Kind::Model(case) => format!("{}-t{}", case.name, case.threads),
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        match self {
            Kind::Attention(case) => case.check(),
            Kind::Projection(case) => case.check(),
            Kind::Model(case) => {
                let tokens = case.prompt_tokens > 0 && case.generated_tokens > 1;
                ensure!(tokens && case.threads > 0, "a model case needs tokens and threads");
                Ok(())
            }
        }
    }
}

/// A case with its names.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// The name of its file.
    pub(crate) family: String,
    /// `family/…`, unique.
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    attention: Vec<AttentionGrid>,
    #[serde(default)]
    projection: Vec<ProjectionGrid>,
    #[serde(default)]
    model: Vec<ModelCase>,
}

/// Which cases to run, and on how many threads instead of their own number.
#[derive(Debug)]
pub(crate) struct Selection<'a> {
    /// Parts of names, one of which a case's name must have; all cases if there are none.
    pub(crate) filters: &'a [String],
    pub(crate) threads: Option<usize>,
}

/// Reads all case files of a folder, in the order of their names.
pub(crate) fn load(folder: &Path, selection: &Selection<'_>) -> anyhow::Result<Vec<Case>> {
    let files = std::fs::read_dir(folder).and_then(|entries| {
        entries.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>()
    });
    let mut files = files.with_context(|| format!("cannot list cases in {}", folder.display()))?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    let mut cases = Vec::new();
    for path in files {
        let read = || -> anyhow::Result<Vec<Case>> {
            let family = path.file_stem().unwrap_or_default().to_string_lossy();
            read_family(&family, &std::fs::read_to_string(&path)?, selection.threads)
        };
        cases.extend(read().with_context(|| format!("cannot read {}", path.display()))?);
    }
    let wanted = |case: &Case| {
        let filters = selection.filters;
        filters.is_empty() || filters.iter().any(|filter| case.name.contains(filter.as_str()))
    };
    cases.retain(wanted);
    Ok(cases)
}

fn read_family(family: &str, text: &str, threads: Option<usize>) -> anyhow::Result<Vec<Case>> {
    let file: File = toml::from_str(text)?;
    let attention = file.attention.iter().flat_map(AttentionGrid::cases).map(Kind::Attention);
    let projection = file.projection.iter().flat_map(ProjectionGrid::cases).map(Kind::Projection);
    let model = file.model.into_iter().map(Kind::Model);
    let mut cases: Vec<Case> = Vec::new();
    for mut kind in attention.chain(projection).chain(model) {
        if let Some(threads) = threads {
            kind.set_threads(threads);
        }
        let name = format!("{family}/{}", kind.name());
        kind.check().with_context(|| format!("{name} is no case"))?;
        if cases.iter().all(|case| case.name != name) {
            cases.push(Case { family: family.to_owned(), name, kind });
        }
    }
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_multiplied_out() {
        let text = r#"
            [[attention]]
            phase = "forward"
            seq_q = [7, 64]
            heads = 4
            kv_heads = 2
            dim = [64, 128]
            mask = ["full", { window = 5 }]
            peers = ["unfused"]
        "#;
        let cases = read_family("short", text, None).unwrap();
        assert_eq!(cases.len(), 8);
        assert_eq!(cases[1].name, "short/n7-d64-h4:2-window5-f32-t1");
        assert_eq!(read_family("short", text, Some(2)).unwrap()[0].kind.threads(), 2);
    }

    #[test]
    fn unknown_fields_and_impossible_cases_are_refused() {
        let unknown = "[[attention]]\nphase = \"forward\"\nseq = 3\n";
        assert!(read_family("a", unknown, None).unwrap_err().to_string().contains("seq"));
        let heads = "[[attention]]\nphase = \"forward\"\nseq_q = 3\nheads = 3\nkv_heads = 2\ndim = 8\nmask = \"full\"\n";
        assert!(read_family("a", heads, None).is_err());
    }

    #[test]
    fn the_projects_own_cases_can_be_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
        let all = Selection { filters: &[], threads: None };
        let cases = load(&folder, &all).unwrap();
        assert!(cases.len() > 50);
        let first = Selection { filters: &[cases[0].name.clone()], threads: None };
        assert_eq!(load(&folder, &first).unwrap().len(), 1);
    }
}
