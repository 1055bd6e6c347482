//! Attention into an array of the caller.

use crate::array::{Array, View};
use crate::attention::Exact;
use crate::call::{Given, Mechanism, collect, views};
use crate::error::{Error, Result};
use foveal::{DType, Element, Tensor};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::output::Output;

/// Runs attention on `arrays` into `out`; the log-sum-exp.
#[pyfunction]
pub(crate) fn attention_into<'py>(
    arrays: &Bound<'py, PyTuple>,
    out: &Bound<'py, PyAny>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyAny>> {
    let exact = Exact::from_options(options)?;
    let arrays = collect(arrays, Exact::ARRAYS)?;
    let given = views(&arrays, Exact::ARRAYS);
    let out = Array::new("out", out)?;
    out.writable("out")?;
    let to = out.view("out");
    for (n, name) in Exact::ARRAYS.iter().enumerate() {
        if given.optional(n).is_some_and(|view| view.shares_with(&to)) {
            return Err(Error::Shared { what: "out", other: name }.into());
        }
    }
    let dtype = given.view(0)?.dtype()?;
    let py = out.object().py();
    let lse = py.detach(|| match dtype {
        DType::F16 => run::<f16>(&exact, &given, &to),
        DType::Bf16 => run::<bf16>(&exact, &given, &to),
        _ => run::<f32>(&exact, &given, &to),
    })?;
    let like = arrays.first().and_then(Option::as_ref).ok_or(Error::Missing { what: "q" })?;
    Output::per_row(lse).into_array(like)
}

fn run<E: Element>(exact: &Exact, given: &Given<'_>, to: &View<'_>) -> Result<Tensor<f32>> {
    let mut lse = Tensor::zeros(given.tensor::<E>(0)?.shape().per_row())?;
    // SAFETY: no array that is read shares memory with it, and the caller keeps others from it, as from any array that
    // a function of NumPy or PyTorch writes to.
    let out = unsafe { to.tensor_mut::<E>()? };
    exact.forward_into(given, out, Some(lse.view_mut()))?;
    Ok(lse)
}
