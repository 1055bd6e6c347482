//! What pointers of the caller may become: views whose memory has been checked as far as numbers can tell.
//!
//! ```text
//! bytes = size · (1 + Σ_axis (extent − 1) · stride + (dim − 1))        writes ∩ (reads ∪ other writes) = ∅
//! ```

use crate::error::{Error, Result};
use crate::types::*;
use foveal::{DType, Element, Shape, Strides, TensorMut, TensorRef};
use std::ffi::c_void;
use std::mem::{align_of, size_of};
use std::slice::{from_raw_parts, from_raw_parts_mut};

/// Elements behind a pointer: not NULL, aligned, and within the address space, unless there are none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    what: &'static str,
    data: *mut c_void,
    /// Elements.
    len: usize,
    /// Bytes.
    bytes: usize,
}

impl Span {
    /// `len` elements of `size` bytes, which are aligned to their size.
    pub(crate) fn new(
        what: &'static str,
        data: *const c_void,
        len: usize,
        size: usize,
    ) -> Result<Span> {
        let overflow = Error::Span { what, len };
        let bytes = len.checked_mul(size).filter(|&bytes| bytes <= isize::MAX as usize);
        let bytes = bytes.ok_or(overflow)?;
        if len > 0 {
            if data.is_null() {
                return Err(Error::Null { what, expected: format!("{len} elements") });
            }
            if !data.addr().is_multiple_of(size) {
                return Err(Error::Misaligned { what, address: data.addr(), alignment: size });
            }
            data.addr().checked_add(bytes).ok_or(Error::Span { what, len })?;
        }
        Ok(Span { what, data: data.cast_mut(), len, bytes })
    }

    /// # Safety
    /// The caller of the C function vouches for `len` readable elements of `T`, of the size and alignment that the
    /// span was made for, which nobody writes during `'a`.
    pub(crate) unsafe fn read<'a, T>(&self) -> &'a [T] {
        debug_assert!(self.len * size_of::<T>() == self.bytes);
        if self.len == 0 {
            return &[];
        }
        // SAFETY: not NULL, aligned, and of a length in bytes that fits isize; the rest is the caller's promise.
        unsafe { from_raw_parts(self.data.cast::<T>(), self.len) }
    }

    /// # Safety
    /// That of [`Span::read`], and nobody else reads or writes the elements during `'a`.
    pub(crate) unsafe fn write<'a, T>(&self) -> &'a mut [T] {
        debug_assert!(self.len * size_of::<T>() == self.bytes);
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as in `read`.
        unsafe { from_raw_parts_mut(self.data.cast::<T>(), self.len) }
    }

    fn shares_with(&self, other: &Span) -> bool {
        let (a, b) = (self.data.addr(), other.data.addr());
        self.bytes > 0 && other.bytes > 0 && a < b + other.bytes && b < a + self.bytes
    }
}

/// A tensor whose span has been checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    span: Span,
    pub(crate) dtype: DType,
    pub(crate) shape: Shape,
    strides: Strides,
}

impl View {
    pub(crate) fn new(what: &'static str, tensor: &foveal_tensor) -> Result<View> {
        let dtype = match tensor.dtype {
            FOVEAL_F32 => DType::F32,
            FOVEAL_F16 => DType::F16,
            FOVEAL_BF16 => DType::Bf16,
            got => {
                let expected = "FOVEAL_F32 (0), FOVEAL_F16 (1) or FOVEAL_BF16 (2) as the dtype";
                return Err(Error::Unknown { what, got, expected });
            }
        };
        let [batch, seq, heads, dim] = tensor.shape;
        let shape = Shape { batch, seq, heads, dim };
        let [batch, seq, heads] = tensor.strides;
        let strides = Strides { batch, seq, heads };
        let overflow = foveal::Error::ShapeOverflow { what, shape };
        let len = strides.checked_span(shape).ok_or(overflow)?;
        let span = Span::new(what, tensor.data, len, dtype.size())?;
        Ok(View { span, dtype, shape, strides })
    }

    fn stored_as(self, expected: DType) -> Result<View> {
        let (what, got) = (self.span.what, self.dtype);
        if got == expected { Ok(self) } else { Err(Error::Dtype { what, expected, got }) }
    }

    /// # Safety
    /// That of [`Span::read`]; `E` is the view's type.
    pub(crate) unsafe fn read<'a, E: Element>(&self) -> Result<TensorRef<'a, E>> {
        debug_assert!(E::DTYPE == self.dtype);
        // SAFETY: the caller's promise is the callee's.
        let data = unsafe { self.span.read() };
        Ok(TensorRef::from_strides(data, self.shape, self.strides)?)
    }

    /// # Safety
    /// That of [`Span::write`]; `E` is the view's type.
    pub(crate) unsafe fn write<'a, E: Element>(&self) -> Result<TensorMut<'a, E>> {
        debug_assert!(E::DTYPE == self.dtype);
        // SAFETY: the caller's promise is the callee's.
        let data = unsafe { self.span.write() };
        Ok(TensorMut::from_strides(data, self.shape, self.strides)?)
    }
}

/// All memory that a call reads and writes.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    reads: Vec<Span>,
    writes: Vec<Span>,
}

impl Memory {
    /// A tensor of any type that is read.
    pub(crate) fn read_any(&mut self, what: &'static str, tensor: &foveal_tensor) -> Result<View> {
        let view = View::new(what, tensor)?;
        self.reads.push(view.span);
        Ok(view)
    }

    /// A tensor of this type that is read.
    pub(crate) fn read(
        &mut self,
        what: &'static str,
        tensor: &foveal_tensor,
        stored_as: DType,
    ) -> Result<View> {
        self.read_any(what, tensor)?.stored_as(stored_as)
    }

    /// A tensor of this type that is written.
    pub(crate) fn write(
        &mut self,
        what: &'static str,
        tensor: &foveal_tensor,
        stored_as: DType,
    ) -> Result<View> {
        let view = View::new(what, tensor)?.stored_as(stored_as)?;
        self.writes.push(view.span);
        Ok(view)
    }

    /// An `f32` tensor that is read, unless it is absent: NULL without extents.
    pub(crate) fn read_optional(
        &mut self,
        what: &'static str,
        tensor: &foveal_tensor,
    ) -> Result<Option<View>> {
        let given = (!tensor.is_absent()).then(|| self.read(what, tensor, DType::F32));
        given.transpose()
    }

    /// An `f32` tensor that is written, unless it is absent.
    pub(crate) fn write_optional(
        &mut self,
        what: &'static str,
        tensor: &foveal_tensor,
    ) -> Result<Option<View>> {
        let given = (!tensor.is_absent()).then(|| self.write(what, tensor, DType::F32));
        given.transpose()
    }

    /// Numbers that are read; `None` where both members are zero.
    pub(crate) fn floats(
        &mut self,
        what: &'static str,
        floats: foveal_floats,
    ) -> Result<Option<Span>> {
        if floats.data.is_null() && floats.len == 0 {
            return Ok(None);
        }
        let span = Span::new(what, floats.data.cast(), floats.len, size_of::<f32>())?;
        self.reads.push(span);
        Ok(Some(span))
    }

    /// Numbers that are written; `None` where both members are zero.
    pub(crate) fn floats_out(
        &mut self,
        what: &'static str,
        floats: foveal_floats_out,
    ) -> Result<Option<Span>> {
        if floats.data.is_null() && floats.len == 0 {
            return Ok(None);
        }
        let span = Span::new(what, floats.data.cast(), floats.len, size_of::<f32>())?;
        self.writes.push(span);
        Ok(Some(span))
    }

    /// Refuses a write to what something else reads or writes.
    pub(crate) fn check(&self) -> Result<()> {
        for (n, write) in self.writes.iter().enumerate() {
            let mut others = self.reads.iter().chain(&self.writes[..n]);
            if let Some(other) = others.find(|other| write.shares_with(other)) {
                return Err(Error::Shared { what: write.what, other: other.what });
            }
        }
        Ok(())
    }
}

/// The struct behind a pointer.
///
/// # Safety
/// The caller of the C function vouches for a readable `T` if the pointer is not NULL.
pub(crate) unsafe fn given<T: Copy>(what: &'static str, pointer: *const T) -> Result<T> {
    if pointer.is_null() {
        return Err(Error::Null { what, expected: "a struct".to_owned() });
    }
    if !pointer.is_aligned() {
        let (address, alignment) = (pointer.addr(), align_of::<T>());
        return Err(Error::Misaligned { what, address, alignment });
    }
    // SAFETY: not NULL and aligned; the caller vouches for the rest.
    Ok(unsafe { pointer.read() })
}
