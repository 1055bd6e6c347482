//! E6: a long text, read with a memory of past keys and values.
//!
//! Wu et al. 2022, "Memorizing Transformers", arXiv:2203.08913.

use foveal_lm::Model;
use foveal_lm::train::config::Order;
use serde_json::{Value, json};

use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table};
use super::language::{Folder, bits_a_token, config, held_out, trained};
use super::results::Results;
use super::{Models, Numbers};
use crate::plot::{Axis, Plot, Series};

/// Held-out bytes that are read as one text.
const READ: usize = 1 << 15;
/// Entries that are looked up of them.
const TOP: usize = 32;
const FEW: usize = 8;
/// Memories at reading, in entries.
const MEMORIES: [usize; 4] = [0, 1024, 4096, 16384];

/// Windows, and a memory of so many entries in the last layer but one.
fn mixers(layers: usize, segment: usize, (memory, top): (usize, usize)) -> Value {
    let window = json!({"name": "window", "tokens": segment});
    let mut all = vec![window; layers];
    if memory > 0 {
        all[layers.saturating_sub(2)] =
            json!({"name": "memorizing", "segment": segment, "top": top, "capacity": memory});
    }
    Value::Array(all)
}

pub(super) fn run(cell: &Cell, _: &Models) -> anyhow::Result<Numbers> {
    let [tokens, memory, layers] = ["tokens", "memory", "layers"].map(|key| cell.count(key));
    let (tokens, memory, layers) = (tokens?, memory?, layers?);
    let mixer = mixers(layers, tokens, (memory, TOP));
    let mut config = config(cell, (cell.count("heads")?, Some(&mixer)))?;
    config.data.order = Order::Streams;
    let folder = Folder::new(&cell.name())?;
    trained(config, folder.path())?;
    let text = held_out(READ);
    let bits = |memory: usize, top: usize| -> anyhow::Result<f64> {
        folder.set_mixer(&mixers(layers, tokens, (memory, top)))?;
        bits_a_token(&Model::load(folder.path())?, &text, text.len())
    };
    let mut numbers = Numbers::from([("bits".to_owned(), bits(memory, TOP)?)]);
    // Without a memory there is no gate to read one with.
    if memory > 0 {
        for at in MEMORIES.into_iter().filter(|&at| at >= memory) {
            numbers.insert(format!("bits_{at}"), bits(at, TOP)?);
        }
        numbers.insert("bits_few".to_owned(), bits(memory, FEW)?);
    }
    Ok(numbers)
}

pub(super) fn judge(results: &Results) -> Judgement {
    let of =
        |memory: usize, number: &str| results.numbers(&[("memory", &memory.to_string())], number);
    let [none, small, middle, large] = MEMORIES;
    let (bits, extended) = ("bits", |at: usize| format!("bits_{at}"));
    let checks = vec![
        Check::greater(
            "no memory needs more bits than 1024 entries",
            &of(none, bits),
            &of(small, bits),
        ),
        Check::greater(
            "1024 entries need more bits than 4096",
            &of(small, bits),
            &of(middle, bits),
        ),
        Check::greater(
            "4096 entries need more bits than 16384",
            &of(middle, bits),
            &of(large, bits),
        ),
        Check::greater(
            "trained with 1024 entries, reading with 16384 needs fewer bits",
            &of(small, &extended(small)),
            &of(small, &extended(large)),
        ),
        Check::as_good(
            "8 entries looked up are as good as 32",
            (&of(middle, "bits_few"), &of(middle, bits)),
            0.02,
        ),
    ];
    let mut head = vec!["trained with".to_owned(), "bits per byte, with the same".to_owned()];
    head.extend(MEMORIES[1..].iter().map(|at| format!("with {at}")));
    head.push(format!("{FEW} looked up"));
    let row = |&memory: &usize| {
        let extended = MEMORIES[1..].iter().map(|&at| Sample::words(&of(memory, &extended(at))));
        let begin = [format!("{memory} entries"), Sample::words(&of(memory, bits))];
        begin.into_iter().chain(extended).chain([Sample::words(&of(memory, "bits_few"))]).collect()
    };
    let line = |&memory: &usize| {
        let point = |&at: &usize| Some((at as f64, Sample::of(&of(memory, &extended(at)))?.mean));
        let name = format!("trained with {memory}");
        Series { name, points: MEMORIES[1..].iter().filter_map(point).collect() }
    };
    let mut series: Vec<Series> = MEMORIES[1..].iter().map(line).collect();
    let without = Sample::of(&of(none, bits)).map(|one| one.mean);
    let across = |bits: f64| vec![(small as f64, bits), (large as f64, bits)];
    series.push(Series {
        name: "no memory".to_owned(),
        points: without.map(across).unwrap_or_default(),
    });
    let plot = Plot {
        title: "A novel read with a memory",
        x: Axis::log("entries at reading"),
        y: Axis::linear("bits per byte"),
        series,
    };
    Judgement {
        checks,
        table: Table { head, rows: MEMORIES.iter().map(row).collect() },
        plots: vec![plot],
    }
}
