//! What each field of a GGUF file means, and what is said when it is wrong.

use std::sync::Arc;

use foveal::projection::Format;
use foveal_lm::weights::gguf::{Gguf, Strings, Value, ValueType};
use foveal_lm::weights::{Description, ElementType, Error, Weight, Weights};

use crate::support::{ARRAY, BOOL, Fields, STRING, U32, small_file};

fn error(fields: Fields) -> Error {
    fields.open().expect_err("the file is wrong")
}

#[test]
fn a_small_file_reads_as_written() {
    let file = Gguf::from_bytes(small_file()).unwrap();
    assert_eq!((file.version(), file.alignment()), (3, 32));
    let metadata = file.metadata();
    assert_eq!(metadata.require::<&str>("general.architecture").unwrap(), "llama");
    assert_eq!(metadata.require::<f32>("eps").unwrap(), 1e-5);
    assert!(metadata.require::<bool>("tied").unwrap());
    let tokens: Vec<_> =
        metadata.require::<Strings>("tokens").unwrap().map(Result::unwrap).collect();
    assert_eq!(tokens, ["a", "", "€"]);
    let Value::Array(nested) = metadata.require("nested").unwrap() else { panic!("an array") };
    assert_eq!((nested.len(), nested.element_type()), (2, ValueType::Array));
    assert_eq!(metadata.get::<u32>("absent").unwrap(), None);
    assert_eq!(metadata.keys().next(), Some("general.architecture"));
}

#[test]
fn shapes_have_the_contiguous_axis_last() {
    let file = Gguf::from_bytes(small_file()).unwrap();
    let [wide, other, norm] = file.tensors() else { panic!("three tensors") };
    assert_eq!((&wide.shape[..], wide.element), (&[2, 32][..], ElementType::Known(Format::Q8_0)));
    assert_eq!((wide.bytes, other.bytes, norm.bytes), (Some(68), Some(136), Some(16)));
    assert_eq!((other.offset - wide.offset, norm.offset % 32), (96, 0));
    assert_eq!(file.tensor("norm").unwrap().to_f32(), [1.0, 2.0, 0.0, -2.0]);
    let wide = file.tensor("wide").unwrap();
    assert_eq!((wide.out_features(), wide.in_features(), wide.row_bytes()), (2, 32, 34));
    assert_eq!(wide.row(1).unwrap()[0], 34);
    assert_eq!(wide.row(2), None);
    let unsupported = file.tensor("other").unwrap_err().to_string();
    assert!(unsupported.contains("IQ4_XS (ggml type 23)") && unsupported.contains("Q6_K"));
}

#[test]
fn a_weight_outlives_its_file() {
    let file = Gguf::from_bytes(small_file()).unwrap();
    let norm = file.tensor("norm").unwrap();
    drop(file);
    assert_eq!(norm.to_f32()[3], -2.0);
    let wrong = norm.with_shape(&[2, 2]).unwrap_err().to_string();
    assert_eq!(wrong, "tensor \"norm\" has the shape [4], expected [2, 2]");
}

#[test]
fn files_may_be_shared_or_built_in() {
    let shared: Arc<[u8]> = small_file().into();
    let embedded: &'static [u8] = Box::leak(small_file().into_boxed_slice());
    for file in [Gguf::from_bytes(shared).unwrap(), Gguf::from_static(embedded).unwrap()] {
        assert_eq!(file.tensor("norm").unwrap().to_f32(), [1.0, 2.0, 0.0, -2.0]);
    }
}

#[test]
fn weights_can_be_made_of_bytes() {
    let weight =
        Weight::new("w", &[2, 1], Format::F32, vec![0, 0, 0x80, 0x3f, 0, 0, 0, 0x40]).unwrap();
    assert_eq!(format!("{weight:?}"), "Weight(\"w\", F32 [2, 1])");
    assert_eq!(weight.to_f32(), [1.0, 2.0]);
    let new =
        |shape: &[usize], len| Weight::new("w", shape, Format::Q8_0, vec![0; len]).unwrap_err();
    assert!(matches!(new(&[2, 32], 34), Error::Length { expected: 68, found: 34, .. }));
    assert!(matches!(new(&[32, 2], 68), Error::Shape { .. }));
    assert!(matches!(new(&[usize::MAX, 32], 68), Error::Shape { .. }));
}

#[test]
fn metadata_errors_name_key_and_types() {
    let file = Gguf::from_bytes(small_file()).unwrap();
    let message = |error: Error| error.to_string();
    let metadata = file.metadata();
    assert_eq!(
        message(metadata.require::<u32>("eps").unwrap_err()),
        "the metadata value \"eps\" is f32 0.00001, expected an integer that fits u32"
    );
    assert_eq!(
        message(metadata.get::<Vec<f32>>("tokens").unwrap_err()),
        "the metadata value \"tokens\" is array of 3 string, expected array of f32"
    );
    assert_eq!(
        message(metadata.require::<u32>("layers").unwrap_err()),
        "the metadata has no \"layers\""
    );
}

#[test]
fn integers_convert_when_they_fit() {
    let file = Fields::header(2, 0, 2)
        .key("negative", 5)
        .raw(&(-1i32).to_le_bytes())
        .key("types", ARRAY)
        .u32(U32)
        .u64(2)
        .u32(1)
        .u32(u32::MAX)
        .open()
        .unwrap();
    assert_eq!(file.metadata().require::<i64>("negative").unwrap(), -1);
    assert!(matches!(file.metadata().get::<u32>("negative"), Err(Error::WrongType { .. })));
    assert_eq!(file.metadata().require::<Vec<u32>>("types").unwrap(), [1, u32::MAX]);
    assert!(matches!(file.metadata().get::<Vec<i32>>("types"), Err(Error::WrongType { .. })));
}

#[test]
fn other_files_and_versions_are_named() {
    assert!(matches!(error(Fields(b"GGML\0\0\0\0".to_vec())), Error::Magic { .. }));
    assert!(matches!(error(Fields::header(1, 0, 0)), Error::Version { found: 1 }));
    assert!(matches!(error(Fields::header(4, 0, 0)), Error::Version { found: 4 }));
    assert!(matches!(error(Fields::header(3u32.swap_bytes(), 0, 0)), Error::BigEndian));
    assert!(Fields::header(2, 0, 0).open().is_ok());
}

#[test]
fn counts_beyond_the_file_are_refused() {
    for count in [u64::MAX, 1 << 63, 1 << 32, 1 << 20] {
        assert!(matches!(error(Fields::header(3, count, 0)), Error::Limit { .. }));
        assert!(matches!(error(Fields::header(3, 0, count)), Error::Limit { .. }));
        let text = Fields::header(3, 0, 1).key("k", STRING).u64(count);
        assert!(matches!(error(text), Error::Truncated { .. }));
        for element in [0, U32, BOOL, STRING, ARRAY, 10] {
            let array = Fields::header(3, 0, 1).key("k", ARRAY).u32(element).u64(count);
            assert!(matches!(error(array), Error::Truncated { .. }));
        }
    }
    let long = Fields::header(3, 0, 1).u64(65_536).raw(&[b'a'; 65_540]);
    assert!(matches!(error(long), Error::Limit { found: 65_536, .. }));
}

#[test]
fn values_outside_their_type_are_refused() {
    let unknown = Fields::header(3, 0, 1).key("k", 13).u32(0);
    assert!(matches!(error(unknown), Error::ValueType { id: 13, .. }));
    let truth = Fields::header(3, 0, 1).key("k", BOOL).raw(&[2]);
    assert!(matches!(error(truth), Error::Bool { found: 2, .. }));
    let truths = Fields::header(3, 0, 1).key("k", ARRAY).u32(BOOL).u64(2).raw(&[1, 3]);
    assert!(matches!(error(truths), Error::Bool { found: 3, .. }));
    let text = Fields::header(3, 0, 1).key("k", STRING).u64(1).raw(&[0xff]);
    assert!(matches!(error(text), Error::Utf8 { .. }));
    let key = Fields::header(3, 0, 1).u64(2).raw(&[0xc3, 0x28]).u32(BOOL).raw(&[1]);
    assert!(matches!(error(key), Error::Utf8 { .. }));
}

#[test]
fn text_in_arrays_is_checked_when_read() {
    let file = Fields::header(3, 0, 1)
        .key("tokens", ARRAY)
        .u32(STRING)
        .u64(2)
        .string("ok")
        .u64(1)
        .raw(&[0xff])
        .open()
        .unwrap();
    let mut tokens = file.metadata().require::<Strings>("tokens").unwrap();
    assert_eq!(tokens.len(), 2);
    assert_eq!(tokens.next().unwrap().unwrap(), "ok");
    assert!(matches!(tokens.next(), Some(Err(Error::Utf8 { .. }))));
    assert!(tokens.next().is_none());
}

#[test]
fn arrays_nest_four_deep_and_no_deeper() {
    let nested = |depth: usize| {
        let outer = Fields::header(3, 0, 1).key("k", ARRAY);
        let outer = (1..depth).fold(outer, |fields, _| fields.u32(ARRAY).u64(1));
        outer.u32(U32).u64(1).u32(7)
    };
    assert!(nested(4).open().is_ok());
    assert!(matches!(error(nested(5)), Error::Limit { found: 5, limit: 4, .. }));
    assert!(matches!(error(nested(100_000)), Error::Limit { .. }));
}

#[test]
fn names_are_unique() {
    let keys = Fields::header(3, 0, 2).key("k", BOOL).raw(&[0]).key("k", BOOL).raw(&[1]);
    assert!(matches!(error(keys), Error::Duplicate { what: "metadata key", .. }));
    let tensors = Fields::header(3, 2, 0).tensor("t", &[1], 0, 0).tensor("t", &[1], 0, 32);
    assert!(matches!(
        error(Fields(tensors.data(&[0; 64]))),
        Error::Duplicate { what: "tensor", .. }
    ));
}

#[test]
fn alignments_are_powers_of_two() {
    let aligned = |to: u32| Fields::header(3, 0, 1).key("general.alignment", U32).u32(to);
    for to in [0, 3, 48, 1 << 21, u32::MAX] {
        assert!(matches!(error(aligned(to)), Error::Alignment { .. }), "{to}");
    }
    assert_eq!(aligned(1).open().unwrap().alignment(), 1);
    let text = Fields::header(3, 0, 1).key("general.alignment", STRING).string("32");
    assert!(matches!(error(text), Error::WrongType { .. }));
}

#[test]
fn shapes_that_no_file_can_hold_are_refused() {
    let with = |axes: &[u64], kind| {
        error(Fields(Fields::header(3, 1, 0).tensor("t", axes, kind, 0).data(&[0; 256])))
    };
    assert!(matches!(with(&[], 0), Error::Axes { found: 0, .. }));
    assert!(matches!(with(&[1; 5], 0), Error::Axes { found: 5, .. }));
    let shapes: [(&[u64], u32); 7] = [
        (&[0], 0),
        (&[4, 0], 0),
        (&[33], 8),    // not a whole number of blocks
        (&[16, 2], 8), // blocks don't run over rows
        (&[1 << 32, 1 << 32], 1),
        (&[u64::MAX, 2], 999), // an unknown type is checked as well
        (&[u64::MAX], 0),
    ];
    for (axes, kind) in shapes {
        assert!(matches!(with(axes, kind), Error::Shape { .. }), "{axes:?}");
    }
}

#[test]
fn data_lies_in_the_file_aligned_and_apart() {
    let at = |offset| Fields(Fields::header(3, 1, 0).tensor("t", &[8], 0, offset).data(&[0; 64]));
    assert!(at(32).open().is_ok());
    assert!(matches!(error(at(33)), Error::Misaligned { offset: 33, .. }));
    for offset in [64, 1 << 40, u64::MAX - 31] {
        assert!(matches!(error(at(offset)), Error::OutOfBounds { .. }), "{offset}");
    }
    let two = |second| {
        let fields = Fields::header(3, 2, 0).tensor("a", &[16], 0, 32).tensor("b", &[8], 0, second);
        Fields(fields.data(&[0; 128]))
    };
    assert!(two(0).open().is_ok() && two(96).open().is_ok());
    assert!(matches!(error(two(32)), Error::Overlap { .. }));
    assert!(matches!(error(two(64)), Error::Overlap { .. }));
}

#[test]
fn types_of_unknown_size_are_listed() {
    let file = Fields(Fields::header(3, 1, 0).tensor("t", &[7, 3], 1234, 0).data(&[0; 8]));
    let file = file.open().unwrap();
    assert_eq!(file.tensors()[0].bytes, None);
    assert_eq!(file.tensors()[0].element.to_string(), "unknown (ggml type 1234)");
    assert!(matches!(file.tensor("t"), Err(Error::Unsupported { .. })));
    assert!(matches!(file.tensor("u"), Err(Error::MissingTensor { .. })));
}

#[test]
fn a_part_of_a_split_model_is_no_model() {
    let part = |count: u16| {
        let key = Fields::header(3, 0, 1).key("split.count", 2).raw(&count.to_le_bytes());
        Weights::from_gguf(key.open().unwrap())
    };
    assert!(matches!(part(3), Err(Error::Split { parts: 3 })));
    let whole = part(1).unwrap();
    assert!(matches!(whole.description(), Description::Gguf(_)));
    assert!(!whole.contains("t"));
}
