//! `foveal pattern`: the picture of a sparse pattern, what it costs, and how far it reaches.

use anyhow::{Context, ensure};
use clap::ValueEnum;
use foveal::plan::Inputs;
use foveal::sparse::{
    AngularHash, BigBird, BlockPlan, Branches, Combine, Factors, Longformer, Moba, NativeSizes,
    NativeSparse, Picture, Reformer, SparseTransformer, SubBlocks, Window, reach,
};
use foveal::testing::normal;
use foveal::{Cpu, Mask, Shape, Tensor};
use serde_json::json;

use crate::output;

/// Show which tokens see which, how many pairs that are, and after how many layers all is reached.
///
/// `lsh`, `moba` and `native_sparse` choose by content: queries and keys are random vectors of 64 numbers. The compressed
/// tokens of `native_sparse` are not in its picture: they are means of the blocks.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The pattern.
    #[arg(value_enum)]
    name: Name,
    /// Tokens.
    #[arg(long, default_value_t = 64)]
    n: usize,
    /// Stride of `strided`, tokens of a block of `fixed`; the root of the number of tokens if not given.
    #[arg(long)]
    stride: Option<usize>,
    /// Summary columns of a block of `fixed`.
    #[arg(long, default_value_t = 1)]
    summary: usize,
    /// Sub-blocks that heads of `fixed` take in turn (`num_verts`).
    #[arg(long, default_value_t = 1)]
    sub_blocks: usize,
    /// Heads that are shown together.
    #[arg(long, default_value_t = 1)]
    heads: usize,
    /// Whether the two sets of `strided` and `fixed` are merged, or take heads or layers in turn.
    #[arg(long, value_enum, default_value_t = Turns::Merged)]
    combine: Turns,
    /// Keys of `window` and the window of `native_sparse`, the query's own included; keys on each side for `longformer`.
    #[arg(long, default_value_t = 8)]
    window: usize,
    /// Distance between neighbouring keys of a window of `longformer`.
    #[arg(long, default_value_t = 1)]
    gap: usize,
    /// Global tokens of `longformer`.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    global: Vec<usize>,
    /// Tokens of a block of `bigbird`, `moba` and `native_sparse`, and of a chunk of `lsh`.
    #[arg(long, default_value_t = 4)]
    block: usize,
    /// Blocks that a row sees: of `moba`, its own included (3), or of `native_sparse`, the first, its own and the one
    /// before included (5).
    #[arg(long)]
    top: Option<usize>,
    /// Rounds of hashing of `lsh`.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Random blocks of each row of `bigbird`.
    #[arg(long, default_value_t = 3)]
    random: usize,
    /// Seed of random blocks and vectors.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Hide later tokens from `longformer` and `bigbird`.
    #[arg(long)]
    causal: bool,
    /// Print JSON, without the picture.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    Full,
    Window,
    Strided,
    Fixed,
    Longformer,
    Bigbird,
    Lsh,
    Moba,
    #[value(name = "native_sparse")]
    NativeSparse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Turns {
    Merged,
    Heads,
    Layers,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let &Arguments { n, heads, .. } = arguments;
    ensure!(n > 0, "there is nothing to show of 0 tokens");
    ensure!((1..=64).contains(&heads), "heads are 1 to 64, not {heads}");
    let masks = masks(arguments)?;
    let pictures =
        masks.iter().map(|mask| Picture::new(mask, heads, n)).collect::<Result<Vec<_>, _>>();
    let pictures = pictures.context("the picture")?;
    let layers = reach(&pictures);
    if arguments.json {
        let values = pictures.iter().map(|picture| {
            json!({
                "pairs": picture.pairs(),
                "all_pairs": picture.all_pairs(),
                "keys_per_query": picture.keys_per_query(),
            })
        });
        let all = json!({
            "tokens": n,
            "layers": values.collect::<Vec<_>>(),
            "reached_after_layers": layers,
        });
        return Ok(output::print_json(&all)?);
    }
    Ok(output::print(&drawn(&pictures, layers))?)
}

/// The pictures and what is counted in them.
fn drawn(pictures: &[Picture], layers: Option<usize>) -> String {
    let mut text = String::new();
    for (layer, picture) in pictures.iter().enumerate() {
        if pictures.len() > 1 {
            text += &format!("layer {layer}\n");
        }
        text += &format!(
            "{picture}{} of {} pairs live ({:.1} %), {:.1} keys a query\n",
            picture.pairs(),
            picture.all_pairs(),
            100.0 * picture.pairs() as f64 / picture.all_pairs() as f64,
            picture.keys_per_query(),
        );
    }
    let what =
        if pictures.iter().all(Picture::is_causal) { "every earlier token" } else { "every token" };
    text += &match layers {
        Some(1) => format!("{what} is reached in one layer\n"),
        Some(layers) => format!("{what} is reached after {layers} layers\n"),
        None => format!("{what} is not reached in any number of layers\n"),
    };
    text
}

/// The masks that layers take in turn.
fn masks(arguments: &Arguments) -> anyhow::Result<Vec<Mask>> {
    let &Arguments { n, window, block, random, seed, causal, heads, .. } = arguments;
    Ok(match arguments.name {
        Name::Full => vec![Mask::causal()],
        Name::Window => vec![Mask::window(window)],
        Name::Strided | Name::Fixed => return sparse_transformer(arguments),
        Name::Longformer => {
            ensure!(arguments.gap > 0, "a gap of 0 between keys; it is at least 1");
            let global = arguments.global.clone();
            ensure!(global.iter().all(|&token| token < n), "a global token is beyond the last");
            let layer = Longformer::new(window).gaps(vec![arguments.gap]).global(vec![global]);
            vec![if causal { layer.causal() } else { layer }.mask()]
        }
        Name::Bigbird => {
            ensure!(block > 0, "blocks of 0 tokens");
            let plan = BlockPlan::published([heads, n.div_ceil(block), random], seed)?;
            vec![BigBird { block, plan, causal }.mask()?]
        }
        Name::Lsh | Name::Moba | Name::NativeSparse => vec![chosen(arguments)?],
    })
}

/// What heads see that choose by content.
fn chosen(arguments: &Arguments) -> anyhow::Result<Mask> {
    let &Arguments { n, heads, block, window, rounds, seed, .. } = arguments;
    let shape = Shape { batch: 1, seq: n, heads, dim: 64 };
    let [q, k] = [seed, seed.wrapping_add(1)].map(|seed| normal(shape, seed));
    let (q, k) = (q?, k?);
    let (q, k) = (q.view(), k.view());
    Ok(match arguments.name {
        Name::Moba => {
            let layer = Moba::new(block, arguments.top.unwrap_or(3))?;
            layer.mask(&layer.choose(q, k)?, n)
        }
        Name::NativeSparse => {
            let top = arguments.top.unwrap_or(5);
            let sizes = NativeSizes { length: block, stride: block, block, top, window };
            let layer = NativeSparse::new(sizes)?;
            let (means, gates) = (layer.pool(k)?, Tensor::zeros(Shape { dim: 3, ..shape })?);
            let tokens = Inputs { q, k, v: k };
            let compressed = Inputs { q, k: means.view(), v: means.view() };
            let inputs = Branches { compressed, selected: tokens, window: tokens };
            layer.mask(&layer.forward(inputs, gates.view())?.choices, n)
        }
        _ => {
            let layer = Reformer::new(block)?;
            // As many buckets as published: two for each chunk.
            let hash = AngularHash::new(shape.dim, 2 * n.div_ceil(block), rounds, seed)?;
            layer.mask(&hash.buckets(q, Cpu::detect()?)?)
        }
    })
}

fn sparse_transformer(arguments: &Arguments) -> anyhow::Result<Vec<Mask>> {
    let stride = arguments.stride.unwrap_or(arguments.n.isqrt().max(1));
    let summary = arguments.summary;
    let factors = match arguments.name {
        Name::Strided => Factors::Strided { stride, window: Window::Paper },
        _ => Factors::Fixed { stride, summary, sub_blocks: SubBlocks::Cycle(arguments.sub_blocks) },
    };
    let pattern = SparseTransformer::new(factors)?;
    Ok(match arguments.combine {
        Turns::Merged => vec![pattern.mask()],
        Turns::Heads => vec![pattern.combine(Combine::PerHead).mask()],
        Turns::Layers => {
            let layer = |layer| pattern.combine(Combine::Interleaved { layer }).mask();
            vec![layer(0), layer(1)]
        }
    })
}
