//! Weights of a whole model: against a computation in f64, their sums, windows, and what cuts and observers may not change.

use std::ops::{ControlFlow, Range};

use foveal_lm::Error;
use foveal_lm::look::{Look, Looking, Row, Wanted, cell};
use foveal_lm::mixer::{Attended, CacheOptions};
use foveal_lm::model::{CHUNK, Observer, Scratch, Step};
use foveal_lm::weights::Weights;

use crate::laws::{assert_same, run, tokens};
use crate::small;

const WIDTH: usize = 128;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 32;

fn whole(tokens: &[u32], wanted: &Wanted) -> Look {
    Look::at(&small::model(), tokens, wanted, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn everything(tokens: usize) -> Wanted {
    Wanted { cells: tokens, rows: (0..tokens).collect(), kept: tokens }
}

/// The weights of all heads of the first layer in f64, `[head][query][key]`, from the file's own numbers.
fn first_layer(weights: &Weights, tokens: &[u32], reach: usize) -> Vec<Vec<Vec<f64>>> {
    let tensor = |name: &str| -> Vec<f64> {
        weights.tensor(name).unwrap().to_f32().into_iter().map(f64::from).collect()
    };
    let (embedding, norm) = (tensor("token_embd.weight"), tensor("blk.0.attn_norm.weight"));
    let (query, key) = (tensor("blk.0.attn_q.weight"), tensor("blk.0.attn_k.weight"));
    let normed = tokens.iter().map(|&token| {
        let x = &embedding[token as usize * WIDTH..][..WIDTH];
        let square = x.iter().map(|x| x * x).sum::<f64>() / WIDTH as f64;
        let scale = 1.0 / (square + f64::from(1e-6_f32)).sqrt();
        x.iter().zip(&norm).map(|(x, w)| x * scale * w).collect::<Vec<f64>>()
    });
    let normed: Vec<Vec<f64>> = normed.collect();
    let project = |matrix: &[f64], head: usize, position: usize| {
        let rows = matrix[head * DIM * WIDTH..][..DIM * WIDTH].chunks_exact(WIDTH);
        let mut out: Vec<f64> =
            rows.map(|row| row.iter().zip(&normed[position]).map(|(a, b)| a * b).sum()).collect();
        for (n, pair) in out.chunks_exact_mut(2).enumerate() {
            let angle = position as f64 * 10_000_f64.powf(-2.0 * n as f64 / DIM as f64);
            let (sin, cos) = angle.sin_cos();
            let [a, b] = [pair[0], pair[1]];
            (pair[0], pair[1]) = (a * cos - b * sin, a * sin + b * cos);
        }
        out
    };
    let head = |h: usize| {
        let keys: Vec<Vec<f64>> =
            (0..tokens.len()).map(|j| project(&key, h / (HEADS / KV_HEADS), j)).collect();
        let row = |i: usize| {
            let q = project(&query, h, i);
            let seen = |j: usize| j <= i && i - j < reach;
            let scores = keys.iter().enumerate().map(|(j, k)| {
                let dot: f64 = q.iter().zip(k).map(|(a, b)| a * b).sum();
                if seen(j) { (dot / (DIM as f64).sqrt()).exp() } else { 0.0 }
            });
            let scores: Vec<f64> = scores.collect();
            let sum: f64 = scores.iter().sum();
            scores.into_iter().map(|score| score / sum).collect()
        };
        (0..tokens.len()).map(row).collect()
    };
    (0..HEADS).map(head).collect()
}

/// A row as it lies over the text.
fn dense(row: &Row, tokens: usize) -> Vec<f32> {
    let mut dense = vec![0.0; tokens];
    row.weights.iter().for_each(|&(position, weight)| dense[position] = weight);
    dense
}

#[test]
fn the_first_layer_is_that_of_f64() {
    let tokens = tokens(70, 11);
    let expected = first_layer(&small::weights(), &tokens, usize::MAX);
    let look = whole(&tokens, &everything(70));
    assert_eq!((look.layers.len(), look.layers[0].heads.len()), (4, HEADS));
    for (h, (head, expected)) in look.layers[0].heads.iter().zip(&expected).enumerate() {
        assert_eq!(head.rows.len(), 70);
        for (i, (row, expected)) in head.rows.iter().zip(expected).enumerate() {
            for (j, (found, expected)) in dense(row, 70).iter().zip(expected).enumerate() {
                let off = (f64::from(*found) - expected).abs();
                assert!(off <= 2e-5, "head {h}, {i} to {j}: off by {off}");
            }
            let entropy: f64 = expected.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            let off = (f64::from(row.entropy) - entropy).abs();
            assert!(off <= 2e-4, "head {h}, entropy of {i}: off by {off}");
        }
    }
}

#[test]
fn every_row_of_every_head_sums_to_one_and_sees_no_later_token() {
    let tokens = tokens(300, 12);
    let look = whole(&tokens, &everything(300));
    for layer in &look.layers {
        for head in &layer.heads {
            for (i, row) in head.rows.iter().enumerate() {
                assert!((row.sum - 1.0).abs() < 2e-5, "{}", row.sum);
                assert!(row.weights.iter().all(|&(j, weight)| j <= i && weight > 0.0));
                assert!(row.weights.is_sorted_by(|a, b| a.1 >= b.1));
                let least = -1e-6..=((i + 1) as f32).ln() + 1e-4;
                assert!(least.contains(&row.entropy), "{} of {i}", row.entropy);
            }
        }
    }
}

/// Maps are sums of the rows, whatever the number of cells, and across chunks.
#[test]
fn maps_are_what_their_rows_add_up_to() {
    let tokens = tokens(530, 13);
    let rows = everything(530);
    for cells in [1, 7, 48, 530] {
        let look = whole(&tokens, &Wanted { cells, ..rows.clone() });
        for head in look.layers.iter().flat_map(|layer| &layer.heads) {
            let mut sums = vec![0.0_f64; cells * cells];
            for a in 0..cells {
                let queries = cell(530, a, cells);
                for i in queries.clone() {
                    let dense = dense(&head.rows[i], 530);
                    for b in 0..cells {
                        let mass: f64 =
                            dense[cell(530, b, cells)].iter().map(|&x| f64::from(x)).sum();
                        sums[a * cells + b] += mass / queries.len() as f64;
                    }
                }
            }
            for (found, expected) in head.map.iter().zip(&sums) {
                assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
            }
        }
    }
}

#[test]
fn few_weights_are_the_greatest_of_all() {
    let tokens = tokens(300, 14);
    let all = whole(&tokens, &everything(300));
    let few = whole(&tokens, &Wanted { cells: 0, rows: vec![3, 255, 256, 299], kept: 4 });
    for (all, few) in all.layers.iter().zip(&few.layers) {
        for (all, few) in all.heads.iter().zip(&few.heads) {
            assert!(few.map.is_empty());
            for (row, position) in few.rows.iter().zip([3, 255, 256, 299]) {
                assert_eq!(row.weights, all.rows[position].weights[..row.weights.len()]);
                assert_eq!((row.weights.len(), row.sum), (4, all.rows[position].sum));
            }
        }
    }
}

#[test]
fn windows_are_respected() {
    let (model, tokens) = (small::model(), tokens(600, 15));
    for reach in [1, 5, 100] {
        let options = CacheOptions { context: Some(reach), ..CacheOptions::default() };
        let mut state = model.state_with(&options).unwrap();
        let wanted = Wanted { cells: 0, rows: vec![0, 4, 99, 270, 599], kept: 600 };
        let watch = &mut |_| ControlFlow::Continue(());
        let look = Look::with_state(&model, &tokens, &wanted, (&mut state, watch)).unwrap();
        for layer in &look.layers {
            assert_eq!(layer.reach, Some(reach));
            for head in &layer.heads {
                for (row, &i) in head.rows.iter().zip(&wanted.rows) {
                    let seen = (i + 1).saturating_sub(reach)..=i;
                    assert!(row.weights.iter().all(|(j, _)| seen.contains(j)), "{i}: {row:?}");
                    assert!((row.sum - 1.0).abs() < 2e-5);
                }
            }
        }
        if reach < 100 {
            let short = &tokens[..60];
            let expected = first_layer(&small::weights(), short, reach);
            let mut state = model.state_with(&options).unwrap();
            let wanted = Wanted { cells: 0, rows: vec![59], kept: 60 };
            let look = Look::with_state(&model, short, &wanted, (&mut state, watch)).unwrap();
            for (head, expected) in look.layers[0].heads.iter().zip(&expected) {
                let found = dense(&head.rows[0], 60);
                for (found, expected) in found.iter().zip(&expected[59]) {
                    assert!((f64::from(*found) - expected).abs() <= 2e-5);
                }
            }
        }
    }
}

struct Nothing(Vec<(usize, Range<usize>)>);

impl Observer for Nothing {
    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> Result<(), Error> {
        self.0.push((layer, attended.queries()));
        assert_eq!((attended.heads(), attended.kv_heads()), (HEADS, KV_HEADS));
        assert_eq!(attended.keys(), 0..attended.queries().end);
        let end = attended.queries().end;
        for wrong in [end..end + 1, 0..end + 1, end + 5..end + 6] {
            assert!(matches!(attended.weights(wrong), Err(Error::Kernel(_))));
        }
        Ok(())
    }
}

#[test]
fn observers_change_no_bit_and_see_every_layer() {
    let (model, tokens) = (small::model(), tokens(300, 16));
    let expected = run(&model, &mut model.state().unwrap(), &tokens, Step::PROMPT);
    let (mut state, mut scratch) = (model.state().unwrap(), Scratch::new());
    let mut observer = Nothing(Vec::new());
    model.forward_observed(&tokens, &mut state, &mut scratch, &mut observer).unwrap();
    assert_same(scratch.logits(), &expected);
    let chunks = [0..256, 256..300];
    let seen = chunks.iter().flat_map(|chunk| (0..4).map(move |layer| (layer, chunk.clone())));
    assert!(observer.0.into_iter().eq(seen));
}

#[test]
fn what_there_is_not_is_refused_and_a_reading_can_be_broken_off() {
    let (model, tokens) = (small::model(), tokens(600, 17));
    let go_on = &mut |_| ControlFlow::Continue(());
    let wanted = Wanted { cells: 4, rows: vec![600], kept: 1 };
    let error = Look::at(&model, &tokens, &wanted, go_on).unwrap_err();
    assert!(matches!(error, Error::Position { found: 600, tokens: 600 }), "{error}");
    let wanted = Wanted { rows: Vec::new(), ..wanted };
    assert!(matches!(Look::at(&model, &[], &wanted, go_on), Err(Error::EmptyPrompt)));
    let mut seen = Vec::new();
    let broken = Look::at(&model, &tokens, &wanted, &mut |done| {
        seen.push(done);
        if done > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(broken, Err(Error::Interrupted)));
    assert_eq!(seen, [0, 256]);
}

/// A look that is kept: the maps of one that is taken at once, any row when it is asked for, and rows of what comes next.
#[test]
fn a_look_that_is_kept_shows_what_one_at_once_shows() {
    let model = small::model();
    let options = CacheOptions { context: Some(4096), ..CacheOptions::default() };
    let text = crate::batch::tokens(CHUNK + 90, 3, 1020);
    let mut looking = Looking::new(&model, text.clone(), (9, 4), &options).unwrap();
    while looking.step(&model).unwrap() {}
    assert!(!looking.step(&model).unwrap() && looking.read() == text.len());
    let asked = vec![1, 40, CHUNK, text.len() - 1];
    let wanted = Wanted { cells: 9, rows: asked.clone(), kept: text.len() };
    let mut state = model.state_with(&options).unwrap();
    let go_on = &mut |_| ControlFlow::Continue(());
    let look = Look::with_state(&model, &text, &wanted, (&mut state, go_on)).unwrap();
    for (kept, layer) in looking.look().layers.iter().zip(&look.layers) {
        assert!(kept.heads.iter().zip(&layer.heads).all(|(a, b)| a.map == b.map));
    }
    for (n, &position) in asked.iter().enumerate() {
        let row = looking.row(&model, position, None).unwrap();
        for (l, layer) in look.layers.iter().enumerate() {
            for (h, head) in layer.heads.iter().enumerate() {
                let found = row.mean(Some(l), Some(h));
                for &(at, weight) in &head.rows[n].weights {
                    assert_eq!(found[at].to_bits(), weight.to_bits(), "{position} {l} {h} {at}");
                }
                assert_eq!(found.len(), position + 1);
            }
        }
        let all = row.mean(None, None);
        assert!((all.iter().sum::<f32>() - 1.0).abs() < 1e-3);
    }
    let habits = looking.habits();
    assert_eq!(habits.len(), look.layers.len());
    assert!(habits.iter().flatten().all(|h| (0.0..=1.001).contains(&(h.first + h.previous))));
    // What comes next is the same text, read further.
    let next = looking.append(&model, 7, None).unwrap();
    let longer: Vec<u32> = text.iter().copied().chain([7]).collect();
    let mut whole = Looking::new(&model, longer, (0, 0), &options).unwrap();
    while whole.step(&model).unwrap() {}
    assert_eq!(whole.logits(), looking.logits());
    assert_eq!(whole.row(&model, text.len(), None).unwrap(), next);
    let error = looking.row(&model, text.len() + 1, None).unwrap_err();
    assert!(matches!(error, Error::Position { .. }), "{error}");
    assert!(matches!(Looking::new(&model, vec![], (4, 0), &options), Err(Error::EmptyPrompt)));
}
