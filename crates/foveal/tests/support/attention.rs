//! Golden attention calls as problems: inputs, every way to say their mask, and the answer.

use super::golden::{Array, Case, cases, check};
use foveal::mask::{Band, Coverage, Dense, Documents, Extent, Pattern, Site};
use foveal::{Mask, Shape};
use std::ops::Range;

/// One golden attention call.
#[derive(Debug)]
pub struct Problem {
    pub case: Case,
    /// Queries, keys and values with their shapes.
    pub inputs: [(Shape, Vec<f64>); 3],
    pub scale: f64,
    /// The same mask in several words.
    pub masks: Vec<(&'static str, Mask)>,
}

/// What an attention returns: output and log-sum-exp in row-major order.
pub type Answer = (Vec<f64>, Vec<f64>);

impl Problem {
    /// Runs `attend` with every form of the mask and compares output and log-sum-exp.
    pub fn check(&self, tolerance: f64, attend: &dyn Fn(&Problem, &Mask) -> Answer) {
        for (form, mask) in &self.masks {
            let (out, lse) = attend(self, mask);
            let what = |tensor| format!("{} {tensor} with the {form} mask", self.case.name);
            check(&what("out"), &out, &self.case.tensor("out").data, tolerance);
            check(&what("lse"), &lse, &self.case.tensor("lse").data, tolerance);
        }
    }

    /// Sequences, heads and lengths of the call.
    pub fn extent(&self) -> Extent {
        let [(q, _), (k, _), _] = &self.inputs;
        Extent { batch: q.batch, heads: q.heads, queries: q.seq, keys: k.seq }
    }
}

/// Cases whose formula has a term that [`foveal::Attention`] does not have.
const LATER: [(&str, &str); 13] = [
    ("softmax_bias_full", "a bias added to scores"),
    ("softmax_bias_head_bcast_batch", "a bias added to scores"),
    ("softmax_bias_bcast_heads", "a bias added to scores"),
    ("softmax_bias_key_only", "a bias added to scores"),
    ("softmax_bias_minus_inf", "a bias added to scores"),
    ("softmax_alibi_h8", "a bias by distance"),
    ("softmax_alibi_h12", "a bias by distance"),
    ("softmax_alibi_h6", "a bias by distance"),
    ("softmax_softcap_causal", "a cap on scores"),
    ("softmax_softcap50_window", "a cap on scores"),
    ("softmax_sinks_causal", "a learned sink"),
    ("softmax_sinks_window", "a learned sink"),
    ("softmax_sinks_dead_rows", "a learned sink"),
];

/// All calls of one sequence a batch row that need nothing but scale, mask and head groups.
pub fn problems() -> Vec<Problem> {
    let (later, now): (Vec<_>, Vec<_>) = cases("softmax")
        .into_iter()
        .partition(|case| LATER.iter().any(|(name, _)| *name == case.name));
    assert_eq!(later.len(), LATER.len(), "a skipped case is gone");
    now.into_iter().map(from_batch).collect()
}

/// All calls of packed documents.
pub fn packed_problems() -> Vec<Problem> {
    cases("softmax_varlen").into_iter().map(from_packed).collect()
}

/// The shape of `[batch, seq, heads, dim]`, or of `[seq, heads, dim]` as one batch row.
pub fn shape(array: &Array) -> Shape {
    match array.shape[..] {
        [batch, seq, heads, dim] => Shape { batch, seq, heads, dim },
        [seq, heads, dim] => Shape { batch: 1, seq, heads, dim },
        ref other => panic!("no attention input: {other:?}"),
    }
}

pub fn inputs(case: &Case) -> [(Shape, Vec<f64>); 3] {
    ["q", "k", "v"].map(|name| (shape(case.tensor(name)), case.tensor(name).data.clone()))
}

/// A mask tensor `[batch, heads, queries, keys]`, axes of 1 shared.
pub fn dense(array: &Array) -> Mask {
    let &[batch, heads, queries, keys] = &array.shape[..] else { panic!("{:?}", array.shape) };
    Dense::new(&array.flags(), Extent { batch, heads, queries, keys }).unwrap().into()
}

fn from_batch(case: Case) -> Problem {
    let mut masks: Vec<_> = typed(&case).into_iter().map(|mask| ("typed", mask)).collect();
    masks.extend(case.tensors.get("mask").map(|array| ("dense", dense(array))));
    assert!(!masks.is_empty(), "{} says nothing about its mask", case.name);
    Problem { inputs: inputs(&case), scale: case.number("scale"), masks, case }
}

/// The mask from what the case's options say, if they determine it.
fn typed(case: &Case) -> Option<Mask> {
    let options = &case.options;
    let count = |name: &str| options[name].as_u64().map(|x| x as usize);
    let window = || count("window").unwrap();
    let keys = case.tensor("k").shape[1];
    let lengths = |name: &str| {
        case.tensors.get(name).map_or_else(
            || {
                options[name]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|x| x.as_u64().unwrap() as usize)
                    .collect()
            },
            Array::indices,
        )
    };
    Some(match options["mask_kind"].as_str().unwrap() {
        "none" => Mask::full(),
        "causal" => Mask::causal(),
        "causal sliding window" => Mask::window(window()),
        "two-sided window" => Mask::band(count("left"), count("right")),
        "w strictly earlier keys, self excluded" => {
            Mask::window(window() + 1).and(Mask::pattern(NotSelf))
        }
        "causal window plus first s tokens always visible (StreamingLLM mask, no re-positioning)" =>
        {
            let first = Mask::pattern(Keys(0..count("sink_tokens").unwrap()));
            Mask::window(window()).or(first).and(Mask::causal())
        }
        "explicit key padding" => per_sequence(&lengths("key_lengths"), |len| 0..len),
        "causal and left padding of keys" => {
            Mask::causal().and(per_sequence(&lengths("left_pad"), |pad| pad..keys))
        }
        "causal and same document" => {
            let ids = lengths("doc_id");
            let starts = ids.chunks(keys).map(|ids| {
                let mut starts = vec![0];
                starts.extend((1..keys).filter(|&j| ids[j] != ids[j - 1]));
                starts.push(keys);
                Mask::documents(&starts).unwrap()
            });
            Mask::causal().and(Mask::pattern(PerSequence(starts.collect())))
        }
        "explicit" => return None,
        other => panic!("{}: unknown mask {other:?}", case.name),
    })
}

fn from_packed(case: Case) -> Problem {
    let starts = |name: &str| case.tensor(name).indices();
    let (rows, keys) = (starts("cu_seqlens_q"), starts("cu_seqlens_k"));
    let (band, alone) = match case.options["mask_kind"].as_str().unwrap() {
        "none" => (Band { behind: None, ahead: None }, Mask::full()),
        "causal" => (Band { behind: None, ahead: Some(0) }, Mask::causal()),
        "window" => {
            let width = case.number("window") as usize;
            (Band { behind: Some(width - 1), ahead: Some(0) }, Mask::window(width))
        }
        other => panic!("{}: unknown mask {other:?}", case.name),
    };
    let documents = Documents::new(&rows, &keys).unwrap();
    let mut masks = vec![
        ("typed", Mask::from(documents.clone().within(band))),
        ("dense", dense_documents(&rows, &keys, band)),
    ];
    if rows == keys {
        // Positions within equal documents differ as positions in the packed sequence do.
        masks.push(("composed", Mask::from(documents).and(alone)));
    }
    Problem { inputs: inputs(&case), scale: case.number("scale"), masks, case }
}

/// Document by document, without [`Documents`].
fn dense_documents(rows: &[usize], keys: &[usize], band: Band) -> Mask {
    let (queries, total) = (rows[rows.len() - 1], keys[keys.len() - 1]);
    let mut visible = vec![false; queries * total];
    for (rows, keys) in rows.windows(2).zip(keys.windows(2)) {
        for r in rows[0]..rows[1] {
            for j in keys[0]..keys[1] {
                // Both count from their document's end.
                let ahead = (rows[1] - r) as isize - (keys[1] - j) as isize;
                let behind = band.behind.is_none_or(|behind| -ahead <= behind as isize);
                let before = band.ahead.is_none_or(|most| ahead <= most as isize);
                visible[r * total + j] = behind && before;
            }
        }
    }
    Dense::new(&visible, Extent { batch: 1, heads: 1, queries, keys: total }).unwrap().into()
}

/// A range of keys for each sequence.
fn per_sequence(numbers: &[usize], range: impl Fn(usize) -> Range<usize>) -> Mask {
    let masks = numbers.iter().map(|&n| Mask::pattern(Keys(range(n)))).collect();
    Mask::pattern(PerSequence(masks))
}

/// Certain keys, whatever the query.
#[derive(Debug)]
pub struct Keys(pub Range<usize>);

impl Pattern for Keys {
    fn allows(&self, _: Site, _: isize, j: usize) -> bool {
        self.0.contains(&j)
    }
}

/// Everything but the token itself.
#[derive(Debug)]
struct NotSelf;

impl Pattern for NotSelf {
    fn allows(&self, _: Site, i: isize, j: usize) -> bool {
        i != j as isize
    }
}

/// Another mask for each sequence of the batch.
#[derive(Debug)]
struct PerSequence(Vec<Mask>);

impl Pattern for PerSequence {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        self.0[at.batch].allows(at, i, j)
    }
    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        self.0[at.batch].live(at, rows, keys, visit);
    }
    fn fill(&self, at: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        self.0[at.batch].fill(at, i, keys, bits);
    }
}
