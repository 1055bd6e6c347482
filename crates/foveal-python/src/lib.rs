//! The Python wheel's native module, `foveal._native`: arrays of any library that speaks DLPack in, kernels without the
//! interpreter, arrays of the same library out.
//!
//! ```text
//! foveal (Python: names, defaults, documentation) → forward, backward by name → the crate `foveal`
//! ```
//!
//! Inputs are read where they lie; results are handed over. Signatures and texts for users are in the Python package.

mod array;
mod attention;
mod cache;
mod call;
mod direct;
mod dlpack;
mod error;
mod exact;
mod linear;
mod mechanisms;
mod memory;
mod output;
mod sparse;
mod state;

use pyo3::prelude::*;

/// The command `foveal` with its name and arguments; the exit code.
#[cfg(feature = "command")]
#[pyfunction]
fn command(py: Python<'_>, arguments: Vec<std::ffi::OsString>) -> u8 {
    py.detach(|| foveal_cli::main(arguments))
}

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<cache::Cache>()?;
    module.add_class::<cache::Pool>()?;
    module.add_class::<state::State>()?;
    module.add_function(wrap_pyfunction!(cache::attention_cached, module)?)?;
    module.add_function(wrap_pyfunction!(call::get_threads, module)?)?;
    module.add_function(wrap_pyfunction!(call::set_threads, module)?)?;
    #[cfg(feature = "command")]
    module.add_function(wrap_pyfunction!(command, module)?)?;
    module.add_function(wrap_pyfunction!(direct::attention_into, module)?)?;
    module.add_function(wrap_pyfunction!(mechanisms::backward, module)?)?;
    module.add_function(wrap_pyfunction!(mechanisms::forward, module)?)?;
    module.add_function(wrap_pyfunction!(mechanisms::mechanisms, module)?)?;
    module.add_function(wrap_pyfunction!(mechanisms::step, module)?)?;
    Ok(())
}
