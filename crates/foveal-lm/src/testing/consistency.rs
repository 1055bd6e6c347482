//! What must hold of every model file that opens.

use crate::weights::gguf::{Array, Gguf, Value};
use crate::weights::{ElementType, Error, Safetensors, TensorInfo, Weight};

/// Reads all there is to read; every byte range must be in its file and every shape must fit its bytes.
/// `len` is the length of the file.
///
/// # Panics
/// If one does not.
pub fn read_gguf(file: &Gguf, len: usize) {
    assert!(file.alignment().is_power_of_two());
    for key in file.metadata().keys() {
        if let Value::Array(array) = file.metadata().require(key).expect("a listed key is there") {
            walk(array);
        }
    }
    assert_tensors(file.tensors(), len, |name| file.tensor(name));
}

/// Reads all there is to read, as [`read_gguf`].
///
/// # Panics
/// If a range or a shape does not fit.
pub fn read_safetensors(file: &Safetensors, len: usize) {
    assert_tensors(file.tensors(), len, |name| file.tensor(name));
}

fn assert_tensors(
    tensors: &[TensorInfo],
    len: usize,
    open: impl Fn(&str) -> Result<Weight, Error>,
) {
    for info in tensors {
        assert!(info.offset + info.bytes.unwrap_or(0) <= len, "{info:?}");
        match (open(&info.name), info.element) {
            (Ok(weight), ElementType::Known(format)) => {
                assert_eq!(weight.format(), format);
                assert_eq!(weight.shape(), info.shape);
                assert_eq!(weight.bytes().len(), weight.out_features() * weight.row_bytes());
                assert_eq!(weight.to_f32().len(), info.elements());
                assert_eq!(weight.row(weight.out_features()), None);
            }
            (Err(Error::Unsupported { .. }), ElementType::Unsupported { .. }) => {}
            (opened, _) => panic!("{info:?} opens as {opened:?}"),
        }
    }
}

fn walk(array: Array<'_>) {
    assert_eq!(array.iter().len(), array.len());
    for element in array.iter() {
        match element {
            Ok(Value::Array(inner)) => walk(inner),
            Ok(_) | Err(Error::Utf8 { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
}
