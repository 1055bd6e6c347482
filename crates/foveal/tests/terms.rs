//! Everything that is done to scores besides scale and mask, against the definition in f64: every level, both
//! phases, alone and together.

mod support;

use foveal::cache::ContiguousCache;
use foveal::mask::Site;
use foveal::position::{RelativeBias, Slopes};
use foveal::reference::{Input, Options, attention_with};
use foveal::{Attention, Dropout, Error, Mask, Shape, Tensor, TensorRef, Workspace};
use support::{Random, cpus, error};

/// A call with every term at hand.
struct Call {
    q: Tensor<f32>,
    k: Tensor<f32>,
    v: Tensor<f32>,
    bias: Tensor<f32>,
    slopes: Vec<f32>,
    table: Vec<f32>,
    sinks: Vec<f32>,
}

/// Which terms a call uses.
#[derive(Debug, Clone, Copy, Default)]
struct Use {
    softcap: Option<f32>,
    bias: bool,
    alibi: bool,
    /// A relative bias; true is of both directions.
    table: Option<bool>,
    sinks: bool,
    dropout: Option<Dropout>,
}

const DROPOUT: Dropout = Dropout { rate: 0.3, seed: 11 };

fn uses() -> Vec<Use> {
    let none = Use::default();
    vec![
        Use { softcap: Some(1.5), ..none },
        Use { bias: true, ..none },
        Use { alibi: true, ..none },
        Use { table: Some(false), ..none },
        Use { table: Some(true), ..none },
        Use { sinks: true, ..none },
        Use { dropout: Some(DROPOUT), ..none },
        Use { bias: true, table: Some(true), ..none },
        Use {
            softcap: Some(30.0),
            bias: true,
            alibi: true,
            table: Some(true),
            sinks: true,
            dropout: Some(DROPOUT),
        },
    ]
}

impl Call {
    fn new(q: Shape, k: Shape, shared: [bool; 3]) -> Call {
        let mut random = Random::new((q.seq * 1000 + k.seq) as u64);
        let one = |shared: bool, extent: usize| if shared { 1 } else { extent };
        let bias = Shape {
            batch: one(shared[0], q.batch),
            seq: one(shared[1], q.seq),
            heads: one(shared[2], q.heads),
            dim: k.seq,
        };
        let mut numbers = |n: usize| (0..n).map(|_| random.number()).collect::<Vec<_>>();
        // Slopes of both signs, whose largest term is no larger than the others: a logit's rounding is
        // relative to its size.
        let slopes = numbers(q.heads).into_iter().map(|x| x * 3.0 / k.seq.max(1) as f32).collect();
        let (table, sinks) = (numbers(16 * q.heads), numbers(q.heads));
        Call {
            q: random.tensor(q, 2.0),
            k: random.tensor(k, 2.0),
            v: random.tensor(k, 1.0),
            bias: random.tensor(bias, 3.0),
            slopes,
            table,
            sinks,
        }
    }

    fn relative(&self, both: bool) -> RelativeBias<'_> {
        let heads = self.q.shape().heads;
        let make = if both { RelativeBias::bidirectional } else { RelativeBias::causal };
        make(&self.table, heads, 40).unwrap()
    }

    fn describe(&self, mask: &Mask, terms: Use) -> Attention<'_> {
        let mut attention = Attention::new().mask(mask.clone());
        if let Some(cap) = terms.softcap {
            attention = attention.softcap(cap);
        }
        if terms.bias {
            attention = attention.bias(self.bias.view());
        }
        if terms.alibi {
            attention = attention.alibi(Slopes::Given(&self.slopes));
        }
        if let Some(both) = terms.table {
            attention = attention.relative_bias(self.relative(both));
        }
        if terms.sinks {
            attention = attention.sinks(&self.sinks);
        }
        if let Some(dropout) = terms.dropout {
            attention = attention.dropout(dropout);
        }
        attention
    }

    fn define(&self, mask: &Mask, terms: Use) -> (Vec<f64>, Vec<f64>) {
        let (queries, keys) = (self.q.shape().seq, self.k.shape().seq);
        let position = |row: usize| row as isize + keys as isize - queries as isize;
        let bias = |at: Site, row: usize, j: usize| {
            let distance = position(row) - j as isize;
            let mut sum = 0.0;
            if terms.bias {
                let shape = self.bias.shape();
                let shared = |extent, index| if extent == 1 { 0 } else { index };
                let (batch, head) = (shared(shape.batch, at.batch), shared(shape.heads, at.q_head));
                sum += f64::from(self.bias.view().row(batch, shared(shape.seq, row), head)[j]);
            }
            if terms.alibi {
                sum -= f64::from(self.slopes[at.q_head]) * distance.abs() as f64;
            }
            if let Some(both) = terms.table {
                let bucket = self.relative(both).bucket(distance);
                sum += f64::from(self.table[bucket * self.q.shape().heads + at.q_head]);
            }
            sum
        };
        let drop = |at: Site, row: usize, j: usize| {
            let site = (at.batch, at.q_head);
            terms.dropout.map_or(1.0, |dropout| dropout.factor(site, position(row), j).into())
        };
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let data = [&self.q, &self.k, &self.v].map(|x| wide(x.as_slice()));
        let shapes = [&self.q, &self.k, &self.v].map(Tensor::shape);
        let inputs = [0, 1, 2].map(|n| Input { data: &data[n], shape: shapes[n] });
        let sinks = wide(&self.sinks);
        let options = Options {
            softcap: terms.softcap.map(f64::from),
            bias: Some(&bias),
            sinks: terms.sinks.then_some(&sinks),
            dropout: Some(&drop),
            ..Options::new(1.0 / (self.q.shape().dim as f64).sqrt(), mask)
        };
        let result = attention_with(inputs, &options).unwrap();
        (result.out, result.lse)
    }

    fn check(&self, mask: &Mask, terms: Use, bound: f64) {
        let (out, lse) = self.define(mask, terms);
        for cpu in cpus() {
            let attention = self.describe(mask, terms).cpu(cpu);
            let (q, k, v) = (self.q.view(), self.k.view(), self.v.view());
            let mut results = vec![attention.forward(q, k, v).unwrap()];
            if q.shape().seq <= 64 {
                results.push(attention.decode(q, k, v).unwrap());
            }
            for result in results {
                let what = format!(
                    "{:?} over {:?}, {mask}, {terms:?}, {}",
                    q.shape(),
                    k.shape(),
                    cpu.level
                );
                let worst = error(result.out.as_slice(), &out);
                assert!(worst <= bound, "{what}: output off by {worst:e}");
                let worst = error(result.lse.as_slice(), &lse);
                assert!(worst <= bound, "{what}: log-sum-exp off by {worst:e}");
            }
        }
    }
}

#[test]
fn all_small_shapes() {
    for queries in 0..=7 {
        for keys in 0..=9 {
            let heads = [(1, 1), (2, 1), (6, 3)][(queries + keys) % 3];
            let q = Shape {
                batch: 2,
                seq: queries,
                heads: heads.0,
                dim: 1 + (queries * 3 + keys) % 18,
            };
            let k = Shape { seq: keys, heads: heads.1, ..q };
            let shared = [keys % 2 == 0, queries % 3 == 0, (keys / 2) % 2 == 0];
            let call = Call::new(q, k, shared);
            for terms in uses() {
                for mask in [Mask::full(), Mask::causal(), Mask::window(2)] {
                    call.check(&mask, terms, 3e-6);
                }
            }
        }
    }
}

#[test]
fn shapes_beyond_a_tile() {
    for (queries, keys) in [(50, 300), (7, 1100), (97, 257), (64, 64)] {
        let q = Shape { batch: 1, seq: queries, heads: 4, dim: 40 };
        let k = Shape { seq: keys, heads: 2, ..q };
        let call = Call::new(q, k, [false; 3]);
        for terms in uses() {
            for mask in [Mask::full(), Mask::causal(), Mask::window(37)] {
                call.check(&mask, terms, 6e-6);
            }
        }
    }
}

/// Chunks of a prompt, and rows over a cache, are the whole prompt's bits.
#[test]
fn chunks_over_a_cache_are_the_whole() {
    let q = Shape { batch: 1, seq: 70, heads: 4, dim: 24 };
    let k = Shape { heads: 2, seq: 70, ..q };
    let call = Call::new(q, k, [false; 3]);
    for terms in uses() {
        let attention = call.describe(&Mask::causal(), terms);
        let whole = attention.forward(call.q.view(), call.k.view(), call.v.view()).unwrap();
        let mut cache = ContiguousCache::<f32>::new(2, (24, 24), 70).unwrap();
        cache.append(support::tokens(&call.k, 0..30), support::tokens(&call.v, 0..30)).unwrap();
        cache.append(support::tokens(&call.k, 30..70), support::tokens(&call.v, 30..70)).unwrap();
        // The last 40 rows, as a chunk: their bias is the last 40 rows of the bias.
        let rows = Shape { seq: 40, ..q };
        let bias_shape = Shape { seq: 40, ..call.bias.shape() };
        let bias = &call.bias.as_slice()[30 * 4 * 70..];
        let mut chunk = attention.clone();
        if terms.bias {
            chunk = chunk.bias(TensorRef::new(bias, bias_shape).unwrap());
        }
        let plan = chunk.plan(rows, k, k).unwrap();
        let mut out = Tensor::<f32>::zeros(rows).unwrap();
        let mut workspace = Workspace::for_plan(&plan);
        workspace.poison();
        let queries = support::tokens(&call.q, 30..70);
        plan.forward_cached(queries, &[&cache], (out.view_mut(), None), &mut workspace).unwrap();
        assert_eq!(out.as_slice(), &whole.out.as_slice()[30 * 4 * 24..], "{terms:?}");
    }
}

#[test]
fn a_row_without_keys_has_its_sink() {
    let q = Shape { batch: 1, seq: 3, heads: 2, dim: 4 };
    let call = Call::new(q, Shape { seq: 2, ..q }, [false; 3]);
    let attention = call.describe(&Mask::causal(), Use { sinks: true, ..Use::default() });
    let (q, k, v) = (call.q.view(), call.k.view(), call.v.view());
    for result in [attention.forward(q, k, v).unwrap(), attention.decode(q, k, v).unwrap()] {
        assert_eq!(result.out.view().row(0, 0, 1), [0.0; 4]);
        let lse = result.lse.view().row(0, 0, 1)[0];
        assert!((lse - call.sinks[1]).abs() < 1e-6);
    }
}

#[test]
fn a_bias_of_minus_infinity_hides_and_other_bad_numbers_stay_in_their_rows() {
    let shape = Shape { batch: 1, seq: 9, heads: 1, dim: 8 };
    let mut call = Call::new(shape, shape, [true; 3]);
    let bad = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN];
    for bad in bad {
        call.bias = Tensor::from_vec(vec![0.0; 81], Shape { dim: 9, ..shape }).unwrap();
        // Row 3 is biased at a key that it sees; row 4 at one that it does not.
        let mut numbers = vec![0.0; 81];
        (numbers[3 * 9 + 2], numbers[4 * 9 + 7]) = (bad, bad);
        call.bias = Tensor::from_vec(numbers, Shape { dim: 9, ..shape }).unwrap();
        for softcap in [None, Some(2.0)] {
            let terms = Use { bias: true, softcap, ..Use::default() };
            let plain = Use { bias: false, ..terms };
            let (q, k, v) = (call.q.view(), call.k.view(), call.v.view());
            let expected = call.describe(&Mask::causal(), plain).forward(q, k, v).unwrap();
            let (defined, _) = call.define(&Mask::causal(), terms);
            for cpu in cpus() {
                let attention = call.describe(&Mask::causal(), terms).cpu(cpu);
                for result in
                    [attention.forward(q, k, v).unwrap(), attention.decode(q, k, v).unwrap()]
                {
                    let got = result.out.as_slice();
                    let row = &got[3 * 8..4 * 8];
                    if bad == f32::NEG_INFINITY {
                        assert!(error(row, &defined[3 * 8..4 * 8]) < 2e-6);
                    } else {
                        assert!(row.iter().all(|x| x.is_nan()), "{bad} {row:?}");
                    }
                    let others = |x: &[f32]| [&x[..3 * 8], &x[4 * 8..]].concat();
                    let worst = others(got)
                        .iter()
                        .zip(others(expected.out.as_slice()))
                        .fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
                    assert!(worst < 2e-6, "{bad} {softcap:?} {worst}");
                }
            }
        }
    }
}

#[test]
fn terms_that_do_not_fit_are_refused() {
    let q = Shape { batch: 2, seq: 3, heads: 4, dim: 8 };
    let k = Shape { seq: 5, heads: 2, ..q };
    let plan = |attention: Attention<'_>| attention.plan(q, k, k).map(|_| ()).unwrap_err();
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(plan(Attention::new().softcap(cap)), Error::InvalidParameter { .. }));
    }
    for rate in [-0.1, 1.0, f32::NAN] {
        let attention = Attention::new().dropout(Dropout { rate, seed: 0 });
        assert!(matches!(plan(attention), Error::InvalidParameter { .. }));
    }
    let numbers = [0.0; 32 * 4];
    let fits = |attention: Attention<'_>| attention.plan(q, k, k).is_ok();
    for n in 0..6 {
        assert_eq!(fits(Attention::new().sinks(&numbers[..n])), n == 4);
        assert_eq!(fits(Attention::new().alibi(Slopes::Given(&numbers[..n]))), n == 4);
    }
    for heads in [2, 4] {
        let bias = RelativeBias::causal(&numbers[..32 * heads], heads, 128).unwrap();
        assert_eq!(fits(Attention::new().relative_bias(bias)), heads == 4);
    }
    for (batch, seq, heads, dim) in [(2, 3, 4, 5), (1, 1, 1, 5), (1, 3, 1, 5)] {
        let bias = |batch, seq, heads, dim| {
            let shape = Shape { batch, seq, heads, dim };
            Tensor::<f32>::zeros(shape).unwrap()
        };
        assert!(fits(Attention::new().bias(bias(batch, seq, heads, dim).view())));
        for wrong in [
            bias(3, seq, heads, dim),
            bias(batch, 2, heads, dim),
            bias(batch, seq, 2, dim),
            bias(batch, seq, heads, 4),
        ] {
            assert!(matches!(
                plan(Attention::new().bias(wrong.view())),
                Error::ShapeMismatch { .. }
            ));
        }
    }
}

#[test]
fn a_plan_says_its_terms() {
    let shape = Shape { batch: 1, seq: 3, heads: 2, dim: 8 };
    let explain =
        |attention: Attention<'_>| attention.plan(shape, shape, shape).unwrap().explain().terms;
    assert_eq!(explain(Attention::new()), "none");
    let sinks = [0.0; 2];
    let attention = Attention::new().softcap(50.0).alibi(Slopes::Standard).sinks(&sinks);
    assert_eq!(explain(attention), "softcap 50, ALiBi, sinks");
}
