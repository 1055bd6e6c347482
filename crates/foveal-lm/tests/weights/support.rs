//! GGUF files put together by hand, independently of the crate's writer.

use std::path::{Path, PathBuf};

use foveal_lm::weights::Error;
use foveal_lm::weights::gguf::Gguf;

pub(crate) const U32: u32 = 4;
pub(crate) const F32: u32 = 6;
pub(crate) const BOOL: u32 = 7;
pub(crate) const STRING: u32 = 8;
pub(crate) const ARRAY: u32 = 9;

/// A GGUF file in the making: fields one after the other.
#[derive(Clone, Default)]
pub(crate) struct Fields(pub(crate) Vec<u8>);

impl Fields {
    pub(crate) fn header(version: u32, tensors: u64, entries: u64) -> Fields {
        Fields(b"GGUF".to_vec()).u32(version).u64(tensors).u64(entries)
    }

    pub(crate) fn u32(self, value: u32) -> Fields {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn u64(self, value: u64) -> Fields {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Fields {
        self.0.extend(bytes);
        self
    }

    pub(crate) fn string(self, text: &str) -> Fields {
        self.u64(text.len() as u64).raw(text.as_bytes())
    }

    pub(crate) fn key(self, key: &str, kind: u32) -> Fields {
        self.string(key).u32(kind)
    }

    pub(crate) fn tensor(self, name: &str, axes: &[u64], kind: u32, offset: u64) -> Fields {
        let fields = self.string(name).u32(axes.len() as u32);
        axes.iter().fold(fields, |fields, &axis| fields.u64(axis)).u32(kind).u64(offset)
    }

    /// Pads to a multiple of 32 and appends data.
    pub(crate) fn data(mut self, bytes: &[u8]) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(32), 0);
        self.0.extend(bytes);
        self.0
    }

    pub(crate) fn open(self) -> Result<Gguf, Error> {
        Gguf::from_bytes(self.0)
    }
}

/// A file with every kind of field: numbers, text, nested arrays, three element types. Ends with its last tensor.
pub(crate) fn small_file() -> Vec<u8> {
    let fields = Fields::header(3, 3, 6)
        .key("general.architecture", STRING)
        .string("llama")
        .key("general.alignment", U32)
        .u32(32)
        .key("eps", F32)
        .raw(&1e-5f32.to_le_bytes())
        .key("tied", BOOL)
        .raw(&[1])
        .key("tokens", ARRAY)
        .u32(STRING)
        .u64(3)
        .string("a")
        .string("")
        .string("€")
        .key("nested", ARRAY)
        .u32(ARRAY)
        .u64(2)
        .u32(BOOL)
        .u64(2)
        .raw(&[0, 1])
        .u32(U32)
        .u64(1)
        .u32(7)
        .tensor("wide", &[32, 2], 8, 0)
        .tensor("other", &[256], 23, 96)
        .tensor("norm", &[4], 0, 288);
    let mut data: Vec<u8> = (0..288 + 16).map(|i| i as u8).collect();
    data[288..].copy_from_slice(&[0, 0, 0x80, 0x3f, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0xc0]);
    fields.data(&data)
}

/// A folder for one test, empty at its start.
pub(crate) fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("weights").join(test);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("the target folder can be written");
    folder
}
