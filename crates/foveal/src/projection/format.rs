//! The element formats of a stored matrix: plain floats, and GGUF's blocks of small integers with their scales.
//!
//! A row of `in_features` elements is `in_features / block_len` blocks, one after the other, without padding.
//! All numbers are little-endian; `d` and `m` are f16, `x` is the value of an element, offsets are in bytes.
//!
//! | format | elements | bytes | block | value |
//! |---|---|---|---|---|
//! | `F32` `F16` `BF16` | 1 | 4, 2, 2 | the number | `x` |
//! | `Q8_0` | 32 | 34 | `d` @0, 32 × i8 `q` @2 | `d·q` |
//! | `Q4_0` | 32 | 18 | `d` @0, nibbles @2 | `d·(q − 8)` |
//! | `Q4_1` | 32 | 20 | `d` @0, `m` @2, nibbles @4 | `d·q + m` |
//! | `Q5_0` | 32 | 22 | `d` @0, u32 of fifth bits @2, nibbles @6 | `d·(q − 16)` |
//! | `Q5_1` | 32 | 24 | `d` @0, `m` @2, u32 of fifth bits @4, nibbles @8 | `d·q + m` |
//! | `Q4_K` | 256 | 144 | `d` @0, `m` @2, 12 packed bytes @4, nibbles @16 | `d·s·q − m·t` |
//! | `Q5_K` | 256 | 176 | `d` @0, `m` @2, 12 packed bytes @4, fifth bits @16, nibbles @48 | `d·s·q − m·t` |
//! | `Q6_K` | 256 | 210 | low nibbles @0, high bit pairs @128, 16 × i8 `s` @192, `d` @208 | `d·s·(q − 32)` |
//!
//! **Nibbles of a 32-block** are 16 bytes: byte `j` holds element `j` in its low half and element `j + 16` in its
//! high half. In `Q5_0` and `Q5_1`, bit `j` of the u32 is bit 4 of element `j`.
//!
//! **`Q4_K`** has eight runs of 32 elements. Its nibbles are four groups of 32 bytes: the low halves of group `g` are
//! run `2g`, the high halves run `2g + 1`. Each run has a 6-bit scale `s` and a 6-bit minimum `t`, packed in the bytes
//! `p[0..12]`: run `r < 4` has `s = p[r] & 63`, `t = p[r + 4] & 63`; run `r ≥ 4` has
//! `s = (p[r + 4] & 15) | (p[r − 4] >> 6) << 4` and `t = (p[r + 4] >> 4) | (p[r] >> 6) << 4`.
//!
//! **`Q5_K`** is `Q4_K` with 32 more bytes: bit `r` of byte `i` is bit 4 of element `i` of run `r`.
//!
//! **`Q6_K`** has two halves of 128 elements; a half has 64 bytes `l` of nibbles, 32 bytes `h` of bit pairs and eight
//! scales. Its element `32k + i` (`k < 4`, `i < 32`) takes the low bits from `l[32(k mod 2) + i]` (the low half of the
//! byte for `k < 2`, else the high half), the high bits from `h[i] >> 2k & 3`, and the scale `s[2k + i / 16]`.
//!
//! Source: the public GGUF format, as documented with ggml.

/// The element format of a stored matrix.
///
/// A row is a whole number of blocks of [`block_len`](Format::block_len) elements, each of
/// [`block_bytes`](Format::block_bytes) bytes.
///
/// ```
/// use foveal::projection::Format;
///
/// assert_eq!(Format::Q4_1.row_bytes(576), Some(360));
/// assert_eq!(Format::Q4_K.row_bytes(576), None); // not a multiple of 256
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, reason = "the names are those of the format")]
#[non_exhaustive]
pub enum Format {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an `F32`.
    BF16,
    /// 8-bit integers, one scale for 32: 8.5 bits an element.
    Q8_0,
    /// 4-bit integers around 8, one scale for 32: 4.5 bits an element.
    Q4_0,
    /// 4-bit integers, one scale and one minimum for 32: 5 bits an element.
    Q4_1,
    /// 5-bit integers around 16, one scale for 32: 5.5 bits an element.
    Q5_0,
    /// 5-bit integers, one scale and one minimum for 32: 6 bits an element.
    Q5_1,
    /// 4-bit integers, a 6-bit scale and minimum for 32, two f16 for 256: 4.5 bits an element.
    Q4_K,
    /// 5-bit integers, a 6-bit scale and minimum for 32, two f16 for 256: 5.5 bits an element.
    Q5_K,
    /// 6-bit integers around 32, an 8-bit scale for 16, one f16 for 256: 6.5625 bits an element.
    Q6_K,
}

impl Format {
    /// Every format, in the order of the enum.
    pub const ALL: [Format; 11] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Q8_0,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q4_K,
        Format::Q5_K,
        Format::Q6_K,
    ];

    /// Elements in a block; 1 for the plain floats.
    pub const fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::BF16 => 1,
            Format::Q8_0 | Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 => 32,
            Format::Q4_K | Format::Q5_K | Format::Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::BF16 => 2,
            Format::Q8_0 => 34,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
            Format::Q5_0 => 22,
            Format::Q5_1 => 24,
            Format::Q4_K => 144,
            Format::Q5_K => 176,
            Format::Q6_K => 210,
        }
    }

    /// The name that GGUF gives it, such as `Q4_K`.
    pub const fn name(self) -> &'static str {
        match self {
            Format::F32 => "F32",
            Format::F16 => "F16",
            Format::BF16 => "BF16",
            Format::Q8_0 => "Q8_0",
            Format::Q4_0 => "Q4_0",
            Format::Q4_1 => "Q4_1",
            Format::Q5_0 => "Q5_0",
            Format::Q5_1 => "Q5_1",
            Format::Q4_K => "Q4_K",
            Format::Q5_K => "Q5_K",
            Format::Q6_K => "Q6_K",
        }
    }

    /// Bytes of a row of `in_features` elements: `None` when that is not a whole number of blocks, or overflows.
    pub const fn row_bytes(self, in_features: usize) -> Option<usize> {
        if !in_features.is_multiple_of(self.block_len()) {
            return None;
        }
        (in_features / self.block_len()).checked_mul(self.block_bytes())
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::Format;

    #[test]
    fn rows_are_whole_blocks() {
        for format in Format::ALL {
            let (len, bytes) = (format.block_len(), format.block_bytes());
            assert_eq!(format.row_bytes(0), Some(0));
            assert_eq!(format.row_bytes(3 * len), Some(3 * bytes));
            if len > 1 {
                assert_eq!(format.row_bytes(3 * len + 1), None, "{format}");
                assert_eq!(format.row_bytes(len - 1), None, "{format}");
            }
        }
    }

    #[test]
    fn a_row_too_long_for_memory_has_no_size() {
        assert_eq!(Format::F32.row_bytes(usize::MAX), None);
        assert_eq!(Format::Q8_0.row_bytes(usize::MAX - 31), None);
    }
}
