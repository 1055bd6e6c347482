//! The structs of a call as views: checked first, all of them, and made into slices afterwards.

use crate::error::Result;
use crate::memory::{Memory, Span, View};
use crate::types::*;
use foveal::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use foveal::{DType, Element};

/// Queries, keys and values.
#[derive(Debug)]
pub(crate) struct InputViews {
    pub(crate) q: View,
    pub(crate) k: View,
    pub(crate) v: View,
}

impl InputViews {
    pub(crate) fn new(inputs: &foveal_inputs, memory: &mut Memory) -> Result<InputViews> {
        let q = memory.read_any("inputs.q", &inputs.q)?;
        let k = memory.read_any("inputs.k", &inputs.k)?;
        let v = memory.read("inputs.v", &inputs.v, k.dtype)?;
        Ok(InputViews { q, k, v })
    }

    /// # Safety
    /// That of [`View::read`].
    pub(crate) unsafe fn read<'a, E: Element, K: Element>(&self) -> Result<Inputs<'a, E, K>> {
        // SAFETY: the caller's promise is the callee's.
        unsafe { Ok(Inputs { q: self.q.read()?, k: self.k.read()?, v: self.v.read()? }) }
    }
}

/// What backward knows: forward's results and their gradients.
#[derive(Debug)]
pub(crate) struct KnownViews {
    out: View,
    lse: View,
    d_out: View,
    d_lse: Option<View>,
}

impl KnownViews {
    pub(crate) fn new(
        results: &foveal_results,
        upstream: &foveal_upstream,
        dtype: DType,
        memory: &mut Memory,
    ) -> Result<KnownViews> {
        Ok(KnownViews {
            out: memory.read("results.out", &results.out, dtype)?,
            lse: memory.read("results.lse", &results.lse, DType::F32)?,
            d_out: memory.read("upstream.d_out", &upstream.d_out, dtype)?,
            d_lse: memory.read_optional("upstream.d_lse", &upstream.d_lse)?,
        })
    }

    /// # Safety
    /// That of [`View::read`].
    pub(crate) unsafe fn read<'a, E: Element>(&self) -> Result<(Saved<'a, E>, Upstream<'a, E>)> {
        // SAFETY: the caller's promise is the callee's.
        unsafe {
            let d_lse = self.d_lse.map(|d_lse| d_lse.read()).transpose()?;
            let saved = Saved { out: self.out.read()?, lse: self.lse.read()? };
            Ok((saved, Upstream { d_out: self.d_out.read()?, d_lse }))
        }
    }
}

/// What backward writes.
#[derive(Debug)]
pub(crate) struct GradientViews {
    q: View,
    k: View,
    v: View,
    bias: Option<View>,
    slopes: Option<Span>,
    table: Option<Span>,
    sinks: Option<Span>,
}

impl GradientViews {
    pub(crate) fn new(
        gradients: &foveal_gradients,
        inputs: &InputViews,
        memory: &mut Memory,
    ) -> Result<GradientViews> {
        Ok(GradientViews {
            q: memory.write("gradients.d_q", &gradients.d_q, inputs.q.dtype)?,
            k: memory.write("gradients.d_k", &gradients.d_k, inputs.k.dtype)?,
            v: memory.write("gradients.d_v", &gradients.d_v, inputs.k.dtype)?,
            bias: memory.write_optional("gradients.d_bias", &gradients.d_bias)?,
            slopes: memory.floats_out("gradients.d_slopes", gradients.d_slopes)?,
            table: memory.floats_out("gradients.d_table", gradients.d_table)?,
            sinks: memory.floats_out("gradients.d_sinks", gradients.d_sinks)?,
        })
    }

    /// # Safety
    /// That of [`View::write`].
    pub(crate) unsafe fn write<'a, E: Element, K: Element>(&self) -> Result<Gradients<'a, E, K>> {
        // SAFETY: the caller's promise is the callee's.
        unsafe {
            Ok(Gradients {
                d_q: self.q.write()?,
                d_k: self.k.write()?,
                d_v: self.v.write()?,
                terms: TermGradients {
                    d_bias: self.bias.map(|bias| bias.write()).transpose()?,
                    d_slopes: self.slopes.map(|slopes| slopes.write()),
                    d_table: self.table.map(|table| table.write()),
                    d_sinks: self.sinks.map(|sinks| sinks.write()),
                    ..TermGradients::default()
                },
            })
        }
    }
}
