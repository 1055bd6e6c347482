//! Linformer against its definition in f64, differences of it and golden vectors; what it shares and what it refuses.

mod support;

use foveal::linear::{Linformer, MatrixGradients, SequenceMatrix, Sharing};
use foveal::plan::Inputs;
use foveal::position::Slopes;
use foveal::{
    Attention, Cpu, Element, Error, Gradient, Level, Mask, Scale, Shape, Tensor, Threads,
};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use support::golden::{Array, Case, cases};
use support::{Random, cpus, error};

fn close(what: &str, got: &[f32], expected: &[f64], bound: f64) {
    let error = error(got, expected);
    assert!(error <= bound, "{what}: error {error:e} > {bound:e}");
}

/// Linformer by its definition in f64: K' and V', then softmax attention.
struct Definition<'a> {
    q: (&'a [f64], Shape),
    k: (&'a [f64], Shape),
    v: (&'a [f64], Shape),
    e: &'a [f64],
    f: &'a [f64],
    rank: usize,
}

fn mixed(matrix: &[f64], rank: usize, (x, shape): (&[f64], Shape)) -> Vec<f64> {
    let (length, width) = (matrix.len() / rank, shape.heads * shape.dim);
    let mut mixed = vec![0.0; shape.batch * rank * width];
    for b in 0..shape.batch {
        for (r, t) in (0..rank).flat_map(|r| (0..shape.seq).map(move |t| (r, t))) {
            for c in 0..width {
                mixed[(b * rank + r) * width + c] +=
                    matrix[r * length + t] * x[(b * shape.seq + t) * width + c];
            }
        }
    }
    mixed
}

impl Definition<'_> {
    fn out(&self) -> Vec<f64> {
        let (k, v) = (mixed(self.e, self.rank, self.k), mixed(self.f, self.rank, self.v));
        let input = |data, shape| foveal::reference::Input { data, shape };
        let few = |shape: Shape| Shape { seq: self.rank, ..shape };
        let inputs =
            [input(self.q.0, self.q.1), input(&k, few(self.k.1)), input(&v, few(self.v.1))];
        let scale = (self.q.1.dim as f64).powf(-0.5);
        foveal::reference::attention(inputs, scale, &Mask::full()).unwrap().out
    }
}

fn wide<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// A Linformer call.
struct Mixing<E> {
    q: Tensor<E>,
    k: Tensor<E>,
    v: Tensor<E>,
    d_out: Tensor<E>,
    matrices: [Vec<f32>; 2],
    rank: usize,
}

impl<E: Element> Mixing<E> {
    fn random(q: Shape, (seq, kv_heads, value_dim): (usize, usize, usize), rank: usize) -> Self {
        let mut random = Random::new(6);
        let k = Shape { seq, heads: kv_heads, ..q };
        let v = Shape { dim: value_dim, ..k };
        let length = seq + 3;
        let mut matrix = || (0..rank * length).map(|_| random.number()).collect();
        let matrices = [matrix(), matrix()];
        Mixing {
            q: random.tensor(q, 1.0),
            k: random.tensor(k, 1.0),
            v: random.tensor(v, 1.0),
            d_out: random.tensor(Shape { dim: value_dim, ..q }, 1.0),
            matrices,
            rank,
        }
    }

    fn inputs(&self) -> Inputs<'_, E, E> {
        Inputs { q: self.q.view(), k: self.k.view(), v: self.v.view() }
    }

    fn matrix(&self, n: usize) -> SequenceMatrix<'_> {
        let numbers = &self.matrices[n];
        SequenceMatrix::new(numbers, self.rank, numbers.len() / self.rank).unwrap()
    }

    fn headwise(&self) -> Sharing<'_> {
        Sharing::Headwise { keys: self.matrix(0), values: self.matrix(1) }
    }

    /// All numbers in f64: queries, keys, values, E, F.
    fn numbers(&self) -> [Vec<f64>; 5] {
        [
            wide(self.q.as_slice()),
            wide(self.k.as_slice()),
            wide(self.v.as_slice()),
            wide(&self.matrices[0]),
            wide(&self.matrices[1]),
        ]
    }

    fn define(&self, numbers: &[Vec<f64>; 5]) -> Vec<f64> {
        let [q, k, v, e, f] = numbers;
        Definition {
            q: (q, self.q.shape()),
            k: (k, self.k.shape()),
            v: (v, self.v.shape()),
            e,
            f,
            rank: self.rank,
        }
        .out()
    }
}

#[test]
fn linformer_is_its_definition() {
    let small = Shape { batch: 2, seq: 3, heads: 2, dim: 5 };
    for (seq, rank) in [(0, 1), (1, 1), (1, 3), (7, 2), (9, 4), (130, 70), (300, 64)] {
        for (heads, kv_heads) in [(1, 1), (2, 2), (6, 2)] {
            let call: Mixing<f32> =
                Mixing::random(Shape { heads, ..small }, (seq, kv_heads, 4), rank);
            let expected = call.define(&call.numbers());
            for cpu in cpus() {
                let attention = Attention::new().cpu(cpu);
                let layer = Linformer { attention: &attention, sharing: call.headwise() };
                let forward = layer.forward(call.inputs()).unwrap();
                let what = format!("{} {seq} tokens rank {rank} {heads} heads", cpu.level);
                close(&what, forward.out.as_slice(), &expected, 2e-6);
            }
        }
    }
}

#[test]
fn linformer_has_the_gradients_of_its_definition() {
    const STEP: f64 = 1e-5;
    let call: Mixing<f32> =
        Mixing::random(Shape { batch: 2, seq: 3, heads: 4, dim: 3 }, (5, 2, 2), 3);
    let (mut numbers, d_out) = (call.numbers(), wide(call.d_out.as_slice()));
    let mut expected: [Vec<f64>; 5] = Default::default();
    for n in 0..5 {
        for i in 0..numbers[n].len() {
            let own = numbers[n][i];
            let mut at = |x: f64| -> f64 {
                numbers[n][i] = x;
                call.define(&numbers).iter().zip(&d_out).map(|(a, b)| a * b).sum()
            };
            let slope = (at(own + STEP) - at(own - STEP)) / (2.0 * STEP);
            at(own);
            expected[n].push(slope);
        }
    }
    for cpu in cpus() {
        let attention = Attention::new().cpu(cpu);
        let layer = Linformer { attention: &attention, sharing: call.headwise() };
        let forward = layer.forward(call.inputs()).unwrap();
        let [mut d_e, mut d_f] = call.matrices.clone().map(|x| vec![f32::NAN; x.len()]);
        let gradients = MatrixGradients {
            d_keys: Gradient::Write(&mut d_e),
            d_values: Gradient::Write(&mut d_f),
        };
        let own = layer.backward(call.inputs(), &forward, call.d_out.view(), gradients).unwrap();
        let got = [own.d_q.as_slice(), own.d_k.as_slice(), own.d_v.as_slice(), &d_e, &d_f];
        for ((got, expected), what) in got.into_iter().zip(&expected).zip(["q", "k", "v", "E", "F"])
        {
            close(&format!("{} d {what}", cpu.level), got, expected, 1e-5);
        }
    }
}

fn write(place: &mut [f32]) -> MatrixGradients<'_> {
    MatrixGradients { d_keys: Gradient::Write(place), d_values: Gradient::Skip }
}

/// One matrix for both has the sum of both gradients; layers add theirs up.
#[test]
fn shared_matrices_have_summed_gradients() {
    let shape = Shape { batch: 1, seq: 4, heads: 2, dim: 3 };
    let mut call: Mixing<f32> = Mixing::random(shape, (6, 2, 3), 2);
    call.matrices[1] = call.matrices[0].clone();
    let attention = Attention::new();
    let run = |sharing: Sharing<'_>, gradients: MatrixGradients<'_>| {
        let layer = Linformer { attention: &attention, sharing };
        let forward = layer.forward(call.inputs()).unwrap();
        layer.backward(call.inputs(), &forward, call.d_out.view(), gradients)
    };
    let [mut d_e, mut d_f, mut both] = [0; 3].map(|_| vec![0.5; call.matrices[0].len()]);
    let two =
        MatrixGradients { d_keys: Gradient::Write(&mut d_e), d_values: Gradient::Write(&mut d_f) };
    let apart = run(call.headwise(), two).unwrap();
    let together = run(Sharing::KeyValue(call.matrix(0)), write(&mut both)).unwrap();
    assert_eq!(apart, together);
    let sums: Vec<f64> = d_e.iter().zip(&d_f).map(|(a, b)| f64::from(a + b)).collect();
    close("sum", &both, &sums, 1e-6);
    // Two layers, one after the other.
    let mut layers = vec![0.0; both.len()];
    let layerwise = Sharing::Layerwise(call.matrix(0));
    for _ in 0..2 {
        let add = MatrixGradients { d_keys: Gradient::Add(&mut layers), ..Default::default() };
        run(layerwise, add).unwrap();
    }
    let sums: Vec<f64> = both.iter().map(|&x| 2.0 * f64::from(x)).collect();
    close("layers", &layers, &sums, 1e-6);
    let error = run(layerwise, write(&mut layers)).unwrap_err();
    assert!(matches!(error, Error::InvalidParameter { .. }), "{error}");
    let values = MatrixGradients { d_values: Gradient::Add(&mut layers), ..Default::default() };
    let error = run(layerwise, values).unwrap_err();
    assert!(matches!(error, Error::InvalidParameter { .. }), "{error}");
    let short = run(call.headwise(), write(&mut both[..3])).unwrap_err();
    assert!(matches!(short, Error::LengthMismatch { got: 3, .. }), "{short}");
}

fn sixteen_bits<E: Element>(bound: f64) {
    let shape = Shape { batch: 1, seq: 5, heads: 2, dim: 16 };
    let call: Mixing<E> = Mixing::random(shape, (20, 1, 8), 4);
    let expected = call.define(&call.numbers());
    for cpu in cpus() {
        let attention = Attention::new().cpu(cpu);
        let layer = Linformer { attention: &attention, sharing: call.headwise() };
        let forward = layer.forward(call.inputs()).unwrap();
        let out: Vec<f32> = forward.out.as_slice().iter().map(|x| x.to_f32()).collect();
        close(E::DTYPE.to_string().as_str(), &out, &expected, bound);
        let own = layer
            .backward(call.inputs(), &forward, call.d_out.view(), MatrixGradients::default())
            .unwrap();
        assert!(own.d_k.as_slice().iter().all(|x| x.to_f32().is_finite()));
    }
}

#[test]
fn linformer_of_sixteen_bits_is_rounded_at_the_end() {
    sixteen_bits::<f16>(1e-3);
    sixteen_bits::<bf16>(8e-3);
}

#[test]
fn linformer_refuses_what_it_cannot_do() {
    let shape = Shape { batch: 1, seq: 4, heads: 2, dim: 8 };
    let call: Mixing<f32> = Mixing::random(shape, (9, 2, 8), 3);
    let refused = |attention: &Attention<'_>, sharing| {
        Linformer { attention, sharing }.forward(call.inputs()).unwrap_err()
    };
    for mask in [Mask::causal(), Mask::window(3), Mask::full().and(Mask::causal())] {
        let error = refused(&Attention::new().mask(mask), call.headwise());
        assert!(error.to_string().contains("later ones included"), "{error}");
    }
    let slopes = Attention::new().alibi(Slopes::Standard);
    assert!(refused(&slopes, call.headwise()).to_string().contains("no position"));
    let short = SequenceMatrix::new(&[0.0; 24], 3, 8).unwrap();
    let error = refused(&Attention::new(), Sharing::KeyValue(short));
    assert!(error.to_string().contains("9, with 8 columns"), "{error}");
    let ranks = Sharing::Headwise { keys: call.matrix(0), values: short };
    let other = SequenceMatrix::new(&[0.0; 24], 2, 12).unwrap();
    let ranks = match ranks {
        Sharing::Headwise { keys, .. } => Sharing::Headwise { keys, values: other },
        other => other,
    };
    let error = refused(&Attention::new(), ranks);
    assert!(matches!(error, Error::LengthMismatch { expected: 3, got: 2, .. }), "{error}");
    assert!(matches!(SequenceMatrix::new(&[], 0, 3), Err(Error::InvalidParameter { .. })));
    assert!(matches!(SequenceMatrix::new(&[0.0; 5], 2, 3), Err(Error::BufferLength { .. })));
}

fn tensor(array: &Array) -> Tensor<f32> {
    let [batch, seq, heads, dim] = array.shape[..] else { panic!("no tokens") };
    Tensor::from_vec(array.to_f32(), Shape { batch, seq, heads, dim }).unwrap()
}

fn matrix<'a>(case: &Case, name: &str, numbers: &'a [f32]) -> SequenceMatrix<'a> {
    let shape = &case.tensor(name).shape;
    SequenceMatrix::new(numbers, shape[0], shape[1]).unwrap()
}

#[test]
fn linformer_meets_the_golden_vectors() {
    let mut compared = 0;
    for case in cases("linformer") {
        if !case.tensors.contains_key("e") {
            continue;
        }
        compared += 1;
        let shared = !case.tensors.contains_key("f");
        let second = if shared { "e" } else { "f" };
        let [q, k, v, d_out] = ["q", "k", "v", "d_out"].map(|name| tensor(case.tensor(name)));
        let [e, f] = ["e", second].map(|name| case.tensor(name).to_f32());
        let (keys, values) = (matrix(&case, "e", &e), matrix(&case, second, &f));
        let sharing =
            if shared { Sharing::KeyValue(keys) } else { Sharing::Headwise { keys, values } };
        let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
        let tolerance = case.tolerance("f32");
        for cpu in cpus() {
            let scale = Scale::Value(case.number("scale") as f32);
            let attention = Attention::new().scale(scale).cpu(cpu);
            let layer = Linformer { attention: &attention, sharing };
            let forward = layer.forward(inputs).unwrap();
            let [mut d_e, mut d_f] = [&e, &f].map(|x| vec![f32::NAN; x.len()]);
            let gradients = MatrixGradients {
                d_keys: Gradient::Write(&mut d_e),
                d_values: if shared { Gradient::Skip } else { Gradient::Write(&mut d_f) },
            };
            let own = layer.backward(inputs, &forward, d_out.view(), gradients).unwrap();
            case.check("out", &wide(forward.out.as_slice()), tolerance);
            case.check("lse", &wide(forward.lse.as_slice()), tolerance);
            case.check("grad.q", &wide(own.d_q.as_slice()), tolerance);
            case.check("grad.k", &wide(own.d_k.as_slice()), tolerance);
            case.check("grad.v", &wide(own.d_v.as_slice()), tolerance);
            case.check("grad.e", &wide(&d_e), tolerance);
            if !shared {
                case.check("grad.f", &wide(&d_f), tolerance);
            }
        }
    }
    assert_eq!(compared, 3);
}

/// y = x Wᵀ + b in f32, rows of `W` being outputs.
fn project(x: &[f32], w: &[f32], inputs: usize) -> Vec<f32> {
    let row = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * w).sum();
    x.chunks(inputs).flat_map(|x| w.chunks(inputs).map(move |w| row(x, w))).collect()
}

/// The layer of the package `linformer`, whose matrices are transposed.
#[test]
fn a_linformer_layer_meets_the_golden_vectors() {
    let all = cases("linformer");
    let case = all.iter().find(|case| case.name == "linformer_layer").unwrap();
    let (x, d_out) = (case.tensor("x"), case.tensor("d_out").to_f32());
    let [batch, seq, width] = x.shape[..] else { panic!("three axes") };
    let heads = case.number("heads") as usize;
    let shape = Shape { batch, seq, heads, dim: width / heads };
    let weight = |name: &str| case.tensor(&format!("{name}.weight")).to_f32();
    let (x, [w_q, w_k, w_v, w_out]) = (x.to_f32(), ["to_q", "to_k", "to_v", "to_out"].map(weight));
    let [q, k, v] =
        [&w_q, &w_k, &w_v].map(|w| Tensor::from_vec(project(&x, w, width), shape).unwrap());
    let rank = case.tensor("proj_k").shape[1];
    let transpose = |x: &[f32], rows: usize| -> Vec<f32> {
        let columns = x.len() / rows;
        (0..x.len()).map(|n| x[n % rows * columns + n / rows]).collect()
    };
    let [e, f] = ["proj_k", "proj_v"].map(|name| transpose(&case.tensor(name).to_f32(), seq));
    let of = |numbers| SequenceMatrix::new(numbers, rank, seq).unwrap();
    let sharing = Sharing::Headwise { keys: of(&e), values: of(&f) };
    let attention = Attention::new();
    let layer = Linformer { attention: &attention, sharing };
    let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
    let forward = layer.forward(inputs).unwrap();
    let bias = case.tensor("to_out.bias").to_f32();
    let mut out = project(forward.out.as_slice(), &w_out, width);
    out.chunks_mut(width).for_each(|row| row.iter_mut().zip(&bias).for_each(|(o, b)| *o += b));
    let d_heads =
        Tensor::from_vec(project(&d_out, &transpose(&w_out, width), width), shape).unwrap();
    let [mut d_e, mut d_f] = [&e, &f].map(|x| vec![0.0; x.len()]);
    let gradients =
        MatrixGradients { d_keys: Gradient::Write(&mut d_e), d_values: Gradient::Add(&mut d_f) };
    let own = layer.backward(inputs, &forward, d_heads.view(), gradients).unwrap();
    let mut d_x = vec![0.0; x.len()];
    for (d, w) in [(&own.d_q, &w_q), (&own.d_k, &w_k), (&own.d_v, &w_v)] {
        let part = project(d.as_slice(), &transpose(w, width), width);
        d_x.iter_mut().zip(part).for_each(|(d_x, part)| *d_x += part);
    }
    let tolerance = case.tolerance("f32");
    case.check("out", &wide(&out), tolerance);
    case.check("grad.x", &wide(&d_x), tolerance);
    case.check("grad.proj_k", &wide(&transpose(&d_e, rank)), tolerance);
    case.check("grad.proj_v", &wide(&transpose(&d_f, rank)), tolerance);
    let d_weight = |d: &Tensor<f32>| -> Vec<f64> {
        wide(&project(
            &transpose(d.as_slice(), batch * seq),
            &transpose(&x, batch * seq),
            batch * seq,
        ))
    };
    case.check("grad.to_q.weight", &d_weight(&own.d_q), tolerance);
    case.check("grad.to_k.weight", &d_weight(&own.d_k), tolerance);
    case.check("grad.to_v.weight", &d_weight(&own.d_v), tolerance);
}

#[test]
fn linformer_has_the_same_bits_on_any_threads() {
    let shape = Shape { batch: 2, seq: 70, heads: 4, dim: 32 };
    let call: Mixing<f32> = Mixing::random(shape, (90, 2, 32), 40);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    for level in Level::available() {
        let all = |threads| {
            let cpu = Cpu { level, threads: Threads::at_most(NonZeroUsize::new(threads).unwrap()) };
            pool.install(|| {
                let attention = Attention::new().cpu(cpu);
                let layer = Linformer { attention: &attention, sharing: call.headwise() };
                let forward = layer.forward(call.inputs()).unwrap();
                let mut d_e = vec![0.0; call.matrices[0].len()];
                let gradients =
                    MatrixGradients { d_keys: Gradient::Add(&mut d_e), ..Default::default() };
                let d_out = call.d_out.view();
                let own = layer.backward(call.inputs(), &forward, d_out, gradients).unwrap();
                (forward, own, d_e)
            })
        };
        let one = all(1);
        assert!((2..=4).all(|threads| all(threads) == one), "{level}");
    }
}
