//! What a long stream costs: tokens a second of each tenth, bytes of state, resident memory, and perplexity by position.
//!
//! ```text
//! cargo run --release -p foveal-lm --example random_model -- FOLDER MIXER
//! cargo run --release -p foveal-lm --example stream_speed -- FOLDER TEXT TOKENS [MEMORIES]
//! ```
//!
//! The work of `foveal eval --stream`, prompts rounded to bf16 as there. With MEMORIES, entries go to files of that folder.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use foveal::projection::Activations;
use foveal_lm::Model;
use foveal_lm::evaluate::Running;
use foveal_lm::mixer::{CacheOptions, CacheStorage};
use foveal_lm::model::{MemoryFolder, Scratch};
use foveal_lm::text_stream::TextStream;
use foveal_lm::tokenizer::Tokenizer;
use foveal_lm::weights::Weights;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (Some(folder), Some(text), Some(limit)) =
        (arguments.first(), arguments.get(1), arguments.get(2))
    else {
        return Err("give a model's folder, a text, and how many tokens of it".into());
    };
    let limit: usize = limit.parse()?;
    let weights = Weights::open(Path::new(folder))?;
    let model = Model::new(&weights)?.with_activations(Activations::Bf16);
    let tokenizer = Tokenizer::from_folder(Path::new(folder))?;
    let options = CacheOptions { storage: CacheStorage::F16, ..CacheOptions::default() };
    let mut state = model.state_with(&options)?;
    if let Some(memories) = arguments.get(3) {
        state.keep_memories_in(&MemoryFolder::new(Path::new(memories), &model, &weights))?;
    }
    let mut stream = TextStream::new(&tokenizer, File::open(text)?)?.pieces_of(1 << 14);
    let (mut running, mut scratch) = (Running::default(), Scratch::new());
    let (start, mut tenth, mut done, mut marked) = (Instant::now(), Instant::now(), 0, 0);
    while done < limit {
        let Some(mut piece) = stream.next_piece()? else { break };
        piece.truncate(limit - done);
        let both = (&mut state, &mut scratch);
        running.push(&model, &piece, both, &mut |_| ControlFlow::Continue(()))?;
        done += piece.len();
        if done - marked >= limit / 10 || done == limit {
            let rate = (done - marked) as f64 / tenth.elapsed().as_secs_f64();
            let (held, files) = (state.kv_bytes(), state.memory_file_bytes());
            println!("{done} tokens: {rate:.0} tok/s, {held} bytes of state, {files} in files");
            (tenth, marked) = (Instant::now(), done);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{done} tokens in {seconds:.1} s, {:.0} tok/s, digest {:016x}",
        done as f64 / seconds,
        running.digest
    );
    if let Ok(status) = std::fs::read_to_string("/proc/self/status")
        && let Some(line) = status.lines().find(|line| line.starts_with("VmHWM"))
    {
        println!("{line}");
    }
    for bucket in &running.buckets {
        println!("{:?}: perplexity {:.2}", bucket.positions, bucket.mean().exp());
    }
    Ok(())
}
