//! A call's tensors in vectors, and their views.

// Each test program uses a part of this.
#![allow(dead_code, unreachable_pub)]

use foveal_c::*;
use std::ffi::{CStr, c_void};

pub const BATCH: usize = 2;
pub const QUERIES: usize = 5;
pub const KEYS: usize = 9;
pub const HEADS: usize = 4;
pub const KV: usize = 2;
pub const KEY_DIM: usize = 8;
pub const VALUE_DIM: usize = 3;

/// Numbers between -1 and 1.
pub fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

pub fn dense<E>(data: &[E], dtype: foveal_dtype, shape: [usize; 4]) -> foveal_tensor {
    assert_eq!(data.len(), shape.iter().product::<usize>());
    let [batch, seq, heads, dim] = shape;
    foveal_tensor_dense(data.as_ptr().cast::<c_void>(), dtype, batch, seq, heads, dim)
}

pub fn floats(data: &[f32]) -> foveal_floats {
    foveal_floats { data: data.as_ptr(), len: data.len() }
}

pub fn floats_out(data: &mut [f32]) -> foveal_floats_out {
    foveal_floats_out { data: data.as_mut_ptr(), len: data.len() }
}

pub fn message() -> String {
    // SAFETY: the pointer is that of a C string which lives until the next failing call.
    unsafe { CStr::from_ptr(foveal_last_error_message()) }.to_str().unwrap().to_owned()
}

/// All tensors of a call; what is written is filled with NaN.
#[derive(Debug)]
pub struct Call {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub d_out: Vec<f32>,
    pub d_lse: Vec<f32>,
    pub d_q: Vec<f32>,
    pub d_k: Vec<f32>,
    pub d_v: Vec<f32>,
    pub d_bias: Vec<f32>,
}

/// The structs of a call, for a test to change.
#[derive(Debug, Clone, Copy)]
pub struct Structs {
    pub attention: foveal_attention,
    pub inputs: foveal_inputs,
    pub results: foveal_results,
    pub upstream: foveal_upstream,
    pub gradients: foveal_gradients,
}

pub const Q: [usize; 4] = [BATCH, QUERIES, HEADS, KEY_DIM];
pub const K: [usize; 4] = [BATCH, KEYS, KV, KEY_DIM];
pub const V: [usize; 4] = [BATCH, KEYS, KV, VALUE_DIM];
pub const OUT: [usize; 4] = [BATCH, QUERIES, HEADS, VALUE_DIM];
pub const LSE: [usize; 4] = [BATCH, QUERIES, HEADS, 1];
pub const BIAS: [usize; 4] = [1, QUERIES, HEADS, KEYS];

pub fn len(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

impl Call {
    pub fn new() -> Call {
        let nan = |shape| vec![f32::NAN; len(shape)];
        Call {
            q: numbers(len(Q), 1),
            k: numbers(len(K), 2),
            v: numbers(len(V), 3),
            out: nan(OUT),
            lse: nan(LSE),
            d_out: numbers(len(OUT), 4),
            d_lse: numbers(len(LSE), 5),
            d_q: nan(Q),
            d_k: nan(K),
            d_v: nan(V),
            d_bias: nan(BIAS),
        }
    }

    /// Views of all of it. Optional gradients are absent.
    pub fn structs(&mut self) -> Structs {
        let written = |data: &mut Vec<f32>, shape| foveal_tensor {
            data: data.as_mut_ptr().cast(),
            ..dense(data, FOVEAL_F32, shape)
        };
        let read = |data: &[f32], shape| dense(data, FOVEAL_F32, shape);
        Structs {
            attention: foveal_attention_default(),
            inputs: foveal_inputs { q: read(&self.q, Q), k: read(&self.k, K), v: read(&self.v, V) },
            results: foveal_results {
                out: written(&mut self.out, OUT),
                lse: written(&mut self.lse, LSE),
            },
            upstream: foveal_upstream {
                d_out: read(&self.d_out, OUT),
                d_lse: read(&self.d_lse, LSE),
            },
            gradients: foveal_gradients {
                d_q: written(&mut self.d_q, Q),
                d_k: written(&mut self.d_k, K),
                d_v: written(&mut self.d_v, V),
                d_bias: foveal_tensor::default(),
                d_slopes: foveal_floats_out::default(),
                d_table: foveal_floats_out::default(),
                d_sinks: foveal_floats_out::default(),
            },
        }
    }

    pub fn outputs(&self) -> [&[f32]; 6] {
        [&self.out, &self.lse, &self.d_q, &self.d_k, &self.d_v, &self.d_bias]
    }
}

impl Structs {
    pub fn forward(&self, workspace: *mut foveal_workspace) -> foveal_status {
        // SAFETY: the views are those of live vectors, or are refused.
        unsafe { foveal_attention_forward(&self.attention, &self.inputs, &self.results, workspace) }
    }

    pub fn decode(&self, workspace: *mut foveal_workspace) -> foveal_status {
        // SAFETY: as above.
        unsafe { foveal_attention_decode(&self.attention, &self.inputs, &self.results, workspace) }
    }

    pub fn backward(&self, workspace: *mut foveal_workspace) -> foveal_status {
        let Structs { attention, inputs, results, upstream, gradients } = self;
        // SAFETY: as above.
        unsafe {
            foveal_attention_backward(attention, inputs, results, upstream, gradients, workspace)
        }
    }
}
