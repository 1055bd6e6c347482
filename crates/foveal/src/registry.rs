//! The mechanisms that exist, as data: what `foveal list` prints and the tables of the documentation are made from.

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
        paper: "arXiv:1706.03762, arXiv:2305.13245",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "window",
        group: Group::Exact,
        summary: "every token sees a number of the newest tokens, its own included",
        paper: "arXiv:2004.05150, section 3.1",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "differential",
        group: Group::Exact,
        summary: "the difference of two softmaxes over the same values, normalised",
        paper: "arXiv:2410.05258",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "mla",
        group: Group::Exact,
        summary: "keys and values of all heads are made from one compressed row a token, or queries taken to it",
        paper: "arXiv:2405.04434",
        forward: true,
        backward: false,
        decode: true,
    },
    Mechanism {
        name: "transformer_xl",
        group: Group::Exact,
        summary: "earlier segments are remembered, and queries are compared with keys and with distances",
        paper: "arXiv:1901.02860",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "sparse_transformer",
        group: Group::Sparse,
        summary: "near tokens and every l-th one, or the own block and the ends of earlier ones",
        paper: "arXiv:1904.10509",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "longformer",
        group: Group::Sparse,
        summary: "a window, perhaps with gaps, and global tokens with projections of their own; causal or not",
        paper: "arXiv:2004.05150",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "bigbird",
        group: Group::Sparse,
        summary: "neighbouring blocks, the first and the last, and blocks drawn at random",
        paper: "arXiv:2007.14062",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "lsh",
        group: Group::Sparse,
        summary: "Reformer: tokens that hash alike, sorted and cut into chunks; several rounds; queries are keys",
        paper: "arXiv:2001.04451",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "moba",
        group: Group::Sparse,
        summary: "the own block and the earlier ones whose mean key suits the query best",
        paper: "arXiv:2502.13189",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "native_sparse",
        group: Group::Sparse,
        summary: "compressed tokens, the blocks whose compressed tokens weigh most, and a window, summed by gates",
        paper: "arXiv:2502.11089",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "linear",
        group: Group::Linear,
        summary: "queries and keys mapped to positive numbers, their products normalised; causal or not",
        paper: "arXiv:2006.16236",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "performer",
        group: Group::Linear,
        summary: "softmax attention estimated by positive orthogonal random features (FAVOR+), or features max(ωx, 0); causal or not",
        paper: "arXiv:2009.14794",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "efficient",
        group: Group::Linear,
        summary: "softmax over the channels of queries and, in each channel, over keys; causal or not",
        paper: "arXiv:1812.01243",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "linformer",
        group: Group::Linear,
        summary: "softmax attention to few learned mixtures of all keys and values; not causal",
        paper: "arXiv:2006.04768",
        forward: true,
        backward: true,
        decode: false,
    },
    Mechanism {
        name: "retention",
        group: Group::Linear,
        summary: "a state that decays by a constant of each head",
        paper: "arXiv:2307.08621",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "scalar_decay",
        group: Group::Linear,
        summary: "a state that decays by one number for each token and head, as in Mamba-2",
        paper: "arXiv:2405.21060",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "gla",
        group: Group::Linear,
        summary: "a state that decays by a number for each token and key channel",
        paper: "arXiv:2312.06635",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "delta",
        group: Group::Linear,
        summary: "a token replaces what its key has read, instead of adding to it",
        paper: "arXiv:2406.06484",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "gated_delta",
        group: Group::Linear,
        summary: "the delta rule on a state that decays by one number for each token and head",
        paper: "arXiv:2412.06464",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "infini",
        group: Group::Memory,
        summary: "attention within a segment, mixed by a gate with what a matrix remembers of the segments before",
        paper: "arXiv:2404.07143",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "memorizing",
        group: Group::Memory,
        summary: "attention within a segment, mixed by a gate with attention to the best of a document's past keys",
        paper: "arXiv:2203.08913",
        forward: true,
        backward: true,
        decode: true,
    },
];

#[cfg(test)]
mod tests {
    use super::MECHANISMS;

    #[test]
    fn names_are_unique_and_fit_for_configurations() {
        for (i, mechanism) in MECHANISMS.iter().enumerate() {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            assert!(mechanism.name.chars().all(plain), "{}", mechanism.name);
            assert!(MECHANISMS[..i].iter().all(|other| other.name != mechanism.name));
        }
    }
}
