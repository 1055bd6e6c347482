//! `foveal look`: its table, its JSON and its page.

mod support;

use serde_json::Value;
use support::{Folder, assert_fails, built_in, run, run_with, stderr, stdout};

const TEXT: &str = "The Queen said that Alice was late because she had slept";

fn json(arguments: &[&str]) -> Value {
    let output = run(&[&["look", "--json", TEXT], arguments].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_strongest_heads_come_first() {
    let found = json(&["--token", "she", "--top", "100", "--keys", "1000"]);
    assert_eq!(found["token"].as_str().unwrap().trim(), "she");
    let position = found["position"].as_u64().unwrap();
    let heads = found["heads"].as_array().unwrap();
    assert_eq!(heads.len(), 16);
    let strengths: Vec<f64> = heads.iter().map(|head| head["strength"].as_f64().unwrap()).collect();
    assert!(strengths.is_sorted_by(|a, b| a >= b));
    for head in heads {
        let weights = head["weights"].as_array().unwrap();
        let weight = |w: &Value| w["weight"].as_f64().unwrap();
        assert!((weights.iter().map(weight).sum::<f64>() - 1.0).abs() < 1e-4);
        assert!(weights.iter().all(|w| w["position"].as_u64().unwrap() <= position));
        let others = weights.iter().filter(|w| {
            let at = w["position"].as_u64().unwrap();
            at != 0 && at != position
        });
        let most = others.map(weight).fold(0.0, f64::max);
        assert_eq!(head["strength"].as_f64().unwrap(), most);
    }
}

#[test]
fn one_layer_one_head_one_token() {
    let found = json(&["--layer", "2", "--head", "3"]);
    let heads = found["heads"].as_array().unwrap();
    assert_eq!((heads.len(), &heads[0]["layer"], &heads[0]["head"]), (1, &2.into(), &3.into()));
    // Without a choice the last token looks; a word that is several tokens is found by its last one.
    let last = found["tokens"].as_array().unwrap().len() as u64 - 1;
    assert_eq!(found["position"].as_u64().unwrap(), last);
    assert_eq!(json(&["--token", "had slept"])["position"].as_u64().unwrap(), last);
    let first = json(&["--position", "0"])["heads"][0]["strength"].as_f64().unwrap();
    assert!((first - 1.0).abs() < 1e-5, "{first}");
    let to = json(&["--to", "Alice", "--keys", "1000"]);
    for head in to["heads"].as_array().unwrap() {
        let weights = head["weights"].as_array().unwrap().iter();
        let mut alice = weights.filter(|w| w["token"].as_str().unwrap().trim() == "Alice");
        assert_eq!(head["strength"], alice.next().unwrap()["weight"]);
    }
    assert_eq!(json(&["--top", "3"])["heads"].as_array().unwrap().len(), 3);
}

#[test]
fn the_table_has_bars_and_no_colours_in_a_pipe() {
    let output = run(&["look", TEXT, "--token", "she", "--top", "2"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.starts_with("\"she\", token "), "{text}");
    assert_eq!(text.matches("layer ").count(), 2);
    assert!(text.contains('█') && text.contains("entropy") && !text.contains('\x1b'), "{text}");
    let from_input = run_with(&["look", "-", "--token", "she", "--top", "2"], TEXT);
    assert_eq!(stdout(&from_input), text);
}

#[test]
fn a_memory_says_what_was_retrieved() {
    let text = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.";
    let look = |more: &[&str]| built_in(&[&["look", "--top", "24", text], more].concat()).output();
    let output = look(&["--json"]).unwrap();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (tokens, heads) = (found["tokens"].as_array().unwrap(), found["heads"].as_array().unwrap());
    let memories = || heads.iter().filter(|head| head["mechanism"] == "memorizing");
    assert_eq!((heads.len(), memories().count()), (24, 4));
    for head in heads {
        assert_eq!(head["recalled"].is_null(), head["mechanism"] != "memorizing");
    }
    for head in memories() {
        let recalled = &head["recalled"];
        let segment = recalled["segment"].as_u64().unwrap();
        assert_eq!(segment, (tokens.len() as u64 - 1) / 16 * 16);
        let entries = recalled["entries"].as_array().unwrap();
        assert_eq!(entries.len() as u64, segment.min(32));
        assert!(entries.iter().all(|entry| entry.as_u64().unwrap() < segment), "{recalled}");
    }
    let table = look(&[]).unwrap();
    assert_eq!(stdout(&table).matches(" entries\n").count(), 4, "{}", stdout(&table));
}

#[test]
fn what_there_is_not_is_refused_by_name() {
    for (arguments, words) in [
        (&["--token", "zebra"][..], &["zebra", "tokens are"][..]),
        (&["--token", ""], &["the text has no"]),
        (&["--position", "1", "--to", "slept"], &["the text has no", "slept"]),
        (&["--position", "999"], &["--position is 999", "expected 0 to"]),
        (&["--layer", "4"], &["--layer is 4", "0 to 3"]),
        (&["--head", "4"], &["--head is 4", "0 to 3"]),
        (&["--html", "/no/such/folder/page.html"], &["/no/such/folder/page.html"]),
    ] {
        assert_fails(&run(&[&["look", TEXT], arguments].concat()), 1, words);
    }
    assert_fails(&run(&["look", TEXT, "--token", "a", "--position", "1"]), 2, &["--token"]);
    assert_fails(&run(&["look"]), 2, &["<TEXT>"]);
}

/// The page's data, as its script would read it.
fn page(folder: &Folder, text: &str) -> (String, Value) {
    let path = folder.0.join("page.html");
    let output = run_with(&["look", "-", "--html", path.to_str().unwrap()], text);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let page = std::fs::read_to_string(path).unwrap();
    let start = page.find("id=\"data\">").unwrap() + "id=\"data\">".len();
    let data = &page[start..];
    let data = serde_json::from_str(&data[..data.find("</script>").unwrap()]).unwrap();
    (page, data)
}

#[test]
fn the_page_has_everything() {
    let folder = Folder::new("look-page");
    let (page, data) = page(&folder, TEXT);
    assert_eq!(page.matches("<script").count(), 2);
    let tokens = data["tokens"].as_array().unwrap();
    let text: String = tokens.iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(text, TEXT);
    let cells = tokens.len();
    assert_eq!(data["cells"].as_u64().unwrap() as usize, cells);
    let bytes: usize = 16 * cells * (cells + 1) / 2;
    assert_eq!(data["maps"].as_str().unwrap().len(), bytes.div_ceil(3) * 4);
    assert_eq!(data["rows"], "");
}

#[test]
fn a_page_of_a_long_text_grows_with_the_text_alone() {
    let folder = Folder::new("look-long");
    let size = |times: usize| {
        let text = format!("{TEXT}. ").repeat(times);
        let (page, data) = page(&folder, &text);
        let tokens = data["tokens"].as_array().unwrap().len();
        assert_eq!(data["positions"].as_array().unwrap().len(), 128);
        (page.len(), tokens, text.len())
    };
    let (short, long) = (size(30), size(240));
    assert!(long.1 > 7 * short.1);
    // The text with its quotation marks and commas is all that has grown.
    assert!(long.0 - short.0 < 2 * (long.2 - short.2) + 3 * (long.1 - short.1) + 1000);
}
