//! Memories of a text that grow with it, in files of a folder.
//!
//! A state that keeps a whole text to fetch pieces of it ([`Keep::Retrieve`](crate::mixer::Keep::Retrieve)) has a file a layer too, which begins anew with each text.
//! A layer of Memorizing Transformers keeps the keys and values of a document's past. In a folder there is a file for each,
//! mapped into memory ([`MemoryFile`](crate::memory_file::MemoryFile)): entries may be more than the machine has RAM, and the next process finds them again.

use std::ops::Range;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Model, State};
use crate::Error;
use crate::mixer::{MemoryState, SectionState};
use crate::prompt_cache::fingerprint;
use crate::weights::Weights;

/// A folder for the memories of one model's texts.
#[derive(Clone, Debug)]
pub struct MemoryFolder {
    path: PathBuf,
    fingerprint: String,
}

impl MemoryFolder {
    /// A folder, made when it is used; `weights` are those that `model` was made of.
    pub fn new(path: &Path, model: &Model, weights: &Weights) -> MemoryFolder {
        MemoryFolder { path: path.to_owned(), fingerprint: fingerprint(model, weights) }
    }

    fn file(&self, layer: usize, section: usize) -> PathBuf {
        self.path.join(format!("layer-{layer}-section-{section}.memory"))
    }

    fn identity(&self, layer: usize, section: usize) -> [u8; 32] {
        let whose = format!("{} layer {layer} section {section}", self.fingerprint);
        Sha256::digest(whose).into()
    }
}

impl State {
    /// Keeps the entries of memories in files of a folder from here on. Entries that the files hold can be retrieved: a text
    /// that was read before is remembered. Keys and values that are stored as codes are searched as codes of 8 bits, with the
    /// rows in the file (bf16) to decide; others are rows of their type. Returns how many entries a head has found.
    ///
    /// # Errors
    ///
    /// [`Error::CacheOptions`] for a model without such memories, or a state that has read something; [`Error::MemoryFile`].
    pub fn keep_memories_in(&mut self, folder: &MemoryFolder) -> Result<usize, Error> {
        let refuse = |found: &str, expected: &str| Error::CacheOptions {
            what: "folder for memories",
            found: found.to_owned(),
            expected: expected.to_owned(),
        };
        if self.position != 0 {
            return Err(refuse("one for a text that has begun", "one from the beginning on"));
        }
        let made = std::fs::create_dir_all(&folder.path);
        made.map_err(|error| Error::MemoryFile {
            path: folder.path.clone(),
            reason: error.to_string(),
        })?;
        let (storage, mut found, mut any) = (self.options.storage, 0, false);
        for (layer, state) in self.layers.iter_mut().enumerate() {
            if let Some(retrieving) = state.retrieving_mut() {
                let identity = folder.identity(layer, 0);
                retrieving.keep_in(&folder.file(layer, 0), identity)?;
                any = true;
            }
            for (n, section) in state.sections_mut().iter_mut().enumerate() {
                let SectionState::Memory(memory) = section else { continue };
                let identity = folder.identity(layer, n);
                let held = memory.keep_in(&folder.file(layer, n), (storage, identity))?;
                any |= held.is_some();
                found = found.max(held.unwrap_or(0));
            }
        }
        match any {
            true => Ok(found),
            false => Err(refuse("one for a model without any", "a model with memorizing layers")),
        }
    }

    /// Brings entries in files to the disk: what is written of this state then can be taken up after the machine has failed.
    ///
    /// # Errors
    ///
    /// [`Error::MemoryFile`].
    pub fn sync_memories(&self) -> Result<(), Error> {
        self.memories().try_for_each(MemoryState::sync)
    }

    fn memories(&self) -> impl Iterator<Item = &MemoryState> {
        self.layers.iter().flat_map(|layer| layer.sections()).filter_map(|section| match section {
            SectionState::Memory(memory) => Some(&**memory),
            _ => None,
        })
    }

    /// Bytes of the entries that are in files.
    pub fn memory_file_bytes(&self) -> usize {
        let entries = self.memories().filter_map(MemoryState::entries);
        let entries = entries.filter_map(|entries| Some(entries.file()?.held_file_bytes()));
        let texts = self.layers.iter().filter_map(|layer| Some(layer.retrieving()?.file_bytes()));
        entries.chain(texts).sum()
    }

    /// What the newest call fetched of a long text ([`Keep::Retrieve`](crate::mixer::Keep::Retrieve)), layer by layer: positions for
    /// each key/value head. `None` for layers that saw all.
    pub fn fetched(&self) -> Vec<Option<Vec<Vec<Range<usize>>>>> {
        self.layers.iter().map(|layer| layer.retrieving()?.fetched()).collect()
    }
}
