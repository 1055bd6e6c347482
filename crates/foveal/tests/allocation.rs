//! Planning and running a call allocate nothing: an allocator that counts.

use foveal::cache::codes::Bits;
use foveal::cache::{ContiguousCache, KvStore, LatentCache, QuantizedCache, TILE};
use foveal::latent::{LatentAttention, LatentCall, LatentDims, LatentForm, LatentScratch};
use foveal::nn::{LayerNorm, NormBackward, NormGradients, layer_norm_backward};
use foveal::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use foveal::position::RelativeEncoding;
use foveal::projection::{
    Input, Matrix, MatrixShape, Output, ProjectionBackward, ProjectionGradients,
    backward_workspace_bytes, project_backward,
};
use foveal::{
    Attention, Cpu, Element, Gradient, Level, Mask, Phase, Plan, Shape, Tensor, TensorMut, Threads,
    Workspace,
};
use half::bf16;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every request is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        BYTES.with(|bytes| bytes.set(bytes.get() + layout.size()));
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread while `work` runs.
fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

/// Bytes that this thread allocates while `work` runs.
fn bytes(work: impl FnOnce()) -> usize {
    let before = BYTES.with(Cell::get);
    work();
    BYTES.with(Cell::get) - before
}

const KV: Shape = Shape { batch: 2, seq: 700, heads: 2, dim: 40 };

fn plan<'a>(attention: &'a Attention, phase: Phase, q: Shape) -> Plan<'a> {
    let planned = match phase {
        Phase::Prompt => attention.plan(q, KV, KV),
        Phase::Generated => attention.plan_decode(q, KV, KV),
    };
    planned.unwrap()
}

fn queries(phase: Phase) -> Shape {
    let seq = match phase {
        Phase::Prompt => 150,
        Phase::Generated => 2,
    };
    Shape { seq, heads: 6, ..KV }
}

fn masks() -> [Mask; 3] {
    [
        Mask::full(),
        Mask::causal(),
        Mask::window(90).or(Mask::band(Some(300), Some(0)).and(Mask::band(None, Some(7)))),
    ]
}

/// Every level, phase and mask.
fn each_attention(mut check: impl FnMut(&Attention, Phase, &str)) {
    for level in Level::available() {
        for phase in [Phase::Prompt, Phase::Generated] {
            for mask in masks() {
                let cpu = Cpu { level, threads: Threads::ONE };
                let what = format!("{level} {phase:?} {mask}");
                check(&Attention::new().mask(mask).cpu(cpu), phase, &what);
            }
        }
    }
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![1u8; 100]))), 1);
}

#[test]
fn planning_allocates_nothing() {
    each_attention(|attention, phase, what| {
        let count = allocations(|| {
            std::hint::black_box(plan(attention, phase, queries(phase)).workspace_bytes());
        });
        assert_eq!(count, 0, "{what}");
    });
}

fn tensors_allocate_nothing<E: Element>() {
    each_attention(|attention, phase, what| {
        let q = Tensor::<E>::zeros(queries(phase)).unwrap();
        let kv = Tensor::<E>::zeros(KV).unwrap();
        let plan = plan(attention, phase, q.shape());
        let mut out = Tensor::<E>::zeros(plan.out_shape()).unwrap();
        let mut lse = Tensor::<f32>::zeros(plan.out_shape().per_row()).unwrap();
        let mut workspace = Workspace::for_plan(&plan);
        let count = allocations(|| {
            let inputs = Inputs { q: q.view(), k: kv.view(), v: kv.view() };
            plan.forward(inputs, out.view_mut(), Some(lse.view_mut()), &mut workspace).unwrap();
        });
        assert_eq!(count, 0, "{what} {}", E::DTYPE);
    });
}

#[test]
fn tensors_are_attended_to_without_allocating() {
    tensors_allocate_nothing::<f32>();
    tensors_allocate_nothing::<bf16>();
}

fn gradients_allocate_nothing<E: Element>() {
    each_attention(|attention, phase, what| {
        if phase == Phase::Generated {
            return;
        }
        let q = Tensor::<E>::zeros(queries(phase)).unwrap();
        let kv = Tensor::<E>::zeros(KV).unwrap();
        let plan = plan(attention, phase, q.shape());
        let lse = Tensor::<f32>::zeros(q.shape().per_row()).unwrap();
        let [mut d_q, mut d_k, mut d_v] = [q.clone(), kv.clone(), kv.clone()];
        let mut workspace = Workspace::for_backward::<E>(&plan);
        let count = allocations(|| {
            let inputs = Inputs { q: q.view(), k: kv.view(), v: kv.view() };
            let saved = Saved { out: q.view(), lse: lse.view() };
            let upstream = Upstream { d_out: q.view(), d_lse: None };
            let gradients = Gradients {
                d_q: d_q.view_mut(),
                d_k: d_k.view_mut(),
                d_v: d_v.view_mut(),
                terms: TermGradients::default(),
            };
            plan.backward(inputs, saved, upstream, gradients, &mut workspace).unwrap();
        });
        assert_eq!(count, 0, "{what} {}", E::DTYPE);
    });
}

#[test]
fn gradients_are_computed_without_allocating() {
    gradients_allocate_nothing::<f32>();
    gradients_allocate_nothing::<bf16>();
}

fn cache<E: Element>(tokens: usize) -> ContiguousCache<E> {
    let shape = Shape { batch: 1, seq: tokens, ..KV };
    let tensor = Tensor::<f32>::zeros(shape).unwrap();
    let mut cache = ContiguousCache::new(KV.heads, (KV.dim, KV.dim), KV.seq).unwrap();
    cache.append(tensor.view(), tensor.view()).unwrap();
    cache
}

fn caches_allocate_nothing<E: Element>() {
    each_attention(|attention, phase, what| {
        let (first, second) = (cache::<E>(700), cache::<E>(301));
        let stores: [&dyn KvStore; 2] = [&first, &second];
        let q = Tensor::<f32>::zeros(queries(phase)).unwrap();
        let plan = plan(attention, phase, q.shape());
        let shape = plan.out_shape();
        let mut out = vec![0.0f32; shape.checked_len().unwrap()];
        let mut workspace = Workspace::for_plan(&plan);
        let count = allocations(|| {
            let out = TensorMut::new(&mut out, shape).unwrap();
            plan.forward_cached(q.view(), &stores, (out, None), &mut workspace).unwrap();
        });
        assert_eq!(count, 0, "{what} {}", E::DTYPE);
    });
}

#[test]
fn caches_are_attended_to_without_allocating() {
    caches_allocate_nothing::<f32>();
    caches_allocate_nothing::<bf16>();
}

#[test]
fn codes_are_attended_to_without_allocating() {
    let tensor = Tensor::<f32>::zeros(Shape { batch: 1, ..KV }).unwrap();
    let caches = [Bits::Four, Bits::Eight].map(|bits| {
        let mut cache = QuantizedCache::new(bits, KV.heads, (KV.dim, KV.dim), KV.seq).unwrap();
        cache.append(tensor.view(), tensor.view()).unwrap();
        cache
    });
    let stores: [&dyn KvStore; 2] = [&caches[0], &caches[1]];
    each_attention(|attention, phase, what| {
        let q = Tensor::<f32>::zeros(queries(phase)).unwrap();
        let plan = plan(attention, phase, q.shape());
        let mut out = Tensor::<f32>::zeros(plan.out_shape()).unwrap();
        let mut workspace = Workspace::for_plan(&plan);
        let count = allocations(|| {
            let outputs = (out.view_mut(), None);
            plan.forward_cached(q.view(), &stores, outputs, &mut workspace).unwrap();
        });
        assert_eq!(count, 0, "{what}");
    });
    let mut cache = QuantizedCache::new(Bits::Four, KV.heads, (KV.dim, KV.dim), 5 * TILE).unwrap();
    let count = allocations(|| {
        for _ in 0..5 {
            cache.append(tensor.view(), tensor.view()).unwrap();
            cache.forget(cache.end() - TILE);
        }
        cache.clear();
    });
    assert_eq!(count, 0);
}

#[test]
fn appending_and_forgetting_allocate_nothing() {
    let mut cache = cache::<bf16>(500);
    let token = Tensor::<f32>::zeros(Shape { batch: 1, seq: 1, ..KV }).unwrap();
    let count = allocations(|| {
        cache.append(token.view(), token.view()).unwrap();
        cache.forget(300);
        cache.clear();
    });
    assert_eq!(count, 0);
}

#[test]
fn gradients_of_projections_and_norms_allocate_nothing() {
    let (rows, shape) = (70, MatrixShape { out_features: 130, in_features: 300 });
    let MatrixShape { out_features, in_features } = shape;
    let (numbers, x) = (vec![0.5; out_features * in_features], vec![0.25; rows * in_features]);
    let d_y = vec![1.0; rows * out_features];
    let mut d_x = vec![0.0; rows * in_features];
    let (mut d_weights, mut d_bias) = (vec![0.0; numbers.len()], vec![0.0; out_features]);
    let (mut d_weight, mut d_shift) = (vec![0.0; in_features], vec![0.0; in_features]);
    for level in Level::available() {
        let cpu = Cpu { level, threads: Threads::ONE };
        let mut workspace = Workspace::new();
        workspace.reserve(backward_workspace_bytes(cpu));
        let count = allocations(|| {
            let weights = Matrix::from_floats(shape, &numbers).unwrap();
            let x_rows = Input { data: &x, rows, stride: in_features };
            let d_y = Input { data: &d_y, rows, stride: out_features };
            let gradients = ProjectionGradients {
                d_x: Gradient::Write(Output { data: &mut d_x, stride: in_features }),
                d_weights: Gradient::Add(&mut d_weights),
                d_bias: Gradient::Add(&mut d_bias),
            };
            let backward = ProjectionBackward { weights, x: x_rows, d_y };
            project_backward(backward, gradients, cpu, &mut workspace).unwrap();
            let (weight, bias) = (&numbers[..in_features], Some(&numbers[..in_features]));
            let norm = LayerNorm { weight, bias, epsilon: 1e-5 };
            let gradients = NormGradients {
                d_x: Gradient::Write(&mut d_x),
                d_weight: Gradient::Add(&mut d_weight),
                d_bias: Gradient::Add(&mut d_shift),
            };
            layer_norm_backward(norm, NormBackward { x: &x, d_y: &x }, gradients, level).unwrap();
        });
        assert_eq!(count, 0, "{level}");
    }
}

#[test]
fn a_latent_row_takes_the_bytes_of_its_formula() {
    // DeepSeek-V2: 576 numbers a token for 128 heads of 128, where those heads' own keys and values would be 32768.
    let (latent, rope, tokens) = (512, 64, 300);
    let mut cache = None;
    let taken = bytes(|| cache = Some(LatentCache::<bf16>::new((latent, rope), tokens).unwrap()));
    let mut cache = cache.unwrap();
    assert_eq!(cache.bytes_per_token(), (latent + rope) * 2);
    assert_eq!(taken, tokens * cache.bytes_per_token());
    let shape = Shape { batch: 1, seq: tokens, heads: 1, dim: latent + rope };
    let rows = Tensor::<f32>::zeros(shape).unwrap();
    assert_eq!(bytes(|| cache.append(rows.view()).unwrap()), 0);
}

#[test]
fn absorbed_rows_are_computed_without_allocating() {
    let dims = LatentDims { heads: 4, latent: 24, rope: 8, nope: 12, value: 16 };
    let shape = MatrixShape { out_features: 4 * (12 + 16), in_features: 24 };
    let numbers = vec![0.5; shape.out_features * shape.in_features];
    for level in Level::available() {
        let attention = Attention::new().cpu(Cpu { level, threads: Threads::ONE });
        let up = Matrix::from_floats(shape, &numbers).unwrap();
        let layer = LatentAttention::new(attention, dims, up).unwrap();
        let mut cache = LatentCache::<f32>::new((24, 8), 700).unwrap();
        let rows = Shape { batch: 1, seq: 700, heads: 1, dim: 32 };
        cache.append(Tensor::<f32>::zeros(rows).unwrap().view()).unwrap();
        let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 2, heads: 4, dim: 20 }).unwrap();
        let mut out = Tensor::<f32>::zeros(Shape { dim: 16, ..q.shape() }).unwrap();
        let (mut scratch, mut workspace) = (LatentScratch::default(), Workspace::new());
        let stores: [&dyn KvStore; 1] = [&cache];
        let (phase, form) = (Phase::Generated, LatentForm::Absorbed);
        let mut run = || {
            let call = LatentCall { q: q.view(), stores: &stores, phase, form };
            layer.forward(call, (out.view_mut(), None), &mut scratch, &mut workspace).unwrap();
        };
        run();
        assert_eq!(allocations(run), 0, "{level}");
    }
}

#[test]
fn products_by_distance_are_computed_without_allocating() {
    let shape = Shape { batch: 2, seq: 300, heads: 2, dim: 24 };
    let keys = Tensor::<f32>::zeros(Shape { batch: 1, ..shape }).unwrap();
    let bias = [0.0; 48];
    let encoding = RelativeEncoding::new(keys.view(), &bias, &bias).unwrap();
    for level in Level::available() {
        let cpu = Cpu { level, threads: Threads::ONE };
        let attention = Attention::new().mask(Mask::causal()).relative_encoding(encoding).cpu(cpu);
        let kv = Tensor::<f32>::zeros(shape).unwrap();
        for (seq, decode) in [(130, false), (20, false), (2, true)] {
            let q = Tensor::<f32>::zeros(Shape { seq, ..shape }).unwrap();
            let plan = match decode {
                true => attention.plan_decode(q.shape(), shape, shape).unwrap(),
                false => attention.plan(q.shape(), shape, shape).unwrap(),
            };
            let mut out = Tensor::<f32>::zeros(q.shape()).unwrap();
            let mut workspace = Workspace::for_plan(&plan);
            let count = allocations(|| {
                let inputs = Inputs { q: q.view(), k: kv.view(), v: kv.view() };
                plan.forward(inputs, out.view_mut(), None, &mut workspace).unwrap();
            });
            assert_eq!(count, 0, "{level} {seq}");
        }
        let [q, mut d_q, mut d_k, mut d_v] = [(); 4].map(|()| Tensor::<f32>::zeros(shape).unwrap());
        let lse = Tensor::<f32>::zeros(shape.per_row()).unwrap();
        let mut d_keys = Tensor::<f32>::zeros(keys.shape()).unwrap();
        let [mut d_u, mut d_w] = [[0.0; 48]; 2];
        let plan = attention.plan(shape, shape, shape).unwrap();
        let mut workspace = Workspace::for_backward::<f32>(&plan);
        let count = allocations(|| {
            let terms = TermGradients {
                d_relative_keys: Some(d_keys.view_mut()),
                d_content_bias: Some(&mut d_u),
                d_position_bias: Some(&mut d_w),
                ..TermGradients::default()
            };
            let (d_q, d_k, d_v) = (d_q.view_mut(), d_k.view_mut(), d_v.view_mut());
            let inputs = Inputs { q: q.view(), k: kv.view(), v: kv.view() };
            let saved = Saved { out: q.view(), lse: lse.view() };
            let upstream = Upstream { d_out: q.view(), d_lse: None };
            let gradients = Gradients { d_q, d_k, d_v, terms };
            plan.backward(inputs, saved, upstream, gradients, &mut workspace).unwrap();
        });
        assert_eq!(count, 0, "{level}");
    }
}
