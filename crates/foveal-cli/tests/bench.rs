//! `foveal bench`: figures that belong together.

mod support;

use serde_json::Value;
use support::{assert_fails, run, stderr, stdout};

#[test]
fn every_length_has_its_figures_and_its_tokens() {
    let arguments = ["bench", "--lengths", "7,40", "-n", "5", "--rounds", "3", "--json"];
    let output = run(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let cases = found["cases"].as_array().unwrap();
    assert_eq!(
        cases.iter().map(|case| case["length"].as_u64().unwrap()).collect::<Vec<_>>(),
        [7, 40]
    );
    for case in cases {
        assert_eq!(case["greedy"].as_array().unwrap().len(), 6);
        for (best, median, seconds, tokens) in [
            ("read_best", "read_median", "read_seconds", case["length"].as_f64().unwrap()),
            ("made_best", "made_median", "made_seconds", 5.0),
        ] {
            let mut times: Vec<f64> =
                case[seconds].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            assert_eq!(times.len(), 3);
            times.sort_by(f64::total_cmp);
            let number = |name: &str| case[name].as_f64().unwrap();
            for (rate, seconds) in [(number(best), times[0]), (number(median), times[1])] {
                assert!((rate * seconds / tokens - 1.0).abs() < 1e-9, "{rate} {seconds}");
            }
        }
    }
    assert!(cases[0]["kv_bytes"].as_u64() < cases[1]["kv_bytes"].as_u64());
    // The tokens are the model's, whatever the threads.
    let one = run(&[&arguments[..], &["--threads", "1"]].concat());
    let one: Value = serde_json::from_slice(&one.stdout).unwrap();
    assert_eq!(one["cases"][1]["greedy"], cases[1]["greedy"]);
    assert_eq!(one["threads"], 1);
}

#[test]
fn the_table_has_a_line_for_each_length() {
    let output =
        run(&["bench", "--lengths", "3,9", "-n", "2", "--rounds", "1", "--kv-cache", "f32"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    for words in ["reading, tok/s", "making, tok/s", "\n       3 ", "\n       9 ", "1 rounds"] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn numbers_that_make_no_sense_are_refused() {
    for (flag, bad) in
        [("--lengths", "0"), ("--lengths", "1,x"), ("--tokens", "0"), ("--rounds", "0")]
    {
        assert_fails(&run(&["bench", &format!("{flag}={bad}")]), 2, &[flag]);
    }
}
