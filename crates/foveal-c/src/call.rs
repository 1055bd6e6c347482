//! The calls: description and views from structs, then a plan, then the run, once for each pair of storage types.

use crate::attention::Description;
use crate::error::{Result, foveal_status, guard};
use crate::memory::{Memory, View, given};
use crate::types::*;
use crate::views::{GradientViews, InputViews, KnownViews};
use crate::workspace::{foveal_workspace, with_workspace};
use foveal::{DType, Element, Phase, Plan};
use half::{bf16, f16};
use std::ffi::{c_char, c_void};

/// The library's version, for example "0.1.0". Structs may change with it: header and library of one version belong
/// together.
#[unsafe(no_mangle)]
pub extern "C" fn foveal_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Everything sees everything, scores are scaled by 1 / sqrt(key dim), all threads: a struct of zeros.
#[unsafe(no_mangle)]
pub extern "C" fn foveal_attention_default() -> foveal_attention {
    foveal_attention::default()
}

/// A view of a tensor `[batch, seq, heads, dim]` without gaps. Reads nothing. Strides that overflow become the
/// largest there is, and the call that uses them refuses them.
#[unsafe(no_mangle)]
pub extern "C" fn foveal_tensor_dense(
    data: *const c_void,
    dtype: foveal_dtype,
    batch: usize,
    seq: usize,
    heads: usize,
    dim: usize,
) -> foveal_tensor {
    let per_token = heads.saturating_mul(dim);
    foveal_tensor {
        data: data.cast_mut(),
        dtype,
        shape: [batch, seq, heads, dim],
        strides: [seq.saturating_mul(per_token), per_token, dim],
    }
}

/// Attention of all queries of a prompt: writes `results.out`, and `results.lse` if it is there.
///
/// `attention` may be NULL for the default; `workspace` may be NULL, then the call allocates what it needs.
/// May be called by several threads at once, each with outputs and a workspace of its own.
///
/// # Safety
/// Pointers are NULL or point to what their types say; a tensor's memory is there from its first element to its
/// last, and is not written by anybody else during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn foveal_attention_forward(
    attention: *const foveal_attention,
    inputs: *const foveal_inputs,
    results: *const foveal_results,
    workspace: *mut foveal_workspace,
) -> foveal_status {
    let pointers = (attention, inputs, results);
    // SAFETY: the caller's promise is the callee's.
    guard(|| unsafe { forward(Phase::Prompt, pointers, workspace) })
}

/// Like `foveal_attention_forward`, for generated tokens: up to 64 query rows, which read keys and values from end
/// to end as they lie. Rows of one call give the same bits as rows of several.
///
/// Sequences of different lengths are calls of their own, with a batch of 1 each.
///
/// # Safety
/// That of `foveal_attention_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn foveal_attention_decode(
    attention: *const foveal_attention,
    inputs: *const foveal_inputs,
    results: *const foveal_results,
    workspace: *mut foveal_workspace,
) -> foveal_status {
    let pointers = (attention, inputs, results);
    // SAFETY: the caller's promise is the callee's.
    guard(|| unsafe { forward(Phase::Generated, pointers, workspace) })
}

/// Gradients of a loss with respect to queries, keys and values, and to the bias, slopes, table and sinks if they
/// are wanted.
///
/// `attention` and `inputs` are those of the forward call, `results` what it wrote, both members of it. Gradients do
/// not share memory with each other, not even interleaved.
///
/// # Safety
/// That of `foveal_attention_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn foveal_attention_backward(
    attention: *const foveal_attention,
    inputs: *const foveal_inputs,
    results: *const foveal_results,
    upstream: *const foveal_upstream,
    gradients: *const foveal_gradients,
    workspace: *mut foveal_workspace,
) -> foveal_status {
    let pointers = (attention, inputs, results);
    // SAFETY: the caller's promise is the callee's.
    guard(|| unsafe { backward(pointers, (upstream, gradients), workspace) })
}

/// The structs that every call has.
type Pointers = (*const foveal_attention, *const foveal_inputs, *const foveal_results);

/// Calls a function of two storage types by their names.
macro_rules! with_types {
    ($queries:expr, $keys:expr, $function:ident($($argument:expr),*)) => {
        match ($queries, $keys) {
            (DType::F32, DType::F32) => $function::<f32, f32>($($argument),*),
            (DType::F32, DType::F16) => $function::<f32, f16>($($argument),*),
            (DType::F32, DType::Bf16) => $function::<f32, bf16>($($argument),*),
            (DType::F16, DType::F32) => $function::<f16, f32>($($argument),*),
            (DType::F16, DType::F16) => $function::<f16, f16>($($argument),*),
            (DType::F16, DType::Bf16) => $function::<f16, bf16>($($argument),*),
            (DType::Bf16, DType::F32) => $function::<bf16, f32>($($argument),*),
            (DType::Bf16, DType::F16) => $function::<bf16, f16>($($argument),*),
            (DType::Bf16, DType::Bf16) => $function::<bf16, bf16>($($argument),*),
            (queries, keys) => unreachable!("views are stored as {queries} and {keys}"),
        }
    };
}

/// # Safety
/// That of [`foveal_attention_forward`].
unsafe fn forward(
    phase: Phase,
    (attention, inputs, results): Pointers,
    workspace: *const foveal_workspace,
) -> Result<()> {
    let mut memory = Memory::default();
    // SAFETY: the caller's promise is the callee's.
    let (description, inputs, results) = unsafe {
        (
            describe(attention, &mut memory)?,
            InputViews::new(&given("inputs", inputs)?, &mut memory)?,
            given("results", results)?,
        )
    };
    let out = memory.write("results.out", &results.out, inputs.q.dtype)?;
    let outputs = (out, memory.write_optional("results.lse", &results.lse)?);
    memory.check()?;
    // SAFETY: what is written is shared with nothing; the caller vouches for what numbers cannot tell.
    let attention = unsafe { description.attention()? };
    let shapes = (inputs.q.shape, inputs.k.shape, inputs.v.shape);
    let plan = match phase {
        Phase::Prompt => attention.plan(shapes.0, shapes.1, shapes.2)?,
        Phase::Generated => attention.plan_decode(shapes.0, shapes.1, shapes.2)?,
    };
    // SAFETY: as above; types are those of the views.
    unsafe {
        with_types!(inputs.q.dtype, inputs.k.dtype, run_forward(&plan, &inputs, outputs, workspace))
    }
}

/// # Safety
/// That of [`foveal_attention_forward`]; the types are those of the views, of which none that is written shares memory.
unsafe fn run_forward<E: Element, K: Element>(
    plan: &Plan<'_>,
    inputs: &InputViews,
    (out, lse): (View, Option<View>),
    workspace: *const foveal_workspace,
) -> Result<()> {
    // SAFETY: the caller's promise is the callee's.
    unsafe {
        let inputs = inputs.read::<E, K>()?;
        let out = out.write()?;
        let lse = lse.map(|lse| lse.write()).transpose()?;
        with_workspace(workspace, plan.workspace_bytes(), |workspace| {
            plan.forward(inputs, out, lse, workspace)
        })
    }
}

/// # Safety
/// That of [`foveal_attention_backward`].
unsafe fn backward(
    (attention, inputs, results): Pointers,
    (upstream, gradients): (*const foveal_upstream, *const foveal_gradients),
    workspace: *const foveal_workspace,
) -> Result<()> {
    let mut memory = Memory::default();
    // SAFETY: the caller's promise is the callee's.
    let (description, inputs, results, upstream, gradients) = unsafe {
        (
            describe(attention, &mut memory)?,
            InputViews::new(&given("inputs", inputs)?, &mut memory)?,
            given("results", results)?,
            given("upstream", upstream)?,
            given("gradients", gradients)?,
        )
    };
    let known = KnownViews::new(&results, &upstream, inputs.q.dtype, &mut memory)?;
    let gradients = GradientViews::new(&gradients, &inputs, &mut memory)?;
    memory.check()?;
    // SAFETY: what is written is shared with nothing; the caller vouches for what numbers cannot tell.
    let attention = unsafe { description.attention()? };
    let plan = attention.plan(inputs.q.shape, inputs.k.shape, inputs.v.shape)?;
    let views = (&inputs, &known, &gradients);
    // SAFETY: as above; types are those of the views.
    unsafe { with_types!(inputs.q.dtype, inputs.k.dtype, run_backward(&plan, views, workspace)) }
}

/// # Safety
/// That of [`foveal_attention_backward`]; the types are those of the views, of which none that is written shares memory.
unsafe fn run_backward<E: Element, K: Element>(
    plan: &Plan<'_>,
    (inputs, known, gradients): (&InputViews, &KnownViews, &GradientViews),
    workspace: *const foveal_workspace,
) -> Result<()> {
    // SAFETY: the caller's promise is the callee's.
    unsafe {
        let inputs = inputs.read::<E, K>()?;
        let (saved, upstream) = known.read::<E>()?;
        let gradients = gradients.write::<E, K>()?;
        with_workspace(workspace, plan.backward_workspace_bytes::<E>(), |workspace| {
            plan.backward(inputs, saved, upstream, gradients, workspace)
        })
    }
}

/// # Safety
/// The caller of the C function vouches for the struct, the arrays of its mask, and the level's name.
unsafe fn describe(attention: *const foveal_attention, memory: &mut Memory) -> Result<Description> {
    if attention.is_null() {
        // SAFETY: the default points to nothing.
        return unsafe { Description::new(&foveal_attention::default(), memory) };
    }
    // SAFETY: the caller's promise is the callee's.
    unsafe { Description::new(&given("attention", attention)?, memory) }
}
