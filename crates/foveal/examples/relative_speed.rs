//! What the relative encoding of Transformer-XL costs: segments over memories, D 64, 8 heads, causal, one thread.
//!
//! `cargo run --release -p foveal --example relative_speed [ROUNDS]`: rounds alternate between exact attention and the same with
//! a product by distance, and best times count; the peak of multiply-adds is measured in the same rounds. Work is that of the
//! products for the pairs that are seen: forward 2 (Dk + Dv) a pair for exact attention and 2 (2 Dk + Dv) with distances,
//! backward 2 (3 Dk + 2 Dv) and 2 (6 Dk + 2 Dv). The last line is one generated token over a memory.

use foveal::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use foveal::position::RelativeEncoding;
use foveal::testing::multiply_add;
use foveal::{Attention, Cpu, DType, Level, Mask, Result, Shape, Tensor, Threads, Workspace};
use std::time::Instant;

const HEADS: usize = 8;
const DIM: usize = 64;

fn main() -> Result<()> {
    let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(15);
    let cpu = Cpu { level: Level::detect()?, threads: Threads::ONE };
    println!("{}: segment + memory, exact attention, with distances", cpu.level);
    for (segment, memory) in [(128, 128), (512, 512), (2048, 0), (512, 1600), (128, 3800)] {
        Case::new(segment, memory)?.prompt(cpu, rounds)?;
    }
    Case::new(1, 4095)?.generated(cpu, rounds)
}

/// A segment behind its memory.
struct Case {
    q: Tensor<f32>,
    k: Tensor<f32>,
    v: Tensor<f32>,
    keys: Tensor<f32>,
    bias: Vec<f32>,
}

/// What calls write to.
struct Buffers {
    out: Tensor<f32>,
    lse: Tensor<f32>,
    forward: Workspace,
    backward: Workspace,
    /// Gradients of q, k, v and of the keys by distance.
    inputs: [Tensor<f32>; 4],
    biases: [Vec<f32>; 2],
}

fn numbers(seq: usize, factor: usize) -> Result<Tensor<f32>> {
    let shape = Shape { batch: 1, seq, heads: HEADS, dim: DIM };
    let number = |i: usize| (i * factor % 10007) as f32 / 5003.0 - 1.0;
    Tensor::from_vec((0..seq * HEADS * DIM).map(number).collect(), shape)
}

/// Floating-point operations a second of multiply-adds on registers.
fn flops(level: Level) -> f64 {
    let start = Instant::now();
    let (operations, number) = multiply_add(level, DType::F32, 20_000);
    std::hint::black_box(number);
    operations as f64 / start.elapsed().as_secs_f64()
}

/// Seconds that a call takes.
fn time(call: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    call()?;
    Ok(start.elapsed().as_secs_f64())
}

impl Case {
    fn new(segment: usize, memory: usize) -> Result<Case> {
        let keys = segment + memory;
        let bias = numbers(1, 6007)?.into_vec();
        Ok(Case {
            q: numbers(segment, 7919)?,
            k: numbers(keys, 7907)?,
            v: numbers(keys, 7901)?,
            keys: numbers(keys, 7001)?,
            bias,
        })
    }

    /// Exact attention, and the same with distances.
    fn attentions(&self, cpu: Cpu) -> Result<[Attention<'_>; 2]> {
        let exact = Attention::new().mask(Mask::causal()).cpu(cpu);
        let encoding = RelativeEncoding::new(self.keys.view(), &self.bias, &self.bias)?;
        Ok([exact.clone(), exact.relative_encoding(encoding)])
    }

    fn inputs(&self) -> Inputs<'_, f32, f32> {
        Inputs { q: self.q.view(), k: self.k.view(), v: self.v.view() }
    }

    fn prompt(&self, cpu: Cpu, rounds: usize) -> Result<()> {
        let attentions = self.attentions(cpu)?;
        let mut buffers = [self.buffers(&attentions[0])?, self.buffers(&attentions[1])?];
        let [mut forward, mut backward] = [[f64::INFINITY; 2]; 2];
        let mut peak = 0.0f64;
        for _ in 0..rounds {
            peak = peak.max(flops(cpu.level));
            for (n, (attention, buffers)) in attentions.iter().zip(&mut buffers).enumerate() {
                let plan = attention.plan(self.q.shape(), self.k.shape(), self.k.shape())?;
                let Buffers { out, lse, forward: workspace, .. } = buffers;
                let results = (out.view_mut(), Some(lse.view_mut()));
                forward[n] = forward[n]
                    .min(time(|| plan.forward(self.inputs(), results.0, results.1, workspace))?);
                backward[n] = backward[n].min(self.backward(attention, buffers, n == 1)?);
            }
        }
        self.report("forward", (forward, [2, 3]), peak);
        self.report("backward", (backward, [5, 8]), peak);
        Ok(())
    }

    /// Memory of calls, which are the same in each round: a new page costs as much as what is written to it.
    fn buffers(&self, attention: &Attention<'_>) -> Result<Buffers> {
        let plan = attention.plan(self.q.shape(), self.k.shape(), self.k.shape())?;
        let zeros = |x: &Tensor<f32>| Tensor::<f32>::zeros(x.shape());
        Ok(Buffers {
            out: Tensor::zeros(plan.out_shape())?,
            lse: Tensor::zeros(plan.out_shape().per_row())?,
            forward: Workspace::for_plan(&plan),
            backward: Workspace::for_backward::<f32>(&plan),
            inputs: [zeros(&self.q)?, zeros(&self.k)?, zeros(&self.k)?, zeros(&self.keys)?],
            biases: [(); 2].map(|()| vec![0.0; HEADS * DIM]),
        })
    }

    fn backward(
        &self,
        attention: &Attention<'_>,
        buffers: &mut Buffers,
        distances: bool,
    ) -> Result<f64> {
        let plan = attention.plan(self.q.shape(), self.k.shape(), self.k.shape())?;
        let Buffers { out, lse, backward: workspace, inputs, biases, .. } = buffers;
        let ([d_q, d_k, d_v, d_keys], [d_u, d_w]) = (inputs, biases);
        let terms = match distances {
            true => TermGradients {
                d_relative_keys: Some(d_keys.view_mut()),
                d_content_bias: Some(d_u),
                d_position_bias: Some(d_w),
                ..TermGradients::default()
            },
            false => TermGradients::default(),
        };
        let (d_q, d_k, d_v) = (d_q.view_mut(), d_k.view_mut(), d_v.view_mut());
        let saved = Saved { out: out.view(), lse: lse.view() };
        let upstream = Upstream { d_out: self.q.view(), d_lse: None };
        let gradients = Gradients { d_q, d_k, d_v, terms };
        time(|| plan.backward(self.inputs(), saved, upstream, gradients, workspace))
    }

    fn report(&self, what: &str, (times, products): ([f64; 2], [usize; 2]), peak: f64) {
        let (queries, keys) = (self.q.shape().seq, self.k.shape().seq);
        let pairs = HEADS * (queries * (keys - queries) + queries * (queries + 1) / 2);
        let share = |n: usize| (2 * DIM * pairs * products[n]) as f64 / times[n] / peak * 100.0;
        println!(
            "{queries:5} + {:5} {what:9} {:8.2} ms {:3.0} %   {:8.2} ms {:3.0} %   {:.2} times",
            keys - queries,
            times[0] * 1e3,
            share(0),
            times[1] * 1e3,
            share(1),
            times[1] / times[0]
        );
    }

    fn generated(&self, cpu: Cpu, rounds: usize) -> Result<()> {
        let mut best = [f64::INFINITY; 2];
        for _ in 0..rounds * 4 {
            for (attention, best) in self.attentions(cpu)?.iter().zip(&mut best) {
                let plan = attention.plan_decode(self.q.shape(), self.k.shape(), self.k.shape())?;
                let mut out = Tensor::<f32>::zeros(plan.out_shape())?;
                let mut workspace = Workspace::for_plan(&plan);
                let call = || plan.forward(self.inputs(), out.view_mut(), None, &mut workspace);
                *best = best.min(time(call)?);
            }
        }
        let ratio = best[1] / best[0];
        println!(
            "one token over {}: {:.3} ms, {:.3} ms, {ratio:.2} times",
            self.k.shape().seq,
            best[0] * 1e3,
            best[1] * 1e3
        );
        Ok(())
    }
}
