//! Rows of the embedding for tokens, and the gradient of the embedding, on all threads.
//!
//! ```text
//! x_t = E[token_t]      dE[v] += Σ_t [token_t = v] d_t, in the order of t
//! ```
//!
//! A thread takes neighbouring rows of E and looks for their tokens: every sum has the order of the tokens, whoever adds it.

use foveal::projection::{Matrix, embed};
use foveal::{Cpu, nn};

use crate::Error;

/// Tokens that are looked up at a time.
const TOKENS: usize = 64;
/// Parts of the embedding whose gradients are summed apart, at most.
const PARTS: usize = 64;

/// Writes the rows of `tokens`, which the embedding has.
pub(super) fn forward(
    embedding: &Matrix<'_>,
    tokens: &[u32],
    x: &mut [f32],
    cpu: Cpu,
) -> Result<(), Error> {
    let width = x.len() / tokens.len().max(1);
    // What is refused is refused of no tokens too.
    embed(embedding, &[], &mut [], cpu.level)?;
    let pieces = tokens.chunks(TOKENS).zip(x.chunks_mut((TOKENS * width).max(1)));
    cpu.for_each(pieces, |(tokens, x)| {
        embed(embedding, tokens, x, cpu.level).expect("tokens were checked");
    });
    Ok(())
}

/// Adds the gradients `d` of rows to those of the embedding.
pub(super) fn backward(gradients: &mut [f32], tokens: &[u32], d: &[f32], cpu: Cpu) {
    let width = d.len() / tokens.len().max(1);
    if width == 0 {
        return;
    }
    let rows = (gradients.len() / width).div_ceil(PARTS).max(1);
    cpu.for_each(gradients.chunks_mut(rows * width).enumerate(), |(part, gradients)| {
        let own = part * rows..(part + 1) * rows;
        for (&token, d) in tokens.iter().zip(d.chunks_exact(width)) {
            let token = token as usize;
            if own.contains(&token) {
                let row = &mut gradients[(token - own.start) * width..][..width];
                nn::add(row, d, cpu.level).expect("rows of one width");
            }
        }
    });
}
