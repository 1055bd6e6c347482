//! Sparse attention: a row sees few keys, and time and memory follow the pairs that are seen.
//!
//! ```text
//! seen(i) = part₁(i) ∪ part₂(i) ∪ …, disjoint        (O_n, L_n) = exact attention of part n, its keys gathered
//! L = log Σ_n e^(L_n)                                O = Σ_n e^(L_n − L) O_n
//! backward of part n, run with O and L, is exact:    dQ = Σ_n dQ_n;   dK_n, dV_n scattered back and added
//! ```
//!
//! A mechanism chooses tokens and masks; [`crate::Attention`]'s kernels do the rest. There is no other softmax
//! here. Cost: that of exact attention on the pairs seen, and a copy of what is gathered.
//!
//! | mechanism | what a row sees | source |
//! |---|---|---|
//! | [`SparseTransformer`] | strided: near tokens and each l-th one; fixed: its block and the ends of blocks | Child et al. 2019 |
//! | [`Longformer`] | a window, and a few global tokens that see and are seen by all | Beltagy et al. 2020 |
//! | [`BigBird`] | neighbouring, global and random blocks | Zaheer et al. 2020 |
//! | [`Reformer`] | tokens that hash alike ([`AngularHash`]), sorted and cut into chunks | Kitaev et al. 2020 |
//! | [`Moba`] | the own block, and earlier ones whose mean key suits the query | Lu et al. 2025 |
//! | [`NativeSparse`] | compressed tokens, selected blocks and a window, summed by gates | Yuan et al. 2025 |
//!
//! Any other layout of blocks is a [`crate::mask::Blocks`], whose live blocks alone are computed.
//!
//! Results of parts are rounded to the storage type before they are joined.

mod bigbird;
mod choices;
mod held;
mod longformer;
mod lsh;
mod lsh_pattern;
mod lsh_saved;
mod lsh_state;
mod moba;
mod native_pattern;
mod native_sparse;
mod native_state;
mod parts;
mod pattern;
mod picture;
mod prompt;
mod reformer;
mod rows;
mod sparse_transformer;
mod state;

pub use bigbird::{BigBird, BlockPlan};
pub use choices::BlockChoices;
pub use longformer::Longformer;
pub use lsh::{AngularHash, Buckets};
pub use lsh_state::{LshState, LshTokens};
pub use moba::{Moba, MobaState};
pub use native_sparse::{Branches, NativeForward, NativeSizes, NativeSparse};
pub use native_state::NativeState;
pub use picture::{MAX_PICTURE, Picture, reach};
pub use reformer::{Reformer, ReformerForward, SelfLogit};
pub use sparse_transformer::{Combine, Factors, SparseTransformer, SubBlocks, Window};
pub use state::{SparseState, StateHeads};
