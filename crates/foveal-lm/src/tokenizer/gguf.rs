//! The tokenizer in the metadata of a GGUF file.

use super::{Error, GgufVocabulary, Tokenizer};
use crate::weights::gguf::{Metadata, Strings};

impl Tokenizer {
    /// Builds the tokenizer that the keys `tokenizer.ggml.*` describe.
    ///
    /// # Errors
    ///
    /// [`Error::Metadata`] when a key is missing or of another type than it should be, and those of
    /// [`Tokenizer::from_vocabulary`].
    pub fn from_gguf(metadata: &Metadata) -> Result<Tokenizer, Error> {
        Tokenizer::from_vocabulary(&GgufVocabulary::from_metadata(metadata)?)
    }
}

impl<'a> GgufVocabulary<'a> {
    /// What the keys `tokenizer.ggml.*` say. The texts stay in the file.
    ///
    /// # Errors
    ///
    /// [`Error::Metadata`] when a key is missing or of another type than it should be.
    pub fn from_metadata(metadata: &'a Metadata) -> Result<GgufVocabulary<'a>, Error> {
        let strings = |list: Strings<'a>| list.collect::<Result<Vec<_>, _>>();
        Ok(GgufVocabulary {
            model: metadata.require("tokenizer.ggml.model")?,
            pre: metadata.get("tokenizer.ggml.pre")?,
            tokens: strings(metadata.require("tokenizer.ggml.tokens")?)?,
            scores: metadata.get("tokenizer.ggml.scores")?,
            token_types: metadata.get("tokenizer.ggml.token_type")?,
            merges: metadata.get("tokenizer.ggml.merges")?.map(strings).transpose()?,
            bos: metadata.get("tokenizer.ggml.bos_token_id")?,
            eos: metadata.get("tokenizer.ggml.eos_token_id")?,
            eot: metadata.get("tokenizer.ggml.eot_token_id")?,
            unknown: metadata.get("tokenizer.ggml.unknown_token_id")?,
            padding: metadata.get("tokenizer.ggml.padding_token_id")?,
            add_bos: metadata.get("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata.get("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: metadata.get("tokenizer.ggml.add_space_prefix")?,
        })
    }
}
