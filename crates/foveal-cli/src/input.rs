//! Texts from files and from standard input.

use std::fs::File;
use std::io::{Read, stdin};
use std::path::Path;

use anyhow::Context;

/// The longest text that is read.
const MAX_BYTES: u64 = 64 << 20;

/// The text of a file, or of standard input for "-".
pub(crate) fn read(path: &Path, what: &str) -> anyhow::Result<String> {
    let (name, bytes) = if path.as_os_str() == "-" {
        ("standard input".to_owned(), take(stdin().lock()))
    } else {
        (path.display().to_string(), File::open(path).and_then(take))
    };
    let bytes = bytes.with_context(|| format!("cannot read {name}"))?;
    anyhow::ensure!(
        bytes.len() as u64 <= MAX_BYTES,
        "{what} on {name} is longer than 64 MiB; give a shorter one"
    );
    String::from_utf8(bytes)
        .with_context(|| format!("{what} on {name} is not UTF-8; convert it first"))
}

/// The bytes of a file, or of standard input for "-", as they come.
pub(crate) fn open(path: &Path) -> anyhow::Result<Box<dyn Read>> {
    if path.as_os_str() == "-" {
        return Ok(Box::new(stdin().lock()));
    }
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Box::new(file))
}

fn take(from: impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
