//! Files cut short, with bits flipped, with fields overwritten: an error or a consistent model, never a panic.

use foveal_lm::weights::Error;
use foveal_lm::weights::gguf::Gguf;
use proptest::prelude::*;

use crate::support::small_file;
use foveal_lm::testing::read_gguf;

fn open(bytes: Vec<u8>) -> Result<(), Error> {
    let len = bytes.len();
    Gguf::from_bytes(bytes).map(|file| read_gguf(&file, len))
}

#[test]
fn every_truncation_is_an_error() {
    let whole = small_file();
    for len in 0..whole.len() {
        assert!(open(whole[..len].to_vec()).is_err(), "{len} of {} bytes", whole.len());
    }
    open(whole).unwrap();
}

#[test]
fn every_flipped_bit_is_an_error_or_a_model() {
    let whole = small_file();
    let mut refused = 0;
    for bit in 0..8 * whole.len() {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        refused += usize::from(open(bytes).is_err());
    }
    assert!(refused > 1000, "only {refused} flips were noticed");
}

#[test]
fn extreme_numbers_anywhere_are_an_error_or_a_model() {
    let whole = small_file();
    let extremes = [0, 1, u64::MAX, u64::MAX - 1, i64::MAX as u64, 1 << 63, 1 << 32, u64::MAX - 31];
    for at in 0..whole.len() - 8 {
        for extreme in extremes {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&extreme.to_le_bytes());
            let _ = open(bytes);
        }
    }
}

#[test]
fn every_pair_of_a_cut_and_an_extreme_is_an_error_or_a_model() {
    let whole = small_file();
    for at in (0..whole.len() - 8).step_by(3) {
        for len in (at + 8..whole.len()).step_by(7) {
            let mut bytes = whole[..len].to_vec();
            bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
            let _ = open(bytes);
        }
    }
}

proptest! {
    #[test]
    fn edited_files_are_an_error_or_a_model(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)
    ) {
        let mut bytes = small_file();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = open(bytes);
    }

    #[test]
    fn random_bytes_after_the_counts_are_an_error_or_a_model(
        tensors in 0u64..4, entries in 0u64..4, rest in prop::collection::vec(0u8..14, 0..400)
    ) {
        let header = crate::support::Fields::header(3, tensors, entries);
        let _ = open(header.raw(&rest).0);
    }
}
