//! Who sees whom: a row of digits for each token, 0 where it sees nothing of a key, 9 where it sees all.
//!
//! Patterns are those of the kernels' own masks. Mechanisms with a state show how much of a token is left in it, those with a
//! memory what of earlier segments can come back.

use crate::plan::Inputs;
use crate::sparse::{
    AngularHash, BigBird, BlockPlan, Branches, Factors, Longformer, Moba, NativeSizes,
    NativeSparse, Picture, Reformer, SparseTransformer, Window,
};
use crate::testing::normal;
use crate::{Cpu, Mask, Shape};

/// Tokens of a picture.
pub const PICTURE_TOKENS: usize = 48;

/// The picture of the mechanism of this name, [`PICTURE_TOKENS`] rows of as many digits: causal wherever the mechanism can be. Of a name
/// that is not in the registry, that of `full`.
pub fn picture(name: &str) -> Vec<String> {
    let segment = 16;
    match name {
        "retention" | "scalar_decay" | "gla" | "gated_delta" => {
            shades(|i, j| (i >= j).then(|| 0.9f64.powi((i - j) as i32)))
        }
        "linear" | "performer" | "efficient" | "delta" => shades(|i, j| (i >= j).then_some(0.5)),
        "linformer" => shades(|_, _| Some(0.5)),
        "transformer_xl" => {
            shades(|i, j| (i >= j && j / segment + 1 >= i / segment).then_some(1.0))
        }
        "infini" => shades(|i, j| match (i / segment, j / segment) {
            (a, b) if a == b => (i >= j).then_some(1.0),
            (a, b) => (a > b).then_some(0.4),
        }),
        "memorizing" => shades(|i, j| match (i / segment, j / segment) {
            (a, b) if a == b => (i >= j).then_some(1.0),
            // A few of the past, which content would choose.
            (a, b) => (a > b && (i * 7 + j * 5).is_multiple_of(13)).then_some(1.0),
        }),
        name => mask(name).ok().flatten().map_or_else(
            || shades(|i, j| (i >= j).then_some(1.0)),
            |mask| match Picture::new(&mask, 1, PICTURE_TOKENS) {
                Ok(picture) => shades(|i, j| picture.sees(i, j).then_some(1.0)),
                Err(_) => shades(|_, _| None),
            },
        ),
    }
}

fn shades(shade: impl Fn(usize, usize) -> Option<f64>) -> Vec<String> {
    let digit = |shade: Option<f64>| {
        // What is there at all is shown.
        let level = shade.map_or(0, |shade| ((9.0 * shade).round() as u8).clamp(1, 9));
        char::from(b'0' + level)
    };
    (0..PICTURE_TOKENS).map(|i| (0..PICTURE_TOKENS).map(|j| digit(shade(i, j))).collect()).collect()
}

/// What a mechanism that chooses keys shows; `None` for those that show all earlier ones.
fn mask(name: &str) -> crate::Result<Option<Mask>> {
    let shape = Shape { batch: 1, seq: PICTURE_TOKENS, heads: 1, dim: 64 };
    Ok(Some(match name {
        "window" => Mask::window(12),
        "sparse_transformer" => {
            SparseTransformer::new(Factors::Strided { stride: 7, window: Window::Paper })?.mask()
        }
        "longformer" => Longformer::new(5).global(vec![vec![0, 20]]).mask(),
        "bigbird" => {
            let plan = BlockPlan::published([1, PICTURE_TOKENS / 4, 2], 1)?;
            BigBird { block: 4, plan, causal: false }.mask()?
        }
        "lsh" => {
            let hash = AngularHash::new(shape.dim, 12, 2, 1)?;
            Reformer::new(8)?.mask(&hash.buckets(normal(shape, 1)?.view(), Cpu::detect()?)?)
        }
        "moba" => {
            // Blocks of 6, of which a token sees its own and two earlier ones.
            let layer = Moba::new(6, 3)?;
            let (q, k) = (normal(shape, 1)?, normal(shape, 2)?);
            layer.mask(&layer.choose(q.view(), k.view())?, PICTURE_TOKENS)
        }
        "native_sparse" => {
            // What blocks and window let through; means of all that is older come on top.
            let sizes = NativeSizes { length: 4, stride: 4, block: 4, top: 4, window: 6 };
            let layer = NativeSparse::new(sizes)?;
            let (q, k) = (normal(shape, 1)?, normal(shape, 2)?);
            let tokens = Inputs { q: q.view(), k: k.view(), v: k.view() };
            let pooled = layer.pool(k.view())?;
            let compressed = Inputs { k: pooled.view(), v: pooled.view(), ..tokens };
            let gates = normal(Shape { dim: 3, ..shape }, 3)?;
            let inputs = Branches { compressed, selected: tokens, window: tokens };
            layer.mask(&layer.forward(inputs, gates.view())?.choices, PICTURE_TOKENS)
        }
        _ => return Ok(None),
    }))
}
