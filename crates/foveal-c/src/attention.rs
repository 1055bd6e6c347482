//! A description from its struct: numbers are checked here, what they mean by the crate `foveal`.

use crate::error::{Error, Result};
use crate::mask::mask;
use crate::memory::{Memory, Span, View};
use crate::types::*;
use foveal::position::{RelativeBias, Slopes};
use foveal::{Attention, Cpu, Dropout, Level, Mask, Scale, Threads};
use std::ffi::{CStr, c_char};
use std::num::NonZeroUsize;

/// A description whose pointers have been checked and not yet been followed, but for the mask and the level's name.
#[derive(Debug)]
pub(crate) struct Description {
    mask: Mask,
    scale: Scale,
    softcap: f32,
    alibi: foveal_alibi_kind,
    slopes: Option<Span>,
    bias: Option<View>,
    relative: Option<(Span, foveal_relative_bias)>,
    sinks: Option<Span>,
    dropout: foveal_dropout,
    cpu: Cpu,
}

impl Description {
    /// # Safety
    /// The caller of the C function vouches for the arrays of the mask and for the level's name.
    pub(crate) unsafe fn new(attention: &foveal_attention, memory: &mut Memory) -> Result<Self> {
        let slopes = memory.floats("alibi_slopes", attention.alibi_slopes)?;
        if slopes.is_some() != (attention.alibi_kind == FOVEAL_ALIBI_GIVEN) {
            return Err(slopes_or_kind(slopes.is_some()));
        }
        Ok(Description {
            // SAFETY: the caller's promise is the callee's.
            mask: unsafe { mask(&attention.mask)? },
            scale: scale(attention)?,
            softcap: attention.softcap,
            alibi: alibi(attention.alibi_kind)?,
            slopes,
            bias: memory.read_optional("bias", &attention.bias)?,
            relative: relative(attention.relative_bias, memory)?,
            sinks: memory.floats("sinks", attention.sinks)?,
            dropout: attention.dropout,
            cpu: Cpu {
                // SAFETY: the caller's promise is the callee's.
                level: unsafe { level(attention.level)? },
                threads: NonZeroUsize::new(attention.threads)
                    .map_or_else(Threads::all, Threads::at_most),
            },
        })
    }

    /// # Safety
    /// The caller of the C function vouches for the arrays, which nobody writes during `'a`.
    pub(crate) unsafe fn attention<'a>(&self) -> Result<Attention<'a>> {
        // SAFETY: the caller's promise is the callee's.
        let read = |span: &Span| -> &'a [f32] { unsafe { span.read() } };
        let mut attention =
            Attention::new().mask(self.mask.clone()).scale(self.scale).cpu(self.cpu);
        if self.softcap != 0.0 {
            attention = attention.softcap(self.softcap);
        }
        if let Some(bias) = &self.bias {
            // SAFETY: as above; it is stored as f32.
            attention = attention.bias(unsafe { bias.read()? });
        }
        attention = match (self.alibi, &self.slopes) {
            (FOVEAL_ALIBI_STANDARD, _) => attention.alibi(Slopes::Standard),
            (_, Some(slopes)) => attention.alibi(Slopes::Given(read(slopes))),
            _ => attention,
        };
        if let Some((table, relative)) = &self.relative {
            let make = match relative.bidirectional {
                0 => RelativeBias::causal,
                _ => RelativeBias::bidirectional,
            };
            let bias = make(read(table), relative.heads, relative.max_distance)?;
            attention = attention.relative_bias(bias);
        }
        if let Some(sinks) = &self.sinks {
            attention = attention.sinks(read(sinks));
        }
        let foveal_dropout { rate, seed } = self.dropout;
        if rate != 0.0 {
            attention = attention.dropout(Dropout { rate, seed });
        }
        Ok(attention)
    }
}

fn scale(attention: &foveal_attention) -> Result<Scale> {
    match attention.scale_kind {
        FOVEAL_SCALE_INVERSE_SQRT_DIM if attention.scale == 0.0 => Ok(Scale::InverseSqrtDim),
        FOVEAL_SCALE_INVERSE_SQRT_DIM => Err(Error::Unused {
            what: "scale",
            expected: "set scale_kind to FOVEAL_SCALE_VALUE, or leave it zero",
        }),
        FOVEAL_SCALE_VALUE => Ok(Scale::Value(attention.scale)),
        got => Err(Error::Unknown {
            what: "scale_kind",
            got,
            expected: "FOVEAL_SCALE_INVERSE_SQRT_DIM (0) or FOVEAL_SCALE_VALUE (1)",
        }),
    }
}

fn alibi(kind: foveal_alibi_kind) -> Result<foveal_alibi_kind> {
    match kind {
        FOVEAL_ALIBI_NONE | FOVEAL_ALIBI_STANDARD | FOVEAL_ALIBI_GIVEN => Ok(kind),
        got => Err(Error::Unknown {
            what: "alibi_kind",
            got,
            expected: "FOVEAL_ALIBI_NONE (0), FOVEAL_ALIBI_STANDARD (1) or FOVEAL_ALIBI_GIVEN (2)",
        }),
    }
}

/// Slopes without their kind, or the kind without slopes.
fn slopes_or_kind(given: bool) -> Error {
    if given {
        let expected = "set alibi_kind to FOVEAL_ALIBI_GIVEN, or leave it zero";
        return Error::Unused { what: "alibi_slopes", expected };
    }
    let expected = "one slope a query head for FOVEAL_ALIBI_GIVEN".to_owned();
    Error::Null { what: "alibi_slopes", expected }
}

fn relative(
    bias: foveal_relative_bias,
    memory: &mut Memory,
) -> Result<Option<(Span, foveal_relative_bias)>> {
    let what = "relative_bias.bidirectional";
    if bias.bidirectional > 1 {
        return Err(Error::Unknown { what, got: bias.bidirectional, expected: "0 or 1" });
    }
    match memory.floats("relative_bias.table", bias.table)? {
        Some(table) => Ok(Some((table, bias))),
        None if (bias.heads, bias.max_distance, bias.bidirectional) == (0, 0, 0) => Ok(None),
        None => {
            let expected = "buckets times query heads numbers".to_owned();
            Err(Error::Null { what: "relative_bias.table", expected })
        }
    }
}

/// # Safety
/// The caller of the C function vouches for a string if the pointer is not NULL.
unsafe fn level(name: *const c_char) -> Result<Level> {
    if name.is_null() {
        return Ok(Level::detect()?);
    }
    // SAFETY: not NULL; the caller vouches for a zero byte at the end of readable memory.
    let name = unsafe { CStr::from_ptr(name) };
    Ok(Level::named(name.to_str().map_err(|_| Error::LevelName)?)?)
}
