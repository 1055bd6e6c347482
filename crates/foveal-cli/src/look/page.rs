//! One page with all heads, which needs nothing else: no script, font or picture from anywhere.
//!
//! What is in it for each head: a map of at most [`CELLS`]² cells, a byte each, and for long texts the greatest weights
//! of some tokens. Only the text itself grows with the text.

use foveal_lm::look::{Head, Look, Row};
use serde_json::{Value, json};

use super::Text;

const PAGE: &str = include_str!("page.html");
/// Where the page has its data.
const PLACE: &str = "/*DATA*/";
/// Cells of a map's side; texts of up to so many tokens are shown whole.
pub(super) const CELLS: usize = 48;
/// Weights that a page has of each token of a longer text.
pub(super) const KEPT: usize = 12;
/// Weights that all tokens of a longer text have together, about.
const WEIGHTS: usize = 125_000;

/// The tokens whose weights are on the page: the chosen one, and the newest.
pub(super) fn rows(tokens: usize, heads: usize, chosen: usize) -> Vec<usize> {
    if tokens <= CELLS {
        return vec![chosen];
    }
    let count = (WEIGHTS / (heads * KEPT).max(1)).clamp(8, 128).min(tokens);
    let mut rows: Vec<usize> = (tokens - count..tokens).collect();
    if chosen < tokens - count {
        rows.insert(0, chosen);
    }
    rows
}

/// The page of a text.
pub(super) fn page(model: &str, text: &Text, look: &Look, rows: &[usize]) -> String {
    let tokens = text.labels.len();
    let cells = tokens.min(CELLS);
    let exact = cells == tokens;
    let heads = || look.layers.iter().flat_map(|layer| &layer.heads);
    let layers = look.layers.iter().map(|layer| {
        json!({
            "heads": layer.heads.len(),
            "reach": layer.reach.map_or(tokens, |reach| reach.min(tokens)),
        })
    });
    let maps: Vec<u8> = heads().flat_map(|head| map(head, cells)).collect();
    let weights: Vec<u8> = match exact {
        true => Vec::new(),
        false => heads().flat_map(|head| head.rows.iter().flat_map(row)).collect(),
    };
    let data = json!({
        "model": model,
        "tokens": text.labels,
        "chosen": text.chosen,
        "cells": cells,
        "layers": layers.collect::<Vec<Value>>(),
        "maps": base64::encode(maps),
        "positions": if exact { &[] } else { rows },
        "kept": KEPT,
        "rows": base64::encode(weights),
    });
    // Within a script's text nothing but `<` can end it.
    PAGE.replacen(PLACE, &data.to_string().replace('<', "\\u003c"), 1)
}

/// The lower triangle, a byte for each cell: 255 · √weight.
fn map(head: &Head, cells: usize) -> impl Iterator<Item = u8> {
    (0..cells).flat_map(move |a| {
        head.map[a * cells..][..=a]
            .iter()
            .map(|mass| (mass.clamp(0.0, 1.0).sqrt() * 255.0).round() as u8)
    })
}

/// [`KEPT`] times a position of four bytes and 65535 · |weight| of two, low bytes first.
fn row(row: &Row) -> impl Iterator<Item = u8> {
    (0..KEPT).flat_map(|n| {
        let (position, weight) = row.weights.get(n).copied().unwrap_or_default();
        let weight = (weight.abs().min(1.0) * 65535.0).round() as u16;
        let [a, b, c, d] = (position as u32).to_le_bytes();
        let [e, f] = weight.to_le_bytes();
        [a, b, c, d, e, f]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_show_the_chosen_token_and_the_newest() {
        assert_eq!(rows(48, 270, 7), [7]);
        let long = rows(5000, 270, 7);
        assert_eq!((long[0], long.len()), (7, 39));
        assert!(long[1..].iter().copied().eq(4962..5000));
        assert_eq!(rows(5000, 270, 4999).len(), 38);
        assert_eq!(rows(60, 4, 3), (0..60).collect::<Vec<_>>());
        assert_eq!(rows(9000, 100_000, 8999).len(), 8);
    }

    /// Two tokens, one layer with one head.
    fn small(labels: [&str; 2]) -> String {
        let row = |weights: &[(usize, f32)]| Row {
            weights: weights.to_vec(),
            sum: 1.0,
            ..Row::default()
        };
        let head =
            Head { map: vec![1.0, 0.0, 0.25, 0.75], rows: vec![row(&[(1, 0.75), (0, 0.25)])] };
        let layer = foveal_lm::look::Layer { reach: Some(2), sections: vec![], heads: vec![head] };
        let text = Text { labels: labels.map(str::to_owned).to_vec(), chosen: 1, to: None };
        page("a <model>", &text, &Look { layers: vec![layer] }, &[1])
    }

    #[test]
    fn text_can_not_break_out_of_the_page() {
        let plain = small(["a", "b"]);
        let hostile = small(["</script><script>alert(1)</script>", "<!-- \u{2028}\"'"]);
        for tag in ["<script", "</script", "<!--"] {
            assert_eq!(hostile.matches(tag).count(), plain.matches(tag).count(), "{tag}");
        }
        let data = &hostile[hostile.find("id=\"data\">").unwrap() + 10..];
        let data: Value = serde_json::from_str(&data[..data.find("</script>").unwrap()]).unwrap();
        assert_eq!(data["tokens"][0], "</script><script>alert(1)</script>");
        assert_eq!((&data["model"], &data["cells"]), (&"a <model>".into(), &2.into()));
        // 255 · √ of 1, 0.25 and 0.75.
        assert_eq!(data["maps"], base64::encode([255, 128, 221]));
    }

    #[test]
    fn rows_are_positions_and_weights() {
        let row = Row { weights: vec![(70_000, 1.0), (3, 0.5)], sum: 1.0, ..Row::default() };
        let bytes: Vec<u8> = super::row(&row).collect();
        assert_eq!(bytes.len(), 6 * KEPT);
        assert_eq!(bytes[..12], [0x70, 0x11, 1, 0, 0xff, 0xff, 3, 0, 0, 0, 0, 0x80]);
        assert!(bytes[12..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn the_page_has_one_place_for_its_data_and_nothing_from_elsewhere() {
        assert_eq!(PAGE.matches(PLACE).count(), 1);
        for word in ["http", "src=", "@import", "url(", "<link"] {
            assert!(!PAGE.contains(word), "{word}");
        }
    }
}
