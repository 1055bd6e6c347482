//! The keys and values at the head of a GGUF file.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::cursor::Cursor;
use super::value::{FromValue, Value, ValueType};
use crate::weights::{Error, Mapping};

/// Real files have fewer than a hundred keys.
const MAX_KEYS: u64 = 1 << 16;
/// The format's own limit.
pub(super) const MAX_KEY_BYTES: u64 = 65_535;

/// The metadata of a GGUF file, by key and in the order of the file. Values stay in the file until asked for.
#[derive(Debug)]
pub struct Metadata {
    file: Arc<Mapping>,
    entries: Vec<Entry>,
    by_key: BTreeMap<Arc<str>, usize>,
}

#[derive(Debug)]
struct Entry {
    key: Arc<str>,
    kind: ValueType,
    at: usize,
}

impl Metadata {
    /// Reads `count` entries and leaves the cursor, which must lie in `file`, behind them.
    pub(super) fn read(
        file: &Arc<Mapping>,
        cursor: &mut Cursor<'_>,
        count: u64,
    ) -> Result<Metadata, Error> {
        if count > MAX_KEYS {
            return Err(Error::Limit { what: "metadata keys", found: count, limit: MAX_KEYS });
        }
        let mut metadata =
            Metadata { file: file.clone(), entries: Vec::new(), by_key: BTreeMap::new() };
        for index in 0..count as usize {
            let key: Arc<str> = cursor.name("a metadata key", MAX_KEY_BYTES)?.into();
            let kind = cursor.value_type()?;
            let at = cursor.at();
            cursor.value(kind, 0)?;
            if metadata.by_key.insert(key.clone(), index).is_some() {
                return Err(Error::Duplicate { what: "metadata key", name: key.to_string() });
            }
            metadata.entries.push(Entry { key, kind, at });
        }
        Ok(metadata)
    }

    /// The value of `key` as `T`, or `None` when the key is absent.
    ///
    /// Integers are accepted in any width and sign that fits. Only a `Vec` allocates.
    ///
    /// # Errors
    ///
    /// [`Error::WrongType`], with the key, when the value can't be a `T`.
    ///
    /// ```no_run
    /// # use foveal_lm::weights::{Error, gguf::{Gguf, Strings}};
    /// # fn main() -> Result<(), Error> {
    /// let file = Gguf::open("model.gguf".as_ref())?;
    /// let layers: usize = file.metadata().require("llama.block_count")?;
    /// let base = file.metadata().get("llama.rope.freq_base")?.unwrap_or(10_000.0_f32);
    /// for token in file.metadata().require::<Strings>("tokenizer.ggml.tokens")? {
    ///     println!("{}", token?);
    /// }
    /// # Ok(()) }
    /// ```
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, Error> {
        let Some(&index) = self.by_key.get(key) else { return Ok(None) };
        let value = self.value(&self.entries[index])?;
        match T::from_value(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(Error::WrongType {
                key: key.to_owned(),
                expected: T::expected().into_owned(),
                found: value.to_string(),
            }),
        }
    }

    /// The value of `key` as `T`.
    ///
    /// # Errors
    ///
    /// [`Error::MissingKey`], and those of [`get`](Metadata::get).
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, Error> {
        self.get(key)?.ok_or_else(|| Error::MissingKey { key: key.to_owned() })
    }

    /// The keys, in the order of the file.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.iter().map(|entry| &*entry.key)
    }

    fn value(&self, entry: &Entry) -> Result<Value<'_>, Error> {
        Cursor::new(self.file.as_slice(), entry.at).value(entry.kind, 0)
    }
}
