//! A position in a GGUF file, and the only code that reads its bytes.

use super::value::{Array, Value, ValueType};
use crate::weights::Error;

/// Arrays may lie in arrays this deep.
pub(super) const MAX_DEPTH: usize = 4;

/// Reads little-endian fields one after the other; every read is checked against the end of the bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Cursor<'a> {
        Cursor { bytes, at: at.min(bytes.len()) }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Refuses a count of things when the rest of the file can't hold them, `each` bytes at least.
    pub(super) fn need(&self, what: &'static str, count: u64, each: usize) -> Result<(), Error> {
        let needed = count.saturating_mul(each as u64);
        let left = self.bytes.len() - self.at;
        if needed > left as u64 {
            return Err(Error::Truncated { what, at: self.at, needed, left });
        }
        Ok(())
    }

    pub(super) fn take(&mut self, what: &'static str, len: u64) -> Result<&'a [u8], Error> {
        self.need(what, len, 1)?;
        let end = self.at + len as usize; // no more than the bytes that are left
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    pub(super) fn field<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Error> {
        let bytes = self.take(what, N as u64)?;
        Ok(bytes.try_into().expect("as many bytes as were taken"))
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, Error> {
        self.field(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, Error> {
        self.field(what).map(u64::from_le_bytes)
    }

    /// A length and so many bytes.
    pub(super) fn string(&mut self, what: &'static str) -> Result<&'a [u8], Error> {
        let len = self.u64(what)?;
        self.take(what, len)
    }

    /// A length of at most `limit` and so many bytes of UTF-8.
    pub(super) fn name(&mut self, what: &'static str, limit: u64) -> Result<&'a str, Error> {
        let start = self.at;
        let len = self.u64(what)?;
        if len > limit {
            return Err(Error::Limit { what, found: len, limit });
        }
        let bytes = self.take(what, len)?;
        std::str::from_utf8(bytes).map_err(|_| Error::Utf8 { what, at: start })
    }

    pub(super) fn value_type(&mut self) -> Result<ValueType, Error> {
        let at = self.at;
        let id = self.u32("a metadata type")?;
        ValueType::from_id(id).ok_or(Error::ValueType { id, at })
    }

    /// One value of a type, `depth` arrays deep. Checks all that it spans, but for the text in arrays, which is
    /// checked when it is asked for.
    pub(super) fn value(&mut self, kind: ValueType, depth: usize) -> Result<Value<'a>, Error> {
        let what = "a metadata value";
        Ok(match kind {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.field(what)?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.field(what)?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.field(what)?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.field(what)?)),
            ValueType::U32 => Value::U32(u32::from_le_bytes(self.field(what)?)),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.field(what)?)),
            ValueType::U64 => Value::U64(u64::from_le_bytes(self.field(what)?)),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.field(what)?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.field(what)?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.field(what)?)),
            ValueType::Bool => Value::Bool(self.truth(what)?),
            ValueType::Str => Value::Str(self.name(what, u64::MAX)?),
            ValueType::Array => Value::Array(self.array(depth)?),
        })
    }

    fn truth(&mut self, what: &'static str) -> Result<bool, Error> {
        let at = self.at;
        match self.field(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [found] => Err(Error::Bool { found, at }),
        }
    }

    fn array(&mut self, depth: usize) -> Result<Array<'a>, Error> {
        let what = "an array";
        if depth >= MAX_DEPTH {
            let (found, limit) = (depth as u64 + 1, MAX_DEPTH as u64);
            return Err(Error::Limit { what: "arrays in one another", found, limit });
        }
        let kind = self.value_type()?;
        let len = self.u64(what)?;
        self.need(what, len, kind.least_bytes())?;
        let start = self.at;
        match kind {
            ValueType::Str => (0..len).try_for_each(|_| self.string(what).map(drop))?,
            ValueType::Array => (0..len).try_for_each(|_| self.array(depth + 1).map(drop))?,
            ValueType::Bool => (0..len).try_for_each(|_| self.truth(what).map(drop))?,
            _ => self.take(what, len * kind.least_bytes() as u64).map(drop)?,
        }
        // `len` fits: each element has at least one byte of the file.
        Ok(Array { kind, len: len as usize, bytes: &self.bytes[start..self.at] })
    }
}
