//! Any call: refused with an error where the documentation says so, or else what the definition gives, the same with
//! any number of threads, through a cache, and in pieces.

mod case;
mod definition;
mod gradients;
mod memory;
mod terms;

use crate::numbers::Numbers;
use arbitrary::Unstructured;
use case::{Case, Layout, Storage};
use foveal::cache::{ContiguousCache, KvStore};
use foveal::mask::{Extent, Pattern};
use foveal::plan::{Inputs, MAX_DIM};
use foveal::reference::Options;
use foveal::{
    Attention, Cpu, Element, Error, MAX_GENERATED_ROWS, Phase, Plan, Result, Scale, Shape,
    TensorRef, Threads, Workspace,
};
use half::{bf16, f16};
use memory::{Memory, bits};

const DENSE: Layout = Layout { order: [2, 1, 0], gap: 0, skip: 0, repeat: false };

/// One call of softmax attention.
pub fn attention(bytes: &[u8]) {
    let Ok(case) = Case::read(&mut Unstructured::new(bytes)) else { return };
    match case.storage {
        Storage::F32 => Call::<f32>::check(&case, Rounding { result: 0.0, weight: 0.0 }),
        Storage::F16 => Call::<f16>::check(&case, Rounding { result: 1.0 / 1024.0, weight: 0.0 }),
        Storage::Bf16 => {
            Call::<bf16>::check(&case, Rounding { result: 1.0 / 128.0, weight: 1.0 / 128.0 });
        }
    }
}

/// What rounding to a storage type may change.
#[derive(Debug, Clone, Copy)]
struct Rounding {
    /// A result, relative to it.
    result: f64,
    /// A weight: where products are of pairs, weights are rounded too.
    weight: f64,
}

/// A case with its tensors.
#[derive(Clone)]
struct Call<'a, E> {
    case: &'a Case,
    attention: Attention<'a>,
    q: Memory<E>,
    k: Memory<E>,
    v: Memory<E>,
}

/// Output and log-sum-exp in row-major order.
struct Outcome<E> {
    out: Vec<E>,
    lse: Vec<f32>,
}

impl<E: Element> Call<'_, E> {
    fn check(case: &Case, rounding: Rounding) {
        let attention = Attention::new().mask(case.mask.clone()).scale(case.scale).cpu(case.cpu);
        let planned = plan(&attention, case.phase, [case.q, case.k, case.v]);
        let plan = match planned {
            Err(Error::ShapeOverflow { .. }) if !case.runs() => return,
            Err(error) => return assert!(!valid(case), "{error}"),
            Ok(plan) => plan,
        };
        assert!(valid(case), "an invalid call was planned");
        let _ = (plan.explain().to_string(), plan.workspace_bytes());
        if !case.runs() {
            return;
        }
        let call = Call::<E>::new(case, attention.clone());
        let Some(outcome) = call.run(&plan) else { return };
        call.assert_defined(&outcome, rounding);
        call.assert_same_with_one_thread(&outcome);
        call.assert_same_with_caches(&outcome);
        if case.phase == Phase::Prompt {
            let options = Options::new(call.scale(), &case.mask);
            call.assert_gradients(&plan, &outcome, (rounding.result, &options));
        }
        if let Some(terms) = case.terms {
            call.assert_terms(terms, rounding);
        }
    }

    fn new<'a>(case: &'a Case, attention: Attention<'a>) -> Call<'a, E> {
        let mut numbers = Numbers::new(case.numbers);
        let [q, k, v, _] = case.layouts;
        let q = Memory::new(case.q, q).fill(&mut numbers);
        let mut k = Memory::new(case.k, k).fill(&mut numbers);
        let mut v = Memory::new(case.v, v).fill(&mut numbers);
        for n in 0..case.poison {
            match n % 2 {
                0 => v.set(&mut numbers, [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][n % 3]),
                _ => k.set(&mut numbers, f32::NAN),
            }
        }
        Call { case, attention, q, k, v }
    }

    fn inputs(&self) -> Inputs<'_, E, E> {
        Inputs { q: self.q.view(), k: self.k.view(), v: self.v.view() }
    }

    /// Runs the plan on poisoned memory. `None` if the mask is for other lengths, and refused.
    fn run(&self, plan: &Plan<'_>) -> Option<Outcome<E>> {
        let case = self.case;
        let layout = Layout { repeat: false, ..case.layouts[3] };
        let mut out = Memory::<E>::new(plan.out_shape(), layout);
        let mut lse = Memory::<f32>::new(plan.out_shape().per_row(), layout);
        let mut workspace = Workspace::for_plan(plan);
        workspace.poison();
        let (views, inputs) = ((out.view_mut(), Some(lse.view_mut())), self.inputs());
        let done = plan.forward(inputs, views.0, views.1, &mut workspace);
        let Shape { batch, seq: queries, heads, .. } = case.q;
        let fits = case.mask.check(Extent { batch, heads, queries, keys: case.k.seq }).is_ok();
        assert_eq!(done.is_ok(), fits, "{done:?}");
        out.assert_untouched_between_rows();
        lse.assert_untouched_between_rows();
        fits.then(|| Outcome { out: out.elements(), lse: lse.elements() })
    }

    fn scale(&self) -> f64 {
        match self.case.scale {
            Scale::Value(scale) => f64::from(scale),
            _ => 1.0 / (self.case.q.dim as f64).sqrt(),
        }
    }

    fn assert_defined(&self, outcome: &Outcome<E>, rounding: Rounding) {
        let Inputs { q, k, v } = self.inputs();
        let scale = self.scale();
        let mut rows = outcome.out.chunks(self.case.v.dim).zip(&outcome.lse);
        let Shape { batch, seq, heads, .. } = self.case.q;
        for b in 0..batch {
            for t in 0..seq {
                for h in 0..heads {
                    let row = definition::row([q, k, v], &self.case.mask, scale, (b, t, h));
                    let (out, &lse) = rows.next().expect("one row for each query");
                    let what = (b, t, h, self.case);
                    assert_near(lse, row.lse, row.error() * 2.0, &what);
                    // An infinite value times no rounding is none.
                    let weights = (rounding.weight * row.value).max(0.0);
                    let error = row.error() * (1.0 + row.value) + weights;
                    for (&got, &expected) in out.iter().zip(&row.out) {
                        let error = error + rounding.result * expected.abs();
                        assert_near(got.to_f32(), expected, error, &what);
                    }
                }
            }
        }
    }

    fn assert_same_with_one_thread(&self, outcome: &Outcome<E>) {
        let Case { q, k, v, cpu, phase, .. } = *self.case;
        if cpu.threads == Threads::ONE {
            return;
        }
        let alone = self.attention.clone().cpu(Cpu { threads: Threads::ONE, ..cpu });
        let plan = plan(&alone, phase, [q, k, v]).expect("threads decide nothing");
        let again = self.run(&plan).expect("threads decide nothing");
        assert_eq!(bits(&again.out), bits(&outcome.out));
        assert_eq!(bits(&again.lse), bits(&outcome.lse));
    }

    /// The same keys from caches; whole, and where the mask allows it, cut in two.
    fn assert_same_with_caches(&self, outcome: &Outcome<E>) {
        let keys = self.case.k.seq;
        let whole = self.cached(0..self.case.q.seq, keys);
        assert_eq!(bits(&whole), bits(&outcome.out));
        let (cut, queries) = (self.case.cut, self.case.q.seq);
        if self.case.sized || self.case.q.batch != 1 {
            return;
        }
        let row = self.case.q.heads * self.case.v.dim;
        let last = self.cached(cut..queries, keys);
        assert_eq!(bits(&last), bits(&outcome.out[cut * row..]), "the rows behind the cut");
        if self.case.causal && keys >= queries {
            let first = self.cached(0..cut, keys - (queries - cut));
            assert_eq!(bits(&first), bits(&outcome.out[..cut * row]), "the rows before the cut");
        }
    }

    /// Some of the queries over caches that hold the first `keys` keys.
    fn cached(&self, queries: std::ops::Range<usize>, keys: usize) -> Vec<E> {
        let Inputs { q, k, v } = self.inputs();
        let q = dense(q, 0..self.case.q.batch, queries);
        let stores: Vec<ContiguousCache<E>> = (0..self.case.k.batch)
            .map(|b| {
                let (k, v) = (dense(k, b..b + 1, 0..keys), dense(v, b..b + 1, 0..keys));
                let (heads, dims) = (self.case.k.heads, (self.case.k.dim, self.case.v.dim));
                let mut store = ContiguousCache::new(heads, dims, keys).expect("a small cache");
                store.append(k.view(), v.view()).expect("there is room");
                store
            })
            .collect();
        let stores: Vec<&dyn KvStore> = stores.iter().map(|store| store as _).collect();
        let seq = keys + self.case.spare;
        let shapes = [q.view().shape(), Shape { seq, ..self.case.k }, Shape { seq, ..self.case.v }];
        let plan = plan(&self.attention, self.case.phase, shapes).expect("a valid call");
        let mut workspace = Workspace::for_plan(&plan);
        workspace.poison();
        let mut out = Memory::<E>::new(plan.out_shape(), DENSE);
        plan.forward_cached(q.view(), &stores, (out.view_mut(), None), &mut workspace)
            .expect("a valid call");
        out.elements()
    }
}

/// A copy of some sequences and tokens, row after row.
fn dense<E: Element>(
    from: TensorRef<'_, E>,
    batch: std::ops::Range<usize>,
    seq: std::ops::Range<usize>,
) -> Memory<E> {
    let shape = Shape { batch: batch.len(), seq: seq.len(), ..from.shape() };
    let mut memory = Memory::new(shape, DENSE);
    let mut view = memory.view_mut();
    for (b, from_b) in batch.enumerate() {
        for (t, from_t) in seq.clone().enumerate() {
            for h in 0..shape.heads {
                view.row_mut(b, t, h).copy_from_slice(from.row(from_b, from_t, h));
            }
        }
    }
    memory
}

fn plan<'a>(attention: &'a Attention<'_>, phase: Phase, [q, k, v]: [Shape; 3]) -> Result<Plan<'a>> {
    match phase {
        Phase::Prompt => attention.plan(q, k, v),
        Phase::Generated => attention.plan_decode(q, k, v),
    }
}

/// What the documentation of `Attention::plan` and `Attention::plan_decode` asks for.
fn valid(case: &Case) -> bool {
    let Case { q, k, v, .. } = *case;
    let grouped = if k.heads == 0 { q.heads == 0 } else { q.heads.is_multiple_of(k.heads) };
    k == Shape { batch: q.batch, dim: q.dim, ..k }
        && v == Shape { dim: v.dim, ..k }
        && grouped
        && (1..=MAX_DIM).contains(&q.dim)
        && (1..=MAX_DIM).contains(&v.dim)
        && !matches!(case.scale, Scale::Value(scale) if !scale.is_finite())
        && (case.phase == Phase::Prompt || q.seq <= MAX_GENERATED_ROWS)
}

/// Finite numbers are near; what is not finite by definition is not finite.
fn assert_near(got: f32, expected: f64, error: f64, what: &dyn std::fmt::Debug) {
    let got = f64::from(got);
    let near = match expected {
        f64::NEG_INFINITY => got == f64::NEG_INFINITY || got.is_nan(),
        _ if expected.is_finite() => (got - expected).abs() <= error,
        _ => !got.is_finite(),
    };
    assert!(near, "got {got}, expected {expected} ± {error:e}: {what:?}");
}
