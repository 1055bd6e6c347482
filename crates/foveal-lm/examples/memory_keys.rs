//! Queries and keys of a model over a text, as a memory that searches by content would see them: without rotation.
//!
//! ```text
//! cargo run --release -p foveal-lm --example memory_keys -- MODEL.gguf TEXT LAYER TOKENS OUT
//! ```
//!
//! Layer by layer up to LAYER, whose own rotation is left out; layers see 512 tokens. OUT is plain f32: heads, key/value heads, dim
//! and tokens, and then of each token its queries and its keys. `index_recall` of `foveal` measures with it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use foveal::projection::Activations;
use foveal_lm::config::{ModelConfig, RopeScaling};
use foveal_lm::mixer::{Attended, CacheOptions};
use foveal_lm::model::{Observer, Scratch};
use foveal_lm::tokenizer::{Encode, Tokenizer};
use foveal_lm::weights::{Description, Weights};
use foveal_lm::{Error, Model};

/// Tokens that layers see.
const CONTEXT: usize = 512;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, layer, tokens, out] = &arguments[..] else {
        return Err("give a model, a text, LAYER, TOKENS and a file to write".into());
    };
    let (layer, count): (usize, usize) = (layer.parse()?, tokens.parse()?);
    let weights = Weights::open(Path::new(model))?;
    let Description::Gguf(metadata) = weights.description() else {
        return Err("the model is to be a GGUF file".into());
    };
    let tokenizer = Tokenizer::from_gguf(metadata)?;
    let mut config = ModelConfig::read(&weights)?;
    config.layers.truncate(layer + 1);
    let last = config.layers.last_mut().ok_or("a model without layers")?;
    // Angles of 10⁻³⁰ are none.
    last.rope.scaling = RopeScaling::Linear { factor: 1e30 };
    let heads = config.attention;
    let model = Model::assembled(&weights, config)?.with_activations(Activations::Bf16);
    let mut tokens = tokenizer.encode(&std::fs::read_to_string(text)?, Encode::PROMPT)?;
    tokens.truncate(count);
    let mut to = BufWriter::new(File::create(out)?);
    let sizes = [heads.heads, heads.kv_heads, heads.head_dim, tokens.len()];
    for size in sizes {
        to.write_all(&(size as f32).to_le_bytes())?;
    }
    let options = CacheOptions { context: Some(CONTEXT), ..CacheOptions::default() };
    let (mut state, mut scratch) = (model.state_with(&options)?, Scratch::new());
    let mut rows = Rows { layer, bytes: vec![] };
    for chunk in tokens.chunks(4096) {
        model.forward_observed(chunk, &mut state, &mut scratch, &mut rows)?;
        to.write_all(&rows.bytes)?;
        rows.bytes.clear();
        eprintln!("{} of {} tokens", state.position(), tokens.len());
    }
    Ok(to.flush()?)
}

/// What one layer had of a chunk.
struct Rows {
    layer: usize,
    bytes: Vec<u8>,
}

impl Observer for Rows {
    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> Result<(), Error> {
        if layer != self.layer {
            return Ok(());
        }
        let rows = attended.rows()?;
        for t in 0..rows[0].shape().seq {
            for x in rows {
                let heads = (0..x.shape().heads).flat_map(|head| x.row(0, t, head));
                self.bytes.extend(heads.flat_map(|x| x.to_le_bytes()));
            }
        }
        Ok(())
    }
}
