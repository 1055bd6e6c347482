//! Results as arrays of the library that the inputs came from: the memory is handed over, not copied.

use crate::array::{AXES, Array, data_type, is_numpy};
use crate::dlpack::{self, Device, DlTensor, Managed};
use foveal::{DType, Element, Tensor};
use pyo3::exceptions::PyBufferError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use std::any::Any;
use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicPtr, Ordering};

/// Numbers and extents of a result.
#[derive(Debug)]
pub(crate) struct Output {
    dtype: DType,
    /// A vector of the type.
    numbers: Box<dyn Any + Send>,
    data: *mut c_void,
    axes: usize,
    shape: [i64; AXES],
    /// Whether the second and third axes are given in each other's place.
    by_heads: bool,
}

// SAFETY: the pointer is into the vector, which is owned.
unsafe impl Send for Output {}

impl Output {
    /// Numbers of an array with these extents.
    pub(crate) fn new<E: Element>(mut numbers: Vec<E>, extents: &[usize]) -> Output {
        assert_eq!(extents.iter().product::<usize>(), numbers.len());
        let mut shape = [1; AXES];
        for (to, &extent) in shape.iter_mut().zip(extents) {
            *to = extent as i64;
        }
        let data = numbers.as_mut_ptr().cast();
        let (numbers, axes) = (Box::new(numbers), extents.len());
        Output { dtype: E::DTYPE, numbers, data, axes, shape, by_heads: false }
    }

    /// The same numbers as an array `[batch, heads, seq, dim]`.
    pub(crate) fn by_heads(self) -> Output {
        Output { by_heads: self.axes == AXES, ..self }
    }

    /// `[batch, seq, heads, dim]`.
    pub(crate) fn tensor<E: Element>(tensor: Tensor<E>) -> Output {
        let shape = tensor.shape();
        Output::new(tensor.into_vec(), &[shape.batch, shape.seq, shape.heads, shape.dim])
    }

    /// `[batch, seq, heads]` of one number for each row.
    pub(crate) fn per_row(tensor: Tensor<f32>) -> Output {
        let shape = tensor.shape();
        Output::new(tensor.into_vec(), &[shape.batch, shape.seq, shape.heads])
    }

    /// `[seq, heads, dim]` of a batch of one.
    pub(crate) fn unbatched<E: Element>(tensor: Tensor<E>) -> Output {
        let shape = tensor.shape();
        Output::new(tensor.into_vec(), &[shape.seq, shape.heads, shape.dim])
    }

    /// Sums rounded to a storage type.
    pub(crate) fn rounded<E: Element>(tensor: Tensor<f32>) -> Output {
        if E::DTYPE == DType::F32 {
            return Output::tensor(tensor);
        }
        let shape = tensor.shape();
        let rounded: Vec<E> = tensor.as_slice().iter().map(|&x| E::from_f32(x)).collect();
        Output::new(rounded, &[shape.batch, shape.seq, shape.heads, shape.dim])
    }

    /// An array of the kind of `like`.
    pub(crate) fn into_array<'py>(self, like: &Array<'py>) -> PyResult<Bound<'py, PyAny>> {
        let py = like.object().py();
        let managed = self.into_managed();
        // SAFETY: the struct is static.
        let import = like.exchange().and_then(|exchange| unsafe { exchange.as_ref().import });
        if let Some(import) = import {
            let mut object = null_mut::<c_void>();
            // SAFETY: the type's function takes the tensor and writes an object that we own.
            return unsafe {
                if import(managed.as_ptr(), &raw mut object) != 0 {
                    return Err(PyErr::fetch(py));
                }
                Bound::from_owned_ptr_or_err(py, object.cast())
            };
        }
        let buffer = Bound::new(py, Buffer { managed: AtomicPtr::new(managed.as_ptr()) })?;
        importer(like.object())?.call1((buffer,))
    }

    fn into_managed(self) -> NonNull<Managed> {
        let mut held =
            Box::new(Held { shape: self.shape, strides: [1; AXES], numbers: self.numbers });
        for axis in (1..self.axes).rev() {
            held.strides[axis - 1] = held.strides[axis] * held.shape[axis].max(1);
        }
        if self.by_heads {
            held.shape.swap(1, 2);
            held.strides.swap(1, 2);
        }
        let held = Box::into_raw(held);
        // SAFETY: the box has just been made, and stays where it is until it is freed.
        let (shape, strides) = unsafe { (&raw mut (*held).shape, &raw mut (*held).strides) };
        let tensor = DlTensor {
            data: self.data,
            device: Device { kind: dlpack::CPU, id: 0 },
            ndim: self.axes as i32,
            dtype: data_type(self.dtype),
            shape: shape.cast(),
            strides: strides.cast(),
            byte_offset: 0,
        };
        let managed = Managed {
            version: dlpack::VERSION,
            context: held.cast(),
            deleter: Some(free),
            flags: 0,
            tensor,
        };
        NonNull::from(Box::leak(Box::new(managed)))
    }
}

/// The function that makes an array of an exported tensor: PyTorch's for its tensors, NumPy's for everything else.
fn importer<'py>(like: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    static NUMPY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = like.py();
    let name = intern!(py, "from_dlpack");
    if !is_numpy(like) && like.get_type().module()?.to_string().starts_with("torch") {
        return py.import(intern!(py, "torch"))?.getattr(name);
    }
    let numpy = NUMPY.get_or_try_init(py, || -> PyResult<Py<PyAny>> {
        Ok(py.import(intern!(py, "numpy"))?.getattr(name)?.unbind())
    })?;
    Ok(numpy.bind(py).clone())
}

/// What the pointers of an exported tensor point to.
struct Held {
    shape: [i64; AXES],
    strides: [i64; AXES],
    #[expect(dead_code, reason = "dropped with the rest")]
    numbers: Box<dyn Any + Send>,
}

/// # Safety
/// `managed` was made by `into_managed`, and is freed once.
unsafe extern "C" fn free(managed: *mut Managed) {
    // SAFETY: the caller's promise: both were boxes.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.context.cast::<Held>()));
    }
}

/// A result on its way to a library that imports DLPack.
#[pyclass(frozen, module = "foveal._native")]
#[derive(Debug)]
pub(crate) struct Buffer {
    managed: AtomicPtr<Managed>,
}

#[pymethods]
impl Buffer {
    /// The capsule, once.
    #[pyo3(signature = (**_options))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        _options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let managed = self.managed.swap(null_mut(), Ordering::AcqRel);
        if managed.is_null() {
            return Err(PyBufferError::new_err("the memory has been handed over already"));
        }
        let (name, free) = (dlpack::VERSIONED.as_ptr(), Some(free_capsule as _));
        // SAFETY: the capsule frees what it holds unless somebody takes it.
        unsafe {
            Bound::from_owned_ptr_or_err(py, pyo3::ffi::PyCapsule_New(managed.cast(), name, free))
        }
    }

    /// The processor.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (dlpack::CPU, 0)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let managed = self.managed.swap(null_mut(), Ordering::AcqRel);
        if !managed.is_null() {
            // SAFETY: nobody has taken it.
            unsafe { free(managed) };
        }
    }
}

/// # Safety
/// The interpreter's: `capsule` is one of [`Buffer`]'s.
unsafe extern "C" fn free_capsule(capsule: *mut pyo3::ffi::PyObject) {
    // SAFETY: a capsule that still has its first name holds what nobody has taken.
    unsafe {
        if pyo3::ffi::PyCapsule_IsValid(capsule, dlpack::VERSIONED.as_ptr()) != 0 {
            let managed = pyo3::ffi::PyCapsule_GetPointer(capsule, dlpack::VERSIONED.as_ptr());
            free(managed.cast());
        }
    }
}
