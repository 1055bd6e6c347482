//! Weights that are made of what layers were given: of every mixer by name and of latent attention, against f64.

use std::ops::ControlFlow;

use foveal_lm::Model;
use foveal_lm::look::{Head, Look, Looking, Wanted, cell};
use foveal_lm::mixer::CacheOptions;
use foveal_lm::testing::{Tiny, TinySizes};
use serde_json::{Value, json};

use crate::latent::load;
use crate::recurrent;
use crate::reference::{self, Heads};
use crate::sections::{Rows, TOKENS, mixers, name, of, text, tiny};

fn look(model: &Model, text: &[u32], cells: usize) -> Look {
    let wanted = Wanted { cells, rows: (0..text.len()).collect(), kept: text.len() };
    Look::at(model, text, &wanted, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// Every row of a head over the whole text.
fn dense(head: &Head, tokens: usize) -> Vec<Vec<f32>> {
    let row = |row: &foveal_lm::look::Row| {
        let mut dense = vec![0.0; tokens];
        row.weights.iter().for_each(|&(position, weight)| dense[position] = weight);
        dense
    };
    head.rows.iter().map(row).collect()
}

/// Those of recurrences are shares of all magnitudes of a row. And how far off each row of each head may be: magnitudes that
/// cancel to little beside the head's greatest row leave larger errors of their shares.
fn expected(model: &Tiny, text: &[u32]) -> (Vec<Heads>, Vec<Rows>) {
    let mut layers = reference::weights(model, text);
    let mut tolerances = vec![];
    for (layer, heads) in layers.iter_mut().enumerate() {
        let mut recurrent = vec![];
        for (section, count, _) in of(&model.config, layer).unwrap_or_default() {
            recurrent.extend(vec![recurrent::among(&section); count]);
        }
        recurrent.resize(heads.len(), false);
        let each = heads.iter_mut().zip(recurrent).map(|(head, recurrent)| {
            if !recurrent {
                return vec![2e-5; head.len()];
            }
            let sum = |row: &Vec<f64>| row.iter().map(|w| w.abs()).sum::<f64>();
            let sums: Vec<f64> = head.iter().map(sum).collect();
            let most = sums.iter().copied().fold(0.0, f64::max);
            for (row, sum) in head.iter_mut().zip(&sums) {
                row.iter_mut().for_each(|w| *w /= sum);
            }
            sums.iter().map(|sum| 2e-5 * most / sum).collect()
        });
        tolerances.push(each.collect());
    }
    (layers, tolerances)
}

fn check(model: &Model, tiny: &Tiny, text: &[u32], what: &str) -> Look {
    let ((expected, tolerances), found) = (expected(tiny, text), look(model, text, 7));
    assert_eq!(found.layers.len(), expected.len());
    for (l, (layer, expected)) in found.layers.iter().zip(&expected).enumerate() {
        assert_eq!(layer.heads.len(), expected.len(), "{what}");
        for (h, (head, expected)) in layer.heads.iter().zip(expected).enumerate() {
            let rows = dense(head, text.len());
            assert_eq!(rows.len(), text.len());
            for (i, (row, expected)) in rows.iter().zip(expected).enumerate() {
                for (j, (found, expected)) in row.iter().zip(expected).enumerate() {
                    let off = (f64::from(*found) - expected).abs();
                    assert!(
                        off <= tolerances[l][h][i],
                        "{what}, layer {l} head {h}: {i} to {j} off by {off}"
                    );
                }
                let sum: f64 = expected.iter().sum();
                assert!(
                    (f64::from(head.rows[i].sum) - sum).abs() < 5.0 * tolerances[l][h][i],
                    "{what} {l} {h} {i}"
                );
            }
            check_map(head, &rows, what);
        }
    }
    found
}

/// A map has the magnitudes of all rows.
fn check_map(head: &Head, rows: &[Vec<f32>], what: &str) {
    let cells = 7.min(rows.len());
    for (a, b) in (0..cells).flat_map(|a| (0..cells).map(move |b| (a, b))) {
        let queries = cell(rows.len(), a, cells);
        let mass = |i: usize| -> f64 {
            rows[i][cell(rows.len(), b, cells)].iter().map(|w| f64::from(w.abs())).sum()
        };
        let expected = queries.clone().map(mass).sum::<f64>() / queries.len() as f64;
        let off = (f64::from(head.map[a * cells + b]) - expected).abs();
        assert!(off < 1e-5, "{what}: cell {a} {b} off by {off}");
    }
}

#[test]
fn every_mixer_shows_the_weights_of_its_definition() {
    for mixer in mixers() {
        let tiny = tiny(&mixer);
        let model = load(&tiny, &format!("look-{}", name(&mixer))).unwrap();
        let found = check(&model, &tiny, &text(), &mixer.to_string());
        for (n, layer) in found.layers.iter().enumerate() {
            let named = of(&tiny.config, n).unwrap();
            assert_eq!(layer.sections.len(), named.len());
            for (found, (section, heads, _)) in layer.sections.iter().zip(&named) {
                assert_eq!((section["name"].as_str(), found.heads), (Some(found.name), *heads));
                assert_eq!(found.recurrent, recurrent::among(section), "{section}");
            }
        }
    }
}

#[test]
fn long_texts_show_them_too() {
    for mixer in [
        json!([{"name": "gated_delta"}, {"name": "window", "tokens": 9}]),
        json!([{"name": "memorizing", "segment": 64, "top": 3, "capacity": 90, "previous": true}, {"name": "lsh", "chunk": 8, "buckets": 4}]),
    ] {
        let tiny = tiny(&mixer);
        let model = load(&tiny, &format!("look-long-{}", name(&mixer))).unwrap();
        let text: Vec<u32> = (0..270).map(|i| (i * i + 17 * i) as u32 % 50).collect();
        check(&model, &tiny, &text, &mixer.to_string());
    }
}

#[test]
fn latent_attention_shows_the_weights_of_its_definition() {
    for (class, rank) in [("DeepseekV2ForCausalLM", None), ("DeepseekV3ForCausalLM", Some(12))] {
        let tiny = crate::latent::tiny(class, rank);
        let model = load(&tiny, &format!("look-{class}")).unwrap();
        let found = check(&model, &tiny, &text(), class);
        assert!(found.layers.iter().all(|layer| layer.sections[0].name == "mla"));
        assert!(found.layers.iter().all(|layer| layer.reach == Some(4096)));
    }
}

/// Random features: positive weights whose sum is that of a softmax.
#[test]
fn random_features_weigh_like_a_softmax() {
    let sizes = TinySizes { kv_heads: 4, ..TinySizes::default() };
    let tiny = Tiny::mixed(sizes, &json!({"name": "performer", "features": 16}), 100);
    let model = load(&tiny, "look-performer").unwrap();
    for head in look(&model, &text(), 0).layers.iter().flat_map(|layer| &layer.heads) {
        for (i, row) in head.rows.iter().enumerate() {
            assert!(row.weights.iter().all(|&(j, weight)| j <= i && weight >= 0.0));
            assert!((row.sum - 1.0).abs() < 1e-5, "{}", row.sum);
        }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[test]
fn memories_say_what_was_retrieved_and_their_gates() {
    let mixer = json!([
        [{"name": "memorizing", "segment": 6, "top": 4, "capacity": 12, "heads": 2}, {"name": "infini", "segment": 8, "heads": 2}],
        {"name": "full"},
    ]);
    let tiny = tiny(&mixer);
    let model = load(&tiny, "look-recalled").unwrap();
    let found = look(&model, &text(), 0);
    let [retrieving, matrix] = [0, 1].map(|n| {
        let part = format!("model.layers.0.self_attn.sections.{n}.gate");
        tiny.values(&part).unwrap().iter().map(|&beta| sigmoid(beta)).collect::<Vec<f32>>()
    });
    for (h, head) in found.layers[0].heads.iter().enumerate() {
        for (i, row) in head.rows.iter().enumerate() {
            let recalled = row.recalled.as_ref().unwrap();
            let (gate, segment) = if h < 2 { (retrieving[h], 6) } else { (matrix[h - 2], 8) };
            assert!((recalled.gate - gate).abs() < 1e-6);
            assert_eq!(recalled.segment, i / segment * segment);
            if h >= 2 {
                assert!(recalled.entries.is_empty());
                continue;
            }
            // All of the memory that has weight was retrieved, and the best first.
            let weight = |at: usize| row.weights.iter().find(|(j, _)| *j == at).map(|x| x.1);
            let mut seen: Vec<usize> =
                row.weights.iter().map(|x| x.0).filter(|&j| j < recalled.segment).collect();
            let weights: Vec<_> = recalled.entries.iter().map(|&at| weight(at).unwrap()).collect();
            assert!(weights.is_sorted_by(|a, b| a >= b), "{weights:?}");
            assert_eq!(recalled.entries.len(), recalled.segment.min(12).min(4));
            let mut entries = recalled.entries.clone();
            entries.sort_unstable();
            seen.sort_unstable();
            assert_eq!(entries, seen);
            let sum: f32 = weights.iter().sum();
            assert!(entries.is_empty() || (sum - gate).abs() < 1e-5, "{sum} of {gate}");
        }
    }
    assert!(found.layers[1].heads.iter().flat_map(|head| &head.rows).all(|x| x.recalled.is_none()));
}

/// A look that is kept has the same rows as one at once, of any token when it is asked for and of those that come next.
#[test]
fn looks_that_are_kept_make_any_row() {
    let every: Vec<Value> = mixers();
    let last = every[every.len() - 3..].to_vec();
    for mixer in
        last.into_iter().chain([json!([{"name": "gated_delta"}, {"name": "infini", "segment": 9}])])
    {
        let tiny = tiny(&mixer);
        let model = load(&tiny, &format!("look-kept-{}", name(&mixer))).unwrap();
        let options = CacheOptions::default();
        let mut looking = Looking::new(&model, text(), (7, 3), &options).unwrap();
        let mut steps = 1;
        while looking.step(&model).unwrap() {
            steps += 1;
        }
        assert_eq!((steps, looking.read()), (1 + model.config().layers.len(), TOKENS));
        let whole = look(&model, &text(), 7);
        for (kept, layer) in looking.look().layers.iter().zip(&whole.layers) {
            assert_eq!(kept.sections, layer.sections);
            assert!(kept.heads.iter().zip(&layer.heads).all(|(a, b)| a.map == b.map));
        }
        assert!(looking.habits().iter().flatten().all(|h| (0.0..=1.001).contains(&h.spread)));
        for position in [0, 5, 23, TOKENS - 1] {
            let row = looking.row(&model, position, None).unwrap();
            let one = looking.row(&model, position, Some(1)).unwrap();
            assert!(one.layers[0].is_empty() && one.layers[1] == row.layers[1]);
            for (l, layer) in whole.layers.iter().enumerate() {
                for (h, head) in layer.heads.iter().enumerate() {
                    let found = row.mean(Some(l), Some(h));
                    let expected = &dense(head, TOKENS)[position];
                    let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
                    assert!(off.fold(0.0, f32::max) < 1e-6, "{mixer} {l} {h} {position}");
                    assert_eq!(row.recalled[l][h], head.rows[position].recalled);
                }
            }
        }
        let next = looking.append(&model, 7, None).unwrap();
        let longer: Vec<u32> = text().into_iter().chain([7]).collect();
        let mut again = Looking::new(&model, longer, (0, 0), &options).unwrap();
        while again.step(&model).unwrap() {}
        assert_eq!(again.logits(), looking.logits());
        assert_eq!(again.row(&model, TOKENS, None).unwrap(), next);
        assert!(looking.row(&model, TOKENS + 1, None).is_err());
    }
}
