//! What more context is worth to a model: the same tokens, predicted with more and more of what comes before them.
//!
//! ```text
//! cargo run --release -p foveal-lm --example context_loss -- MODEL.gguf TEXT.txt [EVERY]
//! ```
//!
//! Blocks of 8 tokens, from token 2048 on, one in EVERY (32), each with the 16, 32, 64 … 2048 tokens before it and nothing else.
//! Bits a byte of all of them, and how much fewer they are than with 16, with twice the standard error of the blocks' differences.

use std::ops::ControlFlow;
use std::path::Path;

use foveal_lm::Model;
use foveal_lm::evaluate::token_nll;
use foveal_lm::tokenizer::{Encode, Tokenizer};
use foveal_lm::weights::{Description, Weights};

/// Half of the smallest context: a token has at most half as many again before it as is said.
const BLOCK: usize = 8;
const CONTEXTS: [usize; 8] = [16, 32, 64, 128, 256, 512, 1024, 2048];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (path, text, every) = match &arguments[..] {
        [path, text] => (Path::new(path), text, 32),
        [path, text, every] => (Path::new(path), text, every.parse::<usize>()?.max(1)),
        _ => return Err("give a model, a text, and perhaps one in how many blocks".into()),
    };
    let weights = Weights::open(path)?;
    let tokenizer = match weights.description() {
        Description::Gguf(metadata) => Tokenizer::from_gguf(metadata)?,
        _ => Tokenizer::from_folder(path)?,
    };
    let model = Model::new(&weights)?;
    let tokens = tokenizer.encode(&std::fs::read_to_string(text)?, Encode::TEXT)?;
    let longest = CONTEXTS[CONTEXTS.len() - 1];
    let starts = (longest..tokens.len().saturating_sub(BLOCK)).step_by(BLOCK * every);
    let mut state = model.state()?;
    // For each block, its bytes and its bits with each context.
    let mut blocks: Vec<(f64, [f64; CONTEXTS.len()])> = vec![];
    for start in starts {
        let bytes = tokenizer.decode(&tokens[start..start + BLOCK])?.len() as f64;
        let mut bits = [0.0; CONTEXTS.len()];
        for (bits, context) in bits.iter_mut().zip(CONTEXTS) {
            state.reset();
            let text = &tokens[start - context..start + BLOCK];
            let nll = token_nll(&model, text, &mut state, &mut |_| ControlFlow::Continue(()))?;
            let own = nll[nll.len() - BLOCK..].iter().map(|&nll| f64::from(nll)).sum::<f64>();
            *bits = own / std::f64::consts::LN_2;
        }
        blocks.push((bytes, bits));
    }
    let bytes: f64 = blocks.iter().map(|block| block.0).sum();
    println!("{} blocks of {BLOCK} tokens, {bytes} bytes", blocks.len());
    for (n, context) in CONTEXTS.into_iter().enumerate() {
        let all: f64 = blocks.iter().map(|block| block.1[n]).sum();
        let fewer: Vec<f64> = blocks.iter().map(|block| block.1[0] - block.1[n]).collect();
        let mean = fewer.iter().sum::<f64>() / fewer.len() as f64;
        let squares: f64 = fewer.iter().map(|x| (x - mean).powi(2)).sum();
        let error = 2.0 * squares.sqrt() / bytes;
        let fewer = fewer.iter().sum::<f64>() / bytes;
        println!(
            "{context:5} tokens before: {:.4} bits a byte, {fewer:.4} ± {error:.4} fewer",
            all / bytes
        );
    }
    Ok(())
}
