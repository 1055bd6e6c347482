//! Mechanisms by name, with the options that Python gives as tuples.

use crate::attention::{ByHeads, Exact};
use crate::call::{Job, cpu, scale};
use crate::error::Error;
use crate::exact::{Join, Latent, Rotary, TwoMaps};
use crate::linear::{self, AllKeys, Causal, Mixtures};
use crate::memory::{Documents, Segments};
use crate::sparse::{Chosen, Factorised, Hashed, Native, RandomBlocks, Windowed};
use crate::state::State;
use foveal::mask::Band;
use foveal::memory::infini::{Empty, Infini, Update};
use foveal::memory::memorizing::{Index, Memorizing};
use foveal::sparse::{Longformer, Moba, Reformer, SelfLogit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// Runs a mechanism forward: its arrays in order, `None` for what is missing, and its options.
#[pyfunction]
pub(crate) fn forward<'py>(
    name: &str,
    arrays: Bound<'py, PyTuple>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyTuple>> {
    run(name, &Job { arrays, backward: None, state: None }, options)
}

/// Gradients of a mechanism's arrays, from those, what forward gave, and the gradients of it.
#[pyfunction]
pub(crate) fn backward<'py>(
    name: &str,
    arrays: Bound<'py, PyTuple>,
    results: Bound<'py, PyTuple>,
    d_results: Bound<'py, PyTuple>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyTuple>> {
    run(name, &Job { arrays, backward: Some((results, d_results)), state: None }, options)
}

/// Runs a mechanism on the next tokens of a sequence, of which a state holds what it needs.
#[pyfunction]
pub(crate) fn step<'py>(
    name: &str,
    state: Bound<'py, State>,
    arrays: Bound<'py, PyTuple>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyTuple>> {
    const STATES: [&str; 6] =
        ["sparse_transformer", "lsh", "moba", "native_sparse", "infini", "memorizing"];
    if !STATES.contains(&name) {
        let expected = "sparse_transformer, lsh, moba, native_sparse, infini or memorizing";
        let (what, got) = ("mechanism with a state", name.to_owned());
        return Err(Error::Option { what, expected, got }.into());
    }
    run(name, &Job { arrays, backward: None, state: Some(state) }, options)
}

/// Names and groups of the mechanisms, in the registry's order.
#[pyfunction]
pub(crate) fn mechanisms() -> Vec<(&'static str, &'static str, &'static str, &'static str, bool)> {
    let all = foveal::registry::MECHANISMS.iter();
    all.map(|m| (m.name, m.group.name(), m.summary, m.paper, m.backward)).collect()
}

fn run<'py>(
    name: &str,
    job: &Job<'py>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyTuple>> {
    match name {
        "attention" => job.run(&Exact::from_options(options)?),
        "attention_by_heads" => job.run(&ByHeads(Exact::from_options(options)?)),
        "differential" => {
            let (init, epsilon, behind, ahead, scale) = options.extract()?;
            job.run(&TwoMaps { init, epsilon, band: Band { behind, ahead }, scale })
        }
        "mla" => {
            let (rope, value, behind, ahead, scale, generated) = options.extract()?;
            job.run(&Latent { rope, value, band: Band { behind, ahead }, scale, generated })
        }
        "rope" => {
            let (theta, rotary_dim, interleaved) = options.extract()?;
            job.run(&Rotary { theta, rotary_dim, interleaved })
        }
        "merge" => job.run(&Join),
        "sparse_transformer" | "longformer" | "bigbird" | "lsh" | "moba" | "native_sparse" => {
            sparse(name, job, options)
        }
        "infini" | "memorizing" => memory(name, job, options),
        _ => linear(name, job, options),
    }
}

fn sparse<'py>(
    name: &str,
    job: &Job<'py>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyTuple>> {
    match name {
        "sparse_transformer" => {
            type Options =
                (String, usize, usize, String, Option<usize>, String, usize, Option<f32>);
            let (pattern, stride, width, window, sub_blocks, combine, layer, by): Options =
                options.extract()?;
            job.go_on(&Factorised::new(
                (&pattern, stride, width),
                (&window, sub_blocks),
                (&combine, layer),
                by,
            )?)
        }
        "longformer" => {
            type Options =
                (usize, bool, Vec<usize>, Vec<Vec<usize>>, Option<Vec<usize>>, Option<f32>);
            let (reach, causal, gaps, global, lengths, by): Options = options.extract()?;
            let mut layer = Longformer::new(reach).gaps(gaps).global(global).scale(scale(by));
            layer = if causal { layer.causal() } else { layer };
            layer = lengths.into_iter().fold(layer, Longformer::lengths);
            job.run(&Windowed(layer.cpu(cpu()?)))
        }
        "bigbird" => {
            let (block, random, seed, causal, scale) = options.extract()?;
            job.run(&RandomBlocks { block, random, seed, causal, scale })
        }
        "lsh" => {
            type Options = (usize, usize, usize, u64, bool, bool, bool, Option<f32>, f32);
            let (chunk, buckets, rounds, seed, causal, strict, apart, self_logit, by): Options =
                options.extract()?;
            let layer = Reformer::new(chunk).map_err(Error::from)?.causal(causal).cpu(cpu()?);
            let mut layer = layer.scale(foveal::Scale::Value(by));
            layer = if strict { layer.strict_buckets() } else { layer };
            layer = if apart { layer.bucket_chunks() } else { layer };
            layer =
                self_logit.map(SelfLogit::Replace).into_iter().fold(layer, Reformer::self_logit);
            job.go_on(&Hashed { layer, buckets, rounds, seed })
        }
        "moba" => {
            let (block, top, by): (usize, usize, Option<f32>) = options.extract()?;
            let layer = Moba::new(block, top).map_err(Error::from)?;
            job.go_on(&Chosen(layer.scale(scale(by)).cpu(cpu()?)))
        }
        _ => {
            let (length, stride, block, top, window, by) = options.extract()?;
            job.go_on(&Native::new([length, stride, block, top, window], by)?)
        }
    }
}

fn memory<'py>(
    name: &str,
    job: &Job<'py>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyTuple>> {
    if name == "memorizing" {
        type Options = (usize, usize, usize, bool, Option<(usize, usize)>);
        let (segment, top, capacity, previous, lists): Options = options.extract()?;
        let layer = Memorizing::new(segment, top, capacity).map_err(Error::from)?;
        let index = lists.map(|(lists, probes)| Index::new(lists, probes)).transpose();
        let layer = layer.previous(previous).index(index.map_err(Error::from)?);
        return job.go_on(&Documents(layer));
    }
    let (segment, delta, bypass, by): (usize, bool, bool, Option<f32>) = options.extract()?;
    let update = if delta { Update::Delta } else { Update::Linear };
    let empty = if bypass { Empty::Bypassed } else { Empty::Gated };
    let infini = Infini::new(segment).map_err(Error::from)?;
    job.go_on(&Segments(infini.update(update).empty(empty).scale(scale(by))))
}

fn linear<'py>(
    name: &str,
    job: &Job<'py>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyTuple>> {
    match name {
        "linear" => {
            let (map, epsilon, causal): (String, Option<f32>, bool) = options.extract()?;
            let linear = linear::linear(&map, epsilon)?;
            if causal { job.run(&Causal(linear)) } else { job.run(&AllKeys(linear)) }
        }
        "performer" => {
            type Options = (usize, usize, u64, String, bool);
            let (features, dim, seed, kernel, causal): Options = options.extract()?;
            let favor = linear::performer((features, dim, seed), &kernel)?;
            if causal { job.run(&Causal(favor)) } else { job.run(&AllKeys(favor)) }
        }
        "efficient" => {
            let (causal,): (bool,) = options.extract()?;
            let efficient = linear::efficient();
            if causal { job.run(&Causal(efficient)) } else { job.run(&AllKeys(efficient)) }
        }
        "linformer" => {
            let (scale,) = options.extract()?;
            job.run(&Mixtures { scale })
        }
        "retention" => {
            let (decays, heads, by): (Option<Vec<f32>>, usize, Option<f32>) = options.extract()?;
            job.run(&Causal(linear::retention(decays, heads, by)))
        }
        "scalar_decay" | "gla" | "delta" | "gated_delta" => {
            let (by,): (Option<f32>,) = options.extract()?;
            match name {
                "scalar_decay" => job.run(&Causal(linear::scalar_decay(by))),
                "gla" => job.run(&Causal(linear::gla(by))),
                _ => job.run(&Causal(linear::delta(name == "gated_delta", by))),
            }
        }
        got => {
            let (what, expected) = ("mechanism", "a name that foveal.mechanisms() gives");
            Err(Error::Option { what, expected, got: got.to_owned() }.into())
        }
    }
}
