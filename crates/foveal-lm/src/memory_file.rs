//! Entries of a memory on disk: mapped, so that a memory may be larger than what the machine has in RAM, and found again.
//!
//! ```text
//! 0     what the file is: sizes, storage type, whose memory it is, SHA-256 of all that
//! 512   record of what is held, and at 1024 another: written in turn, the newer whole one counts
//! 4096  SHA-256 of each whole tile and its number, by slot
//! then  slots, tile n in slot n mod slots: keys [head][256][key dim], values [head][256][value dim]
//! ```
//!
//! Numbers are little-endian. Entries are written first and the record of them last, and nothing that the record names is
//! written over before a new record gives it up: a process may be killed at any moment and the file holds what it held before
//! or after. [`MemoryFile::sync`] brings it to the disk itself; if the machine fails, contents that did not arrive are found by their
//! digests.
//!
//! Files come from strangers: one that is not such a file, is damaged, or is another's memory is refused and left as it is.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use foveal::cache::{KvKeys, KvRows, KvStore, KvTile, KvValues, TILE};
use foveal::memory::MemoryStore;
use foveal::{DType, Rows, Shape, TensorRef};
use half::{bf16, f16};
use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::weights::mapping::{Plain, map_shared, numbers};
use crate::{Error, atomic_file};

const MAGIC: &[u8; 16] = b"foveal memory 1\n";
const HEADER: usize = 128;
const RECORDS: [u64; 2] = [512, 1024];
const RECORD: usize = 96;
/// Where digests begin, and what they and the slots are aligned to.
const PAGE: usize = 4096;
const DIGEST: usize = 32;
/// Heads and numbers of a head, at most.
const MOST: usize = 1 << 16;
/// Slots for tiles that are no longer remembered: so far a memory can be taken back.
const SPARE: usize = 16;

type Sha = [u8; DIGEST];

/// What a memory's file holds, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLayout {
    /// The type of keys and values.
    pub storage: DType,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Numbers of a key and of a value; a value may have none.
    pub dims: (usize, usize),
    /// Tokens that are remembered, and those that may be appended at a time.
    pub capacity: usize,
    /// A digest of what made the entries: a model and its layer. A file with another one is refused.
    pub identity: [u8; 32],
}

/// Where things are in a file.
#[derive(Clone, Copy, Debug)]
struct Places {
    slots: usize,
    /// Bytes of a tile's keys and of its values, all heads.
    parts: [usize; 2],
    data: usize,
    end: usize,
}

impl MemoryLayout {
    fn places(&self) -> Option<Places> {
        let (key_dim, value_dim) = self.dims;
        let sizes = [self.kv_heads, key_dim];
        if sizes.iter().any(|n| !(1..=MOST).contains(n)) || value_dim > MOST {
            return None;
        }
        let slots = self.capacity.div_ceil(TILE).checked_add(2 + SPARE)?;
        let part = |dim| TILE * self.kv_heads * dim * self.storage.size();
        let parts = [part(key_dim), part(value_dim)];
        let digests = slots.checked_mul(DIGEST)?.checked_next_multiple_of(PAGE)?;
        let data = PAGE.checked_add(digests)?;
        let bytes = slots.checked_mul(parts[0] + parts[1])?;
        let end = data.checked_add(bytes).filter(|&end| end <= isize::MAX as usize)?;
        Some(Places { slots, parts, data, end })
    }

    fn header(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let storage = match self.storage {
            DType::F16 => 1u64,
            DType::Bf16 => 2,
            _ => 0,
        };
        let (key_dim, value_dim) = self.dims;
        let sizes = [self.kv_heads, key_dim, value_dim, self.capacity].map(|n| n as u64);
        for number in [storage].into_iter().chain(sizes) {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(self.identity);
        bytes.extend(digest(&[&bytes]));
        bytes.resize(HEADER, 0);
        bytes
    }
}

/// What a file says that it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Record {
    /// One more than that of the record before.
    number: u64,
    start: u64,
    end: u64,
    /// Of the tile that is not whole.
    tail: Sha,
}

impl Record {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            [self.number, self.start, self.end].iter().flat_map(|n| n.to_le_bytes()).collect();
        bytes.extend(self.tail);
        bytes.extend(digest(&[&bytes]));
        bytes.resize(RECORD, 0);
        bytes
    }

    /// `None` for one that was not written whole.
    fn read(bytes: &[u8]) -> Option<Record> {
        let number = |n: usize| Some(u64::from_le_bytes(*bytes[8 * n..].first_chunk()?));
        let tail = *bytes[24..].first_chunk()?;
        let record = Record { number: number(0)?, start: number(1)?, end: number(2)?, tail };
        (record.bytes() == bytes).then_some(record)
    }

    fn positions(&self) -> Option<Range<usize>> {
        Some(usize::try_from(self.start).ok()?..usize::try_from(self.end).ok()?)
    }
}

fn digest(parts: &[&[u8]]) -> Sha {
    let mut digest = Sha256::new();
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize().into()
}

/// A store of entries in a file of its own, which no other process can open meanwhile.
#[derive(Debug)]
pub struct MemoryFile {
    path: PathBuf,
    layout: MemoryLayout,
    places: Places,
    file: File,
    map: Mmap,
    held: Range<usize>,
    record: Record,
}

impl MemoryFile {
    /// Opens the file of a memory, and makes it if there is none. Its space is taken as entries come.
    ///
    /// # Errors
    ///
    /// [`Error::MemoryFile`] for a layout that no file has, and a file that is no memory, is damaged, holds what another layout or another model made, or is open
    /// elsewhere; it is left as it is.
    pub fn open(path: &Path, layout: &MemoryLayout) -> Result<MemoryFile, Error> {
        let refuse = |reason: String| Error::MemoryFile { path: path.to_owned(), reason };
        let failed = |error: io::Error| refuse(format!("it can't be used: {error}"));
        let Some(places) = layout.places() else {
            return Err(refuse(format!("no file holds {layout:?}")));
        };
        if cfg!(target_endian = "big") {
            return Err(refuse("memories on disk need a little-endian processor".to_owned()));
        }
        if !path.try_exists().map_err(failed)? {
            create(path, layout, places).map_err(failed)?;
        }
        // Asked before opening: to open a named pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(refuse("it is not a regular file".to_owned()));
        }
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        file.try_lock().map_err(|error| refuse(format!("another process uses it: {error}")))?;
        let map = map_shared(&file).map_err(failed)?;
        let (held, record) = check(&map, layout, places)
            .map_err(|reason| refuse(format!("{reason}; delete it or name another file")))?;
        let (path, layout) = (path.to_owned(), layout.clone());
        Ok(MemoryFile { path, layout, places, file, map, held, record })
    }

    /// Bytes that the file has for entries; those that were never written take no space.
    pub fn file_bytes(&self) -> usize {
        self.places.end
    }

    /// Bytes of the entries that are held.
    pub fn held_file_bytes(&self) -> usize {
        let row = (self.layout.dims.0 + self.layout.dims.1) * self.layout.storage.size();
        self.held.len() * self.layout.kv_heads * row
    }

    /// Brings what was appended to the disk.
    ///
    /// # Errors
    ///
    /// [`Error::MemoryFile`].
    pub fn sync(&self) -> Result<(), Error> {
        self.file.sync_all().map_err(|error| Error::MemoryFile {
            path: self.path.clone(),
            reason: error.to_string(),
        })
    }

    /// Writes down what is held, and brings all of it to the disk.
    ///
    /// # Errors
    ///
    /// [`Error::MemoryFile`].
    pub fn flush(&mut self) -> Result<(), Error> {
        let done = self.commit().and_then(|()| self.file.sync_all());
        done.map_err(|error| Error::MemoryFile {
            path: self.path.clone(),
            reason: error.to_string(),
        })
    }

    /// Goes back to an earlier end, as if what follows had not been appended, with the entries that were remembered then.
    ///
    /// # Errors
    ///
    /// [`Error::MemoryFile`] if some of them have been written over, or were never there.
    pub fn rewind(&mut self, held: Range<usize>) -> Result<(), Error> {
        let whole = held.start.is_multiple_of(TILE) && held.start <= held.end;
        // A tile is there if its slot still has it; the newest one of all has no digest yet.
        let there = |tile: usize| {
            let place = PAGE + tile % self.places.slots * DIGEST;
            let sha = tile_digest(&self.map, self.places, tile);
            tile == self.held.end / TILE || self.map[place..place + DIGEST] == sha
        };
        let all = || (held.start / TILE..held.end.div_ceil(TILE)).all(there);
        if !whole || held.end > self.held.end || !all() {
            let reason = format!(
                "the entries {held:?} are asked for, which it does not hold any more; it holds {:?}",
                self.held
            );
            return Err(Error::MemoryFile { path: self.path.clone(), reason });
        }
        self.held = held;
        // The tile that is not whole any more has no digest of its own; that of the record counts.
        self.flush()
    }

    /// Keys and values that are held, head by head.
    pub(crate) fn arrays(&self) -> [Vec<u8>; 2] {
        let size = self.layout.storage.size();
        [(0, self.layout.dims.0), (1, self.layout.dims.1)].map(|(part, dim)| {
            let row = dim * size;
            let mut bytes = Vec::with_capacity(self.held.len() * self.layout.kv_heads * row);
            for head in 0..self.layout.kv_heads {
                for piece in foveal::cache::pieces(self.held.clone()) {
                    let own = self.tile_bytes(piece.start / TILE)[part];
                    let first = head * TILE + piece.start % TILE;
                    bytes.extend_from_slice(&own[first * row..][..piece.len() * row]);
                }
            }
            bytes
        })
    }

    /// The bytes of a tile's keys and of its values.
    fn tile_bytes(&self, tile: usize) -> [&[u8]; 2] {
        tile_bytes(&self.map, self.places, tile)
    }

    fn offset(&self, tile: usize) -> usize {
        offset(self.places, tile)
    }

    /// Writes down what is held.
    fn commit(&mut self) -> io::Result<()> {
        let (start, end) = (self.held.start as u64, self.held.end as u64);
        let tail = tail(&self.map, &self.layout, self.places, self.held.end);
        let record = Record { number: self.record.number + 1, start, end, tail };
        if (Record { number: self.record.number, ..record }) != self.record {
            let place = RECORDS[(record.number % 2) as usize];
            write_at(&self.file, &record.bytes(), place)?;
            self.record = record;
        }
        Ok(())
    }

    /// Writes entries and then the record of them.
    fn write(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> io::Result<()> {
        let (first, end) = (self.held.end, self.held.end + k.shape().seq);
        let recorded = self.record.positions().unwrap_or_default();
        let overwritten = (end.div_ceil(TILE)).saturating_sub(self.places.slots) * TILE;
        if recorded.start < overwritten || recorded.end > first {
            // What the last record names is given up before it is written over.
            self.commit()?;
        }
        for piece in foveal::cache::pieces(first..end) {
            let part = piece.start - first..piece.end - first;
            self.write_piece(&piece, [k.tokens(part.clone()), v.tokens(part)])?;
            self.held.end = piece.end;
            if piece.end.is_multiple_of(TILE) {
                let tile = piece.start / TILE;
                let sha = tile_digest(&self.map, self.places, tile);
                let place = PAGE + tile % self.places.slots * DIGEST;
                write_at(&self.file, &sha, place as u64)?;
            }
        }
        self.commit()
    }

    /// Tokens of one tile.
    fn write_piece(&self, piece: &Range<usize>, rows: [TensorRef<'_, f32>; 2]) -> io::Result<()> {
        let (tile, size) = (piece.start / TILE, self.layout.storage.size());
        let mut place = self.offset(tile);
        for x in rows {
            let Shape { seq, heads, dim, .. } = x.shape();
            for head in 0..heads {
                let row = |t| x.row(0, t, head);
                let bytes: Vec<u8> = match self.layout.storage {
                    DType::F16 => stored(seq, row, |x| f16::from_f32(x).to_le_bytes()),
                    DType::Bf16 => stored(seq, row, |x| bf16::from_f32(x).to_le_bytes()),
                    _ => stored(seq, row, f32::to_le_bytes),
                };
                let at = place + (head * TILE + piece.start % TILE) * dim * size;
                write_at(&self.file, &bytes, at as u64)?;
            }
            place += TILE * heads * dim * size;
        }
        Ok(())
    }

    fn rows<E: Plain>(&self, part: usize, head: usize, at: &Range<usize>) -> Rows<'_, E> {
        let dim = [self.layout.dims.0, self.layout.dims.1][part];
        let own = self.tile_bytes(at.start / TILE)[part];
        let first = (head * TILE + at.start % TILE) * dim;
        let rows = Rows::new(&numbers::<E>(own)[first..], dim, at.len(), dim);
        rows.expect("a slot has room for a tile")
    }

    fn kv_rows(&self, part: usize, head: usize, at: &Range<usize>) -> KvRows<'_> {
        match self.layout.storage {
            DType::F16 => KvRows::F16(self.rows(part, head, at)),
            DType::Bf16 => KvRows::Bf16(self.rows(part, head, at)),
            _ => KvRows::F32(self.rows(part, head, at)),
        }
    }
}

/// Numbers of some rows as they are stored.
fn stored<'a, const N: usize>(
    rows: usize,
    row: impl Fn(usize) -> &'a [f32],
    number: impl Fn(f32) -> [u8; N],
) -> Vec<u8> {
    (0..rows).flat_map(|t| row(t).iter().flat_map(|&x| number(x))).collect()
}

/// Makes a file that holds nothing, which appears whole.
fn create(path: &Path, layout: &MemoryLayout, places: Places) -> io::Result<()> {
    atomic_file::write_at(path, |temporary| {
        let mut file = OpenOptions::new().write(true).create_new(true).open(temporary)?;
        file.write_all(&layout.header())?;
        let tail = digest(&[]);
        write_at(&file, &Record { tail, ..Record::default() }.bytes(), RECORDS[0])?;
        file.set_len(places.end as u64)
    })
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], place: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, place)
}

#[cfg(not(unix))]
fn write_at(mut file: &File, bytes: &[u8], place: u64) -> io::Result<()> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::Start(place))?;
    file.write_all(bytes)
}

fn offset(places: Places, tile: usize) -> usize {
    places.data + tile % places.slots * (places.parts[0] + places.parts[1])
}

fn tile_bytes(map: &[u8], places: Places, tile: usize) -> [&[u8]; 2] {
    let slot = &map[offset(places, tile)..][..places.parts[0] + places.parts[1]];
    let (keys, values) = slot.split_at(places.parts[0]);
    [keys, values]
}

/// Of a whole tile: its number tells it from others that lay in the same slot.
fn tile_digest(map: &[u8], places: Places, tile: usize) -> Sha {
    let [keys, values] = tile_bytes(map, places, tile);
    digest(&[&(tile as u64).to_le_bytes(), keys, values])
}

/// Of the entries of the tile that is not whole.
fn tail(map: &[u8], layout: &MemoryLayout, places: Places, end: usize) -> Sha {
    let mut digest = Sha256::new();
    let parts = tile_bytes(map, places, end / TILE);
    for (part, dim) in parts.into_iter().zip([layout.dims.0, layout.dims.1]) {
        let row = dim * layout.storage.size();
        for head in part.chunks_exact((TILE * row).max(1)) {
            digest.update(&head[..end % TILE * row]);
        }
    }
    digest.finalize().into()
}

/// What a file holds, if it is the one that is expected.
fn check(
    map: &[u8],
    layout: &MemoryLayout,
    places: Places,
) -> Result<(Range<usize>, Record), String> {
    if map.len() < PAGE || map[..MAGIC.len()] != MAGIC[..] {
        return Err("it is no memory of foveal".to_owned());
    }
    let (own, found) = (layout.header(), &map[..HEADER]);
    let sizes = 56;
    if found[sizes + DIGEST..sizes + 2 * DIGEST] != digest(&[&found[..sizes + DIGEST]]) {
        return Err("it is damaged: its description has changed".to_owned());
    }
    if found[..sizes] != own[..sizes] {
        return Err("it holds entries of other sizes, or as another type".to_owned());
    }
    if found[..] != own[..] {
        return Err("it was made by another model or layer".to_owned());
    }
    if map.len() != places.end {
        return Err(format!("it is damaged: it has {} bytes of {}", map.len(), places.end));
    }
    let records = RECORDS.map(|place| Record::read(&map[place as usize..][..RECORD]));
    let Some(record) = records.into_iter().flatten().max_by_key(|record| record.number) else {
        return Err("it is damaged: no record of what it holds is whole".to_owned());
    };
    let fits = |held: &Range<usize>| {
        let tiles = held.end.div_ceil(TILE).checked_sub(held.start / TILE);
        held.start.is_multiple_of(TILE) && tiles.is_some_and(|tiles| tiles <= places.slots)
    };
    let Some(held) = record.positions().filter(|held| held.start <= held.end && fits(held)) else {
        return Err("it is damaged: it can't hold what its record says".to_owned());
    };
    let whole = held.start / TILE..held.end / TILE;
    for tile in whole {
        let place = PAGE + tile % places.slots * DIGEST;
        if map[place..place + DIGEST] != tile_digest(map, places, tile) {
            return Err(format!("it is damaged: the entries of tile {tile} have changed"));
        }
    }
    match tail(map, layout, places, held.end) == record.tail {
        true => Ok((held, record)),
        false => Err("it is damaged: its newest entries have changed".to_owned()),
    }
}

impl MemoryStore for MemoryFile {
    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> foveal::Result<()> {
        let (heads, (key_dim, value_dim)) = (self.layout.kv_heads, self.layout.dims);
        let expected = Shape { batch: 1, seq: k.shape().seq, heads, dim: key_dim };
        for (what, dim, got) in
            [("appended keys", key_dim, k.shape()), ("appended values", value_dim, v.shape())]
        {
            let expected = Shape { dim, ..expected };
            if got != expected {
                return Err(foveal::Error::ShapeMismatch { what, expected, got });
            }
        }
        let (held, appended) = (self.held.clone(), expected.seq);
        let tiles = (held.end + appended).div_ceil(TILE) - held.start / TILE;
        if tiles > self.places.slots {
            let (len, capacity) = (held.len(), self.places.slots * TILE);
            return Err(foveal::Error::CacheFull { len, capacity, appended });
        }
        self.write(k, v).map_err(|error| {
            self.held = held;
            foveal::Error::Store { reason: format!("{}: {error}", self.path.display()) }
        })
    }

    fn forget(&mut self, before: usize) {
        self.held.start =
            (before / TILE * TILE).clamp(self.held.start, self.held.end / TILE * TILE);
    }

    /// The file forgets with the next append or [`MemoryFile::flush`].
    fn clear(&mut self) {
        self.held = 0..0;
    }

    fn exact(&self) -> &dyn KvStore {
        self
    }

    /// None: entries are in the file.
    fn held_bytes(&self) -> Option<usize> {
        Some(0)
    }
}

impl KvStore for MemoryFile {
    fn end(&self) -> usize {
        self.held.end
    }

    fn start(&self) -> usize {
        self.held.start
    }

    fn kv_heads(&self) -> usize {
        self.layout.kv_heads
    }

    fn dims(&self) -> (usize, usize) {
        self.layout.dims
    }

    fn dtype(&self) -> DType {
        self.layout.storage
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        assert!(
            head < self.layout.kv_heads
                && self.held.start <= positions.start
                && positions.end <= self.held.end
        );
        KvTile {
            keys: KvKeys::Rows(self.kv_rows(0, head, &positions)),
            values: KvValues::Rows(self.kv_rows(1, head, &positions)),
        }
    }
}
