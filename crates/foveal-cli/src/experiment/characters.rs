//! E5: models of bytes that differ in their attention alone.
//!
//! Ainslie et al. 2023, arXiv:2305.13245; Child et al. 2019, arXiv:1904.10509; Dai et al. 2019, arXiv:1901.02860.

use foveal_lm::Model;
use foveal_lm::train::config::Order;
use serde_json::{Value, json};

use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table};
use super::language::{Folder, bits_a_token, config, held_out, trained};
use super::results::Results;
use super::{Models, Numbers, recurrent};
use crate::plot::{Axis, Plot, Series};

/// Held-out bytes that are predicted.
const PREDICTED: usize = 1 << 14;
/// Texts of a memory, in sequences of training.
const LONG: usize = 8;
/// What is remembered of them, in sequences of training.
const MEMORIES: [usize; 3] = [1, 2, 4];

/// Key/value heads and mixer of an attention.
fn attention(name: &str, heads: usize, tokens: usize) -> anyhow::Result<(usize, Option<Value>)> {
    let stride = tokens.isqrt();
    let sparse =
        |pattern: &str| json!({"name": "sparse_transformer", "pattern": pattern, "stride": stride});
    Ok(match name {
        "full" => (heads, None),
        "gqa" => ((heads / 2).max(1), None),
        "mqa" => (1, None),
        "fixed" | "strided" => (heads, Some(sparse(name))),
        "transformer_xl" => (heads, Some(remembering(tokens, tokens))),
        other => anyhow::bail!("there is no attention {other:?}"),
    })
}

fn remembering(segment: usize, memory: usize) -> Value {
    json!({"name": "transformer_xl", "segment": segment, "memory": memory})
}

pub(super) fn run(cell: &Cell, _: &Models) -> anyhow::Result<Numbers> {
    let (name, tokens) = (cell.word("attention")?, cell.count("tokens")?);
    let text = held_out(PREDICTED);
    if name == "lstm" {
        let [bits, pace] = recurrent::trained(cell, &text)?;
        let numbers = [("bits", bits), ("tokens_per_second", pace)];
        return Ok(numbers.map(|(name, number)| (name.to_owned(), number)).into());
    }
    let (kv_heads, mixer) = attention(name, cell.count("heads")?, tokens)?;
    let folder = Folder::new(&cell.name())?;
    let mut config = config(cell, (kv_heads, mixer.as_ref()))?;
    if name == "transformer_xl" {
        config.data.order = Order::Streams;
    }
    let pace = trained(config, folder.path())?;
    let bits = |length: usize| -> anyhow::Result<f64> {
        let model = Model::load(folder.path())?;
        bits_a_token(&model, &text, length)
    };
    let mut numbers =
        Numbers::from([("bits".to_owned(), bits(tokens)?), ("tokens_per_second".to_owned(), pace)]);
    if name == "transformer_xl" {
        for memory in MEMORIES {
            folder.set_mixer(&remembering(tokens, memory * tokens))?;
            numbers.insert(format!("bits_memory_{memory}"), bits(LONG * tokens)?);
        }
    }
    Ok(numbers)
}

pub(super) fn judge(results: &Results) -> Judgement {
    let of = |name: &str, number: &str| results.numbers(&[("attention", name)], number);
    let full = of("full", "bits");
    let as_good = |words: &str, a: &[f64], b: &[f64]| Check::as_good(words, (a, b), 0.02);
    let memory = |n: usize| of("transformer_xl", &format!("bits_memory_{n}"));
    let checks = vec![
        Check::greater("an LSTM needs more bits than full", &of("lstm", "bits"), &full),
        as_good("gqa is as good as full", &of("gqa", "bits"), &full),
        Check::greater("mqa needs more bits than full", &of("mqa", "bits"), &full),
        as_good("fixed is as good as full", &of("fixed", "bits"), &full),
        Check::greater(
            "the strided pattern needs more bits than the fixed one",
            &of("strided", "bits"),
            &of("fixed", "bits"),
        ),
        Check::greater(
            "what Transformer-XL remembers saves bits",
            &of("transformer_xl", "bits"),
            &memory(1),
        ),
        Check::greater(
            "Transformer-XL with memory needs fewer bits than full without",
            &full,
            &memory(1),
        ),
        as_good(
            "remembering four times as much as in training does not hurt",
            &memory(4),
            &memory(1),
        ),
    ];
    let names = results.values("attention");
    let mut kinds: Vec<(String, Vec<f64>)> =
        names.iter().map(|name| (name.clone(), of(name, "bits"))).collect();
    for n in MEMORIES {
        kinds.push((format!("xl, memory × {n}"), memory(n)));
    }
    kinds.retain(|(_, bits)| !bits.is_empty());
    let row = |(name, bits): &(String, Vec<f64>)| {
        vec![name.clone(), Sample::words(bits), Sample::words(&of(name, "tokens_per_second"))]
    };
    let head = ["attention", "bits per byte", "trained, tokens a second"];
    let head = head.map(str::to_owned).to_vec();
    let table = Table { head, rows: kinds.iter().map(row).collect() };
    let points = |(n, (name, bits)): (usize, &(String, Vec<f64>))| Series {
        name: name.clone(),
        points: bits.iter().map(|&bits| (n as f64 + 1.0, bits)).collect(),
    };
    let plot = Plot {
        title: "Held-out bytes",
        x: Axis::linear("attention, in the order of the legend"),
        y: Axis::linear("bits per byte"),
        series: kinds.iter().enumerate().map(points).collect(),
    };
    Judgement { checks, table, plots: vec![plot] }
}
