//! Native Sparse Attention token by token.
//!
//! Held are all compressed tokens, all tokens of which blocks are selected, and the w newest of the window. Whoever
//! compresses does so once a stride, when another length of tokens is whole.

use super::choices::BlockChoices;
use super::held::{Held, Stepped};
use super::native_sparse::{Branches, NativeForward, NativeSparse, gated_sum};
use super::state::StateHeads;
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::plan::{Inputs, expect};
use crate::problem::Forward;
use crate::tensor::{Shape, TensorRef};
use std::ops::Range;

/// Keys and values of one sequence in each branch.
///
/// ```
/// use foveal::sparse::{Branches, NativeSizes, NativeSparse, StateHeads};
/// use foveal::{Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let sizes = NativeSizes { length: 8, stride: 4, block: 8, top: 5, window: 16 };
/// let layer = NativeSparse::new(sizes)?;
/// let heads = StateHeads { heads: 4, kv_heads: 2, key_dim: 16, value_dim: 16 };
/// let mut state = layer.state(heads)?;
/// let x = Tensor::<f32>::zeros(Shape { batch: 1, seq: 95, heads: 2, dim: 16 })?;
/// let compressed = layer.pool(x.view())?;
/// let kv = Branches { compressed: compressed.view(), selected: x.view(), window: x.view() };
/// state.append(kv, kv)?;
/// let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 1, heads: 4, dim: 16 })?;
/// let gates = Tensor::zeros(Shape { batch: 1, seq: 1, heads: 4, dim: 3 })?;
/// let q = Branches { compressed: q.view(), selected: q.view(), window: q.view() };
/// assert_eq!(state.attend(q, gates.view())?.out.shape().heads, 4);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct NativeState<E> {
    layer: NativeSparse,
    compressed: Held<E>,
    selected: Held<E>,
    /// Token t at t mod w.
    window: Held<E>,
}

impl NativeSparse {
    /// A state that has seen nothing.
    ///
    /// # Errors
    /// Those of [`crate::Attention::plan_decode`].
    pub fn state<E: Element>(&self, shape: StateHeads) -> Result<NativeState<E>> {
        let held = || Held::new(self.runner(shape.key_dim)?, shape);
        Ok(NativeState { layer: *self, compressed: held()?, selected: held()?, window: held()? })
    }
}

impl<E: Element> NativeState<E> {
    /// Tokens appended.
    pub fn tokens(&self) -> usize {
        self.selected.entries()
    }

    /// Compressed tokens that the next `tokens` tokens bring.
    pub fn compressed_by(&self, tokens: usize) -> usize {
        self.layer.compressed_tokens(self.tokens() + tokens) - self.compressed.entries()
    }

    /// Bytes of the keys and values that are held in all branches.
    pub fn bytes(&self) -> usize {
        self.compressed.bytes() + self.selected.bytes() + self.window.bytes()
    }

    /// Takes these instructions and threads from now on.
    pub fn set_cpu(&mut self, cpu: Cpu) {
        for held in [&mut self.compressed, &mut self.selected, &mut self.window] {
            held.runner.cpu = cpu;
        }
    }

    /// Heads and dims.
    pub fn heads(&self) -> StateHeads {
        self.selected.shape
    }

    /// The mechanism.
    pub fn layer(&self) -> &NativeSparse {
        &self.layer
    }

    /// Keys and values of all tokens as blocks are selected of them, rows `[token][kv head]`.
    pub fn rows(&self) -> [&[E]; 2] {
        self.selected.rows()
    }

    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        let all = [&mut self.compressed, &mut self.selected, &mut self.window];
        all.into_iter().for_each(Held::clear);
    }

    /// Appends tokens: keys `[1, n, KV, Dk]` and values `[1, n, KV, Dv]` of each branch, where n is
    /// [`NativeState::compressed_by`] for compressed ones. Allocates as it grows.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; the state is unchanged then.
    pub fn append(
        &mut self,
        k: Branches<TensorRef<'_, E>>,
        v: Branches<TensorRef<'_, E>>,
    ) -> Result<()> {
        let [tokens, compressed] = self.counts(k, v)?;
        for t in 0..tokens {
            let place = self.tokens();
            self.selected.write(place, [k.selected, v.selected], t);
            let place = place % self.layer.sizes.window;
            self.window.write(place, [k.window, v.window], t);
        }
        for n in 0..compressed {
            self.compressed.write(self.compressed.entries(), [k.compressed, v.compressed], n);
        }
        Ok(())
    }

    /// How many tokens and compressed tokens there are to append, if they fit.
    fn counts(
        &self,
        k: Branches<TensorRef<'_, E>>,
        v: Branches<TensorRef<'_, E>>,
    ) -> Result<[usize; 2]> {
        let tokens = self.selected.check(k.selected.shape(), v.selected.shape())?;
        self.window.check(k.window.shape(), v.window.shape())?;
        self.compressed.check(k.compressed.shape(), v.compressed.shape())?;
        let count = |what, seq, got: Shape| expect(what, Shape { seq, ..got }, got);
        count("tokens of the window", tokens, k.window.shape())?;
        let compressed = self.compressed_by(tokens);
        count("compressed tokens", compressed, k.compressed.shape())?;
        Ok([tokens, compressed])
    }

    /// Appends the tokens of a prompt as [`NativeState::append`] does, and attends with all of their queries
    /// `[1, n, H, Dk]` in each branch, by their gates `[1, n, H, 3]`. However a prompt is cut into such calls, the bits are
    /// the same. Allocates the result and what is gathered.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; the state is unchanged then.
    pub fn prompt(
        &mut self,
        tokens: Branches<Inputs<'_, E, E>>,
        gates: TensorRef<'_, f32>,
    ) -> Result<NativeForward<E>> {
        let Branches { compressed, selected, window } = tokens;
        let k = Branches { compressed: compressed.k, selected: selected.k, window: window.k };
        let v = Branches { compressed: compressed.v, selected: selected.v, window: window.v };
        let [count, _] = self.counts(k, v)?;
        let rows = self.selected.rows_of(self.tokens(), selected)?;
        let shape = Shape { seq: count, ..selected.q.shape() };
        expect("queries of compressed tokens", shape, compressed.q.shape())?;
        expect("queries of the window", shape, window.q.shape())?;
        expect("gates of three branches", Shape { dim: 3, ..shape }, gates.shape())?;
        let (layer, runner) = (self.layer, self.selected.runner);
        let own = [window.k, window.v];
        let [keys, values] = self.window.newest(layer.sizes.window, rows.clone(), own)?;
        self.append(k, v)?;
        let Inputs { q, k, v } = self.compressed.all(compressed.q)?;
        let weighed = layer.compressed(&runner, [k.shape().seq, rows.end]).forward(q, k, v)?;
        let choices = layer.choose(&runner, (q, k, weighed.lse.view()), rows.end)?;
        let selected = layer.selected(&runner, self.selected.all(selected.q)?, &choices)?;
        let window = layer.near(&runner).forward(window.q, keys.view(), values.view())?;
        let branches = Branches { compressed: weighed, selected, window };
        let out = gated_sum(&branches, gates, runner.cpu.threads.count())?;
        Ok(NativeForward { out, branches, choices })
    }

    /// Attention of the newest token: its queries `[1, 1, H, Dk]` in each branch, and its gates `[1, 1, H, 3]`.
    /// Allocates the result, and workspaces once.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; [`Error::InvalidParameter`] where nothing has been appended.
    pub fn attend(
        &mut self,
        q: Branches<TensorRef<'_, E>>,
        gates: TensorRef<'_, f32>,
    ) -> Result<NativeForward<E>> {
        let shape = q.selected.shape();
        let mut compressed = self.compressed.nothing(q.compressed.shape())?;
        let mut window = self.window.nothing(q.window.shape())?;
        let mut selected = self.selected.nothing(shape)?;
        expect("gates of three branches", Shape { dim: 3, ..shape }, gates.shape())?;
        let (tokens, heads) = (self.tokens(), 0..shape.heads);
        if tokens == 0 {
            let (what, expected) = ("tokens of a state that attends", "at least 1");
            return Err(Error::InvalidParameter { what, expected, got: "0".into() });
        }
        let whole = 0..self.compressed.entries();
        if !whole.is_empty() {
            self.compressed.attend(q.compressed, heads.clone(), all(whole), &mut compressed)?;
        }
        self.window.attend(q.window, heads, all(0..self.window.entries()), &mut window)?;
        let runner = self.compressed.runner;
        let weights = (q.compressed, self.compressed.view()?, compressed.lse.view());
        let choices = self.layer.choose(&runner, weights, tokens)?;
        self.select(q.selected, &choices, &mut selected)?;
        let branches = Branches { compressed, selected, window };
        let out = gated_sum(&branches, gates, 1)?;
        Ok(NativeForward { out, branches, choices })
    }

    /// The blocks that each group of heads sees.
    fn select(
        &mut self,
        q: TensorRef<'_, E>,
        choices: &BlockChoices,
        to: &mut Forward<E>,
    ) -> Result<()> {
        let StateHeads { heads, kv_heads, .. } = self.selected.shape;
        let (block, tokens) = (self.layer.sizes.block, self.tokens());
        let newest = ((tokens - 1) / block).saturating_sub(1) * block..tokens;
        let first = 0..newest.start.min(block);
        for entries in [first, newest].into_iter().filter(|entries| !entries.is_empty()) {
            self.selected.attend(q, 0..heads, all(entries), to)?;
        }
        for kv in 0..kv_heads {
            let own = kv * heads / kv_heads..(kv + 1) * heads / kv_heads;
            for n in choices.of(0, kv, 0) {
                let entries = all(n * block..(n + 1) * block);
                self.selected.attend(q, own.clone(), entries, to)?;
            }
        }
        Ok(())
    }
}

/// All entries of a range.
fn all(entries: Range<usize>) -> (Stepped, Mask) {
    (Stepped { entries, step: 1 }, Mask::Full)
}
