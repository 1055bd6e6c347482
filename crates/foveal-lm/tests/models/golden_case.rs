//! Golden outputs of whole models: `tests/golden/manifest.json` and the files beside it.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "shared by tests that each use some of it"
)]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

/// One case: what the manifest says, and its tensors.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) tolerance: f32,
    bytes: Vec<u8>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

impl Case {
    /// The cases whose name begins with `prefix`; there is one at least.
    pub(crate) fn all(prefix: &str) -> Vec<Case> {
        let text = std::fs::read_to_string(folder().join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_str(&text).unwrap();
        let entries = manifest["cases"].as_array().unwrap();
        let chosen =
            entries.iter().filter(|case| case["name"].as_str().unwrap().starts_with(prefix));
        let cases: Vec<Case> = chosen.map(Case::read).collect();
        assert!(!cases.is_empty(), "no case {prefix}");
        cases
    }

    fn read(entry: &Value) -> Case {
        Case {
            name: entry["name"].as_str().unwrap().to_owned(),
            tolerance: entry["tolerance"]["f32"].as_f64().unwrap() as f32,
            bytes: std::fs::read(folder().join(entry["file"].as_str().unwrap())).unwrap(),
        }
    }

    fn data<const N: usize>(&self, name: &str, dtype: safetensors::Dtype) -> Vec<[u8; N]> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), dtype, "{name}");
        tensor.data().as_chunks().0.to_vec()
    }

    pub(crate) fn tokens(&self, name: &str) -> Vec<u32> {
        let ids = self.data(name, safetensors::Dtype::I64);
        ids.into_iter().map(|id| i64::from_le_bytes(id).try_into().unwrap()).collect()
    }

    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        let numbers = self.data(name, safetensors::Dtype::F32);
        numbers.into_iter().map(f32::from_le_bytes).collect()
    }

    /// Numbers that are stored as f64.
    pub(crate) fn doubles(&self, name: &str) -> Vec<f32> {
        let numbers = self.data(name, safetensors::Dtype::F64);
        numbers.into_iter().map(|number| f64::from_le_bytes(number) as f32).collect()
    }
}

/// The largest difference; NaN counts as infinite.
pub(crate) fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |most, d| if d <= most { most } else { d })
}

pub(crate) fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// −ln softmax(logits)[token].
pub(crate) fn nll(logits: &[f32], token: u32) -> f32 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - most).exp()).sum();
    (sum.ln() + f64::from(most - logits[token as usize])) as f32
}
