//! Models that people use, against values that the Python package `gguf` 0.19 reads from the same files.

use foveal_lm::testing::{Model, fetch_model};
use foveal_lm::weights::gguf::{Gguf, Strings};
use foveal_lm::weights::{Description, Weights};

use crate::gguf_round_trip::copy;

/// A tensor, its format and shape, and of its last row the first value, the last value, and the sum in f64.
struct LastRow {
    name: &'static str,
    format: &'static str,
    shape: [usize; 2],
    first: f32,
    last: f32,
    sum: f64,
}

impl LastRow {
    fn check(&self, weights: &Weights) {
        let weight = weights.tensor(self.name).unwrap().with_shape(&self.shape).unwrap();
        assert_eq!(weight.format().name(), self.format);
        let row = weight.row(self.shape[0] - 1).unwrap();
        let mut values = vec![f32::NAN; self.shape[1]];
        foveal::projection::dequantize_row(weight.format(), row, &mut values).unwrap();
        let sum: f64 = values.iter().map(|&x| f64::from(x)).sum();
        assert_eq!((values[0], values[self.shape[1] - 1], sum), (self.first, self.last, self.sum));
    }
}

fn stored_as(weights: &Weights, format: &str) -> usize {
    weights.tensors().iter().filter(|tensor| tensor.element.to_string() == format).count()
}

fn tokens(weights: &Weights) -> Vec<&str> {
    let Description::Gguf(metadata) = weights.description() else { panic!("a GGUF file") };
    let tokens: Strings = metadata.require("tokenizer.ggml.tokens").unwrap();
    tokens.map(Result::unwrap).collect()
}

#[test]
fn smollm2_opens() {
    let Some(path) = fetch_model(Model::SmolLm2) else { return };
    let weights = Weights::open(&path).unwrap();
    assert_eq!(weights.tensors().len(), 272);
    assert_eq!(["F32", "Q4_1", "Q8_0"].map(|f| stored_as(&weights, f)), [61, 210, 1]);
    assert_eq!(tokens(&weights).len(), 49_152);
    assert_eq!(tokens(&weights)[7042], "ĠParis");
    let rows = [
        LastRow {
            name: "token_embd.weight",
            format: "Q8_0",
            shape: [49_152, 576],
            first: 0.011505127,
            last: -0.04170227,
            sum: -0.466_220_855_712_890_6,
        },
        LastRow {
            name: "blk.0.ffn_down.weight",
            format: "Q4_1",
            shape: [576, 1536],
            first: -0.040222168,
            last: -0.18136597,
            sum: 1.456_176_757_812_5,
        },
    ];
    rows.iter().for_each(|row| row.check(&weights));
}

#[test]
fn gemma3_opens() {
    let Some(path) = fetch_model(Model::Gemma3) else { return };
    let weights = Weights::open(&path).unwrap();
    assert_eq!(weights.tensors().len(), 236);
    let formats = ["F32", "Q8_0", "Q5_0", "Q4_K", "Q6_K"];
    assert_eq!(formats.map(|f| stored_as(&weights, f)), [109, 10, 81, 27, 9]);
    assert_eq!(tokens(&weights).len(), 262_144);
    assert_eq!(tokens(&weights)[506], "▁the");
    let Description::Gguf(metadata) = weights.description() else { panic!("a GGUF file") };
    assert_eq!(metadata.require::<Vec<f32>>("tokenizer.ggml.scores").unwrap().len(), 262_144);
    assert_eq!(metadata.require::<u32>("gemma3.attention.sliding_window").unwrap(), 512);
    let rows = [
        LastRow {
            name: "token_embd.weight",
            format: "Q8_0",
            shape: [262_144, 640],
            first: -0.0075502396,
            last: -0.017424583,
            sum: -0.037_315_845_489_501_95,
        },
        LastRow {
            name: "blk.0.attn_k.weight",
            format: "Q5_0",
            shape: [256, 640],
            first: -0.020629883,
            last: 0.024047852,
            sum: -0.055_572_509_765_625,
        },
        LastRow {
            name: "blk.0.attn_output.weight",
            format: "Q4_K",
            shape: [640, 1024],
            first: -0.039336205,
            last: -0.011407614,
            sum: 0.589_304_685_592_651_4,
        },
        LastRow {
            name: "blk.0.ffn_down.weight",
            format: "Q6_K",
            shape: [640, 2048],
            first: 0.0016117096,
            last: -0.009414017,
            sum: 0.136_157_989_501_953_12,
        },
    ];
    rows.iter().for_each(|row| row.check(&weights));
}

/// The writer against ggml's own: the same metadata and tensors make the same file, byte for byte.
#[test]
fn a_copy_of_smollm2_is_smollm2() {
    let Some(path) = fetch_model(Model::SmolLm2) else { return };
    let copied = copy(&Gguf::open(&path).unwrap());
    assert!(copied == std::fs::read(&path).unwrap(), "the copy differs");
}

#[test]
fn the_other_files_can_be_fetched() {
    for model in [Model::Glass, Model::GlassTokenizer] {
        let Some(path) = fetch_model(model) else { return };
        assert!(path.is_file());
        assert_eq!(fetch_model(model), Some(path));
    }
}
