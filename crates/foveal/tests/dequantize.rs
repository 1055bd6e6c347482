//! Every stored format against an independent decoder.
//!
//! `fixtures/dequantize.safetensors` holds, for each format, random blocks with finite scales (`NAME.blocks`, u8) and
//! their values (`NAME.values`, f32) as decoded by `gguf.quants.dequantize` of the Python package `gguf` 0.19.

use foveal::projection::{Format, dequantize_row};
use safetensors::SafeTensors;

#[test]
fn every_format_agrees_bit_for_bit() {
    let file = SafeTensors::deserialize(include_bytes!("fixtures/dequantize.safetensors")).unwrap();
    for format in Format::ALL {
        let blocks = file.tensor(&format!("{format}.blocks")).unwrap();
        let values = file.tensor(&format!("{format}.values")).unwrap();
        let expected: Vec<u32> =
            values.data().as_chunks().0.iter().map(|x| u32::from_le_bytes(*x)).collect();
        let mut got = vec![f32::NAN; expected.len()];
        dequantize_row(format, blocks.data(), &mut got).unwrap();
        let got: Vec<u32> = got.iter().map(|x| x.to_bits()).collect();
        assert_eq!(got, expected, "{format}");
    }
}
