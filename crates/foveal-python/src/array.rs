//! Arrays of other libraries as views: what numbers can tell of their memory is checked, nothing is copied.

use crate::dlpack::{self, DataType, DlTensor, Exchange, Managed};
use crate::error::{Error, Result};
use foveal::{DType, Element, Shape, Strides, TensorMut, TensorRef};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyCapsule, PyDict};
use std::marker::PhantomData;
use std::ptr::{NonNull, null_mut};

/// The most axes of an array.
pub(crate) const AXES: usize = 4;

/// An array, kept alive, and what it says of its memory.
#[derive(Debug)]
pub(crate) struct Array<'py> {
    object: Bound<'py, PyAny>,
    /// What has to be told that the array is no longer needed.
    managed: Option<NonNull<Managed>>,
    exchange: Option<NonNull<Exchange>>,
    tensor: Memory,
    read_only: bool,
}

/// A description that points to nothing but the numbers.
#[derive(Debug, Clone, Copy)]
struct Memory {
    data: *mut u8,
    dtype: DataType,
    axes: usize,
    shape: [usize; AXES],
    strides: [i64; AXES],
}

/// Truth values on four axes: rows of bytes.
#[derive(Debug)]
pub(crate) struct Truths<'a> {
    data: *const u8,
    pub(crate) shape: [usize; AXES],
    strides: [i64; AXES],
    array: PhantomData<&'a [u8]>,
}

impl<'a> Truths<'a> {
    /// A row along the last axis.
    pub(crate) fn row(&self, at: [usize; 3]) -> &'a [u8] {
        assert!(at.iter().zip(&self.shape).all(|(at, extent)| at < extent));
        let first: i64 = at.iter().zip(&self.strides).map(|(&at, stride)| at as i64 * stride).sum();
        // SAFETY: as in `View::arranged`; indices are within the extents.
        unsafe { std::slice::from_raw_parts(self.data.add(first as usize), self.shape[3]) }
    }
}

impl<'py> Array<'py> {
    /// Any array on the processor.
    pub(crate) fn new(what: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Array<'py>> {
        let exchange = exchange(object);
        let borrow = exchange.and_then(|exchange| {
            // SAFETY: the capsule's pointer is that of a static struct of version 1.
            unsafe { exchange.as_ref().borrow }
        });
        if let Some(borrow) = borrow {
            let mut tensor = empty();
            // SAFETY: the object is of the type whose function this is; `tensor` is written.
            if unsafe { borrow(object.as_ptr().cast(), &raw mut tensor) } != 0 {
                return Err(PyErr::fetch(object.py()));
            }
            // SAFETY: what was written describes the object, which is alive.
            let tensor = unsafe { Memory::new(what, &tensor)? };
            let object = object.clone();
            return Ok(Array { object, managed: None, exchange, tensor, read_only: false });
        }
        Array::exported(what, object)
    }

    /// An array that exports itself in a capsule.
    fn exported(what: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Array<'py>> {
        let py = object.py();
        let no_array = |_| {
            let kind = object.get_type().name().map(|name| name.to_string()).unwrap_or_default();
            PyTypeError::new_err(format!(
                "{what}: expected a NumPy array, a PyTorch tensor or another array with __dlpack__, got {kind}"
            ))
        };
        let export = object.getattr(intern!(py, "__dlpack__")).map_err(no_array)?;
        static VERSION: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
        let version = VERSION.get_or_try_init(py, || -> PyResult<Py<PyDict>> {
            Ok([(intern!(py, "max_version"), (1, 0))].into_py_dict(py)?.unbind())
        })?;
        let capsule = export.call((), Some(version.bind(py)))?;
        let capsule = capsule.cast_into::<PyCapsule>().map_err(PyErr::from)?;
        let pointer = capsule.pointer_checked(Some(dlpack::VERSIONED)).map_err(|_| {
            let text =
                "an array that exports DLPack 1.0 (NumPy 2.1 or newer, PyTorch 2.7 or newer)";
            PyValueError::new_err(format!("{what}: expected {text}"))
        })?;
        let managed = pointer.cast::<Managed>();
        // SAFETY: the name says what the pointer points to; it is ours from here on, since nobody takes a used capsule.
        unsafe { pyo3::ffi::PyCapsule_SetName(capsule.as_ptr(), dlpack::USED.as_ptr()) };
        // SAFETY: as above.
        let (tensor, flags) = unsafe { (&managed.as_ref().tensor, managed.as_ref().flags) };
        let mut array = Array {
            object: object.clone(),
            managed: Some(managed),
            exchange: None,
            tensor: Memory::none(),
            read_only: flags & dlpack::READ_ONLY != 0,
        };
        // SAFETY: as above; the array frees it, should it be refused here.
        array.tensor = unsafe { Memory::new(what, tensor)? };
        Ok(array)
    }

    /// The object itself.
    pub(crate) fn object(&self) -> &Bound<'py, PyAny> {
        &self.object
    }

    /// The functions of its type.
    pub(crate) fn exchange(&self) -> Option<NonNull<Exchange>> {
        self.exchange
    }

    /// The view of it.
    pub(crate) fn view(&self, what: &'static str) -> View<'_> {
        View { what, memory: self.tensor, array: PhantomData }
    }

    /// Refuses what must not be written.
    pub(crate) fn writable(&self, what: &'static str) -> Result<()> {
        if self.read_only { Err(Error::ReadOnly { what }) } else { Ok(()) }
    }
}

impl Drop for Array<'_> {
    fn drop(&mut self) {
        if let Some(managed) = self.managed {
            // SAFETY: a capsule that was taken is freed once, by who took it.
            unsafe {
                if let Some(deleter) = managed.as_ref().deleter {
                    deleter(managed.as_ptr());
                }
            }
        }
    }
}

/// NumPy's type of arrays, which has no exchange API: asking for one costs more than a call.
pub(crate) fn is_numpy(object: &Bound<'_, PyAny>) -> bool {
    static ARRAY: PyOnceLock<Option<Py<PyAny>>> = PyOnceLock::new();
    let py = object.py();
    let array = ARRAY.get_or_init(py, || {
        let numpy = py.import(intern!(py, "numpy")).ok()?;
        Some(numpy.getattr(intern!(py, "ndarray")).ok()?.unbind())
    });
    array.as_ref().is_some_and(|array| object.get_type().is(array.bind(py)))
}

/// The exchange API of an object's type, of the version that is understood. That of the first type that has one is
/// remembered.
fn exchange(object: &Bound<'_, PyAny>) -> Option<NonNull<Exchange>> {
    static FIRST: PyOnceLock<(Py<PyAny>, Found)> = PyOnceLock::new();
    if is_numpy(object) {
        return None;
    }
    let (py, own) = (object.py(), object.get_type());
    if let Some((_, found)) = FIRST.get(py).filter(|(first, _)| own.is(first.bind(py))) {
        return Some(found.0);
    }
    let found = exchange_of(object)?;
    // Another thread may have been first with another type.
    let _ = FIRST.set(py, (own.into_any().unbind(), Found(found)));
    Some(found)
}

/// A static struct of functions.
struct Found(NonNull<Exchange>);

// SAFETY: the struct is static and never changes.
unsafe impl Send for Found {}
// SAFETY: as above.
unsafe impl Sync for Found {}

fn exchange_of(object: &Bound<'_, PyAny>) -> Option<NonNull<Exchange>> {
    let name = intern!(object.py(), "__dlpack_c_exchange_api__");
    let capsule = object.get_type().getattr_opt(name).ok()??.cast_into::<PyCapsule>().ok()?;
    let pointer = capsule.pointer_checked(Some(dlpack::EXCHANGE)).ok()?;
    let mut exchange = Some(pointer.cast::<Exchange>());
    while let Some(own) = exchange {
        // SAFETY: the name says what the pointer points to; the struct is static and begins with its version.
        let own_ref = unsafe { own.as_ref() };
        if own_ref.version.major == dlpack::VERSION.major {
            return Some(own);
        }
        exchange = NonNull::new(own_ref.previous.cast_mut());
    }
    None
}

fn empty() -> DlTensor {
    let device = dlpack::Device { kind: 0, id: 0 };
    DlTensor {
        data: null_mut(),
        device,
        ndim: 0,
        dtype: DataType::F32,
        shape: null_mut(),
        strides: null_mut(),
        byte_offset: 0,
    }
}

impl Memory {
    fn none() -> Memory {
        let (shape, strides) = ([0; AXES], [0; AXES]);
        Memory { data: null_mut(), dtype: DataType::F32, axes: 1, shape, strides }
    }

    /// # Safety
    /// `tensor` is what a living array says of itself.
    unsafe fn new(what: &'static str, tensor: &DlTensor) -> PyResult<Memory> {
        if tensor.device.kind != dlpack::CPU {
            let kind = tensor.device.kind;
            return Err(PyValueError::new_err(format!(
                "{what}: expected an array in the memory of the CPU, got one of device type {kind}; move it with .cpu()"
            )));
        }
        let axes = usize::try_from(tensor.ndim).unwrap_or(usize::MAX);
        if axes > AXES {
            return Err(Error::TooManyAxes { what, got: tensor.ndim }.into());
        }
        let mut memory = Memory { dtype: tensor.dtype, axes, ..Memory::none() };
        let mut dense = 1i64;
        for axis in (0..axes).rev() {
            // SAFETY: `shape` has `ndim` numbers, and so have strides unless they are null.
            let (extent, stride) = unsafe {
                let stride = (!tensor.strides.is_null()).then(|| *tensor.strides.add(axis));
                (*tensor.shape.add(axis), stride)
            };
            memory.shape[axis] = usize::try_from(extent).unwrap_or(0);
            memory.strides[axis] = stride.unwrap_or(dense);
            dense = dense.saturating_mul(extent.max(1));
        }
        memory.data = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize);
        Ok(memory)
    }
}

/// A view of an array's numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    what: &'static str,
    memory: Memory,
    array: PhantomData<&'a ()>,
}

// SAFETY: a view points to numbers that its array keeps alive; whoever writes them from elsewhere meanwhile breaks the
// same contract as with NumPy's and PyTorch's own functions, which release the interpreter too.
unsafe impl Send for View<'_> {}
// SAFETY: as above; a view is read through, and written through by its only owner.
unsafe impl Sync for View<'_> {}

/// The name of a storage type among DLPack's.
pub(crate) fn data_type(dtype: DType) -> DataType {
    match dtype {
        DType::F16 => DataType::F16,
        DType::Bf16 => DataType::BF16,
        _ => DataType::F32,
    }
}

impl<'a> View<'a> {
    /// The extents.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.memory.shape[..self.memory.axes]
    }

    /// The same with the second and third of four axes in each other's place.
    pub(crate) fn by_heads(&self) -> View<'a> {
        let mut own = *self;
        if own.memory.axes == AXES {
            own.memory.shape.swap(1, 2);
            own.memory.strides.swap(1, 2);
        }
        own
    }

    /// The storage type, one of the three that kernels take.
    pub(crate) fn dtype(&self) -> Result<DType> {
        match self.memory.dtype {
            DataType::F32 => Ok(DType::F32),
            DataType::F16 => Ok(DType::F16),
            DataType::BF16 => Ok(DType::Bf16),
            got => {
                let expected = "float32, float16 or bfloat16".to_owned();
                Err(Error::Dtype { what: self.what, expected, got })
            }
        }
    }

    /// A tensor `[batch, seq, heads, dim]` of its four axes.
    pub(crate) fn tensor<E: Element>(&self) -> Result<TensorRef<'a, E>> {
        self.arranged([0, 1, 2, 3], "[batch, seq, heads, dim]")
    }

    /// A tensor of an array `[batch, heads, queries, keys]`.
    pub(crate) fn scores(&self) -> Result<TensorRef<'a, f32>> {
        self.arranged([0, 2, 1, 3], "[batch, heads, queries, keys]")
    }

    /// A tensor with one number for each row, of an array `[batch, seq, heads]`.
    pub(crate) fn per_row(&self) -> Result<TensorRef<'a, f32>> {
        self.axes(3, "[batch, seq, heads]")?;
        let mut own = *self;
        (own.memory.axes, own.memory.shape[3], own.memory.strides[3]) = (4, 1, 1);
        own.tensor()
    }

    /// A tensor of an array `[seq, heads, dim]`.
    pub(crate) fn unbatched<E: Element>(&self) -> Result<TensorRef<'a, E>> {
        self.axes(3, "[seq, heads, dim]")?;
        let mut own = *self;
        let Memory { shape: [seq, heads, dim, _], strides: [s, h, d, _], .. } = self.memory;
        (own.memory.axes, own.memory.shape, own.memory.strides) =
            (4, [1, seq, heads, dim], [0, s, h, d]);
        own.tensor()
    }

    /// A tensor of one head, of an array `[batch, seq, dim]`.
    pub(crate) fn shared_rows<E: Element>(&self) -> Result<TensorRef<'a, E>> {
        self.axes(3, "[batch, seq, dim]")?;
        let mut own = *self;
        let Memory { shape: [batch, seq, dim, _], strides: [b, s, d, _], .. } = self.memory;
        (own.memory.axes, own.memory.shape, own.memory.strides) =
            (4, [batch, seq, 1, dim], [b, s, 0, d]);
        own.tensor()
    }

    /// The heads of even numbers, and those of odd ones.
    pub(crate) fn alternating<E: Element>(&self) -> Result<[TensorRef<'a, E>; 2]> {
        self.axes(4, "[batch, seq, heads, dim]")?;
        let heads = self.memory.shape[2];
        if !heads.is_multiple_of(2) {
            let (expected, got) = ("an even number of heads, two for each map", heads.to_string());
            return Err(Error::Option { what: self.what, expected, got });
        }
        let mut own = *self;
        own.memory.shape[2] = heads / 2;
        own.memory.strides[2] = self.memory.strides[2].saturating_mul(2);
        let mut other = own;
        let step = self.memory.strides[2] as isize * E::DTYPE.size() as isize;
        if heads > 0 {
            other.memory.data = own.memory.data.wrapping_offset(step);
        }
        Ok([own.tensor()?, other.tensor()?])
    }

    fn arranged<E: Element>(
        &self,
        order: [usize; 4],
        meaning: &'static str,
    ) -> Result<TensorRef<'a, E>> {
        self.axes(4, meaning)?;
        let (shape, strides) = self.layout(order)?;
        let len = self.span::<E>(shape, strides)?;
        if len == 0 {
            return Ok(TensorRef::from_strides(&[], shape, strides)?);
        }
        // SAFETY: the type is the array's, the address is aligned, and the array vouches for the elements that its
        // extents and strides, none of which is negative, reach.
        let data = unsafe { std::slice::from_raw_parts(self.memory.data.cast::<E>(), len) };
        Ok(TensorRef::from_strides(data, shape, strides)?)
    }

    /// The same to be written.
    ///
    /// # Safety
    /// Nobody else reads or writes the elements while it lives.
    pub(crate) unsafe fn tensor_mut<E: Element>(&self) -> Result<TensorMut<'a, E>> {
        self.axes(4, "[batch, seq, heads, dim]")?;
        let (shape, strides) = self.layout([0, 1, 2, 3])?;
        let len = self.span::<E>(shape, strides)?;
        if len == 0 {
            return Ok(TensorMut::from_strides(&mut [], shape, strides)?);
        }
        // SAFETY: as in `arranged`; the rest is the caller's promise.
        let data = unsafe { std::slice::from_raw_parts_mut(self.memory.data.cast::<E>(), len) };
        Ok(TensorMut::from_strides(data, shape, strides)?)
    }

    /// Numbers that lie one after the other, whatever the axes.
    pub(crate) fn floats(&self) -> Result<&'a [f32]> {
        self.typed(DataType::F32, DType::F32.size())?;
        let len = self.contiguous()?;
        if len == 0 {
            return Ok(&[]);
        }
        // SAFETY: as in `arranged`.
        Ok(unsafe { std::slice::from_raw_parts(self.memory.data.cast::<f32>(), len) })
    }

    /// Whole numbers that are not negative, copied; from int32 or int64.
    pub(crate) fn indices(&self) -> Result<Vec<usize>> {
        let size = match self.memory.dtype {
            DataType::I32 => 4,
            DataType::I64 => 8,
            got => {
                let expected = "int32 or int64".to_owned();
                return Err(Error::Dtype { what: self.what, expected, got });
            }
        };
        self.aligned(size)?;
        let number = |at: usize| {
            // SAFETY: as in `arranged`, for numbers that lie one after the other.
            let n = unsafe {
                match size {
                    4 => i64::from(*self.memory.data.cast::<i32>().add(at)),
                    _ => *self.memory.data.cast::<i64>().add(at),
                }
            };
            usize::try_from(n).map_err(|_| Error::Option {
                what: self.what,
                expected: "numbers that are not negative",
                got: n.to_string(),
            })
        };
        (0..self.contiguous()?).map(number).collect()
    }

    /// Truth values of an array that broadcasts to four axes.
    pub(crate) fn truths(&self) -> Result<Truths<'a>> {
        self.typed(DataType::BOOL, 1)?;
        let (mut shape, mut strides) = ([1; 4], [0i64; 4]);
        let skip = AXES - self.memory.axes;
        shape[skip..].copy_from_slice(self.shape());
        strides[skip..].copy_from_slice(&self.memory.strides[..self.memory.axes]);
        self.ordered(shape, strides)?;
        Ok(Truths { data: self.memory.data, shape, strides, array: PhantomData })
    }

    /// Bytes from the first to the last.
    pub(crate) fn shares_with(&self, other: &View<'_>) -> bool {
        let range = |view: &View<'_>| {
            let axes = view.shape().iter().zip(&view.memory.strides);
            let reach: i64 = axes.map(|(&n, &stride)| (n as i64 - 1).max(0) * stride).sum();
            let size = usize::from(view.memory.dtype.bits) / 8;
            let start = view.memory.data.addr();
            let empty = view.shape().contains(&0);
            start..if empty { start } else { start + (reach.max(0) as usize + 1) * size }
        };
        let (a, b) = (range(self), range(other));
        !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end
    }

    fn axes(&self, expected: usize, meaning: &'static str) -> Result<()> {
        let got = self.memory.axes;
        if got == expected {
            Ok(())
        } else {
            Err(Error::Axes { what: self.what, expected, meaning, got })
        }
    }

    /// Refuses strides that kernels do not take. Those of arrays without elements say nothing.
    fn ordered(&self, shape: [usize; 4], strides: [i64; 4]) -> Result<()> {
        if shape.contains(&0) {
            return Ok(());
        }
        let negative = shape.iter().zip(strides).find(|(n, stride)| **n > 1 && *stride < 0);
        if let Some((_, got)) = negative {
            return Err(Error::Backwards { what: self.what, got });
        }
        if shape[3] > 1 && strides[3] != 1 {
            return Err(Error::LastAxis { what: self.what, got: strides[3] });
        }
        Ok(())
    }

    fn layout(&self, order: [usize; 4]) -> Result<(Shape, Strides)> {
        let shape = order.map(|axis| self.memory.shape[axis]);
        let strides = order.map(|axis| self.memory.strides[axis]);
        self.ordered(shape, strides)?;
        // The stride of an axis of one element says nothing.
        let empty = shape.contains(&0);
        let stride =
            |axis: usize| if shape[axis] > 1 && !empty { strides[axis] as usize } else { 0 };
        let [batch, seq, heads, dim] = shape;
        let strides = Strides { batch: stride(0), seq: stride(1), heads: stride(2) };
        Ok((Shape { batch, seq, heads, dim }, strides))
    }

    /// Elements from the first to the last, of a checked type.
    fn span<E: Element>(&self, shape: Shape, strides: Strides) -> Result<usize> {
        self.typed(data_type(E::DTYPE), E::DTYPE.size())?;
        let overflow = foveal::Error::ShapeOverflow { what: self.what, shape };
        Ok(strides.checked_span(shape).ok_or(overflow)?)
    }

    fn typed(&self, expected: DataType, size: usize) -> Result<()> {
        let got = self.memory.dtype;
        if got != expected {
            return Err(Error::Dtype { what: self.what, expected: expected.name(), got });
        }
        self.aligned(size)
    }

    fn aligned(&self, size: usize) -> Result<()> {
        let empty = self.shape().contains(&0);
        if empty || self.memory.data.addr().is_multiple_of(size) {
            return Ok(());
        }
        Err(Error::Misaligned { what: self.what })
    }

    /// Elements of an array that lie one after the other.
    fn contiguous(&self) -> Result<usize> {
        let mut dense = 1;
        if self.shape().contains(&0) {
            return Ok(0);
        }
        for axis in (0..self.memory.axes).rev() {
            let n = self.memory.shape[axis];
            if n > 1 && self.memory.strides[axis] != dense as i64 {
                return Err(Error::Contiguous { what: self.what });
            }
            dense *= n;
        }
        Ok(dense)
    }
}
