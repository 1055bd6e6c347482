//! Hugging Face folders: `config.json` with `model.safetensors`, or with the shards that
//! `model.safetensors.index.json` names.
//!
//! ```text
//! u64 header length   JSON header { name: { dtype, shape, data_offsets } }   data, without gaps
//! ```
//!
//! Shapes are in row-major order already. The header is read by the `safetensors` crate.

pub(crate) mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path};
use std::sync::Arc;

use foveal::projection::Format;
use safetensors::Dtype;
use safetensors::tensor::Metadata as Header;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::tensor::Tensors;
use super::{ElementType, Error, Mapping, TensorInfo, Weight};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The limit that the format's own implementation has.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// A parsed value can be many times as large as its text; real configurations have a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// The largest public models have indexes of some ten megabytes.
const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_SHARDS: usize = 4096;

/// An open safetensors model, every field of its headers checked.
#[derive(Debug)]
pub struct Safetensors {
    pub(super) config: Option<serde_json::Value>,
    pub(super) tensors: Tensors,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    #[serde(deserialize_with = "distinct")]
    weight_map: BTreeMap<String, String>,
}

/// A map whose keys differ; serde's own keeps the last of equal ones.
fn distinct<'a, D: Deserializer<'a>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Distinct;

    impl<'a> Visitor<'a> for Distinct {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of tensors to files")
        }

        fn visit_map<A: MapAccess<'a>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((name, file)) = entries.next_entry::<String, String>()? {
                if map.contains_key(&name) {
                    return Err(A::Error::custom(format!("the tensor {name:?} is listed twice")));
                }
                map.insert(name, file);
            }
            Ok(map)
        }
    }

    from.deserialize_map(Distinct)
}

impl Safetensors {
    /// Opens a folder with `config.json` and `model.safetensors`, or the shards of `model.safetensors.index.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] for a missing file, [`Error::Json`], [`Error::Limit`] for a configuration over 1 MiB, an index
    /// over 64 MiB or more than 4096 shards, [`Error::ShardName`] when the index leads out of the folder,
    /// [`Error::MissingTensor`] when a shard lacks a tensor of the index, and those of
    /// [`from_bytes`](Safetensors::from_bytes).
    pub fn open_folder(folder: &Path) -> Result<Safetensors, Error> {
        let config = Some(read_json(&folder.join(CONFIG), MAX_CONFIG_BYTES)?);
        let single = folder.join(SINGLE);
        let tensors = if single.exists() {
            Safetensors::open_file(&single)?.tensors
        } else if folder.join(INDEX).exists() {
            open_shards(folder, read_json(&folder.join(INDEX), MAX_INDEX_BYTES)?)?
        } else {
            let expected = "model.safetensors or model.safetensors.index.json in the folder";
            return Err(Error::NotAModel { path: folder.to_owned(), expected });
        };
        Ok(Safetensors { config, tensors })
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], and those of [`from_bytes`](Safetensors::from_bytes).
    pub fn open_file(path: &Path) -> Result<Safetensors, Error> {
        Safetensors::from_bytes(Mapping::open(path)?)
    }

    /// Checks the bytes of one safetensors file.
    ///
    /// # Errors
    ///
    /// [`Error::Truncated`], [`Error::Limit`] for a header over 100 MB, [`Error::Json`] when the header is not as the
    /// format has it, and [`Error::DataLength`].
    pub fn from_bytes(bytes: impl Into<Mapping>) -> Result<Safetensors, Error> {
        let mut tensors = Tensors::default();
        for info in add_file(&mut tensors, bytes.into())? {
            tensors.insert(info)?;
        }
        Ok(Safetensors { config: None, tensors })
    }

    /// The same tensors as those of a folder with this `config.json`.
    #[must_use]
    pub fn with_config(self, config: serde_json::Value) -> Safetensors {
        Safetensors { config: Some(config), ..self }
    }

    /// The `config.json` of the folder; `None` for a lone file.
    pub fn config(&self) -> Option<&serde_json::Value> {
        self.config.as_ref()
    }

    /// The tensors, in the order of the files.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.tensors.list()
    }

    /// The tensor called `name`. Copies no data.
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], or [`Error::Unsupported`] when it is not f32, f16 or bf16.
    pub fn tensor(&self, name: &str) -> Result<Weight, Error> {
        self.tensors.weight(name)
    }
}

/// Opens the shards of an index, in the order of their names; tensors that the index leaves out are left out.
fn open_shards(folder: &Path, index: Index) -> Result<Tensors, Error> {
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, shard) in index.weight_map {
        shards.entry(shard).or_default().push(name);
    }
    if shards.len() > MAX_SHARDS {
        let (found, limit) = (shards.len() as u64, MAX_SHARDS as u64);
        return Err(Error::Limit { what: "shards in the index", found, limit });
    }
    let mut tensors = Tensors::default();
    for (shard, names) in shards {
        if !is_file_name(&shard) {
            return Err(Error::ShardName { found: shard });
        }
        let mapping = Mapping::open(&folder.join(&shard))?;
        let mut infos = add_file(&mut tensors, mapping)?;
        infos.retain(|info| names.binary_search_by(|name| (**name).cmp(&info.name)).is_ok());
        if let Some(name) = missing(&names, &infos) {
            return Err(Error::MissingTensor { name });
        }
        infos.into_iter().try_for_each(|info| tensors.insert(info))?;
    }
    Ok(tensors)
}

/// Whether a name stays in its folder: one plain component, without separators of any system.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(only)) if only == name)
        && components.next().is_none()
        && !name.contains(['/', '\\', ':', '\0'])
}

fn missing(names: &[String], infos: &[TensorInfo]) -> Option<String> {
    let present: BTreeSet<&str> = infos.iter().map(|info| &*info.name).collect();
    names.iter().find(|name| !present.contains(name.as_str())).cloned()
}

/// Adds a file and returns its tensors, by offset.
fn add_file(tensors: &mut Tensors, mapping: Mapping) -> Result<Vec<TensorInfo>, Error> {
    let (header, start) = read_header(mapping.as_slice())?;
    let file = tensors.add_file(Arc::new(mapping));
    let mut infos = Vec::new();
    for (name, tensor) in header.tensors() {
        // Within the file: the header's offsets are in order and end where the file does.
        let (from, to) = tensor.data_offsets;
        infos.push(TensorInfo {
            name: name.into(),
            shape: tensor.shape.clone(),
            element: element_type(tensor.dtype),
            offset: start + from,
            bytes: Some(to - from),
            file,
        });
    }
    infos.sort_unstable_by(|a, b| (a.offset, &a.name).cmp(&(b.offset, &b.name)));
    Ok(infos)
}

/// The header, and where the data starts.
///
/// The crate's own way in, `SafeTensors::read_metadata`, adds the file's lengths without checking for overflow.
fn read_header(bytes: &[u8]) -> Result<(Header, usize), Error> {
    let truncated = |at: usize, needed| Error::Truncated {
        what: "the safetensors header",
        at,
        needed,
        left: bytes.len() - at,
    };
    let (length, rest) = bytes.split_first_chunk().ok_or_else(|| truncated(0, 8))?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let what = "the bytes of the safetensors header";
        return Err(Error::Limit { what, found: length, limit: MAX_HEADER_BYTES });
    }
    let text = rest.get(..length as usize).ok_or_else(|| truncated(8, length))?;
    let header: Header = serde_json::from_slice(text)
        .map_err(|source| Error::Json { what: "the safetensors header".to_owned(), source })?;
    let (expected, found) = (header.data_len(), rest.len() - text.len());
    if expected != found {
        return Err(Error::DataLength { expected, found });
    }
    Ok((header, bytes.len() - found))
}

fn element_type(dtype: Dtype) -> ElementType {
    let name = match dtype {
        Dtype::F32 => return ElementType::Known(Format::F32),
        Dtype::F16 => return ElementType::Known(Format::F16),
        Dtype::BF16 => return ElementType::Known(Format::BF16),
        Dtype::BOOL => "BOOL",
        Dtype::F4 => "F4",
        Dtype::F6_E2M3 => "F6_E2M3",
        Dtype::F6_E3M2 => "F6_E3M2",
        Dtype::U8 => "U8",
        Dtype::I8 => "I8",
        Dtype::F8_E5M2 => "F8_E5M2",
        Dtype::F8_E4M3 => "F8_E4M3",
        Dtype::F8_E8M0 => "F8_E8M0",
        Dtype::F8_E4M3FNUZ => "F8_E4M3FNUZ",
        Dtype::F8_E5M2FNUZ => "F8_E5M2FNUZ",
        Dtype::I16 => "I16",
        Dtype::U16 => "U16",
        Dtype::I32 => "I32",
        Dtype::U32 => "U32",
        Dtype::C64 => "C64",
        Dtype::F64 => "F64",
        Dtype::I64 => "I64",
        Dtype::U64 => "U64",
        _ => "unknown",
    };
    ElementType::Unsupported { name, id: None }
}

/// Reads a JSON file of at most `limit` bytes.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path, limit: u64) -> Result<T, Error> {
    let failed = |source| Error::Io { action: "read", path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("not a regular file")));
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(limit + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > limit {
        let found = text.len() as u64;
        return Err(Error::Limit { what: "the bytes of a JSON file", found, limit });
    }
    serde_json::from_slice(&text)
        .map_err(|source| Error::Json { what: path.display().to_string(), source })
}
