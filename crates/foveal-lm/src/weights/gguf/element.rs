//! The numbers that GGUF gives to element types.

use foveal::projection::Format;

use crate::weights::ElementType;

/// The element type with ggml's number `id`, and the elements and bytes of its blocks where they are known.
pub(super) fn element_type(id: u32) -> (ElementType, Option<(usize, usize)>) {
    if let Some(format) = format(id) {
        return (ElementType::Known(format), Some((format.block_len(), format.block_bytes())));
    }
    let (name, layout) = match id {
        9 => ("Q8_1", None),
        10 => ("Q2_K", Some((256, 84))),
        11 => ("Q3_K", Some((256, 110))),
        15 => ("Q8_K", Some((256, 292))),
        16 => ("IQ2_XXS", Some((256, 66))),
        17 => ("IQ2_XS", Some((256, 74))),
        18 => ("IQ3_XXS", Some((256, 98))),
        19 => ("IQ1_S", Some((256, 50))),
        20 => ("IQ4_NL", Some((32, 18))),
        21 => ("IQ3_S", Some((256, 110))),
        22 => ("IQ2_S", Some((256, 82))),
        23 => ("IQ4_XS", Some((256, 136))),
        24 => ("I8", Some((1, 1))),
        25 => ("I16", Some((1, 2))),
        26 => ("I32", Some((1, 4))),
        27 => ("I64", Some((1, 8))),
        28 => ("F64", Some((1, 8))),
        29 => ("IQ1_M", Some((256, 56))),
        34 => ("TQ1_0", Some((256, 54))),
        35 => ("TQ2_0", Some((256, 66))),
        39 => ("MXFP4", Some((32, 17))),
        40 => ("NVFP4", Some((64, 36))),
        41 => ("Q1_0", Some((128, 18))),
        _ => ("unknown", None),
    };
    (ElementType::Unsupported { name, id: Some(id) }, layout)
}

fn format(id: u32) -> Option<Format> {
    Format::ALL.into_iter().find(|&format| type_id(format) == Some(id))
}

/// ggml's number for a format.
pub(super) fn type_id(format: Format) -> Option<u32> {
    Some(match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q4_0 => 2,
        Format::Q4_1 => 3,
        Format::Q5_0 => 6,
        Format::Q5_1 => 7,
        Format::Q8_0 => 8,
        Format::Q4_K => 12,
        Format::Q5_K => 13,
        Format::Q6_K => 14,
        Format::BF16 => 30,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_a_number() {
        for format in Format::ALL {
            let id = type_id(format).expect("GGUF can store every format");
            assert_eq!(element_type(id).0, ElementType::Known(format));
        }
    }

    #[test]
    fn other_types_keep_their_number() {
        let (q3_k, layout) = element_type(11);
        assert_eq!(q3_k.to_string(), "Q3_K (ggml type 11)");
        assert_eq!(layout, Some((256, 110)));
        assert_eq!(element_type(u32::MAX).0.to_string(), "unknown (ggml type 4294967295)");
    }
}
