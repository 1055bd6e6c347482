//! Metadata values that belong to the program, for writing.

use super::value::{Value, ValueType};
use crate::weights::Error;

/// A metadata value for a [`Writer`](super::Writer). Numbers, text and `Vec`s of them convert into it; a [`Value`]
/// of an open file does too, by copying.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the variants are those of ValueType")]
pub enum OwnedValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    Str(String),
    Array(OwnedArray),
}

/// An array of values of one type.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnedArray {
    kind: ValueType,
    values: Vec<OwnedValue>,
}

impl OwnedArray {
    /// An array whose elements all have the type `kind`, which an empty array has too.
    ///
    /// # Errors
    ///
    /// [`Error::MixedArray`] when an element has another type.
    pub fn new(kind: ValueType, values: Vec<OwnedValue>) -> Result<OwnedArray, Error> {
        if let Some(other) = values.iter().find(|value| value.value_type() != kind) {
            let (expected, found) = (kind.name(), other.value_type().name());
            return Err(Error::MixedArray { expected, found });
        }
        Ok(OwnedArray { kind, values })
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.kind.id().to_le_bytes());
        out.extend((self.values.len() as u64).to_le_bytes());
        self.values.iter().for_each(|value| value.put(out));
    }
}

impl OwnedValue {
    /// The type of the value.
    pub const fn value_type(&self) -> ValueType {
        match self {
            OwnedValue::U8(_) => ValueType::U8,
            OwnedValue::I8(_) => ValueType::I8,
            OwnedValue::U16(_) => ValueType::U16,
            OwnedValue::I16(_) => ValueType::I16,
            OwnedValue::U32(_) => ValueType::U32,
            OwnedValue::I32(_) => ValueType::I32,
            OwnedValue::U64(_) => ValueType::U64,
            OwnedValue::I64(_) => ValueType::I64,
            OwnedValue::F32(_) => ValueType::F32,
            OwnedValue::F64(_) => ValueType::F64,
            OwnedValue::Bool(_) => ValueType::Bool,
            OwnedValue::Str(_) => ValueType::Str,
            OwnedValue::Array(_) => ValueType::Array,
        }
    }

    /// How many arrays lie in one another here.
    pub(super) fn depth(&self) -> usize {
        match self {
            OwnedValue::Array(array) => {
                1 + array.values.iter().map(OwnedValue::depth).max().unwrap_or(0)
            }
            _ => 0,
        }
    }

    /// Appends the value as the file has it, without its type.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        match self {
            OwnedValue::U8(n) => out.extend(n.to_le_bytes()),
            OwnedValue::I8(n) => out.extend(n.to_le_bytes()),
            OwnedValue::U16(n) => out.extend(n.to_le_bytes()),
            OwnedValue::I16(n) => out.extend(n.to_le_bytes()),
            OwnedValue::U32(n) => out.extend(n.to_le_bytes()),
            OwnedValue::I32(n) => out.extend(n.to_le_bytes()),
            OwnedValue::U64(n) => out.extend(n.to_le_bytes()),
            OwnedValue::I64(n) => out.extend(n.to_le_bytes()),
            OwnedValue::F32(x) => out.extend(x.to_le_bytes()),
            OwnedValue::F64(x) => out.extend(x.to_le_bytes()),
            OwnedValue::Bool(truth) => out.push(u8::from(*truth)),
            OwnedValue::Str(text) => put_string(text, out),
            OwnedValue::Array(array) => array.put(out),
        }
    }
}

pub(super) fn put_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

macro_rules! conversions {
    ($($rust:ty => $variant:ident),*) => {$(
        impl From<$rust> for OwnedValue {
            fn from(value: $rust) -> OwnedValue {
                OwnedValue::$variant(value.into())
            }
        }

        impl From<Vec<$rust>> for OwnedValue {
            fn from(values: Vec<$rust>) -> OwnedValue {
                let values = values.into_iter().map(OwnedValue::from).collect();
                OwnedValue::Array(OwnedArray { kind: ValueType::$variant, values })
            }
        }
    )*};
}

conversions!(
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64, f32 => F32,
    f64 => F64, bool => Bool, &str => Str, String => Str, OwnedArray => Array
);

impl TryFrom<Value<'_>> for OwnedValue {
    type Error = Error;

    /// Copies a value of an open file; [`Error::Utf8`] when an array has text that is not UTF-8.
    fn try_from(value: Value<'_>) -> Result<OwnedValue, Error> {
        Ok(match value {
            Value::U8(n) => n.into(),
            Value::I8(n) => n.into(),
            Value::U16(n) => n.into(),
            Value::I16(n) => n.into(),
            Value::U32(n) => n.into(),
            Value::I32(n) => n.into(),
            Value::U64(n) => n.into(),
            Value::I64(n) => n.into(),
            Value::F32(x) => x.into(),
            Value::F64(x) => x.into(),
            Value::Bool(truth) => truth.into(),
            Value::Str(text) => text.into(),
            Value::Array(array) => {
                let values = array.iter().map(|element| element?.try_into());
                let values = values.collect::<Result<_, Error>>()?;
                OwnedArray { kind: array.element_type(), values }.into()
            }
        })
    }
}
