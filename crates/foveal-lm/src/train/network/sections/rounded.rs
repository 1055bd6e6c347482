//! Tensors rounded to bf16 for a kernel, and what it gives widened again.

use foveal::{Cpu, Shape, Tensor, TensorMut, TensorRef};
use half::bf16;

use crate::Error;

/// Tokens that are rounded at a time.
const TOKENS: usize = 16;

/// The same numbers, to nearest, ties to even. Allocates them.
pub(super) fn rounded(x: TensorRef<'_, f32>, cpu: Cpu) -> Result<Tensor<bf16>, Error> {
    let shape = x.shape();
    let Shape { batch, seq, heads, dim } = shape;
    let mut numbers = vec![bf16::ZERO; batch * seq * heads * dim];
    let token = (heads * dim).max(1);
    let pieces = numbers.chunks_mut(TOKENS * token).enumerate();
    cpu.for_each(pieces, |(piece, numbers)| {
        for (n, rows) in numbers.chunks_exact_mut(token).enumerate() {
            let at = piece * TOKENS + n;
            for (head, to) in rows.chunks_exact_mut(dim).enumerate() {
                let from = x.row(at / seq, at % seq, head);
                to.iter_mut().zip(from).for_each(|(to, &x)| *to = bf16::from_f32(x));
            }
        }
    });
    Ok(Tensor::from_vec(numbers, shape)?)
}

/// Writes numbers of 16 bits as such of 32.
pub(super) fn widen(from: &Tensor<bf16>, to: &mut TensorMut<'_, f32>) {
    let from = from.view();
    let Shape { batch, seq, heads, .. } = from.shape();
    for (b, t) in (0..batch).flat_map(|b| (0..seq).map(move |t| (b, t))) {
        for head in 0..heads {
            let rows = to.row_mut(b, t, head).iter_mut().zip(from.row(b, t, head));
            rows.for_each(|(to, x)| *to = f32::from_bits(u32::from(x.to_bits()) << 16));
        }
    }
}
