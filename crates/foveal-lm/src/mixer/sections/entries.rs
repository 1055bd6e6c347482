//! Where a section's memory keeps its entries: in RAM or in a file, searched as rows or as codes of 8 bits.

use std::ops::Range;

use foveal::cache::{KvStore, KvTile, TILE};
use foveal::memory::{CodedMemory, MemoryStore};
use foveal::{DType, TensorRef};

use crate::Error;
use crate::memory_file::{MemoryFile, MemoryLayout};
use crate::mixer::state::{Array, Span};
use crate::mixer::{CacheStorage, Contents, Store, Taken};

/// Rows of keys and values.
#[derive(Debug)]
pub(crate) enum Rows {
    Ram(Box<Store>),
    File(Box<MemoryFile>),
}

/// A memory's entries.
#[derive(Clone, Debug)]
pub(crate) enum Entries {
    Rows(Rows),
    Coded(Box<CodedMemory<Rows>>),
}

/// Runs the same expression on whichever store it is.
macro_rules! with_entries {
    ($entries:expr, $store:ident => $body:expr) => {
        match $entries {
            Entries::Rows(Rows::Ram($store)) => $body,
            Entries::Rows(Rows::File($store)) => $body,
            Entries::Coded($store) => $body,
        }
    };
}

macro_rules! with_rows {
    ($rows:expr, $store:ident => $body:expr) => {
        match $rows {
            Rows::Ram($store) => $body,
            Rows::File($store) => $body,
        }
    };
}

impl Entries {
    /// Entries in a file, of which those are searched as codes that `storage` would code.
    pub(super) fn in_file(file: MemoryFile, storage: CacheStorage) -> Result<Entries, Error> {
        let value_dim = file.dims().1;
        let rows = Rows::File(Box::new(file));
        Ok(match storage.coded() {
            true => Entries::Coded(Box::new(CodedMemory::new(rows, value_dim)?)),
            false => Entries::Rows(rows),
        })
    }

    fn rows(&self) -> &Rows {
        match self {
            Entries::Rows(rows) => rows,
            Entries::Coded(memory) => memory.keys(),
        }
    }

    /// The file that holds them, if one does.
    pub(crate) fn file(&self) -> Option<&MemoryFile> {
        match self.rows() {
            Rows::File(file) => Some(file),
            Rows::Ram(_) => None,
        }
    }

    /// Brings what a file holds to the disk.
    pub(super) fn sync(&self) -> Result<(), Error> {
        self.file().map_or(Ok(()), MemoryFile::sync)
    }

    /// Names the entries for a file; those that lie in a file of their own are not. `None` for codes in RAM.
    pub(super) fn save<'a>(&'a self, contents: &mut Contents<'a>) -> Option<()> {
        match self {
            Entries::Rows(Rows::Ram(store)) => contents.store("", store),
            Entries::Coded(memory) if matches!(memory.keys(), Rows::Ram(_)) => return None,
            _ => {}
        }
        Some(())
    }

    /// What was saved of entries that were held at positions.
    pub(super) fn restored(
        self,
        held: Range<usize>,
        taken: &mut Taken<'_>,
    ) -> Result<Entries, Error> {
        let back = |rows: Rows| match rows {
            Rows::File(mut file) => {
                file.rewind(held.clone())?;
                Ok::<Rows, Error>(Rows::File(file))
            }
            ram => Ok(ram),
        };
        match self {
            Entries::Rows(Rows::Ram(mut store)) => {
                taken.store("", &mut store)?;
                Ok(Entries::Rows(Rows::Ram(store)))
            }
            Entries::Rows(rows) => Ok(Entries::Rows(back(rows)?)),
            Entries::Coded(memory) => {
                let value_dim = memory.dims().1;
                let rows = back(memory.into_keys())?;
                Ok(Entries::Coded(Box::new(CodedMemory::new(rows, value_dim)?)))
            }
        }
    }
}

/// What a file stores for a choice of storage.
pub(super) fn stored(storage: CacheStorage) -> DType {
    match storage {
        CacheStorage::F32 => DType::F32,
        CacheStorage::F16 => DType::F16,
        _ => DType::Bf16,
    }
}

/// A copy in RAM, also of what was in a file: no two stores write to one.
impl Clone for Rows {
    fn clone(&self) -> Rows {
        Rows::Ram(Box::new(match self {
            Rows::Ram(store) => Store::clone(store),
            Rows::File(file) => in_ram(file).expect("what a file holds fits a store"),
        }))
    }
}

fn in_ram(file: &MemoryFile) -> Result<Store, Error> {
    let storage = match file.dtype() {
        DType::F32 => CacheStorage::F32,
        DType::F16 => CacheStorage::F16,
        _ => CacheStorage::Bf16,
    };
    let mut store = Store::new(storage, file.kv_heads(), file.dims())?;
    let [keys, values] = file.arrays();
    let span = Span { coded: file.start()..file.start(), end: file.end() };
    store.restore(&span, |array| match array {
        Array::Keys => &keys,
        Array::Values => &values,
        _ => &[],
    })?;
    Ok(store)
}

impl MemoryStore for Rows {
    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> foveal::Result<()> {
        with_rows!(self, store => MemoryStore::append(&mut **store, k, v))
    }

    fn forget(&mut self, before: usize) {
        with_rows!(self, store => store.forget(before));
    }

    fn clear(&mut self) {
        with_rows!(self, store => MemoryStore::clear(&mut **store));
    }

    fn exact(&self) -> &dyn KvStore {
        self
    }

    fn held_bytes(&self) -> Option<usize> {
        with_rows!(self, store => store.held_bytes())
    }
}

impl KvStore for Rows {
    fn end(&self) -> usize {
        with_rows!(self, store => store.end())
    }

    fn start(&self) -> usize {
        with_rows!(self, store => store.start())
    }

    fn kv_heads(&self) -> usize {
        with_rows!(self, store => store.kv_heads())
    }

    fn dims(&self) -> (usize, usize) {
        with_rows!(self, store => store.dims())
    }

    fn dtype(&self) -> DType {
        with_rows!(self, store => store.dtype())
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        with_rows!(self, store => store.tile(head, positions))
    }
}

impl MemoryStore for Entries {
    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> foveal::Result<()> {
        with_entries!(self, store => MemoryStore::append(&mut **store, k, v))
    }

    fn forget(&mut self, before: usize) {
        with_entries!(self, store => store.forget(before));
    }

    fn clear(&mut self) {
        with_entries!(self, store => MemoryStore::clear(&mut **store));
    }

    fn exact(&self) -> &dyn KvStore {
        with_entries!(self, store => store.exact())
    }

    fn distance(&self, kv_head: usize, position: usize) -> f32 {
        with_entries!(self, store => store.distance(kv_head, position))
    }

    fn held_bytes(&self) -> Option<usize> {
        with_entries!(self, store => store.held_bytes())
    }
}

impl KvStore for Entries {
    fn end(&self) -> usize {
        with_entries!(self, store => store.end())
    }

    fn start(&self) -> usize {
        with_entries!(self, store => store.start())
    }

    fn kv_heads(&self) -> usize {
        with_entries!(self, store => store.kv_heads())
    }

    fn dims(&self) -> (usize, usize) {
        with_entries!(self, store => store.dims())
    }

    fn dtype(&self) -> DType {
        with_entries!(self, store => store.dtype())
    }

    fn coded(&self) -> bool {
        with_entries!(self, store => store.coded())
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        with_entries!(self, store => store.tile(head, positions))
    }
}

/// The layout of a file for the entries of a memory.
pub(super) fn layout(
    memory: &foveal::memory::Memorizing,
    heads: foveal::sparse::StateHeads,
    (storage, identity): (CacheStorage, [u8; 32]),
) -> MemoryLayout {
    MemoryLayout {
        storage: stored(storage),
        kv_heads: heads.kv_heads,
        dims: (heads.key_dim, heads.value_dim),
        capacity: memory.capacity().saturating_add(memory.segment()).saturating_add(TILE),
        identity,
    }
}
