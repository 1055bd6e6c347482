//! What the writer writes, the reader reads.

use std::io::{self, Write};

use foveal::projection::Format;
use foveal_lm::atomic_file;
use foveal_lm::weights::gguf::{Gguf, OwnedArray, OwnedValue, Value, ValueType, Writer};
use foveal_lm::weights::{ElementType, Error};
use proptest::prelude::*;

use crate::support::{folder, small_file};
use foveal_lm::testing::read_gguf;

#[derive(Clone, Debug)]
struct Model {
    alignment: u32,
    metadata: Vec<(String, OwnedValue)>,
    tensors: Vec<(Vec<usize>, Format, Vec<u8>)>,
}

impl Model {
    fn write(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.metadata("general.alignment", self.alignment).unwrap();
        for (index, (key, value)) in self.metadata.iter().enumerate() {
            writer.metadata(&format!("{index}.{key}"), value.clone()).unwrap();
        }
        for (index, (shape, format, bytes)) in self.tensors.iter().enumerate() {
            writer.tensor(&format!("tensor {index}"), shape, *format, bytes).unwrap();
        }
        writer.to_bytes()
    }
}

fn scalar() -> impl Strategy<Value = OwnedValue> {
    prop_oneof![
        any::<u8>().prop_map(OwnedValue::from),
        any::<i16>().prop_map(OwnedValue::from),
        any::<u32>().prop_map(OwnedValue::from),
        any::<i64>().prop_map(OwnedValue::from),
        any::<u32>().prop_map(|bits| f32::from_bits(bits).into()),
        any::<f64>().prop_map(OwnedValue::from),
        any::<bool>().prop_map(OwnedValue::from),
        ".{0,12}".prop_map(OwnedValue::from),
    ]
}

/// Values with arrays up to four deep; of the elements drawn, those of the first one's type stay.
fn value() -> impl Strategy<Value = OwnedValue> {
    scalar().prop_recursive(4, 24, 4, |inner| {
        prop::collection::vec(inner, 0..4).prop_map(|mut values| {
            let kind = values.first().map_or(ValueType::F64, OwnedValue::value_type);
            values.retain(|value| value.value_type() == kind);
            OwnedArray::new(kind, values).unwrap().into()
        })
    })
}

fn tensor() -> impl Strategy<Value = (Vec<usize>, Format, Vec<u8>)> {
    let format = prop::sample::select(Format::ALL.to_vec());
    (format, prop::collection::vec(1usize..4, 1..=4), any::<u8>()).prop_map(
        |(format, mut shape, byte)| {
            *shape.last_mut().unwrap() *= format.block_len();
            let len = format.row_bytes(shape.iter().product()).unwrap();
            let bytes = (0..len).map(|i| (i as u8).wrapping_add(byte)).collect();
            (shape, format, bytes)
        },
    )
}

fn model() -> impl Strategy<Value = Model> {
    let metadata = prop::collection::vec((".{0,8}", value()), 0..6);
    let tensors = prop::collection::vec(tensor(), 0..5);
    (0u32..8, metadata, tensors).prop_map(|(power, metadata, tensors)| Model {
        alignment: 1 << power,
        metadata,
        tensors,
    })
}

/// Writes an open file once more.
pub(crate) fn copy(file: &Gguf) -> Vec<u8> {
    let weights: Vec<_> = file.tensors().iter().map(|t| file.tensor(&t.name).unwrap()).collect();
    let mut writer = Writer::new();
    for key in file.metadata().keys() {
        let value: Value = file.metadata().require(key).unwrap();
        writer.metadata(key, OwnedValue::try_from(value).unwrap()).unwrap();
    }
    for weight in &weights {
        writer.tensor(weight.name(), weight.shape(), weight.format(), weight.bytes()).unwrap();
    }
    writer.to_bytes()
}

proptest! {
    #[test]
    fn models_survive(model in model()) {
        let bytes = model.write();
        let file = Gguf::from_bytes(bytes.clone()).unwrap();
        read_gguf(&file, bytes.len());
        prop_assert_eq!(file.alignment(), model.alignment as usize);
        prop_assert_eq!(file.metadata().keys().len(), model.metadata.len() + 1);
        prop_assert_eq!(file.tensors().len(), model.tensors.len());
        for (info, (shape, format, stored)) in file.tensors().iter().zip(&model.tensors) {
            prop_assert_eq!(&info.shape, shape);
            prop_assert_eq!(info.element, ElementType::Known(*format));
            let weight = file.tensor(&info.name).unwrap();
            prop_assert_eq!(weight.bytes(), &stored[..]);
        }
        prop_assert_eq!(copy(&file), bytes);
    }
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let mut writer = Writer::new();
    writer.metadata("k", 1u32).unwrap();
    assert!(matches!(writer.metadata("k", 2u32), Err(Error::Duplicate { .. })));
    assert!(matches!(writer.metadata(&"k".repeat(65_536), 2u32), Err(Error::Limit { .. })));
    assert!(matches!(writer.metadata("general.alignment", 3u32), Err(Error::Alignment { .. })));
    assert!(matches!(writer.metadata("general.alignment", "32"), Err(Error::WrongType { .. })));
    let mut deep = OwnedValue::from(1u8);
    for _ in 0..5 {
        deep = OwnedArray::new(deep.value_type(), vec![deep]).unwrap().into();
    }
    assert!(matches!(writer.metadata("deep", deep), Err(Error::Limit { .. })));
    let mixed = OwnedArray::new(ValueType::U8, vec![1u8.into(), true.into()]);
    assert!(matches!(mixed, Err(Error::MixedArray { expected: "u8", found: "bool" })));

    let four = [0; 4];
    writer.tensor("t", &[1], Format::F32, &four).unwrap();
    assert!(matches!(writer.tensor("t", &[1], Format::F32, &four), Err(Error::Duplicate { .. })));
    assert!(matches!(writer.tensor("a", &[2], Format::F32, &four), Err(Error::Length { .. })));
    assert!(matches!(writer.tensor("a", &[], Format::F32, &four), Err(Error::Axes { .. })));
    assert!(matches!(writer.tensor("a", &[1; 5], Format::F32, &four), Err(Error::Axes { .. })));
    assert!(matches!(writer.tensor("a", &[0], Format::F32, &[]), Err(Error::Shape { .. })));
    assert!(matches!(writer.tensor("a", &[33], Format::Q8_0, &four), Err(Error::Shape { .. })));
    let file = Gguf::from_bytes(writer.to_bytes()).unwrap();
    assert_eq!((file.tensors().len(), file.metadata().keys().len()), (1, 1));
}

#[test]
fn saving_replaces_the_file_and_leaves_nothing_else() {
    let folder = folder("saving_replaces");
    let path = folder.join("model.gguf");
    std::fs::write(&path, small_file()).unwrap();
    let old = Gguf::open(&path).unwrap();

    let mut writer = Writer::new();
    writer.metadata("general.name", "new").unwrap();
    writer.save(&path).unwrap();

    let new = Gguf::open(&path).unwrap();
    assert_eq!(new.metadata().require::<&str>("general.name").unwrap(), "new");
    assert_eq!(old.tensor("norm").unwrap().to_f32(), [1.0, 2.0, 0.0, -2.0]);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);

    let missing = writer.save(&folder.join("absent").join("model.gguf"));
    assert!(matches!(missing, Err(Error::Io { action: "write", .. })));
}

#[test]
fn a_write_that_fails_changes_nothing() {
    let folder = folder("failed_write");
    let path = folder.join("model.gguf");
    std::fs::write(&path, "old").unwrap();
    let failed = atomic_file::write(&path, |out| {
        out.write_all(b"half of the new")?;
        Err(io::Error::other("the disk is full"))
    });
    assert_eq!(failed.unwrap_err().to_string(), "the disk is full");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
}
