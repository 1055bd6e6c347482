//! The golden vectors of `tests/golden`: see the README there.

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Numbers with any number of axes, row-major. Integers and bytes are widened: all are below 2⁵³.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

impl Array {
    pub fn indices(&self) -> Vec<usize> {
        self.data.iter().map(|&x| x as usize).collect()
    }
    pub fn flags(&self) -> Vec<bool> {
        self.data.iter().map(|&x| x != 0.0).collect()
    }
    pub fn to_f32(&self) -> Vec<f32> {
        self.data.iter().map(|&x| x as f32).collect()
    }
}

/// One entry of the manifest with its tensors.
#[derive(Debug)]
pub struct Case {
    pub name: String,
    pub options: Value,
    pub tensors: BTreeMap<String, Array>,
    /// All tolerances, by name: `f64`, `f32`, …
    pub tolerance: Value,
}

impl Case {
    pub fn tensor(&self, name: &str) -> &Array {
        let tensor = self.tensors.get(name);
        tensor.unwrap_or_else(|| panic!("{} has no tensor {name}", self.name))
    }
    pub fn tolerance(&self, kind: &str) -> f64 {
        self.tolerance[kind].as_f64().unwrap_or_else(|| panic!("{}: tolerance {kind}", self.name))
    }
    pub fn number(&self, option: &str) -> f64 {
        self.options[option].as_f64().unwrap_or_else(|| panic!("{}: option {option}", self.name))
    }
    /// Compares one result with the tensor of that name.
    pub fn check(&self, tensor: &str, got: &[f64], tolerance: f64) {
        check(&format!("{} {tensor}", self.name), got, &self.tensor(tensor).data, tolerance);
    }
}

/// Requires `max|a − b| <= tolerance · (1 + max|b|)`, and equality where −∞ is expected.
pub fn check(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    let finite = |x: &&f64| x.is_finite();
    let bound = tolerance
        * (1.0 + expected.iter().filter(finite).fold(0.0, |max: f64, x| max.max(x.abs())));
    for (n, (a, b)) in got.iter().zip(expected).enumerate() {
        let close = a == b || (a - b).abs() <= bound;
        assert!(close, "{what}: number {n} is {a}, expected {b} within {bound:e}");
    }
}

/// All cases of a mechanism, in the manifest's order.
pub fn cases(mechanism: &str) -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../foveal/tests/golden");
    let manifest = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let mut manifest: Value = serde_json::from_str(&manifest).unwrap();
    let entries = manifest["cases"].as_array_mut().unwrap();
    let entries = entries.iter_mut().filter(|case| case["mechanism"] == mechanism);
    let cases: Vec<_> = entries
        .map(|case| Case {
            name: case["name"].as_str().unwrap().to_owned(),
            tensors: read(&folder.join(case["file"].as_str().unwrap())),
            options: case["options"].take(),
            tolerance: case["tolerance"].take(),
        })
        .collect();
    assert!(!cases.is_empty(), "no golden cases of {mechanism}");
    cases
}

fn read(path: &Path) -> BTreeMap<String, Array> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter().map(|(name, tensor)| {
        let bytes = tensor.data();
        let data = match tensor.dtype() {
            Dtype::F64 => bytes.as_chunks().0.iter().map(|x| f64::from_le_bytes(*x)).collect(),
            Dtype::F32 => {
                bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x).into()).collect()
            }
            Dtype::I64 => {
                bytes.as_chunks().0.iter().map(|x| i64::from_le_bytes(*x) as f64).collect()
            }
            Dtype::U8 => bytes.iter().map(|&x| x.into()).collect(),
            other => panic!("{}: {name} is {other:?}", path.display()),
        };
        (name, Array { shape: tensor.shape().to_vec(), data })
    });
    tensors.collect()
}
