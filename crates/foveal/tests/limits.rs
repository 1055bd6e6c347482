//! Sizes that no memory holds are refused when a call is planned.

use foveal::{Attention, Cpu, Error, Shape, Tensor, Threads, Workspace};
use half::bf16;
use std::num::NonZeroUsize;

const SMALL: Shape = Shape { batch: 1, seq: 3, heads: 2, dim: 8 };
const HUGE: [usize; 4] = [usize::MAX, usize::MAX / 2, isize::MAX as usize, 1 << 60];

#[allow(clippy::needless_pass_by_value, reason = "results come straight from calls")]
fn is_overflow<T>(result: foveal::Result<T>) -> bool {
    matches!(result, Err(Error::ShapeOverflow { .. }))
}

#[test]
fn sizes_beyond_the_address_space_are_refused() {
    let attention = Attention::new();
    for n in HUGE {
        let keys = Shape { seq: n, ..SMALL };
        assert!(is_overflow(attention.plan(SMALL, keys, keys)), "{n} keys");
        assert!(is_overflow(attention.plan_decode(SMALL, keys, keys)), "{n} keys");
        let queries = Shape { seq: n, ..SMALL };
        assert!(is_overflow(attention.plan(queries, SMALL, SMALL)), "{n} queries");
        let heads = Shape { heads: n - n % 2, ..SMALL };
        assert!(is_overflow(attention.plan(heads, SMALL, SMALL)), "{n} heads");
        let batch = Shape { batch: n, ..SMALL };
        assert!(is_overflow(attention.plan(batch, batch, batch)), "{n} sequences");
    }
}

#[test]
fn an_empty_axis_does_not_hide_a_huge_one() {
    let attention = Attention::new();
    for n in HUGE {
        let shape = Shape { batch: 0, seq: n, ..SMALL };
        assert!(is_overflow(attention.plan(shape, shape, shape)), "{n}");
        let shape = Shape { heads: 0, seq: n, ..SMALL };
        assert!(is_overflow(attention.plan(shape, shape, shape)), "{n}");
    }
}

#[test]
fn a_million_tokens_and_a_thousand_sequences_are_planned() {
    let shape = Shape { batch: 1024, seq: 1 << 20, heads: 128, dim: 256 };
    let attention = Attention::new();
    let plan = attention.plan(shape, shape, shape).unwrap();
    assert!(plan.backward_workspace_bytes::<bf16>() > plan.backward_workspace_bytes::<f32>());
    let one = Shape { seq: 1, ..shape };
    assert!(attention.plan_decode(one, shape, shape).is_ok());
    let small = attention.plan(SMALL, SMALL, SMALL).unwrap();
    assert!(Workspace::for_plan(&small).bytes() >= small.workspace_bytes());
}

#[test]
fn no_query_heads_over_some_keys_are_an_empty_result() {
    let attention = Attention::new();
    let q = Tensor::<f32>::zeros(Shape { heads: 0, ..SMALL }).unwrap();
    let kv = Tensor::<f32>::zeros(SMALL).unwrap();
    for result in [
        attention.forward(q.view(), kv.view(), kv.view()).unwrap(),
        attention.decode(q.view(), kv.view(), kv.view()).unwrap(),
    ] {
        assert_eq!(result.out.shape(), q.shape());
        assert!(result.lse.as_slice().is_empty());
    }
}

/// What a call uses beyond inputs and outputs: 2 MiB a thread forward and 4 MiB backward, one packed image of the keys
/// and values that are in flight, and in 16 bits an image of dQ.
#[test]
fn memory_grows_with_threads_and_packed_keys_alone() {
    const MIB: usize = 1 << 20;
    for (seq, heads, dim) in [(512, 8, 64), (2048, 8, 128), (8192, 8, 256), (65536, 1, 128)] {
        let shape = Shape { batch: 1, seq, heads, dim };
        let bytes = |threads: usize| {
            let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
            let cpu = Cpu { threads, ..Cpu::detect().unwrap() };
            let attention = Attention::new().cpu(cpu);
            let plan = attention.plan(shape, shape, shape).unwrap();
            let backward =
                [plan.backward_workspace_bytes::<f32>(), plan.backward_workspace_bytes::<bf16>()];
            (plan.workspace_bytes(), backward)
        };
        let image = seq.next_multiple_of(288) * dim * 4;
        for threads in 1..=4 {
            let (forward, [backward, sixteen]) = bytes(threads);
            // Keys and values of one head, or of as many as 8 MiB hold.
            let packed = (2 * image + 256 * dim * 8).max(8 * MIB);
            assert!(forward <= threads * 2 * MIB + packed, "{shape:?}, {threads}: {forward}");
            assert!(backward <= threads * 4 * MIB, "{shape:?}, {threads}: {backward}");
            let images = threads.min(heads) * (image + MIB);
            assert!(sixteen <= threads * 4 * MIB + images, "{shape:?}, {threads}: {sixteen}");
        }
    }
}
