//! Ring attention over MPI against attention of one process: `mpirun -n 2 ring` fails where they differ.

use std::error::Error;

use foveal::plan::Inputs;
use foveal::testing::normal;
use foveal::{Attention, Mask, Shape, TensorRef, Workspace};
use foveal_mpi::Mpi;
use foveal_processes::{Processes, RingAttention, Share};

/// What rounding may do to numbers of about 1.
const TOLERANCE: f32 = 2e-5;

fn main() -> Result<(), Box<dyn Error>> {
    let mpi = Mpi::start()?;
    let (rank, share) = (mpi.rank(), Share { count: mpi.count(), balanced: true });
    let shape = Shape { batch: 1, seq: 1024 * share.pieces(), heads: 4, dim: 64 };
    let few = Shape { heads: 2, ..shape };
    let whole = [normal(shape, 1)?, normal(few, 2)?, normal(few, 3)?, normal(shape, 4)?];
    let [q, k, v, d_out] = [0, 1, 2, 3].map(|n| whole[n].view());
    let attention = Attention::new().mask(Mask::causal());
    let once = attention.forward(q, k, v)?;
    let gradients = attention.backward(Inputs { q, k, v }, &once, d_out)?;

    let own = [q, k, v, d_out].map(|x| share.of(x, rank));
    let [q, k, v, d_out] = own;
    let (q, k, v, d_out) = (q?, k?, v?, d_out?);
    let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
    let ring = RingAttention::new(&mpi);
    let mut workspace = Workspace::new();
    let result = ring.forward(inputs, &mut workspace)?;
    let d = ring.backward(inputs, &result, d_out.view(), &mut workspace)?;
    for (what, found, expected) in [
        ("out", &result.out, once.out.view()),
        ("d_q", &d.d_q, gradients.d_q.view()),
        ("d_k", &d.d_k, gradients.d_k.view()),
        ("d_v", &d.d_v, gradients.d_v.view()),
    ] {
        let expected = share.of(expected, rank)?;
        let far = farthest(found.view(), expected.view());
        println!("process {rank} of {}: {what} differs by {far:.1e}", share.count);
        if far.is_nan() || far > TOLERANCE {
            return Err(format!("{what} differs by {far:e}, expected {TOLERANCE:e} at most").into());
        }
    }
    Ok(())
}

fn farthest(a: TensorRef<'_, f32>, b: TensorRef<'_, f32>) -> f32 {
    let Shape { batch, seq, heads, .. } = a.shape();
    let rows = (0..batch * seq * heads).map(|n| (n / heads / seq, n / heads % seq, n % heads));
    let pairs = rows.flat_map(|(b_, t, h)| a.row(b_, t, h).iter().zip(b.row(b_, t, h)));
    pairs
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |far, x| if x > far || x.is_nan() { x } else { far })
}
