//! What can be compared alone, and what it leaves behind.

use foveal::linear::Favor;
pub(crate) use foveal::testing::alone::{DIM, HEADS, WINDOW};

/// What can be run: the computation that kernels replace, and the mechanisms by which a token sees earlier ones alone.
pub(crate) const NAMES: [&str; 17] = [
    "unfused",
    "full",
    "window",
    "sparse_transformer",
    "longformer",
    "lsh",
    "moba",
    "native_sparse",
    "linear",
    "performer",
    "efficient",
    "retention",
    "scalar_decay",
    "gla",
    "gated_delta",
    "infini",
    "memorizing",
];

/// Bytes that a text of so many tokens leaves behind in such a layer, keys and values as f16, matrices as f32.
pub(crate) fn state_bytes(name: &str, tokens: usize) -> usize {
    let row = 2 * HEADS * DIM * 2;
    let matrices = HEADS * DIM * DIM * 4;
    match name {
        "window" => row * tokens.min(WINDOW),
        "longformer" => row * tokens.min(WINDOW + 1),
        "sparse_transformer" => row * tokens,
        "performer" => {
            HEADS
                * Favor::published(DIM, 1)
                    .map_or(0, |favor| favor.features().count() * (DIM + 1) * 4)
        }
        "linear" | "efficient" => matrices + HEADS * DIM * 4,
        "retention" | "scalar_decay" | "gla" | "gated_delta" => matrices,
        "infini" => matrices + HEADS * DIM * 4 + row * tokens.min(WINDOW),
        // Keys as they are, and their compressed ones.
        "native_sparse" => row * tokens + row * tokens / 16,
        _ => row * tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_one_of_the_registry_and_leaves_something_behind() {
        for name in NAMES {
            let known = foveal::registry::MECHANISMS.iter().any(|one| one.name == name);
            assert!((known || name == "unfused") && state_bytes(name, 4096) > 0, "{name}");
        }
    }
}
