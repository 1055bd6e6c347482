//! Four-dimensional views with named axes.
//!
//! Every public signature orders axes `[batch, seq, heads, dim]`. The last axis is contiguous;
//! the other three may have any strides, zero included for inputs, so that views of other
//! libraries' tensors fit without a copy.

use crate::element::{DType, Element};
use crate::error::{Error, Result};
use std::marker::PhantomData;
use std::ops::Range;

mod part;
mod spans;

pub(crate) use spans::Spans;

/// The extents of a tensor, by name, so that axes can't be swapped in silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Independent sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Heads: query heads for queries and outputs, key/value heads for keys and values.
    pub heads: usize,
    /// Numbers of one head's vector.
    pub dim: usize,
}

impl Shape {
    /// The number of elements, or `None` if it overflows.
    pub fn checked_len(&self) -> Option<usize> {
        self.batch.checked_mul(self.seq)?.checked_mul(self.heads)?.checked_mul(self.dim)
    }

    /// The shape of one number per row (`dim` = 1): that of a log-sum-exp.
    pub fn per_row(self) -> Shape {
        Shape { dim: 1, ..self }
    }

    fn is_empty(&self) -> bool {
        self.batch == 0 || self.seq == 0 || self.heads == 0 || self.dim == 0
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "[batch {}, seq {}, heads {}, dim {}]",
            self.batch, self.seq, self.heads, self.dim
        )
    }
}

/// Elements between neighbours along each of the first three axes; the last axis is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Strides {
    /// From one sequence to the next.
    pub batch: usize,
    /// From one token to the next.
    pub seq: usize,
    /// From one head to the next.
    pub heads: usize,
}

impl Strides {
    /// The strides of a dense row-major tensor, or `None` if its size overflows.
    pub fn contiguous(shape: Shape) -> Option<Strides> {
        shape.checked_len()?;
        let seq = shape.heads.checked_mul(shape.dim)?;
        Some(Strides { batch: shape.seq.checked_mul(seq)?, seq, heads: shape.dim })
    }

    fn offset(&self, b: usize, s: usize, h: usize) -> usize {
        b * self.batch + s * self.seq + h * self.heads
    }

    /// Elements that a buffer must hold: the last one's offset plus one. `None` if that is beyond `isize::MAX`.
    pub fn checked_span(&self, shape: Shape) -> Option<usize> {
        if shape.is_empty() {
            return Some(0);
        }
        let along = |extent: usize, stride: usize| (extent - 1).checked_mul(stride);
        along(shape.batch, self.batch)?
            .checked_add(along(shape.seq, self.seq)?)?
            .checked_add(along(shape.heads, self.heads)?)?
            .checked_add(shape.dim)
            .filter(|&n| n <= isize::MAX as usize)
    }

    fn required(&self, shape: Shape, what: &'static str) -> Result<usize> {
        self.checked_span(shape).ok_or(Error::ShapeOverflow { what, shape })
    }

    /// Whether rows are certainly disjoint: sorted by stride, each axis clears the ones below it.
    fn disjoint(&self, shape: Shape) -> bool {
        let mut axes =
            [(self.batch, shape.batch), (self.seq, shape.seq), (self.heads, shape.heads)];
        axes.sort_unstable();
        let mut reach = shape.dim;
        for (stride, extent) in axes.into_iter().filter(|axis| axis.1 > 1) {
            if stride < reach {
                return false;
            }
            reach += (extent - 1) * stride;
        }
        true
    }
}

/// A borrowed, read-only tensor `[batch, seq, heads, dim]`.
#[derive(Debug)]
pub struct TensorRef<'a, E> {
    data: &'a [E],
    shape: Shape,
    strides: Strides,
}

impl<E> Clone for TensorRef<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for TensorRef<'_, E> {}

impl<'a, E: Element> TensorRef<'a, E> {
    /// Views a dense row-major slice.
    ///
    /// # Errors
    /// [`Error::BufferLength`] unless `data` holds exactly the shape's elements.
    pub fn new(data: &'a [E], shape: Shape) -> Result<Self> {
        let strides = dense(data.len(), shape)?;
        Ok(TensorRef { data, shape, strides })
    }

    /// Views a slice with any strides; a stride of zero repeats.
    ///
    /// # Errors
    /// [`Error::BufferLength`] if the furthest element lies outside `data`.
    pub fn from_strides(data: &'a [E], shape: Shape, strides: Strides) -> Result<Self> {
        let expected = strides.required(shape, "tensor")?;
        if data.len() < expected {
            return Err(Error::BufferLength { what: "tensor", expected, got: data.len() });
        }
        Ok(TensorRef { data, shape, strides })
    }

    /// The extents.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// One head's vector of one token.
    ///
    /// # Panics
    /// If an index is outside the shape.
    pub fn row(&self, batch: usize, seq: usize, head: usize) -> &'a [E] {
        assert!(batch < self.shape.batch && seq < self.shape.seq && head < self.shape.heads);
        let at = self.strides.offset(batch, seq, head);
        &self.data[at..at + self.shape.dim]
    }

    /// A range of tokens of a tensor of one sequence.
    ///
    /// # Panics
    /// For another number of sequences, or tokens outside the shape.
    pub fn tokens(&self, tokens: Range<usize>) -> TensorRef<'a, E> {
        assert!(self.shape.batch == 1 && tokens.end <= self.shape.seq);
        let shape = Shape { seq: tokens.len(), ..self.shape };
        let at = if shape.is_empty() { 0 } else { tokens.start * self.strides.seq };
        TensorRef { data: &self.data[at..], shape, strides: self.strides }
    }

    /// A range of heads.
    pub(crate) fn heads(&self, heads: Range<usize>) -> TensorRef<'a, E> {
        assert!(heads.start <= heads.end && heads.end <= self.shape.heads);
        let shape = Shape { heads: heads.len(), ..self.shape };
        let at = if shape.is_empty() { 0 } else { heads.start * self.strides.heads };
        TensorRef { data: &self.data[at..], shape, strides: self.strides }
    }

    /// All tokens of one head as strided rows.
    pub(crate) fn head(&self, batch: usize, head: usize) -> Rows<'a, E> {
        assert!(batch < self.shape.batch && head < self.shape.heads);
        let Shape { seq: count, dim: width, .. } = self.shape;
        let data = if self.shape.is_empty() {
            &[]
        } else {
            let at = self.strides.offset(batch, 0, head);
            &self.data[at..at + (count - 1) * self.strides.seq + width]
        };
        Rows { data, stride: self.strides.seq, count, width }
    }
}

/// `count` rows of `width` elements each, `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a, E> {
    data: &'a [E],
    stride: usize,
    count: usize,
    width: usize,
}

impl<'a, E> Rows<'a, E> {
    /// Views rows of a slice.
    ///
    /// # Errors
    /// [`Error::BufferLength`] if the last row ends outside `data`.
    pub fn new(data: &'a [E], stride: usize, count: usize, width: usize) -> Result<Self> {
        let expected = match count {
            0 => 0,
            _ => (count - 1).saturating_mul(stride).saturating_add(width),
        };
        if data.len() < expected {
            return Err(Error::BufferLength { what: "rows", expected, got: data.len() });
        }
        Ok(Rows { data: &data[..expected], stride, count, width })
    }

    /// A row alone.
    pub(crate) fn single(data: &'a [E]) -> Self {
        Rows { data, stride: data.len(), count: 1, width: data.len() }
    }

    /// The rows of a range.
    ///
    /// # Panics
    /// If the range is not within the rows.
    pub fn slice(&self, rows: Range<usize>) -> Rows<'a, E> {
        assert!(rows.start <= rows.end && rows.end <= self.count);
        let Rows { stride, width, .. } = *self;
        let (count, at) = (rows.len(), rows.start * stride);
        let end =
            if count == 0 { at.min(self.data.len()) } else { at + (count - 1) * stride + width };
        Rows { data: &self.data[at.min(end)..end], stride, count, width }
    }

    /// The same rows, if they are stored as `f32`.
    pub(crate) fn as_f32(&self) -> Option<Rows<'a, f32>>
    where
        E: Element,
    {
        let Rows { data, stride, count, width } = *self;
        if E::DTYPE != DType::F32 {
            return None;
        }
        // SAFETY: of all storage types only `f32` itself has this name.
        let data = unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), data.len()) };
        Some(Rows { data, stride, count, width })
    }

    /// A range of each row's elements.
    ///
    /// # Panics
    /// If the range is not within the rows' width.
    pub(crate) fn columns(&self, columns: Range<usize>) -> Rows<'a, E> {
        assert!(columns.start <= columns.end && columns.end <= self.width);
        let end = self.data.len() - (self.width - columns.end).min(self.data.len());
        let data = &self.data[columns.start.min(end)..end];
        Rows { data, width: columns.len(), ..*self }
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, i: usize) -> &'a [E] {
        assert!(i < self.count);
        &self.data[i * self.stride..i * self.stride + self.width]
    }

    /// The number of rows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn as_ptr(&self) -> *const E {
        self.data.as_ptr()
    }

    /// From the first row's beginning to the last one's end.
    pub(crate) fn as_slice(&self) -> &'a [E] {
        self.data
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }
}

/// A borrowed, writable tensor `[batch, seq, heads, dim]` whose rows do not overlap.
#[derive(Debug)]
pub struct TensorMut<'a, E> {
    data: &'a mut [E],
    shape: Shape,
    strides: Strides,
}

impl<'a, E: Element> TensorMut<'a, E> {
    /// Views a dense row-major slice.
    ///
    /// # Errors
    /// [`Error::BufferLength`] unless `data` holds exactly the shape's elements.
    pub fn new(data: &'a mut [E], shape: Shape) -> Result<Self> {
        let strides = dense(data.len(), shape)?;
        Ok(TensorMut { data, shape, strides })
    }

    /// Views a slice with any strides under which rows are disjoint.
    ///
    /// # Errors
    /// [`Error::BufferLength`] if the furthest element lies outside `data`;
    /// [`Error::OverlappingOutput`] if rows may share elements.
    pub fn from_strides(data: &'a mut [E], shape: Shape, strides: Strides) -> Result<Self> {
        let expected = strides.required(shape, "output")?;
        if data.len() < expected {
            return Err(Error::BufferLength { what: "output", expected, got: data.len() });
        }
        if !shape.is_empty() && !strides.disjoint(shape) {
            return Err(Error::OverlappingOutput { shape });
        }
        Ok(TensorMut { data, shape, strides })
    }

    /// The extents.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// One head's vector of one token.
    ///
    /// # Panics
    /// If an index is outside the shape.
    pub fn row_mut(&mut self, batch: usize, seq: usize, head: usize) -> &mut [E] {
        assert!(batch < self.shape.batch && seq < self.shape.seq && head < self.shape.heads);
        let at = self.strides.offset(batch, seq, head);
        &mut self.data[at..at + self.shape.dim]
    }

    /// A shorter-lived view of the same tensor.
    pub fn reborrow(&mut self) -> TensorMut<'_, E> {
        TensorMut { data: self.data, shape: self.shape, strides: self.strides }
    }

    /// A range of heads.
    pub(crate) fn heads(&mut self, heads: Range<usize>) -> TensorMut<'_, E> {
        assert!(heads.start <= heads.end && heads.end <= self.shape.heads);
        let shape = Shape { heads: heads.len(), ..self.shape };
        let at = if shape.is_empty() { 0 } else { heads.start * self.strides.heads };
        TensorMut { data: &mut self.data[at..], shape, strides: self.strides }
    }

    /// A view that several threads write through, each its own rows.
    pub(crate) fn share(&mut self) -> SharedRows<'_, E> {
        self.reborrow().into_shared()
    }

    /// The tensor in pieces that share no row: for each span, `heads` neighbouring heads at a time. The
    /// number of heads is a multiple of `heads`.
    pub(crate) fn into_patches(self, spans: Spans<'a>, heads: usize) -> Patches<'a, E> {
        let Shape { batch, seq, .. } = self.shape;
        assert!(spans.batch == batch && spans.seq == seq);
        assert!(heads > 0 && self.shape.heads.is_multiple_of(heads));
        Patches { rows: self.into_shared(), spans, heads, next: 0 }
    }

    /// The view of [`TensorMut::share`] for as long as the buffer is lent.
    pub(crate) fn into_shared(self) -> SharedRows<'a, E> {
        SharedRows {
            data: self.data.as_mut_ptr(),
            shape: self.shape,
            strides: self.strides,
            lifetime: PhantomData,
        }
    }
}

/// Rows that threads write without locks: each row by one thread only.
#[derive(Debug)]
pub(crate) struct SharedRows<'a, E> {
    data: *mut E,
    shape: Shape,
    strides: Strides,
    lifetime: PhantomData<&'a mut [E]>,
}

// SAFETY: rows are disjoint (checked when the TensorMut was made) and `row`'s contract gives each
// of them to one user at a time.
unsafe impl<E: Send> Sync for SharedRows<'_, E> {}
// SAFETY: as above; the exclusive borrow lives as long as this view.
unsafe impl<E: Send> Send for SharedRows<'_, E> {}

impl<E> SharedRows<'_, E> {
    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// # Safety
    /// No other reference to this row is alive.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row(&self, batch: usize, seq: usize, head: usize) -> &mut [E] {
        assert!(batch < self.shape.batch && seq < self.shape.seq && head < self.shape.heads);
        let at = self.strides.offset(batch, seq, head);
        // SAFETY: the constructor checked that every row of the shape lies inside the buffer;
        // the caller promises that this row is not aliased.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), self.shape.dim) }
    }

    /// All rows of one head.
    ///
    /// # Safety
    /// No other reference to a row of this head is alive or made while the result is.
    pub(crate) unsafe fn head(&self, batch: usize, head: usize) -> HeadRows<'_, E> {
        HeadRows { rows: self, batch, head }
    }
}

/// The rows of one head, which belong to one thread.
#[derive(Debug)]
pub(crate) struct HeadRows<'a, E> {
    rows: &'a SharedRows<'a, E>,
    batch: usize,
    head: usize,
}

impl<E> HeadRows<'_, E> {
    /// One token's row.
    #[inline(always)]
    pub(crate) fn row(&mut self, seq: usize) -> &mut [E] {
        // SAFETY: whoever made this promised that the head's rows are its own.
        unsafe { self.rows.row(self.batch, seq, self.head) }
    }
}

/// The rows of neighbouring tokens and heads of one sequence, which belong to whoever has this.
#[derive(Debug)]
pub(crate) struct Patch<'a, E> {
    rows: SharedRows<'a, E>,
    batch: usize,
    tokens: Range<usize>,
    heads: Range<usize>,
}

impl<E> Patch<'_, E> {
    /// One row, both indices counted from the patch's beginning.
    #[inline(always)]
    pub(crate) fn row(&mut self, token: usize, head: usize) -> &mut [E] {
        assert!(token < self.tokens.len() && head < self.heads.len());
        // SAFETY: patches of a tensor share no row, and this one is borrowed exclusively.
        unsafe { self.rows.row(self.batch, self.tokens.start + token, self.heads.start + head) }
    }

    /// Elements from one token to the next.
    pub(crate) fn stride(&self) -> usize {
        self.rows.strides.seq
    }
}

/// The patches of a tensor: span by span, and in each heads in order.
#[derive(Debug)]
pub(crate) struct Patches<'a, E> {
    rows: SharedRows<'a, E>,
    spans: Spans<'a>,
    heads: usize,
    next: usize,
}

impl<'a, E> Iterator for Patches<'a, E> {
    type Item = Patch<'a, E>;

    fn next(&mut self) -> Option<Patch<'a, E>> {
        let groups = self.rows.shape.heads / self.heads;
        if self.next >= self.spans.count() * groups {
            return None;
        }
        let (batch, tokens) = self.spans.get(self.next / groups);
        let first = self.next % groups * self.heads;
        self.next += 1;
        let SharedRows { data, shape, strides, lifetime } = self.rows;
        // Spans share no token, and each pair of a span and a group of heads is handed out once.
        let rows = SharedRows { data, shape, strides, lifetime };
        Some(Patch { rows, batch, tokens, heads: first..first + self.heads })
    }
}

impl<E: Element> SharedRows<'_, E> {
    /// The same rows, if they are stored as `f32`.
    pub(crate) fn as_f32(&self) -> Option<SharedRows<'_, f32>> {
        let SharedRows { data, shape, strides, lifetime: _ } = *self;
        let data = data.cast();
        // Of all storage types only `f32` itself has this name.
        (E::DTYPE == DType::F32).then_some(SharedRows {
            data,
            shape,
            strides,
            lifetime: PhantomData,
        })
    }
}

/// An owned dense tensor `[batch, seq, heads, dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor<E> {
    data: Vec<E>,
    shape: Shape,
}

impl<E: Element> Tensor<E> {
    /// A tensor of zeros. Allocates.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if the shape's size overflows.
    pub fn zeros(shape: Shape) -> Result<Self> {
        let overflow = Error::ShapeOverflow { what: "tensor", shape };
        let len = shape.checked_len().filter(|&n| n <= isize::MAX as usize / 4).ok_or(overflow)?;
        Ok(Tensor { data: vec![E::default(); len], shape })
    }

    /// Takes a dense row-major vector.
    ///
    /// # Errors
    /// [`Error::BufferLength`] unless it holds exactly the shape's elements.
    pub fn from_vec(data: Vec<E>, shape: Shape) -> Result<Self> {
        dense(data.len(), shape)?;
        Ok(Tensor { data, shape })
    }

    /// The extents.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// A read-only view.
    pub fn view(&self) -> TensorRef<'_, E> {
        let strides = Strides::contiguous(self.shape).expect("checked when made");
        TensorRef { data: &self.data, shape: self.shape, strides }
    }

    /// A writable view.
    pub fn view_mut(&mut self) -> TensorMut<'_, E> {
        let strides = Strides::contiguous(self.shape).expect("checked when made");
        TensorMut { data: &mut self.data, shape: self.shape, strides }
    }

    /// The elements in row-major order.
    pub fn as_slice(&self) -> &[E] {
        &self.data
    }

    /// The elements in row-major order.
    pub fn into_vec(self) -> Vec<E> {
        self.data
    }
}

fn dense(got: usize, shape: Shape) -> Result<Strides> {
    let overflow = Error::ShapeOverflow { what: "tensor", shape };
    let strides = Strides::contiguous(shape).ok_or(overflow)?;
    let expected = shape.batch * shape.seq * shape.heads * shape.dim;
    if got != expected {
        return Err(Error::BufferLength { what: "tensor", expected, got });
    }
    Ok(strides)
}
