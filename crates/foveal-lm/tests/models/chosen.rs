//! Sections whose keys depend on content or on projections of their own, by their definitions in f64: LSH attention given its
//! buckets, and Longformer's global rows.

use foveal::sparse::AngularHash;
use foveal::{Cpu, Shape, Tensor};
use foveal_lm::testing::TinyTensor;
use serde_json::Value;

use crate::latent::tensor;
use crate::sections::{Rows, Tensors, dot};

/// The tensors that a section has beyond its layer's.
pub(crate) fn tensors(
    section: &Value,
    (heads, kv_heads): (usize, usize),
    (layer, n): (usize, usize),
    (width, dim): (usize, usize),
) -> Vec<TinyTensor> {
    if section["global_projections"] != true {
        return vec![];
    }
    let matrix =
        |part: &str, heads| tensor(layer, &format!("sections.{n}.{part}"), &[heads * dim, width]);
    vec![matrix("q_global", heads), matrix("k_global", kv_heads), matrix("v_global", kv_heads)]
}

/// What a section of LSH attention gives, `[tokens][heads · dim]`; `None` for another one.
pub(crate) fn mix(
    section: &Value,
    tensors: &Tensors<'_>,
    (first, heads): (usize, usize),
    dim: usize,
) -> Option<Rows> {
    if section["name"] != "lsh" {
        return None;
    }
    let count = |key: &str| section[key].as_u64().map(|count| count as usize);
    let (chunk, buckets) = (count("chunk").unwrap(), count("buckets").unwrap());
    let (rounds, seed) = (count("rounds").unwrap_or(2), count("seed").unwrap_or(0) as u64);
    let hash = AngularHash::new(dim, buckets, rounds, seed).unwrap();
    let tokens = tensors.v.len();
    let mut out = vec![vec![]; tokens];
    for head in first..first + heads {
        let cut = |x: &Rows| -> Rows {
            x.iter().map(|row| row[head * dim..(head + 1) * dim].to_vec()).collect()
        };
        let (plain, q, v) = (cut(tensors.plain[0]), cut(tensors.rotated[0]), cut(tensors.v));
        let hashed = plain.concat().iter().map(|&x| x as f32).collect();
        let hashed = Tensor::from_vec(hashed, Shape { batch: 1, seq: tokens, heads: 1, dim });
        let own = hash.buckets(hashed.unwrap().view(), Cpu::detect().unwrap()).unwrap();
        for i in 0..tokens {
            // Logits, as often as a key is seen.
            let mut seen = vec![];
            for round in 0..rounds {
                let own = own.of(0, 0, round);
                let before: Vec<usize> = (0..i).filter(|&j| own[j] == own[i]).collect();
                let start = (before.len() / chunk).saturating_sub(1) * chunk;
                seen.extend(before[start..].iter().map(|&j| (j, 0.0)));
                seen.push((i, -1e5));
            }
            let logit =
                |&(j, own): &(usize, f64)| own + dot(&q[i], &q[j]) / dot(&q[j], &q[j]).sqrt();
            let logits: Vec<f64> = seen.iter().map(logit).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
            let mut row = vec![0.0; dim];
            for ((j, _), logit) in seen.iter().zip(logits) {
                let weight = (logit - max).exp() / sum;
                row.iter_mut().zip(&v[*j]).for_each(|(to, v)| *to += weight * v);
            }
            out[i].extend(row);
        }
    }
    Some(out)
}

/// The rotated queries and keys of a section's global projections, and the values; `None` without any.
pub(crate) fn global(section: &Value, tensors: &Tensors<'_>, n: usize) -> Option<[Rows; 3]> {
    if section["global_projections"] != true {
        return None;
    }
    let project = |part: &str| (tensors.project)(&format!("sections.{n}.{part}"), tensors.inputs);
    let [q, k] = ["q_global", "k_global"].map(|part| (tensors.rotate)(project(part)));
    Some([q, k, if tensors.bare { tensors.v.clone() } else { project("v_global") }])
}
