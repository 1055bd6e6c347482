//! What the inverted file of a large memory finds, and in what time: recall of the 32 best entries against exact search.
//!
//! ```text
//! cargo run --release -p foveal-lm --example memory_keys -- MODEL.gguf TEXT 10 300000 KEYS
//! cargo run --release -p foveal --example index_recall -- KEYS > record.csv
//! ```
//!
//! Queries and keys of a model over a text, and of a Gaussian in as many dims; entries in bf16, one thread. A segment of 512 tokens
//! and a generated token, whole: attention within the segment, search, attention to what was retrieved. Times are the best of
//! a few. Picture: `foveal-bench --recall record.csv --plot docs/pictures`.

use std::time::Instant;

use foveal::cache::ContiguousCache;
use foveal::memory::MemorizingState;
use foveal::memory::memorizing::{Index, Memorizing, MemorizingForward, Tokens};
use foveal::sparse::StateHeads;
use foveal::{Cpu, Phase, Shape, Tensor, Threads};
use half::bf16;

const SEGMENT: usize = 512;
const TOP: usize = 32;
const ENTRIES: [(usize, usize); 2] = [(65_536, 512), (262_144, 1024)];
const PROBES: [usize; 6] = [4, 8, 16, 32, 64, 128];
/// Segments and generated tokens that are measured.
const ROUNDS: usize = 3;

type State = MemorizingState<ContiguousCache<bf16>>;
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let path = std::env::args().nth(1).ok_or("give a file of queries and keys")?;
    let model = Rows::read(&path)?;
    let noise = model.noise()?;
    println!("keys,entries,lists,probes,recall,segment_seconds,token_seconds");
    for (name, rows) in [("SmolLM2", &model), ("Gaussian", &noise)] {
        for (entries, lists) in ENTRIES {
            if rows.tokens < entries + (ROUNDS + 1) * SEGMENT + 1 {
                eprintln!("{name}: too few tokens for {entries} entries");
                continue;
            }
            measure(name, rows, (entries, lists))?;
        }
    }
    Ok(())
}

/// Queries and keys of tokens.
struct Rows {
    heads: StateHeads,
    tokens: usize,
    /// `[token][heads of queries, then of keys][dim]`.
    data: Vec<f32>,
}

impl Rows {
    fn read(path: &str) -> Result<Rows> {
        let bytes = std::fs::read(path)?;
        let numbers = bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x));
        let all: Vec<f32> = numbers.collect();
        let (sizes, data) = all.split_at_checked(4).ok_or("an empty file")?;
        let [heads, kv_heads, dim, tokens] = [0, 1, 2, 3].map(|n| sizes[n] as usize);
        if heads == 0 || kv_heads == 0 || data.len() != tokens * (heads + kv_heads) * dim {
            return Err("another file than memory_keys writes".into());
        }
        let heads = StateHeads { heads, kv_heads, key_dim: dim, value_dim: dim };
        Ok(Rows { heads, tokens, data: data.to_vec() })
    }

    /// As many independent numbers: sums of four, normal enough for directions.
    fn noise(&self) -> Result<Rows> {
        let mut seed = 1u64;
        let mut next = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / 8_388_608.0 - 1.0
        };
        let data = (0..self.data.len()).map(|_| (0..4).map(|_| next()).sum()).collect();
        Ok(Rows { data, ..*self })
    }

    /// Queries and keys of some tokens.
    fn of(&self, tokens: std::ops::Range<usize>) -> Result<[Tensor<f32>; 2]> {
        let StateHeads { heads, kv_heads, key_dim: dim, .. } = self.heads;
        let part = |first: usize, count: usize| {
            let rows = tokens.clone().flat_map(|t| {
                let at = (t * (heads + kv_heads) + first) * dim;
                &self.data[at..at + count * dim]
            });
            let shape = Shape { batch: 1, seq: tokens.len(), heads: count, dim };
            Tensor::from_vec(rows.copied().collect(), shape)
        };
        Ok([part(0, heads)?, part(heads, kv_heads)?])
    }
}

/// What was measured of a memory.
struct Measured {
    segment: f64,
    token: f64,
    /// Of the last segment.
    forward: MemorizingForward<f32>,
}

fn measure(name: &str, rows: &Rows, (entries, lists): (usize, usize)) -> Result<()> {
    let memorizing = Memorizing::new(SEGMENT, TOP, entries)?
        .cpu(Cpu { threads: Threads::ONE, ..Cpu::detect()? });
    let mut store = memorizing.store::<bf16>(rows.heads)?;
    for first in (0..entries).step_by(SEGMENT) {
        let [_, mut k] = rows.of(first..first + SEGMENT)?;
        let mut own = k.view_mut();
        let heads = (0..SEGMENT).flat_map(|t| (0..rows.heads.kv_heads).map(move |head| (t, head)));
        heads.for_each(|(t, head)| unit(own.row_mut(0, t, head)));
        store.append(k.view(), k.view())?;
    }
    let exact = run(&memorizing, (rows, entries), &store, None)?;
    let print = |probes: usize, recall: f64, of: &Measured| {
        let (segment, token) = (of.segment, of.token);
        println!("{name},{entries},{lists},{probes},{recall:.4},{segment:.5},{token:.7}");
    };
    print(lists, 1.0, &exact);
    let mut made: Option<(usize, Vec<f32>)> = None;
    for probes in PROBES {
        let memorizing = memorizing.clone().index(Some(Index::new(lists, probes)?));
        let own = run(&memorizing, (rows, entries), &store, Some(&mut made))?;
        print(probes, recall(&own.forward, &exact.forward, rows.heads.heads), &own);
    }
    Ok(())
}

fn unit(row: &mut [f32]) {
    let norm = (row.iter().map(|x| x * x).sum::<f32>() + 1e-6).sqrt();
    row.iter_mut().for_each(|x| *x /= norm);
}

/// Segments and tokens behind a full memory. Centroids are those of `made`, or are made and kept there.
fn run(
    memorizing: &Memorizing,
    (rows, entries): (&Rows, usize),
    store: &ContiguousCache<bf16>,
    made: Option<&mut Option<(usize, Vec<f32>)>>,
) -> Result<Measured> {
    let mut state: State = memorizing.resume(rows.heads, store.clone())?;
    if let Some(Some((at, centroids))) = &made {
        state.restore_centroids(*at, centroids)?;
    }
    let (gate, scale) = (vec![0.0; rows.heads.heads], vec![1.0; rows.heads.heads]);
    let mut read = |tokens: std::ops::Range<usize>, phase| -> Result<_> {
        let [q, k] = rows.of(tokens)?;
        let tokens = Tokens::new(q.view(), k.view(), k.view(), &gate, &scale);
        let start = Instant::now();
        let forward = state.forward(&tokens, phase)?;
        Ok((start.elapsed().as_secs_f64(), forward))
    };
    // The first one makes lists.
    let mut at = entries;
    let (first, mut forward) = read(at..at + SEGMENT, Phase::Prompt)?;
    let (mut segment, mut token) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        at += SEGMENT;
        let (seconds, own) = read(at..at + SEGMENT, Phase::Prompt)?;
        (segment, forward) = (segment.min(seconds), own);
    }
    at += SEGMENT;
    for n in 0..8 * ROUNDS {
        token = token.min(read(at + n..at + n + 1, Phase::Generated)?.0);
    }
    if let Some(made @ None) = made {
        eprintln!("lists of {entries} entries made in {:.1} s", first - segment);
        *made = state.centroids().map(|(at, centroids)| (at, centroids.to_vec()));
    }
    Ok(Measured { segment, token, forward })
}

/// The share of exactly retrieved entries that are among those of `of`.
fn recall(of: &MemorizingForward<f32>, exact: &MemorizingForward<f32>, heads: usize) -> f64 {
    let mut found = 0;
    for (t, head) in (0..SEGMENT).flat_map(|t| (0..heads).map(move |head| (t, head))) {
        let own: Vec<usize> = of.selected.of(t, head).collect();
        found += exact.selected.of(t, head).filter(|at| own.contains(at)).count();
    }
    found as f64 / (SEGMENT * heads * TOP) as f64
}
