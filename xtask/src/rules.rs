//! `cargo xtask rules`: the rules of the project that no lint knows.

use crate::run;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

/// The only folder with instruction sets in it.
const SIMD: &str = "crates/foveal/src/simd/";
const SIMD_WORDS: &[&str] = &[
    "std::arch",
    "core::arch",
    "target_feature",
    "target_arch",
    "is_x86_feature_detected",
    "is_aarch64_feature_detected",
];
/// Files outside of [`SIMD`] that may hold `unsafe` code.
const UNSAFE: &[&str] = &[
    "crates/foveal/src/element.rs",
    "crates/foveal/src/exact/backward/careful.rs",
    "crates/foveal/src/exact/backward/mod.rs",
    "crates/foveal/src/exact/backward/relative.rs",
    "crates/foveal/src/exact/backward/terms.rs",
    "crates/foveal/src/exact/backward/tile.rs",
    "crates/foveal/src/exact/decode.rs",
    "crates/foveal/src/exact/forward.rs",
    "crates/foveal/src/exact/inspect.rs",
    "crates/foveal/src/exact/mod.rs",
    "crates/foveal/src/exact/short.rs",
    "crates/foveal/src/tensor.rs",
    "crates/foveal-c/src/attention.rs",
    "crates/foveal-c/src/call.rs",
    "crates/foveal-c/src/error.rs",
    "crates/foveal-c/src/mask.rs",
    "crates/foveal-c/src/memory.rs",
    "crates/foveal-c/src/views.rs",
    "crates/foveal-c/src/workspace.rs",
    "crates/foveal-lm/src/weights/mapping.rs",
    "crates/foveal-python/src/array.rs",
    "crates/foveal-python/src/direct.rs",
    "crates/foveal-python/src/dlpack.rs",
    "crates/foveal-python/src/output.rs",
    "bench/src/product.rs",
];
/// Lines of a file; longer ones are listed.
const LONG: usize = 600;
/// Places that exist on one machine only.
const MACHINE_PATHS: &[&str] = &["/home/", "/root/", "/work/", "/Users/", "/tmp/wt"];

/// A source file, relative to the root.
struct File {
    path: String,
    text: String,
}

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    if let [first, ..] = arguments {
        bail!("rules takes no arguments, got {first:?}");
    }
    let files = files()?;
    let broken: Vec<String> = files.iter().flat_map(broken).collect();
    println!("unsafe blocks, functions and impls:");
    for file in &files {
        let count = unsafe_lines(file).count();
        if count > 0 {
            println!("{count:>6}  {}", file.path);
        }
    }
    for file in files.iter().filter(|file| file.text.lines().count() > LONG) {
        println!("{} has {} lines, more than {LONG}", file.path, file.text.lines().count());
    }
    if broken.is_empty() { Ok(()) } else { bail!("broken rules:\n{}", broken.join("\n")) }
}

fn broken(file: &File) -> Vec<String> {
    let mut broken = vec![];
    let own = file.path == "xtask/src/rules.rs";
    if !own && file.path.ends_with(".rs") && !file.path.starts_with(SIMD) {
        for (n, line) in code_lines(file) {
            for word in SIMD_WORDS.iter().filter(|word| line.contains(**word)) {
                broken.push(format!("{}:{n}: {word} belongs in {SIMD}", file.path));
            }
        }
        if !UNSAFE.contains(&file.path.as_str()) && !is_test(&file.path) {
            let places = unsafe_lines(file);
            broken
                .extend(places.map(|n| format!("{}:{n}: unsafe outside of its files", file.path)));
        }
    }
    for (n, line) in (1..).zip(file.text.lines()) {
        for path in MACHINE_PATHS.iter().filter(|path| !own && line.contains(**path)) {
            broken.push(format!("{}:{n}: names the machine's path {path}", file.path));
        }
    }
    broken
}

/// Tests may be what the library may not: a counting allocator is `unsafe` by its nature.
fn is_test(path: &str) -> bool {
    path.contains("/tests/")
}

/// Lines, numbered from 1, that are no comments.
fn code_lines(file: &File) -> impl Iterator<Item = (usize, &str)> {
    let lines = (1..).zip(file.text.lines());
    lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
}

fn unsafe_lines(file: &File) -> impl Iterator<Item = usize> {
    let is_unsafe = |line: &str| {
        let line = line.split("//").next().unwrap_or(line);
        ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern"]
            .iter()
            .any(|form| line.contains(form))
    };
    let rust = file.path.ends_with(".rs") && file.path != "xtask/src/rules.rs";
    code_lines(file).filter(move |(_, line)| rust && is_unsafe(line)).map(|(n, _)| n)
}

/// All text files under the root that are ours.
fn files() -> Result<Vec<File>> {
    let root = run::root();
    let mut files = vec![];
    collect(&root, &root, &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<File>) -> Result<()> {
    const TEXT: &[&str] = &["rs", "toml", "md", "py", "sh", "json", "c", "h"];
    const OTHERS: &[&str] = &["target", "corpus", "artifacts", "golden", "fixtures", ".git"];
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && !path.is_symlink() {
            if !OTHERS.contains(&name.as_str()) {
                collect(root, &path, files)?;
            }
            continue;
        }
        let text = path.extension().is_some_and(|end| TEXT.iter().any(|text| end == *text));
        if text || folder.file_name().is_some_and(|name| name == ".ci") {
            let own = path.strip_prefix(root).unwrap_or(&path);
            let path_text = own.to_string_lossy().replace('\\', "/");
            let text = fs::read_to_string(&path).with_context(|| path_text.clone())?;
            files.push(File { path: path_text, text });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{File, broken};

    fn rules_of(path: &str, text: &str) -> usize {
        broken(&File { path: path.into(), text: text.into() }).len()
    }

    #[test]
    fn intrinsics_and_unsafe_have_their_places() {
        let text = "use std::arch::x86_64::*;\nfn f() { unsafe { g() } }\n// unsafe { and target_arch in words\n";
        assert_eq!(rules_of("crates/foveal/src/simd/avx2.rs", "use std::arch::x86_64::*;"), 0);
        assert_eq!(rules_of("crates/foveal/src/plan.rs", text), 2);
        assert_eq!(rules_of("crates/foveal/src/tensor.rs", text), 1);
        assert_eq!(rules_of("crates/foveal/tests/allocation.rs", text), 1);
    }

    #[test]
    fn paths_of_a_machine_are_noticed_everywhere() {
        let folder = ["/", "home", "/me"].concat();
        assert_eq!(rules_of("docs/design.md", &folder), 1);
        assert_eq!(rules_of("docs/design.md", "crates/foveal/src"), 0);
    }
}
