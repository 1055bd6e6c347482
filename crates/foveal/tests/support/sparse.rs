//! Sparse attention next to what it means: index sets written as published, and the definition in f64.

use super::backward::Call;
use super::error;
use foveal::mask::{Dense, Extent};
use foveal::plan::{Backward, Inputs};
use foveal::reference::Options;
use foveal::sparse::{Combine, Factors, SparseTransformer, SubBlocks, Window};
use foveal::{Attention, Element, Forward, Mask, Tensor};

/// May position `i` of head `head` see position `j`? From the index sets, as published.
pub fn sees(factors: Factors, combine: Combine, head: usize, i: usize, j: usize) -> bool {
    let (first, second) = match factors {
        Factors::Strided { stride: l, window } => {
            let reach = if window == Window::Paper { l } else { l - 1 };
            (i - j <= reach, (i - j).is_multiple_of(l))
        }
        Factors::Fixed { stride: l, summary: c, sub_blocks } => {
            let n = match sub_blocks {
                SubBlocks::Same(n) => n,
                SubBlocks::Cycle(n) => head % n,
            };
            (j / l == i / l, (l - (n + 1) * c..l - n * c).contains(&(j % l)))
        }
    };
    match combine {
        Combine::Merged => first || second,
        Combine::PerHead if head.is_multiple_of(2) => first,
        Combine::Interleaved { layer } if layer.is_multiple_of(2) => first,
        _ => second,
    }
}

/// The pairs that a causal pattern allows, as a dense mask for `queries` rows and `keys` keys.
pub fn dense(extents: [usize; 3], sees: impl Fn(usize, usize, usize) -> bool) -> Mask {
    dense_of(extents, |head, i, j| j <= i && sees(head, i, j))
}

/// The pairs that a pattern allows.
pub fn dense_of(
    [heads, queries, keys]: [usize; 3],
    sees: impl Fn(usize, usize, usize) -> bool,
) -> Mask {
    let mut visible = Vec::with_capacity(heads * queries * keys);
    for head in 0..heads {
        for i in (0..queries).map(|row| (row + keys).checked_sub(queries)) {
            visible.extend((0..keys).map(|j| i.is_some_and(|i| sees(head, i, j))));
        }
    }
    Dense::new(&visible, Extent { batch: 1, heads, queries, keys }).unwrap().into()
}

pub fn inputs<E: Element>(call: &Call<E>) -> Inputs<'_, E, E> {
    Inputs { q: call.q.view(), k: call.k.view(), v: call.v.view() }
}

/// Forward and backward of a call.
pub fn run<E: Element>(layer: &SparseTransformer, call: &Call<E>) -> (Forward<E>, Backward<E>) {
    let forward = layer.forward(inputs(call)).unwrap();
    let backward = layer.backward(inputs(call), &forward, call.d_out.view()).unwrap();
    (forward, backward)
}

/// The largest error of outputs, log-sum-exps and gradients against the definition under `mask`.
pub fn worst_error<E: Element>(
    (forward, backward): &(Forward<E>, Backward<E>),
    call: &Call<E>,
    mask: &Mask,
) -> f64 {
    let scale = 1.0 / (call.q.shape().dim as f64).sqrt();
    let (out, lse) = super::reference((&call.q, &call.k, &call.v), mask, scale);
    let expected = call.define(&Options::new(scale, mask));
    let wide = |x: &[E]| -> Vec<f32> { x.iter().map(|x| x.to_f32()).collect() };
    [
        error(&wide(forward.out.as_slice()), &out),
        error(forward.lse.as_slice(), &lse),
        error(&wide(backward.d_q.as_slice()), &expected.d_q),
        error(&wide(backward.d_k.as_slice()), &expected.d_k),
        error(&wide(backward.d_v.as_slice()), &expected.d_v),
    ]
    .into_iter()
    .fold(0.0, f64::max)
}

/// Results and gradients next to those of exact attention.
#[track_caller]
pub fn assert_like(
    (forward, backward): &(Forward<f32>, Backward<f32>),
    call: &Call<f32>,
    exact: &Attention<'_>,
    what: &str,
) {
    let expected = exact.forward(call.q.view(), call.k.view(), call.v.view()).unwrap();
    let gradients = exact.backward(inputs(call), &expected, call.d_out.view()).unwrap();
    for (name, got, expected) in [
        ("out", &forward.out, &expected.out),
        ("lse", &forward.lse, &expected.lse),
        ("dQ", &backward.d_q, &gradients.d_q),
        ("dK", &backward.d_k, &gradients.d_k),
        ("dV", &backward.d_v, &gradients.d_v),
    ] {
        let expected: Vec<f64> = expected.as_slice().iter().map(|&x| x.into()).collect();
        let worst = error(got.as_slice(), &expected);
        assert!(worst < 1e-5, "{what} {name}: {worst:e}");
    }
}

pub fn wide<E: Element>(x: &Tensor<E>) -> Vec<f64> {
    x.as_slice().iter().map(|x| f64::from(x.to_f32())).collect()
}
