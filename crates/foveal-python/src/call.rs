//! Calls of mechanisms: arrays and options of Python in, the kernels without the interpreter, arrays out.

use crate::array::{Array, View};
use crate::error::{Error, Result};
use crate::output::Output;
use crate::state::{State, Stateful};
use foveal::{Cpu, DType, Element, Level, Scale, Tensor, TensorRef, Threads};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A mechanism with its options: what there is of it for any storage type of queries.
pub(crate) trait Mechanism: Send + Sync {
    /// What its arrays are called, in order; the first has the storage type of the call.
    const ARRAYS: &'static [&'static str];

    /// Its results: the output first.
    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>>;

    /// Gradients in the order of [`Mechanism::ARRAYS`], `None` for what has none; of what forward was given and gave, and
    /// the gradients of what it gave.
    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        results: &Given<'_>,
        d_results: &Given<'_>,
    ) -> Result<Vec<Option<Output>>>;
}

/// Views of the arrays of a call.
#[derive(Debug, Clone)]
pub(crate) struct Given<'a> {
    names: &'static [&'static str],
    views: Vec<Option<View<'a>>>,
}

/// Names of what forward gives, for messages.
const RESULTS: &[&str] = &["result 0", "result 1", "result 2", "result 3", "result 4", "result 5"];
/// Names of their gradients.
const GRADIENTS: &[&str] = &[
    "gradient of result 0",
    "gradient of result 1",
    "gradient of result 2",
    "gradient of result 3",
    "gradient of result 4",
    "gradient of result 5",
];

impl<'a> Given<'a> {
    /// An array that may be missing.
    pub(crate) fn optional(&self, n: usize) -> Option<&View<'a>> {
        self.views.get(n).and_then(Option::as_ref)
    }

    /// An array that must not.
    pub(crate) fn view(&self, n: usize) -> Result<&View<'a>> {
        self.optional(n)
            .ok_or(Error::Missing { what: self.names.get(n).copied().unwrap_or("result") })
    }

    /// `[batch, seq, heads, dim]`.
    pub(crate) fn tensor<E: Element>(&self, n: usize) -> Result<TensorRef<'a, E>> {
        self.view(n)?.tensor()
    }

    /// `[batch, seq, heads, dim]`, or nothing.
    pub(crate) fn maybe<E: Element>(&self, n: usize) -> Result<Option<TensorRef<'a, E>>> {
        self.optional(n).map(View::tensor).transpose()
    }

    /// Numbers that lie one after the other, or nothing.
    pub(crate) fn maybe_floats(&self, n: usize) -> Result<Option<&'a [f32]>> {
        self.optional(n).map(View::floats).transpose()
    }

    /// `[batch, seq, heads]`, or nothing.
    pub(crate) fn maybe_per_row(&self, n: usize) -> Result<Option<TensorRef<'a, f32>>> {
        self.optional(n).map(View::per_row).transpose()
    }

    /// The same, but for the layout of the first arrays: `[batch, heads, seq, dim]`.
    pub(crate) fn by_heads(&self, first: usize) -> Given<'a> {
        let mut own = self.clone();
        own.views.iter_mut().take(first).flatten().for_each(|view| *view = view.by_heads());
        own
    }

    /// Refuses the gradient of a result that mechanisms take none of.
    pub(crate) fn none(&self, n: usize, what: &'static str) -> Result<()> {
        self.optional(n).map_or(Ok(()), |_| Err(Error::NoBackward { what }))
    }
}

/// What is asked of a mechanism.
#[derive(Debug)]
pub(crate) struct Job<'py> {
    pub(crate) arrays: Bound<'py, PyTuple>,
    /// For gradients: what forward gave, and the gradients of it.
    pub(crate) backward: Option<(Bound<'py, PyTuple>, Bound<'py, PyTuple>)>,
    /// What is held of the sequence, if the call goes on with one.
    pub(crate) state: Option<Bound<'py, State>>,
}

impl<'py> Job<'py> {
    /// Runs it, or goes on with a state.
    pub(crate) fn go_on<M: Stateful>(&self, mechanism: &M) -> PyResult<Bound<'py, PyTuple>> {
        let Some(state) = &self.state else { return self.run(mechanism) };
        let arrays = collect(&self.arrays, M::ARRAYS)?;
        let given = views(&arrays, M::ARRAYS);
        let dtype = given.view(0)?.dtype()?;
        let mut held = state.get().lock()?;
        let held = &mut *held;
        let outputs = self.arrays.py().detach(|| match dtype {
            DType::F16 => held.step::<M, f16>(mechanism, &given),
            DType::Bf16 => held.step::<M, bf16>(mechanism, &given),
            _ => held.step::<M, f32>(mechanism, &given),
        })?;
        self.hand_over(&arrays, outputs.into_iter().map(Some))
    }

    /// Arrays like the first one given.
    fn hand_over(
        &self,
        arrays: &[Option<Array<'py>>],
        outputs: impl IntoIterator<Item = Option<Output>>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let like = arrays.first().and_then(Option::as_ref).ok_or(Error::Missing { what: "q" })?;
        let outputs = outputs
            .into_iter()
            .map(|output| output.map(|output| output.into_array(like)).transpose());
        PyTuple::new(self.arrays.py(), outputs.collect::<PyResult<Vec<_>>>()?)
    }

    /// Runs it.
    pub(crate) fn run<M: Mechanism>(&self, mechanism: &M) -> PyResult<Bound<'py, PyTuple>> {
        let py = self.arrays.py();
        let arrays = collect(&self.arrays, M::ARRAYS)?;
        let given = views(&arrays, M::ARRAYS);
        let dtype = given.view(0)?.dtype()?;
        let outputs = match &self.backward {
            None => {
                let run = || -> Result<Vec<Option<Output>>> {
                    let outputs = match dtype {
                        DType::F16 => mechanism.forward::<f16>(&given)?,
                        DType::Bf16 => mechanism.forward::<bf16>(&given)?,
                        _ => mechanism.forward::<f32>(&given)?,
                    };
                    Ok(outputs.into_iter().map(Some).collect())
                };
                py.detach(run)?
            }
            Some((results, d_results)) => {
                let (results, d_results) =
                    (collect(results, RESULTS)?, collect(d_results, GRADIENTS)?);
                let (results, d) = (views(&results, RESULTS), views(&d_results, GRADIENTS));
                py.detach(|| match dtype {
                    DType::F16 => mechanism.backward::<f16>(&given, &results, &d),
                    DType::Bf16 => mechanism.backward::<bf16>(&given, &results, &d),
                    _ => mechanism.backward::<f32>(&given, &results, &d),
                })?
            }
        };
        self.hand_over(&arrays, outputs)
    }
}

/// The arrays of a tuple, `None` for nothing.
pub(crate) fn collect<'py>(
    tuple: &Bound<'py, PyTuple>,
    names: &'static [&'static str],
) -> PyResult<Vec<Option<Array<'py>>>> {
    let array = |(n, object): (usize, Bound<'py, PyAny>)| {
        let name = names.get(n).copied().unwrap_or("array");
        if object.is_none() { Ok(None) } else { Array::new(name, &object).map(Some) }
    };
    tuple.iter().enumerate().map(array).collect()
}

/// Their views.
pub(crate) fn views<'a>(
    arrays: &'a [Option<Array<'_>>],
    names: &'static [&'static str],
) -> Given<'a> {
    let view = |(n, array): (usize, &'a Option<Array<'_>>)| {
        array.as_ref().map(|array| array.view(names.get(n).copied().unwrap_or("array")))
    };
    Given { names, views: arrays.iter().enumerate().map(view).collect() }
}

/// A copy of a view.
pub(crate) fn owned<E: Element>(x: TensorRef<'_, E>) -> Result<Tensor<E>> {
    let shape = x.shape();
    let mut copy = Vec::with_capacity(shape.checked_len().unwrap_or(0));
    for (b, t) in (0..shape.batch).flat_map(|b| (0..shape.seq).map(move |t| (b, t))) {
        (0..shape.heads).for_each(|h| copy.extend_from_slice(x.row(b, t, h)));
    }
    Ok(Tensor::from_vec(copy, shape)?)
}

/// A scale, or 1/√dim.
pub(crate) fn scale(scale: Option<f32>) -> Scale {
    scale.map_or(Scale::InverseSqrtDim, Scale::Value)
}

/// Threads of a call: 0 for all.
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// How many threads calls may use from here on; 0 for all there are.
#[pyfunction]
pub(crate) fn set_threads(threads: usize) {
    THREADS.store(threads, Ordering::Relaxed);
}

/// How many threads a call may use.
#[pyfunction]
pub(crate) fn get_threads() -> usize {
    match THREADS.load(Ordering::Relaxed) {
        0 => Threads::all().count(),
        threads => threads,
    }
}

/// The instructions and threads of a call.
pub(crate) fn cpu() -> Result<Cpu> {
    static LEVEL: OnceLock<foveal::Result<Level>> = OnceLock::new();
    let level = LEVEL.get_or_init(Level::detect).clone()?;
    let threads = NonZeroUsize::new(THREADS.load(Ordering::Relaxed));
    Ok(Cpu { level, threads: threads.map_or_else(Threads::all, Threads::at_most) })
}
