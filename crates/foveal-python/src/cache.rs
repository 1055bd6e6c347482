//! Decoding state: caches of keys and values that Python holds, and attention of queries to them.
//!
//! A cache is locked while a call reads or changes it. Nobody waits for the lock: who waited with the interpreter in hand
//! would stop the call that holds it.

use crate::array::Array;
use crate::attention::{simple, with_workspace};
use crate::call::{Given, cpu, scale, views};
use crate::error::{Error, Result};
use crate::output::Output;
use foveal::cache::{ContiguousCache, KvStore, PagePool, PagedCache, QuantizedCache, codes::Bits};
use foveal::mask::Band;
use foveal::{Attention, DType, Element, Shape, Tensor, TensorRef};
use half::{bf16, f16};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::sync::{RwLock, TryLockError};

/// A store of any kind.
#[derive(Debug)]
enum Store {
    F32(ContiguousCache<f32>),
    F16(ContiguousCache<f16>),
    Bf16(ContiguousCache<bf16>),
    PagedF32(PagedCache<f32>),
    PagedF16(PagedCache<f16>),
    PagedBf16(PagedCache<bf16>),
    Quantized(QuantizedCache),
}

/// Does the same with a store of any kind.
macro_rules! each {
    ($store:expr, $cache:ident => $run:expr) => {
        match $store {
            Store::F32($cache) => $run,
            Store::F16($cache) => $run,
            Store::Bf16($cache) => $run,
            Store::PagedF32($cache) => $run,
            Store::PagedF16($cache) => $run,
            Store::PagedBf16($cache) => $run,
            Store::Quantized($cache) => $run,
        }
    };
}

impl Store {
    fn kv(&self) -> &dyn KvStore {
        each!(self, cache => cache)
    }

    fn append<E: Element>(&mut self, k: TensorRef<'_, E>, v: TensorRef<'_, E>) -> Result<()> {
        // Those with a capacity double it: appending costs the same a token, however long the text.
        let (held, more) = (self.kv().end() - self.kv().start(), k.shape().seq);
        let wanted = (2 * held).max(held + more);
        match self {
            Store::F32(cache) if cache.room() < more => cache.grow(wanted)?,
            Store::F16(cache) if cache.room() < more => cache.grow(wanted)?,
            Store::Bf16(cache) if cache.room() < more => cache.grow(wanted)?,
            Store::Quantized(cache) if cache.room() < more => cache.grow(wanted)?,
            _ => {}
        }
        Ok(each!(self, cache => cache.append(k, v))?)
    }
}

/// Keys and values of one sequence of one layer.
#[pyclass(frozen, module = "foveal._native")]
#[derive(Debug)]
pub(crate) struct Cache(RwLock<Store>);

#[expect(clippy::needless_pass_by_value, reason = "as map_err gives it")]
fn busy<T>(error: TryLockError<T>) -> PyErr {
    let text = match error {
        TryLockError::WouldBlock => "the cache is in use by another thread",
        TryLockError::Poisoned(_) => "the cache is unusable: a call on it has failed inside",
    };
    PyRuntimeError::new_err(text)
}

fn dtype(name: &str) -> Result<DType> {
    match name {
        "float32" => Ok(DType::F32),
        "float16" => Ok(DType::F16),
        "bfloat16" => Ok(DType::Bf16),
        got => {
            let (what, expected) = ("dtype", "float32, float16 or bfloat16");
            Err(Error::Option { what, expected, got: got.to_owned() })
        }
    }
}

impl Cache {
    fn of(store: Store) -> Cache {
        Cache(RwLock::new(store))
    }

    fn read<T>(&self, read: impl FnOnce(&dyn KvStore) -> T) -> PyResult<T> {
        Ok(read(self.0.try_read().map_err(busy)?.kv()))
    }
}

#[pymethods]
impl Cache {
    /// Rows of `dtype` in one piece.
    #[staticmethod]
    fn contiguous(
        kv_heads: usize,
        dims: (usize, usize),
        capacity: usize,
        dtype_name: &str,
    ) -> PyResult<Cache> {
        let new = || -> Result<Store> {
            Ok(match dtype(dtype_name)? {
                DType::F16 => Store::F16(ContiguousCache::new(kv_heads, dims, capacity)?),
                DType::Bf16 => Store::Bf16(ContiguousCache::new(kv_heads, dims, capacity)?),
                _ => Store::F32(ContiguousCache::new(kv_heads, dims, capacity)?),
            })
        };
        Ok(Cache::of(new()?))
    }

    /// Codes of 8 or 4 bits.
    #[staticmethod]
    fn quantized(
        bits: usize,
        kv_heads: usize,
        dims: (usize, usize),
        capacity: usize,
    ) -> PyResult<Cache> {
        let bits = match bits {
            4 => Bits::Four,
            8 => Bits::Eight,
            got => {
                let (what, expected) = ("bits", "8 or 4");
                return Err(Error::Option { what, expected, got: got.to_string() }.into());
            }
        };
        let cache = QuantizedCache::new(bits, kv_heads, dims, capacity).map_err(Error::from)?;
        Ok(Cache::of(Store::Quantized(cache)))
    }

    /// The end of the last token: tokens appended so far.
    fn end(&self) -> PyResult<usize> {
        self.read(|store| store.end())
    }

    /// The first token that is still held.
    fn start(&self) -> PyResult<usize> {
        self.read(|store| store.start())
    }

    /// Appends keys `[1, n, KV, Dk]` and values `[1, n, KV, Dv]` of any of the three storage types.
    fn append(&self, k: &Bound<'_, PyAny>, v: &Bound<'_, PyAny>) -> PyResult<()> {
        let arrays = [Some(Array::new("k", k)?), Some(Array::new("v", v)?)];
        let given = views(&arrays, &["k", "v"]);
        let mut store = self.0.try_write().map_err(busy)?;
        let append = |store: &mut Store| -> Result<()> {
            match given.view(0)?.dtype()? {
                DType::F16 => store.append::<f16>(given.tensor(0)?, given.tensor(1)?),
                DType::Bf16 => store.append::<bf16>(given.tensor(0)?, given.tensor(1)?),
                _ => store.append::<f32>(given.tensor(0)?, given.tensor(1)?),
            }
        };
        Ok(append(&mut store)?)
    }

    /// Keeps the tokens before `end`.
    fn truncate(&self, end: usize) -> PyResult<()> {
        let mut store = self.0.try_write().map_err(busy)?;
        match &mut *store {
            Store::F32(cache) => cache.truncate(end),
            Store::F16(cache) => cache.truncate(end),
            Store::Bf16(cache) => cache.truncate(end),
            Store::PagedF32(cache) => cache.truncate(end),
            Store::PagedF16(cache) => cache.truncate(end),
            Store::PagedBf16(cache) => cache.truncate(end),
            Store::Quantized(_) => {
                let (what, expected) =
                    ("truncate", "a cache of rows; tokens of codes share scales");
                return Err(Error::Option { what, expected, got: "codes".to_owned() }.into());
            }
        }
        Ok(())
    }

    /// Gives up the tokens before a position, as far as whole pages or tiles allow.
    fn forget(&self, before: usize) -> PyResult<()> {
        let mut store = self.0.try_write().map_err(busy)?;
        each!(&mut *store, cache => cache.forget(before));
        Ok(())
    }

    /// Gives up everything.
    fn clear(&self) -> PyResult<()> {
        let mut store = self.0.try_write().map_err(busy)?;
        each!(&mut *store, cache => cache.clear());
        Ok(())
    }

    /// A cache with the first `end` tokens, whose pages both hold.
    fn fork(&self, end: usize) -> PyResult<Cache> {
        let store = self.0.try_read().map_err(busy)?;
        let fork = || -> Result<Store> {
            Ok(match &*store {
                Store::PagedF32(cache) => Store::PagedF32(cache.fork(end)?),
                Store::PagedF16(cache) => Store::PagedF16(cache.fork(end)?),
                Store::PagedBf16(cache) => Store::PagedBf16(cache.fork(end)?),
                _ => {
                    let (what, expected) = ("fork", "a paged cache");
                    return Err(Error::Option { what, expected, got: "another".to_owned() });
                }
            })
        };
        Ok(Cache::of(fork()?))
    }
}

/// Pages that the sequences of a layer share.
#[pyclass(frozen, module = "foveal._native")]
#[derive(Debug)]
pub(crate) struct Pool(Pages);

#[derive(Debug)]
enum Pages {
    F32(PagePool<f32>),
    F16(PagePool<f16>),
    Bf16(PagePool<bf16>),
}

#[pymethods]
impl Pool {
    #[new]
    fn new(
        kv_heads: usize,
        dims: (usize, usize),
        pages: usize,
        dtype_name: &str,
    ) -> PyResult<Pool> {
        let new = || -> Result<Pages> {
            Ok(match dtype(dtype_name)? {
                DType::F16 => Pages::F16(PagePool::new(kv_heads, dims, pages)?),
                DType::Bf16 => Pages::Bf16(PagePool::new(kv_heads, dims, pages)?),
                _ => Pages::F32(PagePool::new(kv_heads, dims, pages)?),
            })
        };
        Ok(Pool(new()?))
    }

    /// An empty sequence.
    fn create(&self) -> Cache {
        Cache::of(match &self.0 {
            Pages::F32(pool) => Store::PagedF32(pool.create()),
            Pages::F16(pool) => Store::PagedF16(pool.create()),
            Pages::Bf16(pool) => Store::PagedBf16(pool.create()),
        })
    }

    /// Pages that no sequence holds.
    fn free_pages(&self) -> usize {
        match &self.0 {
            Pages::F32(pool) => pool.free_pages(),
            Pages::F16(pool) => pool.free_pages(),
            Pages::Bf16(pool) => pool.free_pages(),
        }
    }
}

/// Options of attention to caches: keys before and after a position, scale, softcap, whether rows are generated.
type Options = (Option<usize>, Option<usize>, Option<f32>, Option<f32>, bool);

/// Output and log-sum-exp of queries `[B, T, H, D]` to one cache for each sequence.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "as arguments of Python come")]
pub(crate) fn attention_cached<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    caches: Vec<Bound<'py, Cache>>,
    sinks: Option<&Bound<'py, PyAny>>,
    options: Options,
) -> PyResult<Bound<'py, PyTuple>> {
    let arrays =
        [Some(Array::new("q", q)?), sinks.map(|sinks| Array::new("sinks", sinks)).transpose()?];
    let given = views(&arrays, &["q", "sinks"]);
    let guards = caches.iter().map(|cache| cache.get().0.try_read().map_err(busy));
    let guards = guards.collect::<PyResult<Vec<_>>>()?;
    let stores: Vec<&dyn KvStore> = guards.iter().map(|guard| guard.kv()).collect();
    let dtype = given.view(0).and_then(|q| q.dtype())?;
    let stores = &stores[..];
    let outputs = py.detach(|| match dtype {
        DType::F16 => attend::<f16>(&given, stores, options),
        DType::Bf16 => attend::<bf16>(&given, stores, options),
        _ => attend::<f32>(&given, stores, options),
    })?;
    let [like, _] = &arrays;
    let like = like.as_ref().ok_or(Error::Missing { what: "q" })?;
    let outputs = outputs.into_iter().map(|output| output.into_array(like));
    PyTuple::new(py, outputs.collect::<PyResult<Vec<_>>>()?)
}

fn attend<E: Element>(
    given: &Given<'_>,
    stores: &[&dyn KvStore],
    (behind, ahead, by, softcap, generated): Options,
) -> Result<[Output; 2]> {
    let q = given.tensor::<E>(0)?;
    let mut attention =
        Attention::new().mask(simple(Band { behind, ahead })).scale(scale(by)).cpu(cpu()?);
    attention = softcap.into_iter().fold(attention, Attention::softcap);
    attention = given.maybe_floats(1)?.into_iter().fold(attention, Attention::sinks);
    let (kv_heads, dims) =
        stores.first().map_or((1, (q.shape().dim, 1)), |store| (store.kv_heads(), store.dims()));
    let held = stores.iter().map(|store| store.end() - store.start()).max().unwrap_or(0);
    let k = Shape { seq: held, heads: kv_heads, dim: dims.0, ..q.shape() };
    let v = Shape { dim: dims.1, ..k };
    let plan = match generated {
        true => attention.plan_decode(q.shape(), k, v)?,
        false => attention.plan(q.shape(), k, v)?,
    };
    let mut out = Tensor::zeros(plan.out_shape())?;
    let mut lse = Tensor::zeros(plan.out_shape().per_row())?;
    let outputs = (out.view_mut(), Some(lse.view_mut()));
    with_workspace(plan.workspace_bytes(), |workspace| {
        Ok(plan.forward_cached(q, stores, outputs, workspace)?)
    })?;
    Ok([Output::tensor(out), Output::per_row(lse)])
}
