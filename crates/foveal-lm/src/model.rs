//! A decoder-only language model, assembled from its configuration.
//!
//! ```text
//! x = scale · embedding[tokens]      x ← blockᵢ(x) for each layer      logits = cap(head(norm(x)))
//! ```
//!
//! The cap is Gemma 2's, `c · tanh(logit / c)`; other models have none. Weights stay in their file's form and place.
//! A prompt is read in chunks that end at multiples of [`CHUNK`] of the text's own position, so that neither memory nor
//! any bit of the result depends on how it is cut into calls. Only the tokens whose logits are asked for meet the head.
//!
//! **Beyond the context** that a model was trained with, positions go on to grow and every token sees the newest
//! `context` tokens (those that [`CacheOptions::context`] says, if it does): no distance occurs that training had not, and memory stops growing.

mod batch;
mod memories;
mod paged;
mod resumed;
mod watched;

use std::path::Path;

use foveal::position::Rope;
use foveal::projection::Activations;
use foveal::{Cpu, MAX_GENERATED_ROWS, Phase, Workspace, cache, nn};

use crate::Error;
use crate::block::{self, Block};
use crate::config::ModelConfig;
use crate::linear::{Linear, Run};
use crate::mixer::{CacheOptions, Keep, LayerState, Pages};
use crate::names::Parts;
use crate::norm::Norm;
use crate::ropes::Ropes;
use crate::weights::Weights;

pub use batch::{Batch, MAX_TEXTS};
pub use memories::MemoryFolder;
pub use watched::Observer;
use watched::Watch;

/// Prompt tokens that go through the layers together, at most.
pub const CHUNK: usize = cache::TILE;

/// Prompt tokens that share what they fetch of a long text ([`Keep::Retrieve`]), at most.
const ASKING: usize = 64;

/// A language model: its configuration and its weights, which stay in the file.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    cpu: Cpu,
    activations: Activations,
    embedding: Linear,
    ropes: Vec<Rope>,
    blocks: Vec<Block>,
    final_norm: Norm,
    head: Linear,
}

/// What a model holds of one text: the keys and values of its tokens, layer by layer.
///
/// A clone goes on by itself from the same tokens. It shares pages until one of the two writes them, and holds in RAM what the
/// other one keeps in files.
#[derive(Clone, Debug)]
pub struct State {
    layers: Vec<LayerState>,
    position: usize,
    options: CacheOptions,
    /// Where the layers take their pages from, if they do.
    pages: Option<Pages>,
}

/// Buffers of a call, kept for the next; any number of states may share them, one at a time.
#[derive(Debug, Default)]
pub struct Scratch {
    x: Vec<f32>,
    activations: block::Activations,
    last: Vec<f32>,
    logits: Vec<f32>,
    workspace: Workspace,
}

/// Which tokens of a call get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Logits {
    /// None: the call fills the state.
    None,
    /// The last one.
    Last,
    /// All of them: `vocab` numbers each, so let calls be short.
    All,
}

/// What kind of step a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Step {
    /// Whether the tokens were given or generated; see [`Phase`]. Generated tokens come up to 64 a call.
    pub phase: Phase,
    /// Which of them get logits.
    pub logits: Logits,
}

impl Step {
    /// A prompt, of which the last token gets logits.
    pub const PROMPT: Step = Step { phase: Phase::Prompt, logits: Logits::Last };
    /// A generated token.
    pub const GENERATED: Step = Step { phase: Phase::Generated, logits: Logits::Last };
}

impl Model {
    /// Opens a model's file or folder and assembles it.
    ///
    /// # Errors
    ///
    /// Those of [`Weights::open`] and [`Model::new`].
    pub fn load(path: &Path) -> Result<Model, Error> {
        Model::new(&Weights::open(path)?)
    }

    /// Assembles a model. Copies norms and biases only; the rest stays in its file.
    ///
    /// # Errors
    ///
    /// Those of [`ModelConfig::read`]; [`Error::Weights`] for a tensor that is missing, has another shape than the
    /// configuration implies, or a format that isn't supported; [`Error::Kernel`].
    pub fn new(weights: &Weights) -> Result<Model, Error> {
        Model::assembled(weights, ModelConfig::read(weights)?)
    }

    /// The same by a description that differs from the file's in what tensors do not depend on, such as a memory's length.
    ///
    /// # Errors
    ///
    /// Those of [`Model::new`].
    pub fn assembled(weights: &Weights, config: ModelConfig) -> Result<Model, Error> {
        let cpu = Cpu::detect()?;
        let parts = Parts::new(weights, &config);
        let mut ropes = Ropes::new(&config);
        let block = |layer| Block::new(&parts, layer, ropes.layer(layer)?);
        let blocks = (0..config.layers.len()).map(block).collect::<Result<_, Error>>()?;
        let (embedding, head) = (parts.embedding()?, parts.head()?);
        let final_norm = parts.final_norm()?;
        let ropes = ropes.into_all();
        let activations = Activations::default();
        Ok(Model { cpu, activations, embedding, ropes, blocks, final_norm, head, config })
    }

    /// The same model, with projections that round their inputs; they do not unless told so.
    ///
    /// Rows do not depend on who shares a call in any case. What it costs in quality: docs/performance.md.
    #[must_use]
    pub fn with_activations(self, activations: Activations) -> Model {
        Model { activations, ..self }
    }

    /// What the model is made of.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A state that holds no tokens. It grows as they come, up to what the layers' reach needs, and no further however
    /// long the text.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] when a layer's keys are larger than the address space.
    pub fn state(&self) -> Result<State, Error> {
        self.state_with(&CacheOptions::default())
    }

    /// A state that holds no tokens, and keeps keys and values as `options` say.
    ///
    /// # Errors
    ///
    /// Those of [`Model::state`]; [`Error::CacheOptions`].
    pub fn state_with(&self, options: &CacheOptions) -> Result<State, Error> {
        options.check(self.config.context)?;
        let layers = self.blocks.iter().zip(&self.config.layers).map(|(block, layer)| {
            let reach = self.config.reach_within(layer, options.context);
            block.mixer.state(options, (layer.reach, reach))
        });
        let layers = layers.collect::<Result<_, Error>>()?;
        Ok(State { layers, position: 0, options: *options, pages: None })
    }

    /// Reads `tokens` on from where `state` is, and leaves the logits that `step` asks for in `scratch`.
    ///
    /// Each token's result depends on the tokens before it and on its phase, and on nothing else: not on how a prompt
    /// is cut into calls, not on other states, not on the number of threads. Allocates only to make `state` or `scratch` larger.
    ///
    /// # Errors
    ///
    /// [`Error::Token`], [`Error::TooManyTokens`] and [`Error::State`]; nothing has changed then. [`Error::Kernel`] with
    /// [`OutOfPages`](foveal::Error::OutOfPages): the state holds the tokens up to its position, and goes on from there when
    /// there are pages. [`Error::KeyValue`] and [`Error::Kernel`] where keys or values are beyond what the state stores; it
    /// must be reset then.
    pub fn forward(
        &self,
        tokens: &[u32],
        step: Step,
        state: &mut State,
        scratch: &mut Scratch,
    ) -> Result<(), Error> {
        self.check(tokens, step, state.layers.len())?;
        scratch.logits.clear();
        let mut rest = tokens;
        while !rest.is_empty() {
            let room = state.room(step.phase);
            let (chunk, later) = rest.split_at(room.min(rest.len()));
            self.forward_chunk(chunk, step.phase, state, scratch)?;
            let asked = match step.logits {
                Logits::All => chunk.len(),
                Logits::Last if later.is_empty() => 1,
                Logits::Last | Logits::None => 0,
            };
            self.append_logits(asked, scratch)?;
            rest = later;
        }
        Ok(())
    }

    /// Refuses what no call takes, before anything is changed.
    pub(crate) fn check(&self, tokens: &[u32], step: Step, layers: usize) -> Result<(), Error> {
        let vocab = self.config.vocab;
        if let Some(&found) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(Error::Token { found, vocab });
        }
        if step.phase == Phase::Generated && tokens.len() > MAX_GENERATED_ROWS {
            return Err(Error::TooManyTokens { found: tokens.len(), limit: MAX_GENERATED_ROWS });
        }
        let expected = self.blocks.len();
        if layers != expected && !(layers == 0 && tokens.is_empty()) {
            return Err(Error::State { expected, found: layers });
        }
        Ok(())
    }

    fn forward_chunk(
        &self,
        tokens: &[u32],
        phase: Phase,
        state: &mut State,
        scratch: &mut Scratch,
    ) -> Result<(), Error> {
        self.run_chunk(tokens, phase, (state, scratch), Watch::Nobody)
    }

    fn run_chunk(
        &self,
        tokens: &[u32],
        phase: Phase,
        (state, scratch): (&mut State, &mut Scratch),
        mut watch: Watch<'_, '_>,
    ) -> Result<(), Error> {
        if let Some((pages, needed)) = state.needed(tokens.len()) {
            pages.has_free(&needed)?;
        }
        self.embed(tokens, &mut scratch.x)?;
        let positions: Vec<usize> = (state.position..).take(tokens.len()).collect();
        let rolling = match state.options.keep {
            Keep::Rolling(rolling) => Some(rolling),
            Keep::Retrieve(retrieval) => Some(retrieval.places(state.position + tokens.len())?),
            _ => None,
        };
        scratch.activations.set_positions(&self.ropes, &positions, rolling)?;
        let workspace = &mut scratch.workspace;
        let mut run = Run { cpu: self.cpu, phase, activations: self.activations, workspace };
        for (n, (block, layer)) in self.blocks.iter().zip(&mut state.layers).enumerate() {
            let states = std::slice::from_mut(layer);
            if let Watch::Traces(traces) = &mut watch {
                *scratch.activations.trace() = Some(std::mem::take(&mut traces[n]));
            }
            block.forward(&mut scratch.x, states, &mut scratch.activations, &mut run)?;
            match &mut watch {
                Watch::Nobody => {}
                Watch::Observer(observer) => {
                    let attended = block.attended(layer, &scratch.activations, self.cpu)?;
                    observer.attention(n, &attended)?;
                }
                Watch::Traces(traces) => {
                    traces[n] = scratch.activations.trace().take().unwrap_or_default();
                }
            }
        }
        state.position += tokens.len();
        Ok(())
    }

    fn embed(&self, tokens: &[u32], x: &mut Vec<f32>) -> Result<(), Error> {
        x.resize(tokens.len() * self.config.width, 0.0);
        self.embedding.embed(tokens, x, self.cpu)?;
        x.iter_mut().for_each(|x| *x *= self.config.embedding_scale);
        Ok(())
    }

    /// Projects the last `count` tokens of the chunk to logits.
    ///
    /// Always by the row kernels: they read the head once for up to 64 tokens, and a token gets the same bits whether
    /// its logits are asked for alone or with others.
    fn append_logits(&self, count: usize, scratch: &mut Scratch) -> Result<(), Error> {
        let x = std::mem::take(&mut scratch.x);
        let projected = self.project_logits(&x[x.len() - count * self.config.width..], scratch);
        scratch.x = x;
        projected
    }

    fn project_logits(&self, x: &[f32], scratch: &mut Scratch) -> Result<(), Error> {
        let Scratch { last, logits, workspace, .. } = scratch;
        let width = self.config.width;
        for rows in x.chunks(MAX_GENERATED_ROWS * width) {
            last.resize(rows.len(), 0.0);
            self.final_norm.forward(rows, last, self.cpu)?;
            let start = logits.len();
            logits.resize(start + rows.len() / width * self.config.vocab, 0.0);
            let phase = Phase::Generated;
            let mut run = Run { cpu: self.cpu, phase, activations: self.activations, workspace };
            self.head.forward(last, &mut logits[start..], &mut run)?;
            if let Some(cap) = self.config.logit_softcap {
                nn::softcap(&mut logits[start..], cap, self.cpu.level)?;
            }
        }
        Ok(())
    }
}

impl State {
    /// Tokens read so far: the position of the next.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Tokens that may go through the layers together: those up to the next multiple of [`CHUNK`], and one where each has
    /// its own choice of keys.
    fn room(&self, phase: Phase) -> usize {
        match (self.options.keep, phase) {
            (Keep::HeavyHitters { .. } | Keep::Retrieve(_), Phase::Generated) => 1,
            (Keep::Retrieve(_), Phase::Prompt) => ASKING - self.position % ASKING,
            _ => CHUNK - self.position % CHUNK,
        }
    }

    /// Forgets everything and keeps the memory; the next token has position 0.
    pub fn reset(&mut self) {
        self.layers.iter_mut().for_each(LayerState::clear);
        self.position = 0;
    }

    /// Bytes of the keys and values that are held, in the form in which they are stored.
    pub fn kv_bytes(&self) -> usize {
        self.layers.iter().map(LayerState::bytes).sum()
    }
}

impl Scratch {
    /// No buffers yet.
    pub fn new() -> Scratch {
        Scratch::default()
    }

    /// The logits of the last call, `vocab` for each token that was to have some, in order.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}
