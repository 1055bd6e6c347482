//! The C interface: `foveal_attention_forward`, `_backward` and `_decode` on plain structs, for C and every language
//! that can call C.
//!
//! ```text
//! pointers and numbers of the caller → checked views → the types of the crate `foveal` → its plans
//! ```
//!
//! No view is made before its pointer, alignment, extents, strides and length in bytes are checked, and none that
//! is written before it is known to share no byte with any other. An error is a status; its text is kept for each
//! thread. A panic is caught and is a status too. `include/foveal.h` is made of this crate's doc comments by
//! `cargo xtask docs`.

#![allow(non_camel_case_types, reason = "types have the names of the header")]

mod attention;
mod call;
mod error;
mod mask;
mod memory;
mod types;
mod views;
mod workspace;
mod zero;

pub use call::{
    foveal_attention_backward, foveal_attention_decode, foveal_attention_default,
    foveal_attention_forward, foveal_tensor_dense, foveal_version,
};
pub use error::*;
pub use types::*;
pub use workspace::{foveal_workspace, foveal_workspace_create, foveal_workspace_free};
