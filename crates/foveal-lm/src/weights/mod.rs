//! Model files: GGUF, and Hugging Face folders of safetensors, behind one face.
//!
//! Files are mapped, not read: opening a model costs its header, and a [`Weight`] is a range of the mapping in the
//! file's own form. Files come from strangers: every count, length, offset and shape is checked when the file is
//! opened, before anything is allocated for it.
//!
//! ```no_run
//! use foveal_lm::weights::Weights;
//!
//! let weights = Weights::open("model.gguf".as_ref())?;
//! for tensor in weights.tensors() {
//!     println!("{} {:?} {}", tensor.name, tensor.shape, tensor.element);
//! }
//! let embedding = weights.tensor("token_embd.weight")?;
//! assert_eq!(embedding.row(0).map(<[u8]>::len), Some(embedding.row_bytes()));
//! # Ok::<(), foveal_lm::weights::Error>(())
//! ```

mod error;
pub mod gguf;
pub(crate) mod mapping;
pub(crate) mod safetensors;
mod tensor;

use std::path::Path;

pub use error::Error;
pub use gguf::Gguf;
pub use mapping::Mapping;
pub use safetensors::Safetensors;
pub use tensor::{ElementType, TensorInfo, Weight};

use tensor::Tensors;

/// The tensors of a model and what its file says about them, whatever the kind of file.
#[derive(Debug)]
pub struct Weights {
    tensors: Tensors,
    description: Description,
}

/// What a model file says about its model, apart from the tensors.
#[derive(Debug)]
#[non_exhaustive]
pub enum Description {
    /// The metadata of a GGUF file.
    Gguf(gguf::Metadata),
    /// The `config.json` of a Hugging Face folder.
    Config(serde_json::Value),
    /// Nothing: a lone safetensors file.
    None,
}

impl Weights {
    /// Opens a `.gguf` file, a folder with `config.json` and safetensors, or a lone `.safetensors` file.
    ///
    /// # Errors
    ///
    /// [`Error::NotAModel`] when it is none of these, [`Error::Split`] for a part of a split GGUF model, and whatever
    /// [`Gguf::open`], [`Safetensors::open_folder`] and [`Safetensors::open_file`] find wrong.
    pub fn open(path: &Path) -> Result<Weights, Error> {
        if path.is_dir() {
            return Ok(Safetensors::open_folder(path)?.into());
        }
        match path.extension() {
            Some(extension) if extension.eq_ignore_ascii_case("safetensors") => {
                Ok(Safetensors::open_file(path)?.into())
            }
            _ => match Gguf::open(path) {
                Err(Error::Magic { .. } | Error::Truncated { what: "the magic number", .. }) => {
                    let expected = "a GGUF file, a .safetensors file, or a folder with config.json";
                    Err(Error::NotAModel { path: path.to_owned(), expected })
                }
                opened => Weights::from_gguf(opened?),
            },
        }
    }

    /// The model in an open GGUF file, such as one that is built into the program.
    ///
    /// # Errors
    ///
    /// [`Error::Split`] when the file holds only a part of the model.
    pub fn from_gguf(file: Gguf) -> Result<Weights, Error> {
        let parts = file.metadata.get::<u64>("split.count")?.unwrap_or(1);
        if parts > 1 {
            return Err(Error::Split { parts });
        }
        Ok(Weights { tensors: file.tensors, description: Description::Gguf(file.metadata) })
    }

    /// The tensors, in the order of the files.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.tensors.list()
    }

    /// The tensor called `name`. Copies no data.
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`], or [`Error::Unsupported`] when its format is not in
    /// [`Format`](foveal::projection::Format).
    pub fn tensor(&self, name: &str) -> Result<Weight, Error> {
        self.tensors.weight(name)
    }

    /// Whether there is a tensor called `name`, of any format.
    pub fn contains(&self, name: &str) -> bool {
        !matches!(self.tensor(name), Err(Error::MissingTensor { .. }))
    }

    /// What the file says about the model.
    pub fn description(&self) -> &Description {
        &self.description
    }
}

impl From<Safetensors> for Weights {
    fn from(file: Safetensors) -> Weights {
        let description = file.config.map_or(Description::None, Description::Config);
        Weights { tensors: file.tensors, description }
    }
}
