//! Memories on disk: what is found again, what a kill leaves, and what is refused and left as it is.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use foveal::cache::{ContiguousCache, KvKeys, KvRows, KvStore, KvValues};
use foveal::memory::memorizing::{Memorizing, Tokens};
use foveal::memory::{CodedMemory, MemorizingState, MemoryStore};
use foveal::sparse::StateHeads;
use foveal::{DType, Phase, Shape, Tensor};
use foveal_lm::Error;
use foveal_lm::memory_file::{MemoryFile, MemoryLayout};
use half::bf16;

/// A folder of its own, removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path =
            std::env::temp_dir().join(format!("foveal-memory-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn layout(storage: DType) -> MemoryLayout {
    MemoryLayout { storage, kv_heads: 2, dims: (5, 3), capacity: 1000, identity: [7; 32] }
}

/// Tokens whose numbers tell their position, head and place, exactly in every type.
fn tokens(positions: Range<usize>, heads: usize, dim: usize) -> Tensor<f32> {
    let shape = Shape { batch: 1, seq: positions.len(), heads, dim };
    let number = |t: usize, h: usize, d: usize| ((t * 31 + h * 7 + d * 3) % 128) as f32 / 64.0;
    let heads = |t| (0..heads).flat_map(move |h| (0..dim).map(move |d| number(t, h, d)));
    Tensor::from_vec(positions.flat_map(heads).collect(), shape).unwrap()
}

fn append(store: &mut MemoryFile, positions: Range<usize>) {
    let (k, v) = (tokens(positions.clone(), 2, 5), tokens(positions, 2, 3));
    store.append(k.view(), v.view()).unwrap();
}

fn row(rows: KvRows<'_>) -> Vec<f32> {
    match rows {
        KvRows::F32(rows) => rows.row(0).to_vec(),
        KvRows::F16(rows) => rows.row(0).iter().map(|x| x.to_f32()).collect(),
        KvRows::Bf16(rows) => rows.row(0).iter().map(|x| x.to_f32()).collect(),
        _ => panic!("other rows"),
    }
}

fn holds(store: &MemoryFile, positions: Range<usize>) {
    assert_eq!((store.start(), store.end()), (positions.start, positions.end));
    for at in positions {
        let (k, v) = (tokens(at..at + 1, 2, 5), tokens(at..at + 1, 2, 3));
        for head in 0..2 {
            let tile = store.tile(head, at..at + 1);
            let (KvKeys::Rows(keys), KvValues::Rows(values)) = (tile.keys, tile.values) else {
                panic!("rows")
            };
            assert_eq!(row(keys), k.view().row(0, 0, head), "key {at}");
            assert_eq!(row(values), v.view().row(0, 0, head), "value {at}");
        }
    }
}

fn open(path: &Path) -> Result<MemoryFile, Error> {
    MemoryFile::open(path, &layout(DType::Bf16))
}

#[test]
fn entries_are_found_again() {
    let folder = Folder::new("again");
    for storage in [DType::F32, DType::F16, DType::Bf16] {
        let path = folder.file(&storage.to_string());
        let open = || MemoryFile::open(&path, &layout(storage)).unwrap();
        let mut at = 0;
        for end in [1, 255, 256, 300, 1100, 1101, 5000, 9000, 20_000] {
            let mut store = open();
            assert_eq!(store.end(), at);
            while at < end {
                let next = end.min(at + 700);
                store.forget(next.saturating_sub(1000));
                append(&mut store, at..next);
                at = next;
            }
            let start = store.start();
            drop(store);
            holds(&open(), start..end);
        }
        let mut store = open();
        store.clear();
        append(&mut store, 0..10);
        drop(store);
        holds(&open(), 0..10);
    }
}

#[test]
fn it_is_taken_back_as_far_as_entries_last() {
    let folder = Folder::new("back");
    let path = folder.file("memory");
    let mut store = open(&path).unwrap();
    for at in (0..6000).step_by(500) {
        store.forget((at + 500usize).saturating_sub(1000));
        append(&mut store, at..at + 500);
    }
    store.rewind(3072..4100).unwrap();
    holds(&store, 3072..4100);
    drop(store);
    let mut store = open(&path).unwrap();
    holds(&store, 3072..4100);
    append(&mut store, 4100..4700);
    holds(&store, 3072..4700);
    let backwards = std::ops::Range { start: 3072, end: 3000 };
    for refused in [3072..4701, 0..4000, 1..5, backwards] {
        let error = store.rewind(refused).unwrap_err();
        assert!(matches!(error, Error::MemoryFile { .. }), "{error}");
    }
    // As many entries as the file has room for write the oldest over.
    let mut at = 4700;
    while at < 12_000 {
        store.forget(at + 300 - 1000);
        append(&mut store, at..at + 300);
        at += 300;
    }
    assert!(store.rewind(3072..4100).is_err());
    store.rewind(0..0).unwrap();
    holds(&store, 0..0);
}

/// Whatever was written of what is not recorded: the file holds what it held before.
#[test]
fn a_kill_leaves_what_was_there() {
    let folder = Folder::new("kill");
    let path = folder.file("memory");
    let mut store = open(&path).unwrap();
    append(&mut store, 0..700);
    drop(store);
    let before = fs::read(&path).unwrap();
    let mut store = open(&path).unwrap();
    append(&mut store, 700..1000);
    drop(store);
    let after = fs::read(&path).unwrap();
    let records = 512..1536;
    // All entries, no record; half of the record; none of the entries.
    let mut torn = after.clone();
    torn[records.clone()].copy_from_slice(&before[records.clone()]);
    fs::write(&path, &torn).unwrap();
    holds(&open(&path).unwrap(), 0..700);
    let changed: Vec<usize> = records.clone().filter(|&n| before[n] != after[n]).collect();
    for &n in &changed[changed.len() / 2..] {
        torn[n] = before[n];
    }
    for &n in &changed[..changed.len() / 2] {
        torn[n] = after[n];
    }
    fs::write(&path, &torn).unwrap();
    holds(&open(&path).unwrap(), 0..700);
    fs::write(&path, &after).unwrap();
    holds(&open(&path).unwrap(), 0..1000);
}

#[test]
fn what_is_damaged_or_foreign_is_refused_and_left_as_it_is() {
    let folder = Folder::new("foreign");
    let path = folder.file("memory");
    let mut store = open(&path).unwrap();
    append(&mut store, 0..700);
    drop(store);
    let good = fs::read(&path).unwrap();
    let refused = |bytes: &[u8], layout: &MemoryLayout, says: &str| {
        fs::write(&path, bytes).unwrap();
        let error = MemoryFile::open(&path, layout).unwrap_err();
        assert!(matches!(error, Error::MemoryFile { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error} does not say {says:?}");
        assert!(fs::read(&path).unwrap() == bytes, "{says}: the file was changed");
    };
    let own = layout(DType::Bf16);
    let slot = 2 * 256 * (5 + 3) * 2;
    let data = good.len() - 22 * slot;
    for (place, says) in [
        (0, "no memory"),
        (17, "description"),
        (60, "description"),
        (data, "tile 0"),
        (data + slot + 300, "tile 1"),
        (data + 2 * slot + 3, "newest"),
        (4096, "tile 0"),
    ] {
        let mut bad = good.clone();
        bad[place] ^= 1;
        refused(&bad, &own, says);
    }
    let mut bad = good.clone();
    bad[512..1536].fill(9);
    refused(&bad, &own, "no record");
    refused(&good[..good.len() - 1], &own, "bytes");
    refused(&good[..300], &own, "no memory");
    refused(b"", &own, "");
    refused(b"something of somebody's", &own, "no memory");
    refused(&good, &MemoryLayout { identity: [8; 32], ..own.clone() }, "another model");
    refused(&good, &MemoryLayout { kv_heads: 1, ..own.clone() }, "other sizes");
    refused(&good, &layout(DType::F16), "another type");
    for layout in [
        MemoryLayout { kv_heads: 0, ..own.clone() },
        MemoryLayout { dims: (1 << 20, 1), ..own.clone() },
        MemoryLayout { capacity: usize::MAX, ..own.clone() },
    ] {
        refused(&good, &layout, "no file holds");
    }
    fs::write(&path, &good).unwrap();
    let used = open(&path).unwrap();
    assert!(open(&path).unwrap_err().to_string().contains("another process"));
    holds(&used, 0..700);
    assert!(matches!(open(&folder.0), Err(Error::MemoryFile { .. })));
    assert!(matches!(open(&folder.file("none/memory")), Err(Error::MemoryFile { .. })));
}

const HEADS: StateHeads = StateHeads { heads: 4, kv_heads: 2, key_dim: 16, value_dim: 16 };

fn random(seq: usize, heads: usize, seed: u64) -> Tensor<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    let shape = Shape { batch: 1, seq, heads, dim: 16 };
    Tensor::from_vec((0..seq * heads * 16).map(|_| next()).collect(), shape).unwrap()
}

fn run<M: MemoryStore>(state: &mut MemorizingState<M>, range: Range<usize>) -> Vec<f32> {
    let (q, kv) = (random(1200, 4, 1), random(1200, 2, 2));
    let own = |x: &Tensor<f32>| {
        let row = x.shape().heads * 16;
        let part = x.as_slice()[range.start * row..range.end * row].to_vec();
        Tensor::from_vec(part, Shape { seq: range.len(), ..x.shape() }).unwrap()
    };
    let (q, kv) = (own(&q), own(&kv));
    let tokens = Tokens::new(q.view(), kv.view(), kv.view(), &[0.5; 4], &[2.0; 4]);
    state.forward(&tokens, Phase::Prompt).unwrap().out.into_vec()
}

/// A memory on disk is a memory: the same bits as one in RAM, and on from where a restart finds it.
#[test]
fn a_memory_on_disk_gives_the_bits_of_one_in_ram() {
    let folder = Folder::new("bits");
    let options = Memorizing::new(150, 7, 600).unwrap();
    let layout = MemoryLayout {
        storage: DType::Bf16,
        kv_heads: 2,
        dims: (16, 16),
        capacity: 600 + 150,
        identity: [0; 32],
    };
    let mut ram = options.state(HEADS, options.store::<bf16>(HEADS).unwrap()).unwrap();
    let open = || MemoryFile::open(&folder.file("rows"), &layout).unwrap();
    let mut disk = options.state(HEADS, open()).unwrap();
    assert_eq!(run(&mut disk, 0..900), run(&mut ram, 0..900));
    drop(disk);
    let mut found = options.resume(HEADS, open()).unwrap();
    assert_eq!((found.tokens(), found.open()), (900, 0));
    assert_eq!(run(&mut found, 900..1200), run(&mut ram, 900..1200));

    // The same of codes, which are made anew.
    let keys = ContiguousCache::<bf16>::new(2, (16, 16), 2000).unwrap();
    let mut ram = options.state(HEADS, CodedMemory::new(keys, 16).unwrap()).unwrap();
    let open = || {
        let file = MemoryFile::open(&folder.file("codes"), &layout).unwrap();
        CodedMemory::new(file, 16).unwrap()
    };
    let mut disk = options.state(HEADS, open()).unwrap();
    assert_eq!(run(&mut disk, 0..450), run(&mut ram, 0..450));
    drop(disk);
    let mut found = options.resume(HEADS, open()).unwrap();
    assert_eq!(run(&mut found, 450..600), run(&mut ram, 450..600));
}
