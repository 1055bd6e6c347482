//! One sparse call next to a peer: `bench/peers/sparse_layers.py` starts it, and lets it and the peer take turns.
//!
//! `sparse_peer CASE TOKENS HEADS FOLDER` reads `q k v d_out` (and `qg kg vg` of Longformer's global projections) as
//! little-endian f32 `[tokens, heads, 64]` from files of the folder, writes `out d_q d_k d_v` next to them, and then answers
//! each line of its standard input with the seconds of one forward and one backward. One thread.

use foveal::plan::{Backward, Inputs};
use foveal::sparse::{BigBird, BlockPlan, Longformer, SparseTransformer};
use foveal::{Attention, Cpu, Forward, Level, Mask, Shape, Tensor, Threads};
use std::io::{BufRead, Error, Result, Write, stdin, stdout};
use std::path::Path;
use std::time::Instant;

const DIM: usize = 64;

type Ran = foveal::Result<(Forward<f32>, Backward<f32>, [f64; 2])>;
type Run = Box<dyn Fn(&[Tensor<f32>]) -> Ran>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [case, tokens, heads, folder] = &arguments[..] else {
        return Err(Error::other("sparse_peer CASE TOKENS HEADS FOLDER"));
    };
    let number = |text: &str| text.parse::<usize>().map_err(Error::other);
    let (tokens, heads) = (number(tokens)?, number(heads)?);
    let folder = Path::new(folder);
    let shape = Shape { batch: 1, seq: tokens, heads, dim: DIM };
    let more: &[&str] = if case == "longformer" { &["qg", "kg", "vg"] } else { &[] };
    let names = ["q", "k", "v", "d_out"].iter().chain(more);
    let x: Result<Vec<_>> = names.map(|name| read(&folder.join(name), shape)).collect();
    let (x, run) = (x?, make(case, tokens, heads).map_err(Error::other)?);
    let (forward, d, _) = run(&x).map_err(Error::other)?;
    for (name, tensor) in [("out", &forward.out), ("d_q", &d.d_q), ("d_k", &d.d_k), ("d_v", &d.d_v)]
    {
        let bytes: Vec<u8> = tensor.as_slice().iter().flat_map(|x| x.to_le_bytes()).collect();
        std::fs::write(folder.join(name), bytes)?;
    }
    println!("ready");
    for line in stdin().lock().lines() {
        line?;
        let [forward, backward] = run(&x).map_err(Error::other)?.2;
        println!("{forward} {backward}");
        stdout().flush()?;
    }
    Ok(())
}

fn read(path: &Path, shape: Shape) -> Result<Tensor<f32>> {
    let bytes = std::fs::read(path)?;
    let numbers = bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
    Tensor::from_vec(numbers.collect(), shape).map_err(Error::other)
}

/// The case's computation by name.
fn make(case: &str, tokens: usize, heads: usize) -> foveal::Result<Run> {
    let cpu = Cpu { level: Level::detect()?, threads: Threads::ONE };
    let root = (tokens as f64).sqrt().ceil() as usize;
    let exact = move |mask: Mask| -> Run {
        let attention = Attention::new().mask(mask).cpu(cpu);
        Box::new(move |x| {
            let inputs = own(x);
            let forward = || attention.forward(inputs.q, inputs.k, inputs.v);
            timed(forward, |forward| attention.backward(inputs, forward, x[3].view()))
        })
    };
    let transformer = |layer: SparseTransformer| -> Run {
        let layer = layer.cpu(cpu);
        Box::new(move |x| {
            let forward = || layer.forward(own(x));
            timed(forward, |forward| layer.backward(own(x), forward, x[3].view()))
        })
    };
    Ok(match case {
        "fixed" => transformer(SparseTransformer::fixed(root, 8)?),
        "strided" => transformer(SparseTransformer::strided(root)?),
        "window" => exact(Mask::window(512)),
        "bigbird" => {
            let plan = BlockPlan::published([heads, tokens.div_ceil(64), 3], 1)?;
            exact(BigBird { block: 64, plan, causal: false }.mask()?)
        }
        // 256 keys on each side, 4 global tokens.
        _ => {
            let global = (0..4).map(|g| g * tokens / 4).collect();
            let layer = Longformer::new(256).global(vec![global]).cpu(cpu);
            Box::new(move |x| {
                let [q, k, v] = [4, 5, 6].map(|n| x[n].view());
                let global = Inputs { q, k, v };
                let forward = || layer.forward(own(x), global);
                timed(forward, |forward| {
                    let [local, _] = layer.backward(own(x), global, forward, x[3].view())?;
                    Ok(local)
                })
            })
        }
    })
}

fn own(x: &[Tensor<f32>]) -> Inputs<'_, f32, f32> {
    Inputs { q: x[0].view(), k: x[1].view(), v: x[2].view() }
}

fn timed(
    forward: impl FnOnce() -> foveal::Result<Forward<f32>>,
    backward: impl FnOnce(&Forward<f32>) -> foveal::Result<Backward<f32>>,
) -> Ran {
    let start = Instant::now();
    let result = forward()?;
    let seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let d = backward(&result)?;
    Ok((result, d, [seconds, start.elapsed().as_secs_f64()]))
}
