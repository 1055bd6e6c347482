//! DLPack: how arrays of other libraries are described in memory, as far as it is used here.
//!
//! ```text
//! array ──exchange API of its type──► DLTensor          borrowed: a call of C, no allocation (PyTorch 2.10)
//! array ──__dlpack__(max_version=(1, 0))──► capsule      owned: freed by its deleter (NumPy 2.1, everything else)
//! ```
//!
//! <https://dmlc.github.io/dlpack/latest/c_api.html>, version 1.3; fields have the order of its header.

use std::ffi::{CStr, c_int, c_void};

/// The name of a capsule that nobody has taken.
pub(crate) const VERSIONED: &CStr = c"dltensor_versioned";
/// The name of a capsule that somebody has taken.
pub(crate) const USED: &CStr = c"used_dltensor_versioned";
/// The name of the capsule of an exchange API.
pub(crate) const EXCHANGE: &CStr = c"dlpack_exchange_api";
/// The processor, as a device.
pub(crate) const CPU: i32 = 1;
/// The flag of memory that must not be written.
pub(crate) const READ_ONLY: u64 = 1;
/// The version that is spoken.
pub(crate) const VERSION: Version = Version { major: 1, minor: 0 };

/// A version: readers of another major one cannot read a struct.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// Where memory is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Device {
    pub(crate) kind: i32,
    pub(crate) id: i32,
}

/// What an element is.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DataType {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

impl DataType {
    pub(crate) const F32: DataType = DataType { code: 2, bits: 32, lanes: 1 };
    pub(crate) const F16: DataType = DataType { code: 2, bits: 16, lanes: 1 };
    pub(crate) const BF16: DataType = DataType { code: 4, bits: 16, lanes: 1 };
    pub(crate) const I32: DataType = DataType { code: 0, bits: 32, lanes: 1 };
    pub(crate) const I64: DataType = DataType { code: 0, bits: 64, lanes: 1 };
    pub(crate) const BOOL: DataType = DataType { code: 6, bits: 8, lanes: 1 };

    /// The name that NumPy and PyTorch use.
    pub(crate) fn name(self) -> String {
        let kind = match self.code {
            0 => "int",
            1 => "uint",
            2 => "float",
            4 => "bfloat",
            5 => "complex",
            6 => return "bool".to_owned(),
            code => return format!("DLPack type {code} of {} bits", self.bits),
        };
        format!("{kind}{}", self.bits)
    }
}

/// A tensor in memory. `strides` are in elements; a null pointer means dense, row by row.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct DlTensor {
    pub(crate) data: *mut c_void,
    pub(crate) device: Device,
    pub(crate) ndim: i32,
    pub(crate) dtype: DataType,
    pub(crate) shape: *mut i64,
    pub(crate) strides: *mut i64,
    pub(crate) byte_offset: u64,
}

/// A tensor with its owner.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Managed {
    pub(crate) version: Version,
    pub(crate) context: *mut c_void,
    pub(crate) deleter: Option<unsafe extern "C" fn(*mut Managed)>,
    pub(crate) flags: u64,
    pub(crate) tensor: DlTensor,
}

/// The functions of a type of arrays.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) version: Version,
    pub(crate) previous: *const Exchange,
    allocate: *const c_void,
    export: *const c_void,
    /// Makes an object of the type, which owns the tensor.
    pub(crate) import: Option<unsafe extern "C" fn(*mut Managed, *mut *mut c_void) -> c_int>,
    /// Describes an object of the type while it lives.
    pub(crate) borrow: Option<unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int>,
    stream: *const c_void,
}
