//! The page's looks: maps and rows of a model whose attention is that of its family, and of one whose configuration names mixers.

use foveal_lm::Model;
use foveal_lm::look::{Looking, Weights as Row};
use foveal_lm::mixer::CacheOptions;
use foveal_lm::testing::{Tiny, TinySizes};
use foveal_lm::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::support::{Server, built, model, options};

const TEXT: &str = "the cat sat on the mat because the cat was tired";

/// A layer of a window beside a memory that retrieves, and one of a matrix beside a recurrence.
fn mixed() -> (Model, Tokenizer) {
    let sizes = TinySizes { layers: 2, vocab: 256, kv_heads: 4, ..TinySizes::default() };
    let mixer = json!([
        [{"name": "window", "tokens": 5, "heads": 2, "kv_heads": 2},
         {"name": "memorizing", "segment": 8, "top": 3, "capacity": 100, "heads": 2, "kv_heads": 2}],
        [{"name": "infini", "segment": 8, "heads": 2, "kv_heads": 2},
         {"name": "linear", "heads": 2, "kv_heads": 2}],
    ]);
    built(&Tiny::mixed(sizes, &mixer, 400))
}

/// The weights of an answer, and the tokens that have any.
fn decoded(answer: &Value) -> (Vec<f32>, Vec<bool>) {
    let scale = answer["scale"].as_f64().unwrap() as f32;
    let bytes = base64::decode(answer["weights"].as_str().unwrap()).unwrap();
    let words = bytes.as_chunks().0.iter();
    let weights: Vec<f32> =
        words.map(|&word| f32::from(i16::from_le_bytes(word)) * scale / 32767.0).collect();
    let mut seen = vec![false; weights.len()];
    for run in answer["seen"].as_array().unwrap() {
        let [first, end] = [0, 1].map(|n| run[n].as_u64().unwrap() as usize);
        seen[first..end].fill(true);
    }
    (weights, seen)
}

/// The same look, taken without a server.
fn kept(model: &Model, tokens: usize) -> Looking {
    let text: Vec<u32> = TEXT.bytes().map(u32::from).collect();
    let mut looking = Looking::new(model, text, (32, 64), &CacheOptions::default()).unwrap();
    while looking.step(model).unwrap() {}
    assert_eq!(looking.read(), tokens);
    looking
}

fn check(answer: &Value, row: &Row, (layer, head): (Option<usize>, Option<usize>)) {
    let (weights, seen) = decoded(answer);
    let expected = row.mean(layer, head);
    assert_eq!(weights.len(), expected.len());
    for ((found, seen), expected) in weights.iter().zip(&seen).zip(&expected) {
        assert!((found - expected).abs() < 4e-5, "{found} {expected}");
        assert_eq!(*seen, *expected != 0.0);
    }
}

#[test]
fn named_mixers_show_maps_rows_and_what_was_retrieved() {
    let server = Server::of(&options(), mixed);
    let look = server.post("/page/look", &json!({"text": TEXT})).good();
    let tokens = look["tokens"].as_array().unwrap().len();
    assert_eq!((tokens, look["layers"].as_array().unwrap().len()), (TEXT.len(), 2));
    let names = |layer: usize| -> Vec<&str> {
        let sections = look["layers"][layer]["sections"].as_array().unwrap().iter();
        sections.map(|section| section["name"].as_str().unwrap()).collect()
    };
    assert_eq!((names(0), names(1)), (vec!["window", "memorizing"], vec!["infini", "linear"]));
    assert_eq!(look["layers"][1]["sections"][1]["recurrent"], true);
    let maps = base64::decode(look["layers"][0]["maps"].as_str().unwrap()).unwrap();
    assert_eq!(maps.len(), 4 * 32 * 33 / 2);

    let path = format!("/page/look/{}/row", look["id"].as_str().unwrap());
    let (model, _) = mixed();
    let kept = kept(&model, tokens);
    for position in [3, tokens - 1] {
        let row = kept.row(&model, position, None).unwrap();
        for (layer, head) in [(None, None), (Some(1), None), (Some(0), Some(0)), (Some(1), Some(3))]
        {
            let mut body = json!({"position": position});
            layer.into_iter().for_each(|layer| body["layer"] = json!(layer));
            head.into_iter().for_each(|head| body["head"] = json!(head));
            let answer = server.post(&path, &body).good();
            check(&answer, &row, (layer, head));
            assert!(answer["recalled"].is_null());
        }
        let of = |layer: usize, head: usize| {
            let body = json!({"position": position, "layer": layer, "head": head});
            server.post(&path, &body).good()["recalled"].take()
        };
        let (retrieved, matrix) = (of(0, 3), of(1, 0));
        let expected = row.recalled[0][3].as_ref().unwrap();
        assert_eq!(retrieved["entries"], json!(expected.entries));
        assert_eq!(retrieved["segment"], position / 8 * 8);
        assert_eq!(
            (&matrix["segment"], &matrix["entries"]),
            (&json!(position / 8 * 8), &json!([]))
        );
        assert!(matrix["gate"].as_f64().is_some_and(|gate| (0.0..=1.0).contains(&gate)));
    }
    // A window of five tokens is the only thing that its heads see.
    let body = json!({"position": 20, "layer": 0, "head": 1});
    assert_eq!(server.post(&path, &body).good()["seen"], json!([[16, 21]]));
    let path = format!("/page/look/{}/continue", look["id"].as_str().unwrap());
    let events = server.post(&path, &json!({"tokens": 3, "layer": 1, "head": 2})).events();
    assert!(events.len() <= 3 && !events.is_empty());
    assert_eq!(events[0]["position"], tokens);
    assert_eq!(decoded(&events[0]).0.len(), tokens + 1);
}

#[test]
fn the_family_s_own_attention_shows_rows_that_sum_to_one() {
    let server = Server::new();
    let look = server.post("/page/look", &json!({"text": "The dog ran home."})).good();
    let tokens = look["tokens"].as_array().unwrap().len();
    assert_eq!(look["layers"][0]["sections"], json!([]));
    let path = format!("/page/look/{}/row", look["id"].as_str().unwrap());
    for heads in [json!({}), json!({"layer": 0}), json!({"layer": 0, "head": 0})] {
        let mut body = heads.clone();
        body["position"] = json!(tokens - 1);
        let (weights, seen) = decoded(&server.post(&path, &body).good());
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-3);
        assert!(seen.iter().all(|seen| *seen));
    }
    server.post(&path, &json!({"position": tokens})).fails(400, "invalid_value");
    server.post(&path, &json!({"position": 0, "layer": 99})).fails(400, "invalid_value");
    server.post("/page/look/77/row", &json!({"position": 0})).fails(404, "no_look");
    assert!(model().0.config().layers.len() < 99);
}
