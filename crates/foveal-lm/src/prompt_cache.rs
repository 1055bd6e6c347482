//! What a model has read of a text, on disk: the next process goes on from there, to the bit.
//!
//! ```text
//! safetensors:  tokens [n]      spans [stores, 3]: where codes begin, where they end, where the store ends
//!               layer.L.keys … as each layer's store has them; layer.L.section.N.… as each section's state has it
//! metadata:     what made it; the model's fingerprint; SHA-256 of all arrays
//! ```
//!
//! Files come from strangers: a file is taken only if it is whole, was made by the same model with the same options,
//! instructions and version, and holds exactly what this model would hold of so many tokens.
//!
//! A text that goes on otherwise than the one in the file is read from where they part, where the state can be taken back so
//! far ([`Model::rewind`]): codes of a few bits, and what a window has left behind, can't; such a text is read anew.

mod streamed;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use safetensors::tensor::{Metadata, View};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use sha2::{Digest, Sha256};

use crate::mixer::{Array, CacheOptions, Contents, Keep, Span, Store, Taken};
use crate::model::{Logits, MemoryFolder, Model, Scratch, State, Step};
use crate::weights::{Mapping, Weights};
use crate::{Error, atomic_file, generate, weights};

pub use streamed::Streamed;

/// Bytes of each tensor that tell models apart.
const SAMPLE: usize = 4096;
/// The keys of the file's own metadata.
const MADE_BY: &str = "foveal.prompt_cache";
const MODEL: &str = "foveal.model";
const SHA256: &str = "foveal.sha256";

/// A prompt that was read but for its last token.
#[derive(Debug)]
pub struct Resumed {
    /// What the model holds of it.
    pub state: State,
    /// How many tokens of it came from the file.
    pub held: usize,
}

/// Reads and writes what one model holds of texts, with one choice of options.
#[derive(Debug)]
pub struct PromptCache<'a> {
    model: &'a Model,
    options: CacheOptions,
    /// What the file's metadata has to say.
    made_by: String,
    fingerprint: String,
    memories: Option<MemoryFolder>,
}

impl<'a> PromptCache<'a> {
    /// For states that `model` makes with `options`; `weights` are those that it was made of.
    ///
    /// # Errors
    ///
    /// [`Error::CacheOptions`] for options that choose keys by their weight: what they remember is not written.
    pub fn new(
        model: &'a Model,
        weights: &Weights,
        options: CacheOptions,
    ) -> Result<PromptCache<'a>, Error> {
        let chosen = |keep| {
            matches!(keep, Keep::HeavyHitters { .. } | Keep::SnapKv { .. } | Keep::Retrieve(_))
        };
        if chosen(options.keep) {
            return Err(Error::CacheOptions {
                what: "choice of keys for a prompt cache",
                found: format!("{:?}", options.keep),
                expected: "all, or the first and the newest".to_owned(),
            });
        }
        let CacheOptions { storage, context, keep } = options;
        let context = context.unwrap_or(model.config().context);
        let made_by = format!(
            "{}, keys and values {}, context {context}, keeping {keep:?}",
            model.arithmetic(),
            storage.name()
        );
        let fingerprint = fingerprint(model, weights);
        Ok(PromptCache { model, options, made_by, fingerprint, memories: None })
    }

    /// For states whose memories are in files of a folder ([`State::keep_memories_in`]): what is written are the others' parts,
    /// and what is opened goes on with these files, from where the state was.
    #[must_use]
    pub fn with_memories(self, folder: MemoryFolder) -> PromptCache<'a> {
        PromptCache { memories: Some(folder), ..self }
    }

    /// Writes `state`, which has read `tokens`, to a file, which appears whole or not at all.
    ///
    /// # Errors
    ///
    /// [`Error::PromptCache`] for a state that has read another number of tokens, or was made with other options;
    /// [`Error::Weights`] when the file can't be written.
    pub fn save(&self, path: &Path, tokens: &[u32], state: &State) -> Result<(), Error> {
        let refuse = |reason: String| Error::PromptCache { path: path.to_owned(), reason };
        if state.position() != tokens.len() {
            let position = state.position();
            let reason = format!("the state has read {position} tokens, not {}", tokens.len());
            return Err(refuse(reason));
        }
        self.write(path, ("tokens", Numbers::tokens(tokens)), state)
    }

    /// Writes what a state holds, and what was read of its text.
    fn write<'s>(
        &self,
        path: &Path,
        (name, read): (&str, Numbers<'s>),
        state: &'s State,
    ) -> Result<(), Error> {
        let refuse = |reason: String| Error::PromptCache { path: path.to_owned(), reason };
        let contents = contents(state)
            .filter(|_| *state.options() == self.options)
            .ok_or_else(|| refuse("the state was made with other options".to_owned()))?;
        let (stores, numbers) = (contents.stores(), contents.all_numbers());
        let mut arrays = vec![(name.to_owned(), read)];
        arrays.push(("spans".to_owned(), Numbers::spans(stores)));
        for (name, store) in stores {
            let named =
                |&array: &Array| (format!("{name}{}", array.name()), Numbers::of(store, array));
            arrays.extend(store.arrays().iter().map(named));
        }
        arrays
            .extend(numbers.iter().map(|(name, numbers)| (name.clone(), Numbers::plain(numbers))));
        let mut digest = Sha256::new();
        arrays.sort_by(|a, b| a.0.cmp(&b.0));
        arrays.iter().for_each(|(name, numbers)| add(&mut digest, name, &numbers.data()));
        let metadata = HashMap::from([
            (MADE_BY.to_owned(), self.made_by.clone()),
            (MODEL.to_owned(), self.fingerprint.clone()),
            (SHA256.to_owned(), hex(digest)),
        ]);
        let written = atomic_file::write_at(path, |temporary| {
            let done = safetensors::serialize_to_file(arrays, Some(metadata), temporary);
            done.map_err(|error| match error {
                SafeTensorError::IoError(error) => error,
                error => io::Error::other(error),
            })
        });
        let path = path.to_owned();
        Ok(written.map_err(|source| weights::Error::Io { action: "write", path, source })?)
    }

    /// The tokens that a file's state has read, and the state; `None` if there is no file.
    ///
    /// # Errors
    ///
    /// [`Error::PromptCache`] for a file that is damaged, or was not made by this model with these options;
    /// [`Error::Weights`] when it can't be read.
    pub fn open(&self, path: &Path) -> Result<Option<(Vec<u32>, State)>, Error> {
        self.found(path, |bytes| self.take(bytes))
    }

    /// What `take` makes of a file, if there is one.
    fn found<T>(
        &self,
        path: &Path,
        take: impl FnOnce(&[u8]) -> Result<T, String>,
    ) -> Result<Option<T>, Error> {
        let mapping = match Mapping::open(path) {
            Err(weights::Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            mapping => mapping?,
        };
        take(mapping.as_slice()).map(Some).map_err(|reason| {
            let reason = format!("{reason}; delete it or name another file");
            Error::PromptCache { path: path.to_owned(), reason }
        })
    }

    /// Reads a prompt but for its last token, on from what a file holds of it, and writes the file if there was something to
    /// read. `watch` is told how many tokens have been read, and may break the reading off.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyPrompt`]; [`Error::Interrupted`], after which the file is as it was; those of [`PromptCache::open`],
    /// [`PromptCache::save`] and [`Model::forward`].
    pub fn read(
        &self,
        path: &Path,
        prompt: &[u32],
        watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Resumed, Error> {
        let (_, tokens) = prompt.split_last().ok_or(Error::EmptyPrompt)?;
        let (mut state, mut held) = (self.model.state_with(&self.options)?, 0);
        if let Some((earlier, found)) = self.open(path)? {
            let common = earlier.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            state = found;
            if self.model.rewind(&mut state, common) {
                held = common;
            } else {
                state.reset();
            }
        }
        if held < tokens.len() {
            let mut watch = |done| watch(held + done);
            let rest = generate::read(self.model, &tokens[held..], &mut state, &mut watch)?;
            let step = Step { logits: Logits::None, ..Step::PROMPT };
            self.model.forward(rest, step, &mut state, &mut Scratch::new())?;
            self.save(path, tokens, &state)?;
        }
        Ok(Resumed { state, held })
    }

    fn take(&self, bytes: &[u8]) -> Result<(Vec<u32>, State), String> {
        let file = self.whole(bytes)?;
        let tokens = numbers(&file, "tokens", Dtype::U32, u32::from_le_bytes)?;
        let vocab = self.model.config().vocab;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(format!("it has the token {token} of a vocabulary of {vocab}"));
        }
        let state = self.state_of(&file, tokens.len())?;
        Ok((tokens, state))
    }

    /// A file that is whole, and made as this one would be.
    fn whole<'f>(&self, bytes: &'f [u8]) -> Result<SafeTensors<'f>, String> {
        let damaged = |error: SafeTensorError| format!("it is damaged: {error}");
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
        self.check(&metadata, &file)?;
        Ok(file)
    }

    /// What a file has of a state that has read so many tokens.
    fn state_of(&self, file: &SafeTensors<'_>, position: usize) -> Result<State, String> {
        let mut taken = Taken::new(file, spans(file)?);
        let how = (&self.options, self.memories.as_ref());
        let state =
            self.model.resumed(how, position, |n, layer| layer.restore(n, position, &mut taken));
        let state = state.map_err(|error| format!("it is damaged: {error}"))?;
        let state = state.filter(|_| taken.is_empty());
        let other = || "it does not hold what this model holds of so many tokens".to_owned();
        state.ok_or_else(other)
    }

    /// Whether the file is whole, and made as this one would be.
    fn check(&self, metadata: &Metadata, file: &SafeTensors<'_>) -> Result<(), String> {
        let said = |key: &str| {
            let said = metadata.metadata().as_ref().and_then(|said| said.get(key));
            said.ok_or_else(|| format!("it is no prompt cache: it has no {key}"))
        };
        let (made_by, model, sha256) = (said(MADE_BY)?, said(MODEL)?, said(SHA256)?);
        if *made_by != self.made_by {
            let (found, expected) = (made_by.escape_debug(), &self.made_by);
            return Err(format!("it was made by {found:.300}; this is {expected}"));
        }
        if *model != self.fingerprint {
            return Err("it was made by another model".to_owned());
        }
        let mut names = file.names();
        names.sort_unstable();
        let mut digest = Sha256::new();
        for name in names {
            let tensor = file.tensor(name).map_err(|error| error.to_string())?;
            add(&mut digest, name, tensor.data());
        }
        match *sha256 == hex(digest) {
            true => Ok(()),
            false => Err("it is damaged: its contents have changed".to_owned()),
        }
    }
}

/// Every part of a state; `None` if there is more to the state.
fn contents(state: &State) -> Option<Contents<'_>> {
    let mut contents = Contents::default();
    let mut layers = state.layers().iter().enumerate();
    layers.try_for_each(|(n, layer)| layer.save(n, &mut contents))?;
    Some(contents)
}

fn numbers<T, const BYTES: usize>(
    file: &SafeTensors<'_>,
    name: &str,
    dtype: Dtype,
    number: fn([u8; BYTES]) -> T,
) -> Result<Vec<T>, String> {
    let tensor = file.tensor(name).map_err(|error| format!("it is damaged: {error}"))?;
    if tensor.dtype() != dtype {
        return Err(format!("it is damaged: {name} are {:?}, expected {dtype:?}", tensor.dtype()));
    }
    Ok(tensor.data().as_chunks().0.iter().map(|&x| number(x)).collect())
}

fn spans(file: &SafeTensors<'_>) -> Result<Vec<Span>, String> {
    let all = numbers(file, "spans", Dtype::U64, u64::from_le_bytes)?;
    let span = |&[start, coded, end]: &[u64; 3]| {
        let [start, coded, end] = [start, coded, end].map(|at| usize::try_from(at).ok());
        let (start, coded, end) = (start?, coded?, end?);
        (start <= coded && coded <= end).then_some(Span { coded: start..coded, end })
    };
    let spans: Option<Vec<Span>> = all.as_chunks().0.iter().map(span).collect();
    spans.ok_or_else(|| "it is damaged: positions of a store go backwards".to_owned())
}

/// What tells a model apart from others: its configuration, and of each tensor name, shape, format and some bytes from its
/// middle.
pub(crate) fn fingerprint(model: &Model, weights: &Weights) -> String {
    let mut digest = Sha256::new();
    digest.update(format!("{:?}", model.config()));
    for tensor in weights.tensors() {
        digest.update(format!("{} {:?} {}", tensor.name, tensor.shape, tensor.element));
        // A tensor of a type that is not read makes no difference.
        let Ok(weight) = weights.tensor(&tensor.name) else { continue };
        let bytes = weight.bytes();
        let start = bytes.len().saturating_sub(SAMPLE) / 2;
        digest.update(&bytes[start..][..bytes.len().min(SAMPLE)]);
    }
    hex(digest)
}

fn add(digest: &mut Sha256, name: &str, data: &[u8]) {
    digest.update((name.len() as u64).to_le_bytes());
    digest.update(name);
    digest.update((data.len() as u64).to_le_bytes());
    digest.update(data);
}

fn hex(digest: Sha256) -> String {
    digest.finalize().iter().fold(String::new(), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// An array of the file; a state's is made when it is written.
struct Numbers<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Data<'a>,
}

enum Data<'a> {
    Bytes(Vec<u8>),
    Plain(&'a [f32]),
    Of(&'a Store, Array),
}

impl<'a> Numbers<'a> {
    fn tokens(tokens: &[u32]) -> Numbers<'a> {
        let data = Data::Bytes(tokens.iter().flat_map(|token| token.to_le_bytes()).collect());
        Numbers { dtype: Dtype::U32, shape: vec![tokens.len()], data }
    }

    fn spans(stores: &[(String, &Store)]) -> Numbers<'a> {
        let spans = stores.iter().flat_map(|(_, store)| {
            let Span { coded, end } = store.span();
            [coded.start, coded.end, end].map(|at| at as u64)
        });
        let data = Data::Bytes(spans.flat_map(u64::to_le_bytes).collect());
        Numbers { dtype: Dtype::U64, shape: vec![stores.len(), 3], data }
    }

    fn plain(numbers: &'a [f32]) -> Numbers<'a> {
        Numbers { dtype: Dtype::F32, shape: vec![numbers.len()], data: Data::Plain(numbers) }
    }

    fn of(store: &'a Store, array: Array) -> Numbers<'a> {
        let (dtype, shape) = (store.array_dtype(array), store.array_shape(array));
        Numbers { dtype, shape, data: Data::Of(store, array) }
    }
}

impl View for Numbers<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.data {
            Data::Bytes(bytes) => Cow::Borrowed(bytes),
            Data::Plain(numbers) => {
                Cow::Owned(numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
            }
            Data::Of(store, array) => Cow::Owned(store.array_bytes(*array)),
        }
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}
