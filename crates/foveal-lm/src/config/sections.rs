//! Which mechanisms mix the tokens of a layer, where it is not the attention of its family: by name, for all heads or for
//! some of them.
//!
//! ```json
//! "foveal": {"mixer": {"name": "sparse_transformer", "pattern": "fixed", "stride": 128, "width": 8}}
//! "foveal": {"mixer": [{"name": "full"},
//!                      [{"name": "window", "tokens": 256, "heads": 6}, {"name": "moba", "block": 64, "top": 4, "heads": 2}]]}
//! ```
//!
//! One description stands for all layers, a list has one for each. A layer is one mechanism, or a list of them with the
//! heads that each takes, in their order.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::LayerConfig;
use crate::Error;

/// What mixes tokens in some of a layer's heads.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Mechanism {
    /// All tokens of the context.
    Full {},
    /// The newest tokens, the query's own included.
    Window {
        /// How many.
        tokens: usize,
    },
    /// [`SparseTransformer`](foveal::sparse::SparseTransformer).
    SparseTransformer {
        /// Which pattern.
        pattern: Factorised,
        /// l.
        stride: usize,
        /// c, the columns of a summary, of the fixed pattern.
        #[serde(default = "one")]
        width: usize,
        /// With the fixed pattern, head `h` takes the columns of sub-block `h mod num_verts`.
        #[serde(default)]
        num_verts: Option<usize>,
        /// Keys of the strided pattern's near part.
        #[serde(default)]
        window: NearWindow,
        /// Which of the two sets a head sees.
        #[serde(default)]
        combine: CombineHeads,
    },
    /// [`Longformer`](foveal::sparse::Longformer), keys at or before the query.
    Longformer {
        /// Keys before the query that it sees.
        reach: usize,
        /// The distance between them.
        #[serde(default = "one")]
        gap: usize,
        /// Positions that see all and are seen by all.
        #[serde(default)]
        global: Vec<usize>,
        /// Whether the rows of global tokens have projections of their own.
        #[serde(default)]
        global_projections: bool,
    },
    /// [`BigBird`](foveal::sparse::BigBird) with the published plan, keys at or before the query.
    Bigbird {
        /// Tokens of a block.
        block: usize,
        /// Random blocks of a block row.
        random: usize,
        /// What they are drawn with.
        #[serde(default)]
        seed: u64,
    },
    /// [`Moba`](foveal::sparse::Moba).
    Moba {
        /// Tokens of a block.
        block: usize,
        /// Blocks that a query sees, its own included.
        top: usize,
    },
    /// [`NativeSparse`](foveal::sparse::NativeSparse): blocks compressed to their means, one key and value for all three
    /// branches, gates from the layer's inputs.
    NativeSparse {
        /// Tokens that are compressed to one.
        length: usize,
        /// Tokens from one compressed one to the next.
        stride: usize,
        /// Tokens of a selected block.
        block: usize,
        /// Selected blocks.
        top: usize,
        /// Newest tokens.
        window: usize,
    },
    /// [`Reformer`](foveal::sparse::Reformer) with chunks of buckets: queries are keys, hashed before they are rotated, and
    /// scores aren't scaled.
    Lsh {
        /// Tokens of a chunk of a bucket; a query sees its own chunk and the one before it.
        chunk: usize,
        /// Buckets of a round.
        buckets: usize,
        /// Rounds of hashing.
        #[serde(default = "two")]
        rounds: usize,
        /// What directions are drawn with.
        #[serde(default)]
        seed: u64,
    },
    /// [`Linear`](foveal::linear::Linear).
    Linear {
        /// What queries and keys go through.
        #[serde(default)]
        map: KernelMap,
    },
    /// [`Favor`](foveal::linear::Favor) with orthogonal features.
    Performer {
        /// How many.
        features: usize,
        /// What they are drawn with.
        #[serde(default)]
        seed: u64,
    },
    /// [`Efficient`](foveal::linear::Efficient), over the keys so far.
    Efficient {},
    /// [`Linformer`](foveal::linear::Linformer), with matrices for as many tokens as the context has: for encoders, since it
    /// is not causal. Models that continue texts refuse it.
    Linformer {
        /// Mixtures of keys.
        rank: usize,
        /// Whether keys and values share one matrix.
        #[serde(default)]
        shared: bool,
    },
    /// [`Retention`](foveal::linear::Retention).
    Retention {},
    /// [`ScalarDecay`](foveal::linear::ScalarDecay).
    ScalarDecay {
        /// Taps of the convolutions of queries, keys and values; 0 for none.
        #[serde(default)]
        conv: usize,
    },
    /// [`VectorDecay`](foveal::linear::VectorDecay): gated linear attention.
    Gla {
        /// Inner width of the projection to decays.
        #[serde(default = "sixteen")]
        rank: usize,
    },
    /// [`Delta`](foveal::linear::Delta) without gate.
    Delta {
        /// As in [`Mechanism::ScalarDecay`].
        #[serde(default = "four")]
        conv: usize,
        /// Whether writing strengths go up to 2.
        #[serde(default)]
        negative_eigenvalues: bool,
    },
    /// [`Delta`](foveal::linear::Delta) with a gate.
    GatedDelta {
        /// As in [`Mechanism::ScalarDecay`].
        #[serde(default = "four")]
        conv: usize,
        /// Whether writing strengths go up to 2.
        #[serde(default)]
        negative_eigenvalues: bool,
    },
    /// Transformer-XL: the segment and the tokens before it, by [`RelativeEncoding`](foveal::position::RelativeEncoding).
    TransformerXl {
        /// Tokens of a segment.
        segment: usize,
        /// Tokens before a segment that its queries see.
        memory: usize,
        /// Whether every query sees as many tokens as a memory has, its own included, whatever its place in the segment.
        #[serde(default)]
        same_length: bool,
        /// The distance that those beyond it count as.
        #[serde(default)]
        clamp: Option<usize>,
    },
    /// [`Infini`](foveal::memory::infini::Infini).
    Infini {
        /// Tokens of a segment.
        segment: usize,
        /// What a segment adds to the memory.
        #[serde(default)]
        update: MemoryUpdate,
        /// Whether queries and keys are rotated within a segment.
        #[serde(default = "yes")]
        rotated: bool,
    },
    /// [`Memorizing`](foveal::memory::memorizing::Memorizing), its memory stored as other keys and values. The mechanism has no positions: other
    /// layers have to have them.
    Memorizing {
        /// Tokens of a segment.
        segment: usize,
        /// Entries of the memory that a query sees.
        top: usize,
        /// Tokens that are remembered.
        capacity: usize,
        /// Whether the segment before is seen whole as well.
        #[serde(default)]
        previous: bool,
        /// Whether entries are found by an inverted file, once there are many. Training looks at all of them.
        #[serde(default)]
        index: Option<MemoryIndex>,
    },
}

/// See [`foveal::memory::memorizing::Index`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryIndex {
    /// Lists of a key/value head.
    pub lists: usize,
    /// Lists that a query searches.
    pub probes: usize,
}

/// See [`foveal::memory::infini::Update`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryUpdate {
    /// Values.
    #[default]
    Linear,
    /// Values less what is held.
    Delta,
}

/// See [`foveal::linear::FeatureMap`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelMap {
    /// elu(x) + 1.
    #[default]
    EluPlusOne,
    /// max(x, 0).
    Relu,
    /// e^x.
    Exp,
}

/// The patterns of the Sparse Transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Factorised {
    /// Near tokens, and each l-th one before.
    Strided,
    /// The own block, and the summaries of all blocks.
    Fixed,
}

/// See [`foveal::sparse::Window`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NearWindow {
    /// l + 1 keys.
    #[default]
    Paper,
    /// l keys.
    Code,
}

/// See [`foveal::sparse::Combine`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CombineHeads {
    /// Every head sees both sets.
    #[default]
    Merged,
    /// Even heads see the first, odd ones the second.
    PerHead,
    /// Even layers see the first, odd ones the second.
    Interleaved,
}

const fn one() -> usize {
    1
}

const fn two() -> usize {
    2
}

const fn yes() -> bool {
    true
}

const fn four() -> usize {
    4
}

const fn sixteen() -> usize {
    16
}

impl Mechanism {
    /// All names, as `foveal list` has them.
    pub const NAMES: [&str; 20] = [
        "full",
        "window",
        "sparse_transformer",
        "longformer",
        "bigbird",
        "moba",
        "native_sparse",
        "lsh",
        "linear",
        "performer",
        "efficient",
        "linformer",
        "retention",
        "scalar_decay",
        "gla",
        "delta",
        "gated_delta",
        "transformer_xl",
        "infini",
        "memorizing",
    ];

    /// Its name.
    pub const fn name(&self) -> &'static str {
        match self {
            Mechanism::Full {} => "full",
            Mechanism::Window { .. } => "window",
            Mechanism::SparseTransformer { .. } => "sparse_transformer",
            Mechanism::Longformer { .. } => "longformer",
            Mechanism::Bigbird { .. } => "bigbird",
            Mechanism::Moba { .. } => "moba",
            Mechanism::NativeSparse { .. } => "native_sparse",
            Mechanism::Lsh { .. } => "lsh",
            Mechanism::Linear { .. } => "linear",
            Mechanism::Performer { .. } => "performer",
            Mechanism::Efficient {} => "efficient",
            Mechanism::Linformer { .. } => "linformer",
            Mechanism::Retention {} => "retention",
            Mechanism::ScalarDecay { .. } => "scalar_decay",
            Mechanism::Gla { .. } => "gla",
            Mechanism::Delta { .. } => "delta",
            Mechanism::GatedDelta { .. } => "gated_delta",
            Mechanism::TransformerXl { .. } => "transformer_xl",
            Mechanism::Infini { .. } => "infini",
            Mechanism::Memorizing { .. } => "memorizing",
        }
    }
}

/// Neighbouring heads of a layer, and what mixes tokens in them.
#[derive(Clone, Debug, PartialEq)]
pub struct SectionConfig {
    /// The mechanism.
    pub mechanism: Mechanism,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; they divide the query heads.
    pub kv_heads: usize,
}

/// What [`read`] reads: `None` for layers without sections.
///
/// # Errors
///
/// [`Error::UnsupportedConfig`] where only some layers have sections.
pub(crate) fn write(layers: &[LayerConfig]) -> Result<Option<Value>, Error> {
    if layers.iter().all(|layer| layer.sections.is_empty()) {
        return Ok(None);
    }
    let unsupported = |found: String| {
        let key = "mixers by name in some layers only".to_owned();
        Error::UnsupportedConfig { key, found }
    };
    let mut mixer = vec![];
    for (n, layer) in layers.iter().enumerate() {
        if layer.sections.is_empty() {
            return Err(unsupported(format!("none in layer {n}")));
        }
        let sections = layer.sections.iter().map(|section| {
            let mut json = serde_json::to_value(&section.mechanism)?;
            json["heads"] = section.heads.into();
            json["kv_heads"] = section.kv_heads.into();
            Ok(json)
        });
        let sections: Result<Value, serde_json::Error> = sections.collect();
        mixer.push(sections.map_err(|error| unsupported(error.to_string()))?);
    }
    Ok(Some(json!({"mixer": mixer})))
}

/// The sections of each of `layers` layers: empty where a layer has its family's attention.
pub(super) fn read(
    foveal: Option<&Value>,
    layers: usize,
    heads: [usize; 2],
) -> Result<Vec<Vec<SectionConfig>>, Error> {
    let Some(foveal) = foveal else { return Ok(vec![vec![]; layers]) };
    let fields = foveal.as_object().filter(|fields| fields.keys().all(|key| key == "mixer"));
    let Some(mixer) = fields.and_then(|fields| fields.get("mixer")) else {
        return Err(wrong("", foveal, "an object with the key \"mixer\" alone"));
    };
    match mixer {
        Value::Array(each) if each.len() == layers => {
            each.iter().enumerate().map(|(n, layer)| self::layer(n, layer, heads)).collect()
        }
        Value::Array(_) => Err(wrong(" mixer", mixer, &format!("one for each of {layers} layers"))),
        _ => (0..layers).map(|n| layer(n, mixer, heads)).collect(),
    }
}

/// The sections of a layer.
fn layer(n: usize, layer: &Value, all: [usize; 2]) -> Result<Vec<SectionConfig>, Error> {
    let sections = match layer {
        Value::Array(sections) => sections.iter().map(|one| section(n, one, all)).collect(),
        one => section(n, one, all).map(|section| vec![section]),
    };
    let sections: Vec<SectionConfig> = sections?;
    let sum = |count: fn(&SectionConfig) -> usize| sections.iter().map(count).sum::<usize>();
    let found = [sum(|section| section.heads), sum(|section| section.kv_heads)];
    if found != all {
        let expected = format!("sections with {} heads and {} key/value heads", all[0], all[1]);
        return Err(wrong(&format!(" mixer of layer {n}"), layer, &expected));
    }
    Ok(sections)
}

fn section(n: usize, section: &Value, all: [usize; 2]) -> Result<SectionConfig, Error> {
    let place = format!(" mixer of layer {n}");
    let Value::Object(fields) = section else {
        return Err(wrong(&place, section, "an object with a name"));
    };
    let name = fields.get("name").and_then(Value::as_str).unwrap_or_default();
    if !Mechanism::NAMES.contains(&name) {
        let expected = format!("a name among {}", Mechanism::NAMES.join(", "));
        return Err(wrong(&place, section, &expected));
    }
    let mut fields = fields.clone();
    let mut count = |key: &str, usual: usize| match fields.remove(key) {
        None => Ok(usual),
        Some(value) => {
            let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
            let count = count.filter(|count| (1..=1 << 12).contains(count));
            count.ok_or_else(|| wrong(&place, section, &format!("{key}: 1 to 4096")))
        }
    };
    let heads = count("heads", all[0])?;
    // As many query heads for each as in the whole layer.
    let usual = (heads * all[1]).div_ceil(all[0].max(1));
    let kv_heads = count("kv_heads", usual)?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(wrong(&place, section, "key/value heads that divide its heads"));
    }
    let mechanism = serde_json::from_value(Value::Object(fields))
        .map_err(|error| wrong(&place, section, &error.to_string()))?;
    Ok(SectionConfig { mechanism, heads, kv_heads })
}

fn wrong(place: &str, found: &Value, expected: &str) -> Error {
    let mut found = found.to_string();
    found.truncate(found.floor_char_boundary(120));
    Error::config(&format!("config.json \"foveal\"{place}"), found, expected)
}
