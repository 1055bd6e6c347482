//! Where linear attention stops and starts to pay, one thread, 8 heads side by side.
//!
//! ```text
//! cargo run --release -p foveal --example linear_limits crossover [DIM]   next to exact causal attention, by length
//! … growth [DIM]     time and memory from 4096 to 262144 tokens
//! … stream [DIM]     a token at position 100 and at position 1000000, and what the workspace holds
//! … steps [DIM]      one call next to a call for each token
//! … forgotten [DIM]  states that have decayed to nothing next to ones that are written to
//! ```
//!
//! Both sides take turns in every round; medians of ratios, and the best of each.

use foveal::linear::{
    DecayForm, Delta, Linear, Recurrence, Recurrent, Results, Retention, State, Tokens, VectorDecay,
};
use foveal::plan::Inputs;
use foveal::{Attention, Cpu, Level, Mask, Shape, TensorMut, TensorRef, Threads, Workspace};
use std::ops::Range;
use std::time::Instant;

const HEADS: usize = 8;
const ROUNDS: usize = 9;

fn main() -> foveal::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_default();
    let dim = arguments.next().and_then(|x| x.parse().ok()).unwrap_or(64);
    let cpu = Cpu { level: Level::detect()?, threads: Threads::ONE };
    println!("{}, one thread, {HEADS} heads of {dim}, {ROUNDS} rounds", cpu.level);
    match what.as_str() {
        "crossover" => crossover(dim, cpu),
        "growth" => growth(dim, cpu),
        "stream" => stream(dim, cpu),
        "steps" => steps(dim, cpu),
        "forgotten" => forgotten(dim, cpu),
        _ => {
            println!("say crossover, growth, stream, steps or forgotten");
            Ok(())
        }
    }
}

/// Queries, keys, values, decays of channels and of tokens, strengths.
struct Text {
    shape: Shape,
    qkv: [Vec<f32>; 3],
    decays: [Vec<f32>; 2],
    beta: Vec<f32>,
}

/// Numbers between −1 and 1 that look random, times a scale.
fn numbers(len: usize, scale: f32, shift: f32) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..len).map(|_| shift + scale * next()).collect()
}

impl Text {
    fn new(tokens: usize, dim: usize) -> Text {
        let shape = Shape { batch: 1, seq: tokens, heads: HEADS, dim };
        let (rows, keys) = (tokens * HEADS, (dim as f32).powf(-0.5));
        let of = |scale| numbers(rows * dim, scale, 0.0);
        Text {
            shape,
            qkv: [of(1.0), of(keys), of(1.0)],
            decays: [numbers(rows * dim, 0.05, -0.05), numbers(rows, 0.05, -0.05)],
            beta: numbers(rows, 0.5, 0.5),
        }
    }

    /// A stretch of rows of `dim` numbers a head.
    fn span<'a>(
        &self,
        x: &'a [f32],
        dim: usize,
        range: &Range<usize>,
    ) -> foveal::Result<TensorRef<'a, f32>> {
        let row = HEADS * dim;
        let shape = Shape { seq: range.len(), dim, ..self.shape };
        TensorRef::new(&x[range.start * row..range.end * row], shape)
    }

    /// A stretch, with the gates that a mechanism takes.
    fn tokens<'a, R: Recurrence>(
        &'a self,
        mechanism: &R,
        range: &Range<usize>,
    ) -> foveal::Result<Tokens<'a, f32>> {
        let dim = self.shape.dim;
        let [q, k, v] = &self.qkv;
        let rows = |x| self.span(x, dim, range);
        let tokens = Tokens::new(rows(q)?, rows(k)?, rows(v)?);
        let form = mechanism.form();
        let tokens = match form.decay {
            DecayForm::None => tokens,
            DecayForm::Scalar => tokens.log_decay(self.span(&self.decays[1], 1, range)?),
            DecayForm::Vector => tokens.log_decay(rows(&self.decays[0])?),
        };
        match form.beta {
            true => Ok(tokens.beta(self.span(&self.beta, 1, range)?)),
            false => Ok(tokens),
        }
    }
}

/// A mechanism with a state of its own.
struct Runner<R> {
    recurrent: Recurrent<R>,
    state: State,
    out: Vec<f32>,
    workspace: Workspace,
}

impl<R: Recurrence> Runner<R> {
    fn new(mechanism: R, text: &Text, cpu: Cpu) -> foveal::Result<Runner<R>> {
        let recurrent = Recurrent::new(mechanism).cpu(cpu);
        let state = recurrent.state(&text.tokens(recurrent.mechanism(), &(0..0))?)?;
        let out = vec![0.0; text.qkv[2].len()];
        Ok(Runner { recurrent, state, out, workspace: Workspace::new() })
    }

    /// Takes some of the text's tokens in; returns the seconds.
    fn run(&mut self, text: &Text, range: Range<usize>) -> foveal::Result<f64> {
        let tokens = text.tokens(self.recurrent.mechanism(), &range)?;
        let row = HEADS * text.shape.dim;
        let place = &mut self.out[range.start * row..range.end * row];
        let out = TensorMut::new(place, Shape { seq: range.len(), ..text.shape })?;
        let start = Instant::now();
        let results = Results { out, reads: None };
        self.recurrent.forward_into(&tokens, results, &mut self.state, &mut self.workspace)?;
        Ok(start.elapsed().as_secs_f64())
    }
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

/// Time of exact causal attention ÷ time of linear attention.
fn crossover(dim: usize, cpu: Cpu) -> foveal::Result<()> {
    println!("| tokens | exact ÷ linear | exact ÷ retention | exact ÷ gated_delta | linear, us |");
    println!("|---|---|---|---|---|");
    for tokens in [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024, 4096] {
        let text = Text::new(tokens, dim);
        let mut linear = Runner::new(Linear::new(), &text, cpu)?;
        let mut retention = Runner::new(Retention::new(HEADS), &text, cpu)?;
        let mut delta = Runner::new(Delta::gated(), &text, cpu)?;
        let [q, k, v] = &text.qkv;
        let rows = |x| text.span(x, dim, &(0..tokens));
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let plan = attention.plan(text.shape, text.shape, text.shape)?;
        let mut workspace = Workspace::new();
        workspace.reserve(plan.workspace_bytes());
        let mut out = vec![0.0; v.len()];
        let (mut ratios, mut best) = ([vec![], vec![], vec![]], f64::INFINITY);
        // Short calls are repeated until they take a while.
        let repeats = (65536 / tokens).clamp(1, 512);
        for _ in 0..ROUNDS {
            let start = Instant::now();
            for _ in 0..repeats {
                let inputs = Inputs { q: rows(q)?, k: rows(k)?, v: rows(v)? };
                plan.forward(inputs, TensorMut::new(&mut out, text.shape)?, None, &mut workspace)?;
            }
            let exact = start.elapsed().as_secs_f64();
            let one = |run: &mut dyn FnMut() -> foveal::Result<f64>| -> foveal::Result<f64> {
                let start = Instant::now();
                (0..repeats).try_for_each(|_| run().map(|_| ()))?;
                Ok(start.elapsed().as_secs_f64())
            };
            let own = [
                one(&mut || linear.run(&text, 0..tokens))?,
                one(&mut || retention.run(&text, 0..tokens))?,
                one(&mut || delta.run(&text, 0..tokens))?,
            ];
            best = best.min(own[0] / repeats as f64);
            ratios.iter_mut().zip(own).for_each(|(all, own)| all.push(exact / own));
        }
        let [a, b, c] = ratios.map(median);
        println!("| {tokens} | {a:.2} | {b:.2} | {c:.2} | {:.1} |", 1e6 * best);
    }
    Ok(())
}

/// Exponents of the time, and memory besides tensors and states.
fn growth(dim: usize, cpu: Cpu) -> foveal::Result<()> {
    const LENGTHS: [usize; 4] = [4096, 16384, 65536, 262_144];
    let text = Text::new(LENGTHS[3], dim);
    fn one<R: Recurrence>(name: &str, mechanism: R, text: &Text, cpu: Cpu) -> foveal::Result<()> {
        let mut best = [f64::INFINITY; 4];
        let mut runner = Runner::new(mechanism, text, cpu)?;
        let mut bytes = vec![];
        for round in 0..3 {
            for (n, length) in LENGTHS.into_iter().enumerate() {
                // As many tokens of each length, from different places of the text.
                for _ in 0..(LENGTHS[2] / length).max(1) {
                    best[n] = best[n].min(runner.run(text, 0..length)?);
                }
                if round == 0 {
                    bytes.push(runner.workspace.bytes());
                }
            }
        }
        let exponent = (best[3] / best[0]).ln() / (LENGTHS[3] as f64 / LENGTHS[0] as f64).ln();
        let rates = LENGTHS.iter().zip(best).map(|(n, s)| (n * HEADS) as f64 / s / 1e6);
        let rates: Vec<String> = rates.map(|rate| format!("{rate:.2}")).collect();
        println!(
            "{name}: Mtok/s a head {}, exponent {exponent:.3}, workspace {bytes:?} bytes",
            rates.join(", ")
        );
        Ok(())
    }
    println!("tokens {LENGTHS:?}");
    one("linear", Linear::new(), &text, cpu)?;
    one("retention", Retention::new(HEADS), &text, cpu)?;
    one("gla", VectorDecay::new(), &text, cpu)?;
    one("gated_delta", Delta::gated(), &text, cpu)
}

/// The time of a token early and late in a stream.
fn stream(dim: usize, cpu: Cpu) -> foveal::Result<()> {
    const PIECE: usize = 2000;
    let text = Text::new(PIECE, dim);
    fn one<R: Recurrence + Clone>(
        name: &str,
        mechanism: R,
        text: &Text,
        cpu: Cpu,
    ) -> foveal::Result<()> {
        let mut early = Runner::new(mechanism.clone(), text, cpu)?;
        let mut late = Runner::new(mechanism, text, cpu)?;
        early.run(text, 0..100)?;
        for _ in 0..1_000_000 / PIECE {
            late.run(text, 0..PIECE)?;
        }
        let saved = [early.state.clone(), late.state.clone()];
        let (mut ratios, mut best) = (vec![], [f64::INFINITY; 2]);
        for round in 0..4 * ROUNDS {
            let mut seconds = [0.0; 2];
            let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
            for n in order {
                let runner = if n == 0 { &mut early } else { &mut late };
                runner.state.clone_from(&saved[n]);
                let start = Instant::now();
                for t in 0..500 {
                    runner.run(text, t..t + 1)?;
                }
                seconds[n] = start.elapsed().as_secs_f64() / 500.0;
                best[n] = best[n].min(seconds[n]);
            }
            ratios.push(seconds[1] / seconds[0]);
        }
        let [first, last] = best.map(|s| 1e6 * s);
        println!(
            "{name}: {first:.2} us at token 100, {last:.2} us at token 1000000, median ratio {:.3}",
            median(ratios)
        );
        Ok(())
    }
    one("linear", Linear::new(), &text, cpu)?;
    one("retention", Retention::new(HEADS), &text, cpu)?;
    one("gla", VectorDecay::new(), &text, cpu)?;
    one("gated_delta", Delta::gated(), &text, cpu)
}

/// Time of a call for each token ÷ time of one call.
fn steps(dim: usize, cpu: Cpu) -> foveal::Result<()> {
    let text = Text::new(512, dim);
    fn one<R: Recurrence + Clone>(
        name: &str,
        mechanism: R,
        text: &Text,
        cpu: Cpu,
    ) -> foveal::Result<()> {
        let mut runner = Runner::new(mechanism, text, cpu)?;
        let mut line = format!("{name}:");
        for tokens in [1, 2, 3, 4, 5, 8, 16, 31, 64, 512] {
            let mut ratios = vec![];
            for _ in 0..ROUNDS {
                let repeats = 2048 / tokens;
                let start = Instant::now();
                for _ in 0..repeats {
                    runner.run(text, 0..tokens)?;
                }
                let whole = start.elapsed().as_secs_f64();
                let start = Instant::now();
                for t in (0..repeats).flat_map(|_| 0..tokens) {
                    runner.run(text, t..t + 1)?;
                }
                ratios.push(start.elapsed().as_secs_f64() / whole);
            }
            line += &format!(" {tokens}: {:.2},", median(ratios));
        }
        println!("{line}");
        Ok(())
    }
    println!("a call for each token ÷ one call of so many tokens");
    one("linear", Linear::new(), &text, cpu)?;
    one("retention", Retention::new(HEADS), &text, cpu)?;
    one("gla", VectorDecay::new(), &text, cpu)?;
    one("delta", Delta::new(), &text, cpu)?;
    one("gated_delta", Delta::gated(), &text, cpu)
}

/// Time of tokens whose keys are zero, long after the last one that was not, ÷ time of tokens with keys. Without care the
/// state would pass through subnormal numbers, which processors compute slowly, for hundreds of tokens.
fn forgotten(dim: usize, cpu: Cpu) -> foveal::Result<()> {
    const TOKENS: usize = 2048;
    let text = Text::new(TOKENS, dim);
    let mut silent = Text::new(TOKENS, dim);
    silent.qkv[1].fill(0.0);
    fn one<R: Recurrence + Clone>(
        name: &str,
        mechanism: &R,
        (text, silent): (&Text, &Text),
        cpu: Cpu,
    ) -> foveal::Result<()> {
        let mut ratios = vec![];
        for _ in 0..ROUNDS {
            let mut written = Runner::new(mechanism.clone(), text, cpu)?;
            let mut decayed = Runner::new(mechanism.clone(), text, cpu)?;
            written.run(text, 0..TOKENS)?;
            decayed.run(text, 0..TOKENS)?;
            let seconds = written.run(text, 0..TOKENS)?;
            ratios.push(decayed.run(silent, 0..TOKENS)? / seconds);
        }
        println!("{name}: {:.3}", median(ratios));
        Ok(())
    }
    println!("{TOKENS} tokens without keys ÷ as many with keys");
    let texts = (&text, &silent);
    one("retention", &Retention::new(HEADS), texts, cpu)?;
    one("gla", &VectorDecay::new(), texts, cpu)?;
    one("gated_delta", &Delta::gated(), texts, cpu)
}
