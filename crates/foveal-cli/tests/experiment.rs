//! `foveal experiment`: every experiment in its smallest form, and the page of what is committed.

mod support;

use std::path::{Path, PathBuf};

use support::{Folder, SMALL, assert_fails, run, stderr, stdout};

fn path(folder: &Folder) -> &str {
    folder.0.to_str().unwrap()
}

/// All files below a folder, with their contents.
fn files(folder: &Path, ending: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = vec![];
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path, ending));
        } else if path.extension().is_some_and(|end| end == ending) {
            let content = std::fs::read(&path).unwrap();
            all.push((path, content));
        }
    }
    all.sort();
    all
}

#[test]
fn every_experiment_runs_to_its_end_and_not_again() {
    let folder = Folder::new("experiments-tiny");
    let models = Path::new(SMALL).parent().unwrap().to_str().unwrap();
    let arguments = ["experiment", "all", "--tiny", "--models", models, "--out", path(&folder)];
    let first = run(&arguments);
    assert!(first.status.success(), "{}", stderr(&first));
    let results = files(&folder.0, "json");
    assert!(!results.is_empty());
    let page = std::fs::read_to_string(folder.0.join("experiments.md")).unwrap();
    for name in page.lines().filter_map(|line| line.strip_prefix("## ")) {
        let name = name.split(':').next().unwrap();
        assert!(stdout(&first).contains(&format!("{name} ")), "{name}");
        assert!(folder.0.join(format!("experiments/{name}.svg")).exists(), "{name}");
    }
    assert!(!page.contains("NaN") && !page.contains("inf "));

    let second = run(&arguments);
    assert!(second.status.success(), "{}", stderr(&second));
    assert!(stderr(&second).lines().all(|line| line.ends_with(", 0 of them to run")));
    assert_eq!(files(&folder.0, "json"), results);
    assert_eq!(stdout(&second), stdout(&first));
}

#[test]
fn the_committed_page_is_what_the_committed_results_make() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let folder = Folder::new("experiments-page");
    let committed = docs.join("experiments");
    for (path, content) in files(&committed, "json") {
        let to = folder.0.join("experiments").join(path.strip_prefix(&committed).unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::write(to, content).unwrap();
    }
    let made = run(&["experiment", "all", "--page", "--out", path(&folder)]);
    assert!(made.status.success(), "{}", stderr(&made));
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
    assert_eq!(read(folder.0.join("experiments.md")), read(docs.join("experiments.md")));
    let pictures = files(&folder.0.join("experiments"), "svg");
    assert!(!pictures.is_empty());
    for (path, content) in pictures {
        let name = path.file_name().unwrap();
        assert!(std::fs::read(committed.join(name)).unwrap() == content, "{}", name.display());
    }
}

#[test]
fn what_is_no_experiment_or_no_result_is_said() {
    let folder = Folder::new("experiments-wrong");
    let out = path(&folder);
    assert_fails(&run(&["experiment", "E99", "--out", out]), 1, &["E99", "E4"]);
    assert_fails(&run(&["experiment"]), 2, &["NAME"]);
    assert_fails(&run(&["experiment", "E4", "--tiny", "--full"]), 2, &["--full"]);
    let made = run(&["experiment", "E4", "--tiny", "--out", out]);
    assert!(made.status.success());
    let (result, _) = files(&folder.0, "json").remove(0);
    std::fs::write(&result, "{}").unwrap();
    let name = result.file_name().unwrap().to_str().unwrap().to_owned();
    assert_fails(&run(&["experiment", "E4", "--page", "--out", out]), 1, &[&name]);
    // A file that is none is made again.
    let again = run(&["experiment", "E4", "--tiny", "--out", out]);
    assert!(again.status.success(), "{}", stderr(&again));
    assert!(stderr(&again).contains("1 of them to run"));
}
