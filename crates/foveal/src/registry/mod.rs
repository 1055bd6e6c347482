//! The mechanisms that exist, as data: what `foveal list` prints and the tables of the documentation are made from.

mod picture;

pub use picture::{PICTURE_TOKENS, picture};

/// A family of mechanisms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Group {
    /// Softmax attention, computed exactly.
    Exact,
    /// Exact attention to keys that are chosen: cost follows the pairs that are seen.
    Sparse,
    /// Linear attention: cost grows with the number of tokens, not with its square.
    Linear,
    /// Attention to near tokens, mixed with what a memory of earlier ones gives.
    Memory,
}

impl Group {
    /// The name, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Group::Exact => "exact",
            Group::Sparse => "sparse",
            Group::Linear => "linear",
            Group::Memory => "memory",
        }
    }
}

/// A mechanism: its name in configurations and commands, and what there is of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mechanism {
    /// The name, the same everywhere.
    pub name: &'static str,
    /// Its family.
    pub group: Group,
    /// One sentence.
    pub summary: &'static str,
    /// What it computes, in a line.
    pub equation: &'static str,
    /// The order of a head's operations, for N tokens of D numbers.
    pub cost: &'static str,
    /// Where it was published.
    pub paper: &'static str,
    /// Whether whole sequences can be computed.
    pub forward: bool,
    /// Whether gradients can be computed.
    pub backward: bool,
    /// Whether tokens can be computed one by one from a cache or state.
    pub decode: bool,
}

/// All mechanisms, by group.
pub const MECHANISMS: &[Mechanism] = &[
    Mechanism {
        name: "full",
        group: Group::Exact,
        summary: "every token sees all tokens before it; multi-head, grouped-query and multi-query",
        equation: "o_i = Σ_{j≤i} softmax_j(q_i·k_j/√D) v_j",
        cost: "2·N²·D",
        paper: "arXiv:1706.03762, arXiv:2305.13245",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "window",
        group: Group::Exact,
        summary: "every token sees a number of the newest tokens, its own included",
        equation: "o_i = Σ_{i−w<j≤i} softmax_j(q_i·k_j/√D) v_j",
        cost: "4·N·w·D",
        paper: "arXiv:2004.05150, section 3.1",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "differential",
        group: Group::Exact,
        summary: "the difference of two softmaxes over the same values, normalised",
        equation: "o = norm((softmax(q¹k¹ᵀ) − λ softmax(q²k²ᵀ)) v)",
        cost: "4·N²·D",
        paper: "arXiv:2410.05258",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "mla",
        group: Group::Exact,
        summary: "keys and values of all heads are made from one compressed row a token, or queries taken to it",
        equation: "k_j = W_k c_j,  v_j = W_v c_j,  c_j = W_c x_j, shared by all heads",
        cost: "2·N²·D",
        paper: "arXiv:2405.04434",
        forward: true,
        backward: false,
        decode: true,
    },
    Mechanism {
        name: "transformer_xl",
        group: Group::Exact,
        summary: "earlier segments are remembered, and queries are compared with keys and with distances",
        equation: "s_ij = (q_i + u)·k_j + (q_i + v)·W_r R_{i−j}",
        cost: "4·N²·D, segments and what they remember",
        paper: "arXiv:1901.02860",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "sparse_transformer",
        group: Group::Sparse,
        summary: "near tokens and every l-th one, or the own block and the ends of earlier ones",
        equation: "seen(i) = {i−l … i} ∪ {j : (i − j) mod l = 0}",
        cost: "8·N·√N·D",
        paper: "arXiv:1904.10509",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "longformer",
        group: Group::Sparse,
        summary: "a window, perhaps with gaps, and global tokens with projections of their own; causal or not",
        equation: "seen(i) = {j : |i − j| ≤ w} ∪ global; global tokens see all",
        cost: "4·N·(w + g)·D",
        paper: "arXiv:2004.05150",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "bigbird",
        group: Group::Sparse,
        summary: "neighbouring blocks, the first and the last, and blocks drawn at random",
        equation: "seen(block) = neighbours ∪ first ∪ last ∪ r at random",
        cost: "4·N·(5 + r)·b·D",
        paper: "arXiv:2007.14062",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "lsh",
        group: Group::Sparse,
        summary: "Reformer: tokens that hash alike, sorted and cut into chunks; several rounds; queries are keys",
        equation: "seen(i) = {j ≤ i : hash(q_j) = hash(q_i)}, in chunks, several rounds",
        cost: "8·N·c·rounds·D",
        paper: "arXiv:2001.04451",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "moba",
        group: Group::Sparse,
        summary: "the own block and the earlier ones whose mean key suits the query best",
        equation: "seen(i) = own block ∪ top k of earlier blocks by q_i · mean(k_block)",
        cost: "4·N·k·b·D",
        paper: "arXiv:2502.13189",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "native_sparse",
        group: Group::Sparse,
        summary: "compressed tokens, the blocks whose compressed tokens weigh most, and a window, summed by gates",
        equation: "o = g¹ compressed + g² selected blocks + g³ window",
        cost: "4·N·(N/s + n·b + w)·D",
        paper: "arXiv:2502.11089",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "linear",
        group: Group::Linear,
        summary: "queries and keys mapped to positive numbers, their products normalised; causal or not",
        equation: "S_i = S_{i−1} + φ(k_i) v_iᵀ,   o_i = φ(q_i) S_i / φ(q_i)·z_i",
        cost: "4·N·D²",
        paper: "arXiv:2006.16236",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "performer",
        group: Group::Linear,
        summary: "softmax attention estimated by positive orthogonal random features (FAVOR+), or features max(ωx, 0); causal or not",
        equation: "φ(x) = exp(ωx − |x|²/2)/√m,  E[φ(q)·φ(k)] = e^{q·k}",
        cost: "8·N·m·D",
        paper: "arXiv:2009.14794",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "efficient",
        group: Group::Linear,
        summary: "softmax over the channels of queries and, in each channel, over keys; causal or not",
        equation: "o = softmax_D(q) (softmax_N(k)ᵀ v)",
        cost: "4·N·D²",
        paper: "arXiv:1812.01243",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "linformer",
        group: Group::Linear,
        summary: "softmax attention to few learned mixtures of all keys and values; not causal",
        equation: "o = softmax(q (E k)ᵀ) (F v),  E and F mix N tokens to r",
        cost: "8·N·r·D",
        paper: "arXiv:2006.04768",
        forward: true,
        backward: true,
        decode: false,
    },
    Mechanism {
        name: "retention",
        group: Group::Linear,
        summary: "a state that decays by a constant of each head",
        equation: "S_i = γ S_{i−1} + k_i v_iᵀ,   o_i = q_i S_i",
        cost: "4·N·D²",
        paper: "arXiv:2307.08621",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "scalar_decay",
        group: Group::Linear,
        summary: "a state that decays by one number for each token and head, as in Mamba-2",
        equation: "S_i = a_i S_{i−1} + k_i v_iᵀ,   o_i = q_i S_i",
        cost: "4·N·D²",
        paper: "arXiv:2405.21060",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "gla",
        group: Group::Linear,
        summary: "a state that decays by a number for each token and key channel",
        equation: "S_i = diag(α_i) S_{i−1} + k_i v_iᵀ,   o_i = q_i S_i",
        cost: "4·N·D²",
        paper: "arXiv:2312.06635",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "delta",
        group: Group::Linear,
        summary: "a token replaces what its key has read, instead of adding to it",
        equation: "S_i = S_{i−1} + β_i k_i (v_i − S_{i−1}ᵀ k_i)ᵀ,   o_i = q_i S_i",
        cost: "6·N·D²",
        paper: "arXiv:2406.06484",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "gated_delta",
        group: Group::Linear,
        summary: "the delta rule on a state that decays by one number for each token and head",
        equation: "S_i = a_i S_{i−1} + β_i k_i (v_i − a_i S_{i−1}ᵀ k_i)ᵀ,   o_i = q_i S_i",
        cost: "6·N·D²",
        paper: "arXiv:2412.06464",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "infini",
        group: Group::Memory,
        summary: "attention within a segment, mixed by a gate with what a matrix remembers of the segments before",
        equation: "o = σ(g) φ(q)M/φ(q)z + (1 − σ(g)) segment;   M ← M + φ(k)ᵀ v",
        cost: "2·N·s·D + 4·N·D²",
        paper: "arXiv:2404.07143",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "memorizing",
        group: Group::Memory,
        summary: "attention within a segment, mixed by a gate with attention to the best of a document's past keys",
        equation: "o = σ(g) top-k of the memory + (1 − σ(g)) segment",
        cost: "2·N·s·D + 2·N·memory·D for the search",
        paper: "arXiv:2203.08913",
        forward: true,
        backward: true,
        decode: true,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_fit_for_configurations() {
        for (i, mechanism) in MECHANISMS.iter().enumerate() {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            assert!(mechanism.name.chars().all(plain), "{}", mechanism.name);
            assert!(MECHANISMS[..i].iter().all(|other| other.name != mechanism.name));
        }
    }

    #[test]
    fn every_mechanism_has_its_equation_its_cost_and_its_picture() {
        for mechanism in MECHANISMS {
            let name = mechanism.name;
            assert!(!mechanism.equation.is_empty() && !mechanism.cost.is_empty(), "{name}");
            let rows = picture(name);
            assert_eq!(rows.len(), PICTURE_TOKENS, "{name}");
            // Every token sees something.
            let seen = |row: &String| row.len() == PICTURE_TOKENS && row.bytes().any(|x| x != b'0');
            assert!(rows.iter().all(seen), "{name}");
        }
    }
}
