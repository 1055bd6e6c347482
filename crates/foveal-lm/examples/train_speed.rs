//! Times a step of training: the 4-layer model of `bench/peers/torch_train.py`, with the same batches and AdamW.
//!
//! ```text
//! cargo run --release -p foveal-lm --example train_speed -- --threads 2 --steps 5 --lengths 256,2048,8192
//!     [--bf16] [--recompute] [--mixer '{"name": "window", "tokens": 256}'] [--tokens 2048] [--save FOLDER]
//! ```
//!
//! Prints one JSON line a length: the least and the median time of a step, that of the optimizer alone, the resident set at
//! its peak above the level before, and the losses of the first steps. `--save` writes the model as it begins, for the peer.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use foveal::nn::{AdamW, adamw};
use foveal::{Cpu, Level, Threads};
use foveal_lm::config::ModelConfig;
use foveal_lm::train::{
    Batch, Group, Network, Objective, Parameters, Precision, Scratch, StepOptions,
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

const VOCAB: usize = 4096;

struct Options {
    threads: usize,
    steps: usize,
    tokens: usize,
    lengths: Vec<usize>,
    bf16: bool,
    recompute: bool,
    mixer: Option<Value>,
    save: Option<PathBuf>,
}

fn options() -> Options {
    let mut options = Options {
        threads: 2,
        steps: 5,
        tokens: 2048,
        lengths: vec![256, 2048, 8192],
        bf16: false,
        recompute: false,
        mixer: None,
        save: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{name} needs a value"));
        let count = |text: String| text.parse().expect("a number");
        match name.as_str() {
            "--threads" => options.threads = count(value()),
            "--steps" => options.steps = count(value()),
            "--tokens" => options.tokens = count(value()),
            "--lengths" => {
                options.lengths =
                    value().split(',').map(|n| n.parse().expect("a number")).collect();
            }
            "--bf16" => options.bf16 = true,
            "--recompute" => options.recompute = true,
            "--mixer" => options.mixer = Some(serde_json::from_str(&value()).expect("JSON")),
            "--save" => options.save = Some(value().into()),
            other => panic!("no option {other}"),
        }
    }
    options
}

/// The resident set at its peak, in MiB; 0 where the system does not say.
fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

/// The peer's tokens: of each text its tokens, and the next of each.
fn batch_of(step: u64, batch: usize, seq: usize) -> [Vec<u32>; 2] {
    let mut state = (step * 2_654_435_761 + 12_345) as u32;
    let mut tokens = vec![];
    for _ in 0..batch * (seq + 1) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        tokens.push((state >> 8) % VOCAB as u32);
    }
    let texts = |from: usize| {
        let rows = tokens.chunks_exact(seq + 1);
        rows.flat_map(|row| &row[from..from + seq]).copied().collect()
    };
    [texts(0), texts(1)]
}

fn save(parameters: &Parameters, config: &Value, folder: &PathBuf) {
    std::fs::create_dir_all(folder).expect("a folder");
    std::fs::write(folder.join("config.json"), config.to_string()).expect("a file");
    let bytes: Vec<u8> = parameters.values().iter().flat_map(|x| x.to_le_bytes()).collect();
    let views = parameters.entries().iter().map(|entry| {
        let own = &bytes[4 * entry.range.start..4 * entry.range.end];
        (entry.name.clone(), TensorView::new(Dtype::F32, entry.shape.clone(), own).expect("fits"))
    });
    let file = folder.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &file).expect("a file");
}

fn measure(seq: usize, options: &Options, base: f64) -> Result<Value, foveal_lm::Error> {
    let mut config = json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 1024, "rms_norm_eps": 1e-5,
        "max_position_embeddings": seq, "tie_word_embeddings": false,
    });
    if let Some(mixer) = &options.mixer {
        config["foveal"] = json!({"mixer": mixer});
    }
    let model = ModelConfig::from_json(&config)?;
    let mut parameters = Parameters::initial(&model, 1)?;
    if let Some(folder) = &options.save {
        save(&parameters, &config, folder);
    }
    let network = Network::new(&model, Objective::Causal)?;
    let batch = (options.tokens / seq).max(1);
    let threads = Threads::at_most(NonZeroUsize::new(options.threads).expect("a thread"));
    let cpu = Cpu { level: Level::detect()?, threads };
    let mut scratch = Scratch::new();
    let [mut first, mut second, mut gradients] = [0; 3].map(|_| parameters.zeros());
    let (mut times, mut optimizer, mut losses) = (vec![], vec![], vec![]);
    for step in 0..options.steps as u64 + 2 {
        let [tokens, targets] = batch_of(step, batch, seq);
        let begin = Instant::now();
        gradients.fill(0.0);
        let of = Batch { sequences: batch, tokens: &tokens, targets: &targets };
        let mut how = StepOptions::new(cpu, &mut scratch);
        how.recompute = options.recompute;
        how.precision = if options.bf16 { Precision::Bf16 } else { Precision::F32 };
        let loss = network.gradients(parameters.values(), &of, None, &mut gradients, &mut how)?;
        let middle = Instant::now();
        let entries = parameters.entries().to_vec();
        for entry in entries {
            let by = AdamW {
                step: step + 1,
                learning_rate: 1e-3,
                betas: [0.9, 0.95],
                epsilon: 1e-8,
                weight_decay: if entry.group == Group::Matrix { 0.1 } else { 0.0 },
                gradient_factor: 1.0,
            };
            let own = entry.range;
            let moments = [&mut first[own.clone()], &mut second[own.clone()]];
            let values = &mut parameters.values_mut()[own.clone()];
            adamw(by, values, &gradients[own], moments, cpu)?;
        }
        losses.push((loss.mean() * 1e5).round() / 1e5);
        if step >= 2 {
            times.push(begin.elapsed().as_secs_f64() * 1e3);
            optimizer.push(middle.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    optimizer.sort_by(f64::total_cmp);
    let tenth = |x: f64| (x * 10.0).round() / 10.0;
    losses.truncate(5);
    Ok(json!({
        "length": seq, "batch": batch, "threads": options.threads,
        "dtype": if options.bf16 { "bf16" } else { "f32" },
        "ms": tenth(times[0]), "median_ms": tenth(times[times.len() / 2]), "optimizer_ms": tenth(optimizer[0]),
        "peak_mib": (resident_mib() - base).round(),
        "activations_mib": (scratch.peak_bytes() as f64 / f64::from(1 << 20)).round(), "losses": losses,
    }))
}

fn main() -> Result<(), foveal_lm::Error> {
    let options = options();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build_global();
    pool.expect("the first pool");
    let base = resident_mib();
    for &seq in &options.lengths {
        println!("{}", measure(seq, &options, base)?);
    }
    Ok(())
}
