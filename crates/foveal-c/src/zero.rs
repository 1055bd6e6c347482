//! The structs of the header with every byte zero: absent, or the default.

use crate::types::*;
use std::ptr::{null, null_mut};

/// Implements `Default` with these members.
macro_rules! zero {
    ($($name:ident { $($member:ident: $value:expr),* $(,)? })*) => {
        $(impl Default for $name {
            fn default() -> $name {
                $name { $($member: $value),* }
            }
        })*
    };
}

zero! {
    foveal_tensor { data: null_mut(), dtype: FOVEAL_F32, shape: [0; 4], strides: [0; 3] }
    foveal_floats { data: null(), len: 0 }
    foveal_floats_out { data: null_mut(), len: 0 }
    foveal_documents { query_starts: null(), key_starts: null(), count: 0 }
    foveal_dense_mask { data: null(), batch: 0, heads: 0, queries: 0, keys: 0 }
    foveal_mask {
        kind: FOVEAL_MASK_FULL,
        width: 0,
        band: Default::default(),
        documents: Default::default(),
        dense: Default::default(),
    }
    foveal_relative_bias { table: Default::default(), heads: 0, max_distance: 0, bidirectional: 0 }
    foveal_attention {
        scale_kind: FOVEAL_SCALE_INVERSE_SQRT_DIM,
        scale: 0.0,
        softcap: 0.0,
        alibi_kind: FOVEAL_ALIBI_NONE,
        alibi_slopes: Default::default(),
        mask: Default::default(),
        bias: Default::default(),
        relative_bias: Default::default(),
        sinks: Default::default(),
        dropout: Default::default(),
        threads: 0,
        level: null(),
    }
}

impl foveal_tensor {
    /// Whether it stands for none: NULL without extents.
    pub(crate) fn is_absent(&self) -> bool {
        self.data.is_null() && self.shape == [0; 4]
    }
}
