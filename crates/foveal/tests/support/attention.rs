//! Golden attention calls as problems: inputs, every way to say their mask, and the answer.

use super::golden::{Array, Case, cases, check};
use foveal::mask::{Band, Dense, Documents, Extent, Pattern, Site};
use foveal::position::{RelativeBias, Slopes};
use foveal::{Attention, Mask, Shape, Strides, TensorRef};

/// One golden attention call.
#[derive(Debug)]
pub struct Problem {
    pub case: Case,
    /// Queries, keys and values with their shapes.
    pub inputs: [(Shape, Vec<f64>); 3],
    pub scale: f64,
    pub terms: Terms,
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

/// What a golden call does to its scores besides scale and mask.
#[derive(Debug, Default)]
pub struct Terms {
    pub softcap: Option<f32>,
    /// `[batch, heads, queries, keys]`; `None` where it is said by slopes or a table.
    pub bias: Option<Array>,
    /// The numbers of `bias` in f32.
    pub bias_f32: Vec<f32>,
    pub slopes: Option<Vec<f32>>,
    pub sinks: Option<Vec<f32>>,
    /// A table `[buckets, heads]` for distances up to 128, of one direction or of both.
    pub table: Option<(Vec<f32>, bool)>,
    /// `[batch, heads, queries, keys]`: what weights are multiplied by.
    pub dropout: Option<Array>,
}

impl Terms {
    fn of(case: &Case) -> Terms {
        let numbers = |name: &str| case.tensors.get(name).map(Array::to_f32);
        let slopes = numbers("slopes");
        let bias = case.tensors.get("bias").filter(|_| slopes.is_none()).cloned();
        let keep = case.options["keep"].as_f64();
        let both = || case.options["bidirectional"].as_bool().unwrap();
        Terms {
            softcap: case.options["softcap"].as_f64().map(|cap| cap as f32),
            bias_f32: bias.as_ref().map(Array::to_f32).unwrap_or_default(),
            bias,
            slopes,
            sinks: numbers("sinks"),
            table: numbers("table").map(|table| (table, both())),
            dropout: keep.map(|keep| {
                let mut factors = case.tensor("keep_mask").clone();
                factors.data.iter_mut().for_each(|x| *x /= keep);
                factors
            }),
        }
    }

    /// Adds the terms to a description; slopes as the standard ones if they are.
    pub fn describe<'a>(&'a self, mut attention: Attention<'a>) -> Attention<'a> {
        assert!(self.dropout.is_none(), "the engine chooses for itself what it drops");
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        if let Some(bias) = &self.bias {
            attention = attention.bias(self.bias_view(bias));
        }
        if let Some(slopes) = &self.slopes {
            let heads = slopes.len();
            let standard = (0..heads).all(|h| Slopes::Standard.of(h, heads) == slopes[h]);
            let slopes = if standard { Slopes::Standard } else { Slopes::Given(slopes) };
            assert_eq!(slopes, Slopes::Standard, "the golden slopes are those of the paper");
            attention = attention.alibi(slopes);
        }
        if let Some((table, both)) = &self.table {
            let heads = table.len() / 32;
            let bias = match both {
                true => RelativeBias::bidirectional(table, heads, 128),
                false => RelativeBias::causal(table, heads, 128),
            };
            attention = attention.relative_bias(bias.unwrap());
        }
        if let Some(sinks) = &self.sinks {
            attention = attention.sinks(sinks);
        }
        attention
    }

    fn bias_view(&self, bias: &Array) -> TensorRef<'_, f32> {
        let &[batch, heads, queries, keys] = &bias.shape[..] else { panic!("{:?}", bias.shape) };
        let shape = Shape { batch, seq: queries, heads, dim: keys };
        let strides = Strides { batch: heads * queries * keys, heads: queries * keys, seq: keys };
        TensorRef::from_strides(&self.bias_f32, shape, strides).unwrap()
    }

    /// What is added to a score, in f64.
    pub fn added(&self, extent: Extent, at: Site, row: usize, j: usize) -> f64 {
        let distance = row as isize + extent.keys as isize - extent.queries as isize - j as isize;
        let mut sum = self.bias.as_ref().map_or(0.0, |bias| entry(bias, at, row, j));
        if let Some(slopes) = &self.slopes {
            sum -= f64::from(slopes[at.q_head]) * distance.abs() as f64;
        }
        if let Some((table, both)) = &self.table {
            sum += f64::from(table[t5_bucket(distance, *both) * extent.heads + at.q_head]);
        }
        sum
    }
}

/// An entry of `[batch, heads, queries, keys]`, axes of 1 shared.
pub fn entry(array: &Array, at: Site, row: usize, j: usize) -> f64 {
    let index = [at.batch, at.q_head, row, j];
    let flat = array
        .shape
        .iter()
        .zip(index)
        .fold(0, |flat, (&extent, index)| flat * extent + if extent == 1 { 0 } else { index });
    array.data[flat]
}

/// The bucket of 32 for distances up to 128, from the rule's words: powers of two compared as integers.
pub fn t5_bucket(distance: isize, both: bool) -> usize {
    let (first, steps) = if both { (8, 8) } else { (16, 16) };
    let offset = if both && distance < 0 { 16 } else { 0 };
    let n = if both { distance.unsigned_abs() } else { distance.max(0) as usize };
    if n < first {
        return offset + n;
    }
    // The ratio of 128 to the first limit is 8 or 16: bucket b begins at n^steps >= first^steps · ratio^b.
    let ratio = 128 / first;
    let n = (n as f64).log2() * steps as f64;
    let begins = |b: usize| (first as f64).log2() * steps as f64 + (ratio as f64).log2() * b as f64;
    let b = (0..steps).rev().find(|&b| n >= begins(b) - 1e-9).unwrap();
    offset + first + b
}

/// All calls of one sequence a batch row.
pub fn problems() -> Vec<Problem> {
    cases("softmax").into_iter().map(from_batch).collect()
}

/// Calls with a bias by bucketed distance.
pub fn bucketed_problems() -> Vec<Problem> {
    cases("softmax_t5_bias").into_iter().map(from_batch).collect()
}

/// Calls whose dropped weights are given.
pub fn dropout_problems() -> Vec<Problem> {
    cases("softmax_dropout").into_iter().map(from_batch).collect()
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
    Problem {
        inputs: inputs(&case),
        scale: case.number("scale"),
        terms: Terms::of(&case),
        masks,
        case,
    }
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
    // Bucketed biases say whether they are causal; calls with given dropout are.
    let kind = options["mask_kind"].as_str();
    let kind = kind.unwrap_or_else(|| match options["causal"].as_bool() {
        Some(false) => "none",
        _ => "causal",
    });
    Some(match kind {
        "none" => Mask::full(),
        "causal" => Mask::causal(),
        "causal sliding window" => Mask::window(window()),
        "two-sided window" => Mask::band(count("left"), count("right")),
        "w strictly earlier keys, self excluded" => {
            Mask::window(window() + 1).and(Mask::pattern(NotSelf))
        }
        "causal window plus first s tokens always visible (StreamingLLM mask, no re-positioning)" => {
            Mask::streaming(count("sink_tokens").unwrap(), window())
        }
        "explicit key padding" => Mask::key_lengths(&lengths("key_lengths")),
        "causal and left padding of keys" => {
            Mask::causal().and(Mask::left_padding(&lengths("left_pad")))
        }
        "causal and same document" => {
            let ids = lengths("doc_id");
            let starts = ids.chunks(keys).map(|ids| {
                let mut starts = vec![0];
                starts.extend((1..keys).filter(|&j| ids[j] != ids[j - 1]));
                starts.push(keys);
                Mask::documents(&starts).unwrap()
            });
            Mask::causal().and(Mask::per_sequence(starts.collect()))
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
    Problem {
        inputs: inputs(&case),
        scale: case.number("scale"),
        terms: Terms::default(),
        masks,
        case,
    }
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

/// Everything but the token itself.
#[derive(Debug)]
struct NotSelf;

impl Pattern for NotSelf {
    fn allows(&self, _: Site, i: isize, j: usize) -> bool {
        i != j as isize
    }
}
