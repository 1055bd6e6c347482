//! What a run needs to go on as if it had not stopped, in one file that appears whole or not at all.
//!
//! ```text
//! state         JSON: step, position in the text, what was seen, the best loss
//! parameters    f32
//! first         m of the optimizer, f32
//! second        v, f32
//! carried.N     what layers carry of the sequences of batch N of a step
//! sha256        of all bytes before it
//! ```
//!
//! The file is safetensors. Random numbers have no state: they follow from the seed and the step. A file that was damaged
//! is refused: its last tensor says what the others were.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Error;
use super::data::Position;
use crate::atomic_file;
use crate::weights::safetensors::writer::{self, Layout, Written};
use crate::weights::{Mapping, Safetensors};

/// The name of the file in a run's folder.
pub(super) const FILE: &str = "checkpoint.safetensors";
const DIGEST: usize = 32;
/// What a run writes whole.
const FILES: [&str; 7] = [
    FILE,
    "config.json",
    "model.safetensors",
    "report.html",
    "tokenizer.json",
    "tokenizer_config.json",
    "train.toml",
];

/// What is known of a run besides its numbers.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct State {
    /// Steps that are done.
    pub step: u64,
    /// Tokens that were predicted in them.
    pub tokens: u64,
    /// What has been read of the text.
    pub position: Position,
    /// The text and its tokens.
    pub digest: String,
    /// The best loss of an evaluation, its bits, and the step it was at.
    pub(super) best: Option<(u64, u64)>,
    /// Evaluations since then.
    pub stale: u64,
    /// Whether the run is over.
    pub done: bool,
    /// Bytes of the metrics that belong to these steps.
    pub metrics: u64,
    /// Seconds that the steps took, in all processes together.
    pub seconds: f64,
}

impl State {
    /// The best loss of an evaluation.
    pub fn best_loss(&self) -> Option<f64> {
        self.best.map(|(bits, _)| f64::from_bits(bits))
    }

    /// The step that it was at.
    pub fn best_step(&self) -> Option<u64> {
        self.best.map(|(_, step)| step)
    }

    pub(super) fn set_best(&mut self, loss: f64, step: u64) {
        self.best = Some((loss.to_bits(), step));
        self.stale = 0;
    }
}

/// The numbers of a run.
#[derive(Debug)]
pub(super) struct Numbers<'a> {
    pub(super) parameters: &'a [f32],
    pub(super) first: &'a [f32],
    pub(super) second: &'a [f32],
    pub(super) carried: Vec<Vec<u8>>,
}

/// Passes bytes on, and hashes them.
struct Hashed<'a, W: Write> {
    out: &'a mut W,
    hash: Sha256,
}

impl<W: Write> Write for Hashed<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes the checkpoint of the run in `folder`; until all is on disk the last one stays.
///
/// # Errors
///
/// [`Error::Write`].
pub(super) fn save(folder: &Path, state: &State, numbers: &Numbers<'_>) -> Result<(), Error> {
    let path = folder.join(FILE);
    let failed = |source| Error::Write { path: path.clone(), source };
    let mut text = serde_json::to_vec(state).map_err(|error| failed(error.into()))?;
    // Numbers begin at multiples of eight.
    text.resize(text.len().next_multiple_of(8), b' ');
    let layout = |name: &str, len: usize, written| Layout {
        name: name.to_owned(),
        shape: vec![len],
        written,
    };
    let arenas =
        [("parameters", numbers.parameters), ("first", numbers.first), ("second", numbers.second)];
    let mut layouts = vec![layout("state", text.len(), Written::Bytes)];
    layouts.extend(arenas.map(|(name, values)| layout(name, values.len(), Written::F32)));
    for (n, carried) in numbers.carried.iter().enumerate() {
        layouts.push(layout(&format!("carried.{n}"), carried.len(), Written::Bytes));
    }
    layouts.push(layout("sha256", DIGEST, Written::Bytes));
    let write = |out: &mut io::BufWriter<std::fs::File>| {
        let mut out = Hashed { out, hash: Sha256::new() };
        writer::write(&mut out, &layouts, |n, out| match n {
            0 => out.write_all(&text),
            1..=3 => writer::numbers(arenas[n - 1].1, Written::F32, out),
            _ => match numbers.carried.get(n - 4) {
                Some(carried) => out.write_all(carried),
                None => {
                    let digest = out.hash.clone().finalize();
                    out.write_all(&digest)
                }
            },
        })
    };
    atomic_file::write(&path, write).map_err(failed)
}

/// A checkpoint that was read.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) state: State,
    path: PathBuf,
    tensors: Safetensors,
    bytes: Mapping,
}

/// Opens the checkpoint of the run in `folder`; `None` if there is none yet.
///
/// # Errors
///
/// [`Error::Checkpoint`] for a file that is damaged.
pub(super) fn open(folder: &Path) -> Result<Option<Checkpoint>, Error> {
    let path = folder.join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let wrong = |reason: String| Error::Checkpoint { path: path.clone(), reason };
    let bytes = Mapping::open(&path)?;
    let all = bytes.as_slice();
    let Some((rest, digest)) = all.split_last_chunk::<DIGEST>() else {
        return Err(wrong(format!("it has {} bytes only", all.len())));
    };
    if Sha256::digest(rest)[..] != digest[..] {
        return Err(wrong("it is damaged: its checksum is another".to_owned()));
    }
    let tensors = Safetensors::open_file(&path).map_err(|error| wrong(error.to_string()))?;
    let mut checkpoint = Checkpoint { state: State::default(), path: path.clone(), tensors, bytes };
    let state = checkpoint.bytes_of("state")?;
    checkpoint.state =
        serde_json::from_slice(state).map_err(|error| wrong(format!("its state: {error}")))?;
    Ok(Some(checkpoint))
}

impl Checkpoint {
    /// Of how many calls it has what they carry.
    pub(super) fn calls(&self) -> usize {
        self.tensors.tensors().iter().filter(|info| info.name.starts_with("carried.")).count()
    }

    /// An error of this file.
    pub(super) fn wrong(&self, reason: String) -> Error {
        Error::Checkpoint { path: self.path.clone(), reason }
    }

    /// The bytes of a tensor.
    pub(super) fn bytes_of(&self, name: &str) -> Result<&[u8], Error> {
        let info = self.tensors.tensors().iter().find(|info| &*info.name == name);
        let bytes = info.and_then(|info| {
            self.bytes.as_slice().get(info.offset..info.offset.checked_add(info.bytes?)?)
        });
        bytes.ok_or_else(|| self.wrong(format!("it has no {name:?}")))
    }

    /// Reads numbers into `values`, of which there must be as many.
    pub(super) fn read(&self, name: &str, values: &mut [f32]) -> Result<(), Error> {
        let bytes = self.bytes_of(name)?;
        if bytes.len() != size_of_val(values) {
            let (found, expected) = (bytes.len() / 4, values.len());
            return Err(self.wrong(format!("{name} has {found} numbers, the model {expected}")));
        }
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(4)) {
            *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Ok(())
    }
}

/// Removes what a process that was killed has left half written.
pub(super) fn clean(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let mut half = FILES.iter().map(|file| format!(".{file}."));
        if half.any(|file| name.starts_with(&file)) {
            // It is in nobody's way.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("foveal-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn a_checkpoint_comes_back_bit_for_bit_and_damage_is_seen() {
        let folder = folder("checkpoint");
        assert!(open(&folder).unwrap().is_none());
        let mut state = State { step: 12, seconds: 0.1, ..State::default() };
        state.set_best(1.0 / 3.0, 7);
        let parameters = [f32::MIN_POSITIVE / 3.0, -0.0, 1.5, f32::MAX];
        let carried = vec![vec![1, 2, 3], vec![]];
        let (first, second) = (&[1.0; 4], &[2.0; 4]);
        let numbers = Numbers { parameters: &parameters, first, second, carried };
        save(&folder, &state, &numbers).unwrap();
        std::fs::write(folder.join(".checkpoint.safetensors.9-0"), "half").unwrap();
        clean(&folder);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);

        let checkpoint = open(&folder).unwrap().unwrap();
        assert_eq!(checkpoint.state, state);
        let mut values = [f32::NAN; 4];
        checkpoint.read("parameters", &mut values).unwrap();
        assert_eq!(values.map(f32::to_bits), parameters.map(f32::to_bits));
        assert_eq!(checkpoint.bytes_of("carried.0").unwrap(), [1, 2, 3]);
        assert!(checkpoint.bytes_of("carried.1").unwrap().is_empty());
        assert!(
            checkpoint
                .read("first", &mut values[..3])
                .unwrap_err()
                .to_string()
                .contains("4 numbers")
        );
        assert!(checkpoint.bytes_of("third").is_err());

        let path = folder.join(FILE);
        let bytes = std::fs::read(&path).unwrap();
        for at in (0..bytes.len()).step_by(7) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            std::fs::write(&path, &damaged).unwrap();
            assert!(matches!(open(&folder), Err(Error::Checkpoint { .. })), "byte {at}");
        }
        for len in [0, 8, 31, 40, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(open(&folder).is_err(), "{len} bytes");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
