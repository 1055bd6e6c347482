//! GGUF's metadata values: numbers, truth values, text, and arrays that stay in the file until they are read.

use std::borrow::Cow;

use super::cursor::Cursor;
use crate::weights::Error;

/// The type of a metadata value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ValueType {
    /// An 8-bit unsigned integer.
    U8,
    /// An 8-bit signed integer.
    I8,
    /// A 16-bit unsigned integer.
    U16,
    /// A 16-bit signed integer.
    I16,
    /// A 32-bit unsigned integer.
    U32,
    /// A 32-bit signed integer.
    I32,
    /// A 32-bit float.
    F32,
    /// A truth value, one byte.
    Bool,
    /// UTF-8 text.
    Str,
    /// An array of values of one type.
    Array,
    /// A 64-bit unsigned integer.
    U64,
    /// A 64-bit signed integer.
    I64,
    /// A 64-bit float.
    F64,
}

impl ValueType {
    /// In the order of the format's numbers.
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::Str,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    pub(super) fn from_id(id: u32) -> Option<ValueType> {
        ValueType::ALL.get(usize::try_from(id).ok()?).copied()
    }

    pub(super) fn id(self) -> u32 {
        self as u32
    }

    /// The bytes of a value, or the least that one can have.
    pub(super) const fn least_bytes(self) -> usize {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::Str => 8,
            ValueType::Array => 12,
        }
    }

    /// The name, as Rust writes the type: `u32`, `f32`, `string`, `array`.
    pub const fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "u8",
            ValueType::I8 => "i8",
            ValueType::U16 => "u16",
            ValueType::I16 => "i16",
            ValueType::U32 => "u32",
            ValueType::I32 => "i32",
            ValueType::F32 => "f32",
            ValueType::Bool => "bool",
            ValueType::Str => "string",
            ValueType::Array => "array",
            ValueType::U64 => "u64",
            ValueType::I64 => "i64",
            ValueType::F64 => "f64",
        }
    }
}

/// A metadata value; text and arrays borrow from the file.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the variants are those of ValueType")]
pub enum Value<'a> {
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
    Str(&'a str),
    Array(Array<'a>),
}

impl Value<'_> {
    /// The type of the value.
    pub const fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F32(_) => ValueType::F32,
            Value::F64(_) => ValueType::F64,
            Value::Bool(_) => ValueType::Bool,
            Value::Str(_) => ValueType::Str,
            Value::Array(_) => ValueType::Array,
        }
    }

    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(n) => n.into(),
            Value::I8(n) => n.into(),
            Value::U16(n) => n.into(),
            Value::I16(n) => n.into(),
            Value::U32(n) => n.into(),
            Value::I32(n) => n.into(),
            Value::U64(n) => n.into(),
            Value::I64(n) => n.into(),
            _ => return None,
        })
    }
}

/// For messages: the type, and the number itself where it is one.
impl std::fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = self.value_type().name();
        match self {
            Value::Array(array) => write!(f, "array of {} {}", array.len, array.kind.name()),
            Value::F32(x) => write!(f, "{name} {x}"),
            Value::F64(x) => write!(f, "{name} {x}"),
            Value::Bool(x) => write!(f, "{name} {x}"),
            Value::Str(_) => f.write_str(name),
            _ => write!(f, "{name} {}", self.integer().unwrap_or_default()),
        }
    }
}

/// An array of values of one type, still in the file.
#[derive(Clone, Copy, Debug)]
pub struct Array<'a> {
    pub(super) kind: ValueType,
    pub(super) len: usize,
    pub(super) bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The type of the elements.
    pub fn element_type(&self) -> ValueType {
        self.kind
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, read one by one. Text that is not UTF-8 is an [`Error::Utf8`] at its place.
    pub fn iter(&self) -> Elements<'a> {
        Elements { kind: self.kind, left: self.len, cursor: Cursor::new(self.bytes, 0) }
    }
}

/// The elements of an [`Array`].
#[derive(Clone, Debug)]
pub struct Elements<'a> {
    kind: ValueType,
    left: usize,
    cursor: Cursor<'a>,
}

impl<'a> Iterator for Elements<'a> {
    type Item = Result<Value<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        Some(self.cursor.value(self.kind, 0))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Elements<'_> {}

/// The elements of an array of text, such as a vocabulary, read one by one without copying.
#[derive(Clone, Debug)]
pub struct Strings<'a> {
    left: usize,
    cursor: Cursor<'a>,
}

impl<'a> Iterator for Strings<'a> {
    type Item = Result<&'a str, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        Some(self.cursor.name("an array's string", u64::MAX))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

/// A type that metadata can be asked for: integers (from any integer that fits), `f32`, `f64`, `bool`, `&str`,
/// [`Strings`], [`Value`], and `Vec` of these.
pub trait FromValue<'a>: Sized {
    /// What the metadata should have held, for messages.
    fn expected() -> Cow<'static, str>;

    /// The value as this type: `None` when it is of another type or out of range.
    fn from_value(value: Value<'a>) -> Option<Self>;
}

macro_rules! integers {
    ($($integer:ty),*) => {$(
        impl FromValue<'_> for $integer {
            fn expected() -> Cow<'static, str> {
                concat!("an integer that fits ", stringify!($integer)).into()
            }

            fn from_value(value: Value<'_>) -> Option<Self> {
                value.integer()?.try_into().ok()
            }
        }
    )*};
}

integers!(u8, u16, u32, u64, usize, i8, i16, i32, i64);

impl FromValue<'_> for f32 {
    fn expected() -> Cow<'static, str> {
        "f32".into()
    }

    fn from_value(value: Value<'_>) -> Option<Self> {
        match value {
            Value::F32(x) => Some(x),
            Value::F64(x) => Some(x as f32),
            _ => None,
        }
    }
}

impl FromValue<'_> for f64 {
    fn expected() -> Cow<'static, str> {
        "f64".into()
    }

    fn from_value(value: Value<'_>) -> Option<Self> {
        match value {
            Value::F32(x) => Some(x.into()),
            Value::F64(x) => Some(x),
            _ => None,
        }
    }
}

impl FromValue<'_> for bool {
    fn expected() -> Cow<'static, str> {
        "bool".into()
    }

    fn from_value(value: Value<'_>) -> Option<Self> {
        if let Value::Bool(truth) = value { Some(truth) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a str {
    fn expected() -> Cow<'static, str> {
        "string".into()
    }

    fn from_value(value: Value<'a>) -> Option<Self> {
        if let Value::Str(text) = value { Some(text) } else { None }
    }
}

impl<'a> FromValue<'a> for Value<'a> {
    fn expected() -> Cow<'static, str> {
        "any value".into()
    }

    fn from_value(value: Value<'a>) -> Option<Self> {
        Some(value)
    }
}

impl<'a> FromValue<'a> for Strings<'a> {
    fn expected() -> Cow<'static, str> {
        "array of string".into()
    }

    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::Array(Array { kind: ValueType::Str, len, bytes }) => {
                Some(Strings { left: len, cursor: Cursor::new(bytes, 0) })
            }
            _ => None,
        }
    }
}

impl<'a, T: FromValue<'a>> FromValue<'a> for Vec<T> {
    fn expected() -> Cow<'static, str> {
        format!("array of {}", T::expected()).into()
    }

    fn from_value(value: Value<'a>) -> Option<Self> {
        let Value::Array(array) = value else { return None };
        array.iter().map(|element| T::from_value(element.ok()?)).collect()
    }
}
