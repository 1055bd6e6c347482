//! What the page shows of each mechanism of the registry: equation, cost, who sees whom, and how long it takes here.

mod measure;
mod pictures;

use foveal::registry::{MECHANISMS, Mechanism};
use serde_json::{Value, json};

pub(crate) use measure::{Measuring, TOKENS};
pub(crate) use pictures::TOKENS as PICTURE_TOKENS;

/// A mechanism's equation and the order of its cost, for N tokens of D numbers a head.
fn words(name: &str) -> [&'static str; 2] {
    const FULL: &str = "o_i = Σ_{j≤i} softmax_j(q_i·k_j/√D) v_j";
    match name {
        "full" => [FULL, "2·N²·D"],
        "window" => ["o_i = Σ_{i−w<j≤i} softmax_j(q_i·k_j/√D) v_j", "4·N·w·D"],
        "differential" => ["o = norm((softmax(q¹k¹ᵀ) − λ softmax(q²k²ᵀ)) v)", "4·N²·D"],
        "mla" => ["k_j = W_k c_j,  v_j = W_v c_j,  c_j = W_c x_j, shared by all heads", "2·N²·D"],
        "transformer_xl" => [
            "s_ij = (q_i + u)·k_j + (q_i + v)·W_r R_{i−j}",
            "4·N²·D, segments and what they remember",
        ],
        "sparse_transformer" => ["seen(i) = {i−l … i} ∪ {j : (i − j) mod l = 0}", "8·N·√N·D"],
        "longformer" => {
            ["seen(i) = {j : |i − j| ≤ w} ∪ global; global tokens see all", "4·N·(w + g)·D"]
        }
        "bigbird" => ["seen(block) = neighbours ∪ first ∪ last ∪ r at random", "4·N·(5 + r)·b·D"],
        "lsh" => [
            "seen(i) = {j ≤ i : hash(q_j) = hash(q_i)}, in chunks, several rounds",
            "8·N·c·rounds·D",
        ],
        "moba" => {
            ["seen(i) = own block ∪ top k of earlier blocks by q_i · mean(k_block)", "4·N·k·b·D"]
        }
        "native_sparse" => {
            ["o = g¹ compressed + g² selected blocks + g³ window", "4·N·(N/s + n·b + w)·D"]
        }
        "linear" => ["S_i = S_{i−1} + φ(k_i) v_iᵀ,   o_i = φ(q_i) S_i / φ(q_i)·z_i", "4·N·D²"],
        "performer" => ["φ(x) = exp(ωx − |x|²/2)/√m,  E[φ(q)·φ(k)] = e^{q·k}", "8·N·m·D"],
        "efficient" => ["o = softmax_D(q) (softmax_N(k)ᵀ v)", "4·N·D²"],
        "linformer" => ["o = softmax(q (E k)ᵀ) (F v),  E and F mix N tokens to r", "8·N·r·D"],
        "retention" => ["S_i = γ S_{i−1} + k_i v_iᵀ,   o_i = q_i S_i", "4·N·D²"],
        "scalar_decay" => ["S_i = a_i S_{i−1} + k_i v_iᵀ,   o_i = q_i S_i", "4·N·D²"],
        "gla" => ["S_i = diag(α_i) S_{i−1} + k_i v_iᵀ,   o_i = q_i S_i", "4·N·D²"],
        "delta" => ["S_i = S_{i−1} + β_i k_i (v_i − S_{i−1}ᵀ k_i)ᵀ,   o_i = q_i S_i", "6·N·D²"],
        "gated_delta" => {
            ["S_i = a_i S_{i−1} + β_i k_i (v_i − a_i S_{i−1}ᵀ k_i)ᵀ,   o_i = q_i S_i", "6·N·D²"]
        }
        "infini" => {
            ["o = σ(g) φ(q)M/φ(q)z + (1 − σ(g)) segment;   M ← M + φ(k)ᵀ v", "2·N·s·D + 4·N·D²"]
        }
        "memorizing" => [
            "o = σ(g) top-k of the memory + (1 − σ(g)) segment",
            "2·N·s·D + 2·N·memory·D for the search",
        ],
        _ => ["", ""],
    }
}

/// All mechanisms.
pub(crate) fn all() -> Value {
    let all = MECHANISMS.iter().map(|mechanism| {
        let Mechanism { name, summary, paper, forward, backward, decode, .. } = *mechanism;
        let [equation, cost] = words(name);
        json!({
            "name": name,
            "group": mechanism.group.name(),
            "summary": summary,
            "paper": paper,
            "forward": forward,
            "backward": backward,
            "decode": decode,
            "equation": equation,
            "cost": cost,
            "picture": pictures::picture(name),
        })
    });
    json!({"tokens": PICTURE_TOKENS, "mechanisms": all.collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mechanism_of_the_registry_has_its_words_and_its_picture() {
        for mechanism in MECHANISMS {
            let [equation, cost] = words(mechanism.name);
            assert!(!equation.is_empty() && !cost.is_empty(), "{}", mechanism.name);
            let rows = pictures::picture(mechanism.name);
            assert_eq!(rows.len(), PICTURE_TOKENS, "{}", mechanism.name);
            assert!(rows.iter().all(|row| row.len() == PICTURE_TOKENS));
            // Every token sees something, and the last one's row is not that of a token that sees nothing else.
            assert!(
                rows.iter().all(|row| row.bytes().any(|sees| sees != b'0')),
                "{}",
                mechanism.name
            );
        }
    }
}
