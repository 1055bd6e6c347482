//! Millions of tokens a second and head of linear attention, one thread: forward, forward and backward, token by token.
//!
//! `cargo run --release -p foveal --example linear_speed [TOKENS [KEY_AND_VALUE_DIM...]]` (16384, and 64 and 128 without).
//!
//! Rounds go through all mechanisms one after the other and the best of each is printed, so that a machine that is
//! disturbed disturbs all alike; the peak of multiply-adds is measured in the same rounds. Tokens that are made one by
//! one are given as the bandwidth of the state (read and written), next to that of an in-place update of the same memory.

use foveal::linear::{
    DecayForm, Delta, Efficient, Favor, Gradients, Linear, Recurrence, Recurrent, Results,
    Retention, ScalarDecay, State, Tokens, Upstream, VectorDecay,
};
use foveal::testing::{multiply_add, update};
use foveal::{Cpu, DType, Level, Shape, Tensor, Threads, Workspace};
use std::cell::RefCell;
use std::time::Instant;

const HEADS: usize = 8;

fn main() -> foveal::Result<()> {
    let mut numbers = std::env::args().skip(1).filter_map(|x| x.parse::<usize>().ok());
    let names: Vec<String> =
        std::env::args().skip(1).filter(|x| x.parse::<usize>().is_err()).collect();
    let tokens = numbers.next().unwrap_or(16384);
    let dims: Vec<usize> = numbers.collect();
    let rounds = ((1 << 18) / tokens.max(1)).clamp(5, 400);
    let cpu = Cpu { level: Level::detect()?, threads: Threads::ONE };
    println!("{}, one thread, {tokens} tokens, {HEADS} heads, best of {rounds}", cpu.level);
    for dim in if dims.is_empty() { vec![64, 128] } else { dims } {
        let shape = |dim| Shape { batch: 1, seq: tokens, heads: HEADS, dim };
        let mut cases: Vec<Box<dyn Measure>> = vec![
            case("linear", Linear::new(), shape(dim), cpu)?,
            case("efficient", Efficient::new(), shape(dim), cpu)?,
            case("performer", Favor::published(dim, 1)?, shape(dim), cpu)?,
            case("retention", Retention::new(HEADS), shape(dim), cpu)?,
            case("scalar_decay", ScalarDecay::new(), shape(dim), cpu)?,
            case("gla", VectorDecay::new(), shape(dim), cpu)?,
            case("delta", Delta::new(), shape(dim), cpu)?,
            case("gated_delta", Delta::gated(), shape(dim), cpu)?,
        ];
        cases.retain(|case| names.is_empty() || names.iter().any(|name| name == case.name()));
        let (mut peak, mut in_place) = (0.0f64, 0.0f64);
        for _ in 0..rounds {
            peak = peak.max(flops(cpu.level));
            in_place = in_place.max(update_bandwidth(cpu.level, HEADS * dim * dim));
            for case in &mut cases {
                case.round()?;
            }
        }
        println!(
            "\nD {dim}: peak {:.1} GFLOP/s, in-place update of the states {in_place:.1} GB/s",
            peak / 1e9
        );
        println!(
            "| mechanism | forward, Mtok/s a head | of FMA peak | forward and backward | decode, µs a token | GB/s | of in-place update |"
        );
        println!("|---|---|---|---|---|---|---|");
        for case in &cases {
            case.print(peak, in_place);
        }
    }
    Ok(())
}

/// Best floating-point operations a second of multiply-adds on registers.
fn flops(level: Level) -> f64 {
    let start = Instant::now();
    let (operations, x) = multiply_add(level, DType::F32, 20_000);
    let seconds = start.elapsed().as_secs_f64();
    std::hint::black_box(x);
    operations as f64 / seconds
}

/// Bytes read and written a second by an update of so many numbers in place.
fn update_bandwidth(level: Level, numbers: usize) -> f64 {
    let mut x = vec![1.0f32; numbers];
    let start = Instant::now();
    for _ in 0..200 {
        update(level, &mut x);
    }
    let seconds = start.elapsed().as_secs_f64();
    std::hint::black_box(&x);
    (8 * numbers * 200) as f64 / seconds / 1e9
}

trait Measure {
    fn name(&self) -> &str;
    fn round(&mut self) -> foveal::Result<()>;
    fn print(&self, peak: f64, in_place: f64);
}

/// What a call writes to.
struct Written {
    out: Tensor<f32>,
    reads: Tensor<f32>,
    d_q: Tensor<f32>,
    d_k: Tensor<f32>,
    d_v: Tensor<f32>,
    d_log_decay: Option<Tensor<f32>>,
    d_beta: Option<Tensor<f32>>,
    workspace: Workspace,
}

struct Case<R> {
    name: &'static str,
    recurrent: Recurrent<R>,
    dim: usize,
    /// Rows of a state, and floating-point operations a token: of the state, and of features.
    rows: usize,
    operations: usize,
    /// q, k, v, the gradient of the output.
    tensors: [Tensor<f32>; 4],
    log_decay: Option<Tensor<f32>>,
    beta: Option<Tensor<f32>>,
    written: RefCell<Written>,
    forward: f64,
    both: f64,
    decode: f64,
}

/// Numbers between −1 and 1 that look random, times a scale.
fn numbers(shape: Shape, scale: f32, shift: f32) -> foveal::Result<Tensor<f32>> {
    let mut state = 1u64;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    let len = shape.batch * shape.seq * shape.heads * shape.dim;
    Tensor::from_vec((0..len).map(|_| shift + scale * next()).collect(), shape)
}

fn case<R: Recurrence + 'static>(
    name: &'static str,
    mechanism: R,
    shape: Shape,
    cpu: Cpu,
) -> foveal::Result<Box<dyn Measure>> {
    let form = mechanism.form();
    let keys = (shape.dim as f32).powf(-0.5);
    let log_decay = match form.decay {
        DecayForm::None => None,
        DecayForm::Scalar => Some(numbers(shape.per_row(), 0.05, -0.05)?),
        DecayForm::Vector => Some(numbers(shape, 0.05, -0.05)?),
    };
    let beta = form.beta.then(|| numbers(shape.per_row(), 0.5, 0.5)).transpose()?;
    let of = |shape| numbers(shape, 1.0, 0.0);
    let written = Written {
        out: of(shape)?,
        reads: of(shape)?,
        d_q: of(shape)?,
        d_k: of(shape)?,
        d_v: of(shape)?,
        d_log_decay: log_decay.clone(),
        d_beta: beta.clone(),
        workspace: Workspace::new(),
    };
    let rows = mechanism.mapped_dim(shape.dim)?;
    let features = if mechanism.row_maps().is_some() { 4 * rows * shape.dim } else { 0 };
    Ok(Box::new(Case {
        rows,
        operations: 4 * rows * shape.dim + features,
        written: RefCell::new(written),
        name,
        recurrent: Recurrent::new(mechanism).cpu(cpu),
        dim: shape.dim,
        tensors: [
            numbers(shape, 1.0, 0.0)?,
            numbers(shape, keys, 0.0)?,
            numbers(shape, 1.0, 0.0)?,
            numbers(shape, 1.0, 0.0)?,
        ],
        log_decay,
        beta,
        forward: 0.0,
        both: 0.0,
        decode: f64::INFINITY,
    }))
}

impl<R: Recurrence> Case<R> {
    fn tokens(&self) -> Tokens<'_, f32> {
        let [q, k, v, _] = &self.tensors;
        let mut tokens = Tokens::new(q.view(), k.view(), v.view());
        if let Some(log_decay) = &self.log_decay {
            tokens = tokens.log_decay(log_decay.view());
        }
        if let Some(beta) = &self.beta {
            tokens = tokens.beta(beta.view());
        }
        tokens
    }

    /// Seconds of forward and of both passes, into memory that has been touched.
    fn prompt(&self) -> foveal::Result<(f64, f64)> {
        let tokens = self.tokens();
        let initial = self.recurrent.state(&tokens)?;
        let mut state = initial.clone();
        let d_out = &self.tensors[3];
        let mut written = self.written.borrow_mut();
        let Written { out, reads, d_q, d_k, d_v, d_log_decay, d_beta, workspace } = &mut *written;
        let delta = self.beta.is_some();
        let start = Instant::now();
        let results = Results { out: out.view_mut(), reads: delta.then(|| reads.view_mut()) };
        self.recurrent.forward_into(&tokens, results, &mut state, workspace)?;
        let forward = start.elapsed().as_secs_f64();
        let reads = delta.then(|| reads.view());
        let upstream = Upstream { d_out: d_out.view(), initial: &initial, reads };
        let gradients = Gradients {
            d_q: d_q.view_mut(),
            d_k: d_k.view_mut(),
            d_v: d_v.view_mut(),
            d_log_decay: d_log_decay.as_mut().map(Tensor::view_mut),
            d_beta: d_beta.as_mut().map(Tensor::view_mut),
        };
        self.recurrent.backward_into(&tokens, upstream, gradients, &mut state, workspace)?;
        Ok((forward, start.elapsed().as_secs_f64()))
    }

    /// Seconds of one token of all heads.
    fn token(&self) -> foveal::Result<f64> {
        const TOKENS: usize = 200;
        let one = |x: &Tensor<f32>| {
            let shape = Shape { seq: 1, ..x.shape() };
            Tensor::from_vec(x.as_slice()[..HEADS * shape.dim].to_vec(), shape)
        };
        let [q, k, v, _] = &self.tensors;
        let (q, k, v) = (one(q)?, one(k)?, one(v)?);
        let (log_decay, beta) = (
            self.log_decay.as_ref().map(one).transpose()?,
            self.beta.as_ref().map(one).transpose()?,
        );
        let mut tokens = Tokens::new(q.view(), k.view(), v.view());
        if let Some(log_decay) = &log_decay {
            tokens = tokens.log_decay(log_decay.view());
        }
        if let Some(beta) = &beta {
            tokens = tokens.beta(beta.view());
        }
        let mut state: State = self.recurrent.state(&tokens)?;
        let (mut out, mut workspace) = (Tensor::zeros(v.shape())?, Workspace::new());
        let start = Instant::now();
        for _ in 0..TOKENS {
            let results = Results { out: out.view_mut(), reads: None };
            self.recurrent.forward_into(&tokens, results, &mut state, &mut workspace)?;
        }
        Ok(start.elapsed().as_secs_f64() / TOKENS as f64)
    }
}

impl<R: Recurrence> Measure for Case<R> {
    fn name(&self) -> &str {
        self.name
    }

    fn round(&mut self) -> foveal::Result<()> {
        let (forward, both) = self.prompt()?;
        let tokens = (self.tensors[0].shape().seq * HEADS) as f64 / 1e6;
        self.forward = self.forward.max(tokens / forward);
        self.both = self.both.max(tokens / both);
        self.decode = self.decode.min(self.token()?);
        Ok(())
    }

    fn print(&self, peak: f64, in_place: f64) {
        let share = self.forward * 1e6 * self.operations as f64 / peak;
        let bandwidth = (8 * HEADS * self.rows * self.dim) as f64 / self.decode / 1e9;
        println!(
            "| {} | {:.2} | {:.0} % | {:.2} | {:.2} | {:.0} | {:.0} % |",
            self.name,
            self.forward,
            100.0 * share,
            self.both,
            1e6 * self.decode,
            bandwidth,
            100.0 * bandwidth / in_place,
        );
    }
}
