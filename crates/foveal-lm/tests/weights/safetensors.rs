//! Hugging Face folders, good and hostile.

use std::fs;
use std::path::Path;

use foveal::projection::Format;
use foveal_lm::weights::{Description, Error, Safetensors, Weights};
use safetensors::tensor::{Dtype, TensorView, serialize};

use crate::support::folder;
use foveal_lm::testing::read_safetensors;

const ONE_TWO: [u8; 4] = [0x80, 0x3f, 0x00, 0x40];

/// A file with a bf16 matrix, an f32 scalar and an i32 vector, whose names begin with `prefix`.
fn small_file(prefix: &str) -> Vec<u8> {
    let view = |dtype, shape: &[usize], data| TensorView::new(dtype, shape.to_vec(), data).unwrap();
    let tensors = [
        (format!("{prefix}.matrix"), view(Dtype::BF16, &[2, 1], &ONE_TWO)),
        (format!("{prefix}.scalar"), view(Dtype::F32, &[], &[0, 0, 0, 0x40])),
        (format!("{prefix}.ids"), view(Dtype::I32, &[1], &[7, 0, 0, 0])),
    ];
    serialize(tensors, None).unwrap()
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn open(bytes: Vec<u8>) -> Result<(), Error> {
    let len = bytes.len();
    Safetensors::from_bytes(bytes).map(|file| read_safetensors(&file, len))
}

fn sharded(test: &str, weight_map: &str) -> std::path::PathBuf {
    let folder = folder(test);
    fs::write(folder.join("config.json"), "{}").unwrap();
    fs::write(folder.join("one.safetensors"), small_file("a")).unwrap();
    fs::write(folder.join("two.safetensors"), small_file("b")).unwrap();
    let index = format!("{{\"metadata\": {{}}, \"weight_map\": {{{weight_map}}}}}");
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    folder
}

#[test]
fn a_folder_with_one_file() {
    let folder = folder("one_file");
    fs::write(folder.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    fs::write(folder.join("model.safetensors"), small_file("a")).unwrap();
    let weights = Weights::open(&folder).unwrap();
    let Description::Config(config) = weights.description() else { panic!("a configuration") };
    assert_eq!(config["model_type"], "llama");
    let matrix = weights.tensor("a.matrix").unwrap();
    assert_eq!((matrix.shape(), matrix.format()), (&[2, 1][..], Format::BF16));
    assert_eq!(matrix.to_f32(), [1.0, 2.0]);
    let scalar = weights.tensor("a.scalar").unwrap();
    assert_eq!((scalar.out_features(), scalar.in_features(), scalar.to_f32()[0]), (1, 1, 2.0));
    assert!(weights.contains("a.ids"));
    let ids = weights.tensor("a.ids").unwrap_err().to_string();
    assert!(ids.contains("I32, which is not supported"), "{ids}");
    let lone = Weights::open(&folder.join("model.safetensors")).unwrap();
    assert!(matches!(lone.description(), Description::None));
    assert_eq!(lone.tensors(), weights.tensors());
}

#[test]
fn a_folder_with_shards() {
    let map = r#""a.matrix": "one.safetensors", "a.scalar": "one.safetensors", "b.matrix": "two.safetensors""#;
    let weights = Weights::open(&sharded("shards", map)).unwrap();
    assert_eq!(weights.tensors().len(), 3);
    assert_eq!(weights.tensor("b.matrix").unwrap().to_f32(), [1.0, 2.0]);
    assert!(!weights.contains("b.scalar"));
    let files: Vec<_> = weights.tensors().iter().map(|tensor| tensor.file).collect();
    assert_eq!(files, [0, 0, 1]);
}

#[test]
fn an_index_stays_in_its_folder() {
    let names = [
        "../one.safetensors",
        "/etc/passwd",
        "a/one.safetensors",
        "..",
        ".",
        "",
        "./one.safetensors",
        "one.safetensors/",
        "a\\\\b",
        "C:one",
        "\\u0000",
    ];
    for name in names {
        let folder = sharded("index_escapes", &format!("\"a.matrix\": \"{name}\""));
        let opened = Weights::open(&folder);
        assert!(matches!(opened, Err(Error::ShardName { .. })), "{name}: {opened:?}");
    }
}

#[test]
fn an_index_names_tensors_and_files_that_are_there() {
    let open = |map| Weights::open(&sharded("index_names", map));
    let tensor = open(r#""c.matrix": "one.safetensors""#);
    assert!(matches!(tensor, Err(Error::MissingTensor { .. })));
    let file = open(r#""a.matrix": "three.safetensors""#);
    assert!(matches!(file, Err(Error::Io { .. })));
    assert!(matches!(open(r#""a.matrix": 7"#), Err(Error::Json { .. })));
    let twice = r#""a.matrix": "one.safetensors", "a.matrix": "two.safetensors""#;
    let error = open(twice).unwrap_err();
    assert!(matches!(error, Error::Json { .. }));
    assert!(error.to_string().contains("index.json"), "{error}");
    assert_eq!(open("").unwrap().tensors(), []);
}

#[test]
fn a_folder_without_a_model_is_named() {
    let folder = folder("no_model");
    assert!(matches!(Weights::open(&folder), Err(Error::Io { .. })));
    fs::write(folder.join("config.json"), "{}").unwrap();
    assert!(matches!(Weights::open(&folder), Err(Error::NotAModel { .. })));
    assert!(matches!(Weights::open(&folder.join("config.json")), Err(Error::NotAModel { .. })));
    fs::write(folder.join("empty.gguf"), "").unwrap();
    assert!(matches!(Weights::open(&folder.join("empty.gguf")), Err(Error::NotAModel { .. })));
    assert!(matches!(Weights::open(&folder.join("absent.gguf")), Err(Error::Io { .. })));
}

#[test]
fn configurations_are_bounded() {
    let folder = folder("hostile_config");
    fs::write(folder.join("model.safetensors"), small_file("a")).unwrap();
    let open = |config: &str| {
        fs::write(folder.join("config.json"), config).unwrap();
        Safetensors::open_folder(&folder)
    };
    assert!(matches!(open(""), Err(Error::Json { .. })));
    assert!(matches!(open("{\"a\": 1"), Err(Error::Json { .. })));
    assert!(matches!(open(&"[".repeat(1 << 20)), Err(Error::Json { .. })));
    assert!(matches!(open(&" ".repeat((1 << 20) + 1)), Err(Error::Limit { .. })));
    assert!(open("{}").is_ok());
    fs::remove_file(folder.join("config.json")).unwrap();
    fs::create_dir(folder.join("config.json")).unwrap();
    assert!(matches!(Safetensors::open_folder(&folder), Err(Error::Io { .. })));
}

#[test]
fn every_truncation_is_an_error() {
    let whole = small_file("a");
    for len in 0..whole.len() {
        assert!(open(whole[..len].to_vec()).is_err(), "{len} bytes");
    }
    open(whole.clone()).unwrap();
    assert!(matches!(open([whole, vec![0]].concat()), Err(Error::DataLength { .. })));
}

#[test]
fn every_flipped_bit_is_an_error_or_a_model() {
    let whole = small_file("a");
    let mut refused = 0;
    for bit in 0..8 * whole.len() {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        refused += usize::from(open(bytes).is_err());
    }
    assert!(refused > 500, "only {refused} flips were noticed");
}

#[test]
fn lengths_and_offsets_that_overflow_are_refused() {
    for length in [u64::MAX, u64::MAX - 7, 1 << 63, 1 << 32, 100_000_001] {
        assert!(matches!(open(length.to_le_bytes().to_vec()), Err(Error::Limit { .. })));
    }
    assert!(matches!(open(100u64.to_le_bytes().to_vec()), Err(Error::Truncated { .. })));
    let max = usize::MAX;
    let headers = [
        format!(r#"{{"t": {{"dtype": "U8", "shape": [{max}], "data_offsets": [0, {max}]}}}}"#),
        format!(r#"{{"t": {{"dtype": "F32", "shape": [{max}, 2], "data_offsets": [0, 8]}}}}"#),
        format!(r#"{{"t": {{"dtype": "F32", "shape": [1], "data_offsets": [{max}, 3]}}}}"#),
        r#"{"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}"#.to_owned(),
        r#"{"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#.to_owned(),
        r#"{"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "u": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}"#
            .to_owned(),
        "[".repeat(100_000),
    ];
    for header in headers {
        assert!(open(with_header(&header, &[0; 8])).is_err(), "{header:.80}");
    }
}

#[test]
fn not_a_file_is_refused_without_reading() {
    for path in ["/dev/zero", "/dev"] {
        let path = Path::new(path);
        if path.exists() {
            assert!(matches!(Safetensors::open_file(path), Err(Error::Io { .. })));
        }
    }
}
