//! `foveal compare`: small models and mechanisms alone, and what it refuses.

mod support;

use support::{Folder, assert_fails, run, stderr, stdout};

const LINE: &str = "However little known the feelings or views of such a man may be on his first entering a neighbourhood, \
    this truth is so well fixed in the minds of the surrounding families.\n";

fn path(folder: &Folder, name: &str) -> String {
    folder.0.join(name).to_str().unwrap().to_owned()
}

/// The text of a page without what only names things.
fn needs_nothing_from_elsewhere(page: &str) -> bool {
    let page = page.replace("http://www.w3.org/2000/svg", "");
    !["http:", "https:", "src=", "<script", "<link", "@import", "url("]
        .iter()
        .any(|word| page.contains(word))
}

#[test]
fn attentions_are_trained_alike_and_not_again() {
    let folder = Folder::new("compare");
    // Different lines, so that byte pairs do not end early.
    let text: String =
        (0..400).map(|n| format!("{} {} {LINE}", n * 7919 % 1000, n * 104_729 % 977)).collect();
    let text = folder.write("text.txt", text.as_bytes());
    let out = path(&folder, "out");
    let own = r#"own/2=[{"name": "window", "tokens": 9}, {"name": "infini", "segment": 16}]"#;
    let arguments = [
        "compare",
        "--text",
        &text,
        "--attention",
        "full,gated_delta,bigbird",
        "--attention",
        own,
        "--out",
        &out,
        "--steps",
        "2",
        "--width",
        "32",
        "--layers",
        "2",
        "--sequence",
        "64",
        "--length",
        "100",
        "--recall",
    ];
    let first = run(&arguments);
    assert!(first.status.success(), "{}", stderr(&first));
    assert!(
        stdout(&first).contains(
            "For texts of 100 tokens, of which any single token may have to be found: full"
        )
    );
    let read = |name: &str| std::fs::read_to_string(folder.0.join("out").join(name)).unwrap();
    let (page, table) = (read("index.html"), read("figures.csv"));
    assert!(needs_nothing_from_elsewhere(&page));
    assert_eq!(page.matches("<svg").count(), 5);
    for name in ["full", "gated_delta", "bigbird", "own"] {
        assert!(page.contains(&format!("<td>{name}</td>")), "{name}");
        let parameters =
            table.lines().find_map(|line| line.strip_prefix(&format!("{name},parameters,0,0,")));
        let parameters: f64 = parameters.unwrap().parse().unwrap();
        // Eight units of the inner width are a few percent of such small models.
        assert!((parameters / 50_000.0 - 1.0).abs() < 0.2, "{name}: {parameters}");
    }
    // The plan of BigBird ends with the tokens of training.
    assert!(table.contains("own,bits per byte at positions,128,256,"));
    assert!(!table.contains("bigbird,bits per byte at positions,64,128,"));

    let figures = read("full/figures.json");
    let second = run(&arguments);
    assert!(second.status.success(), "{}", stderr(&second));
    assert_eq!(stdout(&second), stdout(&first));
    assert_eq!(read("full/figures.json"), figures);
    // A model of other settings stays as it is.
    let mut other = arguments;
    other[10] = "3";
    let refused = run(&other);
    assert_eq!(refused.status.code(), Some(1));
    let message = stderr(&refused).lines().last().unwrap();
    assert!(message.contains("cannot train full") && message.contains("--out"), "{message}");
}

#[test]
fn mechanisms_alone_are_measured_with_the_unfused_computation() {
    let folder = Folder::new("compare-kernels");
    let out = path(&folder, "out");
    let arguments = [
        "compare",
        "--kernels-only",
        "--attention",
        "unfused,full,linear",
        "--lengths",
        "128,32",
        "--out",
        &out,
        "--length",
        "64",
        "--memory",
        "80K",
    ];
    let made = run(&arguments);
    assert!(made.status.success(), "{}", stderr(&made));
    let words = stdout(&made);
    assert!(words.contains("full is ") && words.contains("linear is "));
    // 64 tokens leave 64 KiB of keys and values, a matrix 65.
    assert!(
        words.contains("For texts of 64 tokens that leave at most 80.0 KiB behind:"),
        "{words}"
    );
    let table = std::fs::read_to_string(folder.0.join("out/kernels.csv")).unwrap();
    assert_eq!(table.lines().count(), 7);
    assert!(table.contains("\nunfused,32,") && table.contains("\nlinear,128,"));
    let page = std::fs::read_to_string(folder.0.join("out/kernels.html")).unwrap();
    assert!(needs_nothing_from_elsewhere(&page) && page.matches("<svg").count() >= 2);
}

#[test]
fn what_can_not_be_compared_is_said() {
    let folder = Folder::new("compare-wrong");
    let out = path(&folder, "out");
    let short = folder.write("short.txt", LINE.as_bytes());
    let compare = |more: &[&str]| run(&[&["compare", "--out", out.as_str()], more].concat());
    assert_fails(&compare(&["--attention", "nothing"]), 1, &["nothing", "gated_delta"]);
    assert_fails(&compare(&["--attention", "x={"]), 1, &["the mixer of x"]);
    assert_fails(&compare(&["--attention", "full/3"]), 1, &["full/3"]);
    assert_fails(&compare(&["--text", &short]), 1, &["40 KiB"]);
    assert_fails(&compare(&["--text", "no such file"]), 1, &["no such file"]);
    assert_fails(&compare(&["--kernels-only", "--attention", "mla"]), 1, &["mla", "unfused"]);
    assert_fails(&compare(&["--memory", "much"]), 2, &["expected bytes"]);
    assert_fails(&compare(&["--kernels-only", "--text", &short]), 2, &["--kernels-only"]);
}
