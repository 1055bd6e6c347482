//! How a text's keys and values are kept.

use foveal::cache::Rolling;

use crate::Error;

/// The most tokens that a token may be made to see.
const MAX_CONTEXT: usize = 1 << 30;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CacheStorage {
    /// As they were computed. Training takes no other.
    #[default]
    F32,
    /// Rounded to f16. Numbers beyond 65504 are refused.
    F16,
    /// Rounded to bf16.
    Bf16,
    /// Codes of 8 bits, see [`QuantizedCache`](foveal::cache::QuantizedCache).
    Q8,
    /// Codes of 4 bits.
    Q4,
}

impl CacheStorage {
    /// All of them.
    pub const ALL: [CacheStorage; 5] = [
        CacheStorage::F32,
        CacheStorage::F16,
        CacheStorage::Bf16,
        CacheStorage::Q8,
        CacheStorage::Q4,
    ];

    /// `f32`, `f16`, `bf16`, `q8` or `q4`.
    pub const fn name(self) -> &'static str {
        match self {
            CacheStorage::F32 => "f32",
            CacheStorage::F16 => "f16",
            CacheStorage::Bf16 => "bf16",
            CacheStorage::Q8 => "q8",
            CacheStorage::Q4 => "q4",
        }
    }

    /// The storage of that name.
    pub fn named(name: &str) -> Option<CacheStorage> {
        CacheStorage::ALL.into_iter().find(|storage| storage.name() == name)
    }

    /// Whether keys and values are codes.
    pub const fn coded(self) -> bool {
        matches!(self, CacheStorage::Q8 | CacheStorage::Q4)
    }
}

/// Which keys are given up when a text grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Keep {
    /// Those that the layer's window, or the context, leaves behind. Exact.
    #[default]
    All,
    /// All but the first and the newest, at places that stay small (StreamingLLM, see [`Rolling`]). Layers whose own window
    /// is no longer keep that one, with the positions of the text.
    Rolling(Rolling),
    /// For each key/value head those that got least weight so far: half of the budget goes to the newest, half to the keys
    /// with the largest sums (H2O, Zhang et al. 2023). Chosen at every generated token, and between chunks of a prompt, so
    /// that memory stays within the budget and one chunk.
    HeavyHitters {
        /// Keys that are kept.
        budget: usize,
    },
    /// None of the whole text: each call sees the first tokens, the newest, and the pieces between them whose keys suit its
    /// queries best, chosen for each key/value head, at places that stay small, so that a model can be asked about a text
    /// longer than its context. A prompt goes through in calls of up to 64 tokens, which share what they see, and a generated
    /// token alone. Layers whose own window is no longer keep that one.
    Retrieve(Retrieval),
    /// When a prompt ends, for each key/value head those of it to which its last 32 tokens (or half of the budget, if that is
    /// less) gave least weight (SnapKV, Li et al. 2024). Generated tokens are added to what is kept.
    SnapKv {
        /// Keys of a prompt that are kept.
        budget: usize,
    },
}

/// How much of a long text a call sees: see [`Keep::Retrieve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Retrieval {
    /// Of the first tokens.
    pub sinks: usize,
    /// Of the pieces that suit the queries best: a multiple of `piece`.
    pub fetched: usize,
    /// Of the newest tokens, the query's own included.
    pub window: usize,
    /// Tokens of a piece.
    pub piece: usize,
    /// How far before a query the last fetched token is placed, at most `window`: models read best what is near.
    pub near: usize,
}

impl Retrieval {
    /// So many tokens in all: half of them the newest, a piece of the first, the others in pieces of 32, of which the last is
    /// placed 16 tokens before a query.
    pub fn within(budget: usize) -> Retrieval {
        let piece = 32;
        let fetched = (budget / 2).saturating_sub(piece) / piece * piece;
        let sinks = piece.min(budget / 4);
        let window = budget - sinks - fetched;
        Retrieval { sinks, fetched, window, piece, near: window.clamp(1, 16) }
    }

    /// Where queries of a call are placed towards what comes before the newest tokens, of a text of so many tokens: where they
    /// are while all is seen, and near to what is fetched then.
    pub(crate) fn places(self, tokens: usize) -> Result<Rolling, Error> {
        let first = self.first_tokens();
        let all = tokens <= first.saturating_add(self.window);
        Ok(Rolling::new(first, if all { self.window } else { self.near })?)
    }

    /// Tokens that come before the newest.
    pub(crate) fn first_tokens(self) -> usize {
        self.sinks.saturating_add(self.fetched)
    }
}

impl Keep {
    /// How many keys are kept, if there is a choice among them.
    pub(crate) fn budget(self) -> Option<usize> {
        match self {
            Keep::All => None,
            Keep::Rolling(rolling) => Some(rolling.tokens()),
            Keep::HeavyHitters { budget } | Keep::SnapKv { budget } => Some(budget),
            Keep::Retrieve(retrieval) => {
                Some(retrieval.first_tokens().saturating_add(retrieval.window))
            }
        }
    }
}

/// What a text's keys and values are kept as, and which of them.
///
/// ```
/// use foveal_lm::mixer::{CacheOptions, CacheStorage, Keep};
/// let options = CacheOptions { storage: CacheStorage::Q8, ..CacheOptions::default() };
/// assert_eq!((options.context, options.keep), (None, Keep::All));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheOptions {
    /// How keys and values are stored.
    pub storage: CacheStorage,
    /// How many of the newest tokens a token sees at most, its own included, in place of the context that the model was
    /// trained with. Layers with a shorter window keep it.
    pub context: Option<usize>,
    /// Which keys are given up.
    pub keep: Keep,
}

impl CacheOptions {
    /// Refuses numbers that make no sense for a model trained with so many tokens of context.
    ///
    /// # Errors
    /// [`Error::CacheOptions`].
    pub(crate) fn check(&self, trained: usize) -> Result<(), Error> {
        let refuse = |what, found: String, expected: String| {
            Err(Error::CacheOptions { what, found, expected })
        };
        let context = self.context.unwrap_or(trained);
        if !(1..=MAX_CONTEXT).contains(&context) {
            let expected = format!("1 to {MAX_CONTEXT} tokens");
            return refuse("context of a text", context.to_string(), expected);
        }
        let Some(budget) = self.keep.budget() else { return Ok(()) };
        if !(1..=context).contains(&budget) {
            let expected = format!("1 to the context of {context}");
            return refuse("number of keys to keep", budget.to_string(), expected);
        }
        if let Keep::Retrieve(Retrieval { window, fetched, piece, near, .. }) = self.keep
            && (!(1..=window).contains(&near) || piece == 0 || !fetched.is_multiple_of(piece))
        {
            let expected =
                "a window, a place within it, and whole pieces of 1 token or more".to_owned();
            return refuse("part of a text to see", format!("{:?}", self.keep), expected);
        }
        let evicting = matches!(self.keep, Keep::HeavyHitters { .. } | Keep::SnapKv { .. });
        if evicting && self.storage.coded() {
            let expected = "f32, f16 or bf16: codes can't be picked out".to_owned();
            return refuse("storage of an eviction", self.storage.name().to_owned(), expected);
        }
        Ok(())
    }
}
