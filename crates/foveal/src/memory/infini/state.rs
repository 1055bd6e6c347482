//! Token by token: the memory, and the keys and values of the segment that is not whole yet.
//!
//! ```text
//! a token   attends to the open segment's tokens, itself included, and reads M, z of the segments before
//! the N-th  writes the segment, M_s and z_s, and opens the next
//! ```
//!
//! Bytes: 4 · KV · Dk · (Dv + 1), and the keys and values of one segment (keys twice if they are rotated), whatever the
//! length. Borders lie where they lie in a whole call, which gives the same bits as prompts in any pieces.

use super::super::Gate;
use super::head::{Dims, Head};
use super::{Infini, Sizes, Tokens};
use crate::cpu::{MAX_GENERATED_ROWS, Phase};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::linear::{State, scratches};
use crate::parallel::for_each_item;
use crate::plan::{Inputs, expect};
use crate::sparse::StateHeads;
use crate::tensor::{Shape, Spans, Strides, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;

/// What a sequence leaves to its later tokens.
///
/// ```
/// use foveal::memory::infini::{Infini, Tokens};
/// use foveal::sparse::StateHeads;
/// use foveal::{Phase, Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let heads = StateHeads { heads: 4, kv_heads: 2, key_dim: 16, value_dim: 16 };
/// let mut state = Infini::new(32)?.state(heads, false)?;
/// let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 4, dim: 16 })?;
/// let kv = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 2, dim: 16 })?;
/// let tokens = Tokens::new(q.view(), kv.view(), kv.view(), &[0.0; 4]);
/// let out = state.forward(&tokens, Phase::Prompt)?;
/// assert_eq!((out.shape(), state.tokens(), state.open()), (q.shape(), 100, 4));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct InfiniState<E> {
    infini: Infini,
    shape: StateHeads,
    memory: State,
    /// `[kv head][token of the open segment]`: keys as attention reads them, and values.
    keys: Vec<E>,
    values: Vec<E>,
    /// Keys as the memory reads them, if those are others.
    plain_keys: Option<Vec<E>>,
    open: usize,
    tokens: usize,
    workspace: Workspace,
}

impl Infini {
    /// A state of one sequence that has seen nothing. `rotated`: whether its tokens come with rotated queries and keys.
    /// Allocates all that it will ever hold, but for a workspace.
    ///
    /// # Errors
    /// Those of [`crate::Attention::plan`]; [`Error::ShapeOverflow`] if a segment is more than the address space.
    pub fn state<E: Element>(&self, shape: StateHeads, rotated: bool) -> Result<InfiniState<E>> {
        let StateHeads { heads, kv_heads, key_dim, value_dim } = shape;
        let q = Shape { batch: 1, seq: 1, heads, dim: key_dim };
        let k = Shape { heads: kv_heads, ..q };
        self.attention()?.plan(q, k, Shape { dim: value_dim, ..k })?;
        let sizes = sizes(shape, 1);
        let segment = |dim| -> Result<Vec<E>> {
            let of = Shape { batch: 1, seq: self.segment, heads: kv_heads, dim };
            Ok(Tensor::zeros(of)?.into_vec())
        };
        Ok(InfiniState {
            infini: self.clone(),
            shape,
            memory: State::zeros(sizes.memory(), 1)?,
            keys: segment(key_dim)?,
            values: segment(value_dim)?,
            plain_keys: if rotated { Some(segment(key_dim)?) } else { None },
            open: 0,
            tokens: 0,
            workspace: Workspace::new(),
        })
    }
}

fn sizes(shape: StateHeads, seq: usize) -> Sizes {
    let StateHeads { heads, kv_heads, key_dim, value_dim } = shape;
    Sizes { batch: 1, seq, heads, kv_heads, dims: Dims { key: key_dim, value: value_dim } }
}

impl<E: Element> InfiniState<E> {
    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens of the segment that is not whole yet.
    pub fn open(&self) -> usize {
        self.open
    }

    /// The memory of the whole segments.
    pub fn memory(&self) -> &State {
        &self.memory
    }

    /// The memory, to be given.
    pub fn memory_mut(&mut self) -> &mut State {
        &mut self.memory
    }

    /// What is held of the open segment, `[kv head][token][dim]` with room for a whole segment: keys as attention reads them,
    /// values, and keys as the memory reads them if those are others. With the memory and the number of tokens it is the state.
    pub fn segment(&self) -> [&[E]; 3] {
        [&self.keys, &self.values, self.plain_keys.as_deref().unwrap_or_default()]
    }

    /// Takes up what another state of the same description held after so many tokens: its memory's matrices and sums of keys,
    /// and its [`InfiniState::segment`].
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for slices of other lengths; the state is unchanged then.
    pub fn restore(
        &mut self,
        tokens: usize,
        [matrices, key_sums]: [&[f32]; 2],
        segment: [&[E]; 3],
    ) -> Result<()> {
        let memory = [
            ("matrices of a memory", self.memory.matrices().len(), matrices.len()),
            ("sums of keys of a memory", self.memory.key_sums().len(), key_sums.len()),
        ];
        let held = self.segment().into_iter().zip(segment);
        let held = held.map(|(own, new)| ("numbers of an open segment", own.len(), new.len()));
        for (what, expected, got) in memory.into_iter().chain(held) {
            if expected != got {
                return Err(Error::LengthMismatch { what, expected, got });
            }
        }
        self.memory.matrices_mut().copy_from_slice(matrices);
        self.memory.key_sums_mut().copy_from_slice(key_sums);
        let plain = self.plain_keys.as_deref_mut().unwrap_or_default();
        for (to, from) in [&mut self.keys[..], &mut self.values, plain].into_iter().zip(segment) {
            to.copy_from_slice(from);
        }
        (self.tokens, self.open) = (tokens, tokens % self.infini.segment);
        Ok(())
    }

    /// Bytes of the memory and of a segment's keys and values; all of them are allocated from the beginning.
    pub fn bytes(&self) -> usize {
        let numbers = self.memory.matrices().len() + self.memory.key_sums().len();
        let plain = self.plain_keys.as_ref().map_or(0, Vec::len);
        4 * numbers + E::DTYPE.size() * (self.keys.len() + self.values.len() + plain)
    }

    /// Forgets everything and keeps the memory that it takes.
    pub fn clear(&mut self) {
        self.memory.matrices_mut().fill(0.0);
        self.memory.key_sums_mut().fill(0.0);
        (self.open, self.tokens) = (0, 0);
    }

    /// The outputs `[1, T, H, Dv]` of tokens that follow on those seen. Allocates the outputs, and the workspace once.
    ///
    /// Tokens of a prompt give the same bits in one call or many, and as [`Infini::forward`] on all of them; generated ones
    /// give the same bits however many share a call, of at most 64.
    ///
    /// # Errors
    /// Those of [`Infini::forward_into`]; [`Error::TooManyRows`] for more generated tokens;
    /// [`Error::InvalidParameter`] for rotated tokens in a state that was made for others, or the other way round. The state
    /// is unchanged then.
    pub fn forward(&mut self, tokens: &Tokens<'_, E>, phase: Phase) -> Result<Tensor<E>> {
        self.check(tokens, phase)?;
        let seq = tokens.q.shape().seq;
        let mut out = Tensor::zeros(sizes(self.shape, seq).out())?;
        let mut done = 0;
        while done < seq {
            let segment = self.infini.segment;
            let whole = if phase == Phase::Prompt { (seq - done) / segment * segment } else { 0 };
            let own = match self.open == 0 && whole > 0 {
                true => done..done + whole,
                false => done..seq.min(done + (segment - self.open)),
            };
            let (tokens, out) = (tokens.span(own.clone()), out.view_mut().into_span(own.clone()));
            if self.open == 0 && whole > 0 {
                self.infini.forward_into(&tokens, out, &mut self.memory, &mut self.workspace)?;
            } else {
                self.extend(&tokens, out, phase)?;
            }
            done = own.end;
        }
        self.tokens += seq;
        Ok(out)
    }

    fn check(&self, tokens: &Tokens<'_, E>, phase: Phase) -> Result<()> {
        let StateHeads { heads, kv_heads, key_dim, value_dim } = self.shape;
        let q = Shape { batch: 1, seq: tokens.q.shape().seq, heads, dim: key_dim };
        let k = Shape { heads: kv_heads, ..q };
        expect("queries of the state's sequence", q, tokens.q.shape())?;
        expect("keys of the state's sequence", k, tokens.k.shape())?;
        expect("values of the state's sequence", Shape { dim: value_dim, ..k }, tokens.v.shape())?;
        self.infini.check(tokens)?;
        if tokens.rotated.is_some() != self.plain_keys.is_some() {
            return Err(Error::InvalidParameter {
                what: "rotated queries and keys",
                expected: "some exactly if the state was made for them",
                got: if tokens.rotated.is_some() { "some" } else { "none" }.to_string(),
            });
        }
        if phase == Phase::Generated && q.seq > MAX_GENERATED_ROWS {
            return Err(Error::TooManyRows { got: q.seq, limit: MAX_GENERATED_ROWS });
        }
        // What can go wrong with the longest call on an open segment goes wrong now.
        let most = self.infini.segment.min(self.open.saturating_add(q.seq));
        let keys = Shape { seq: most, ..k };
        let rows = Shape { seq: q.seq.min(most), ..q };
        let attention = self.infini.attention()?;
        match phase {
            Phase::Prompt => attention.plan(rows, keys, Shape { dim: value_dim, ..keys })?,
            Phase::Generated => {
                attention.plan_decode(rows, keys, Shape { dim: value_dim, ..keys })?
            }
        };
        Ok(())
    }

    /// Tokens of the open segment alone.
    fn extend(
        &mut self,
        tokens: &Tokens<'_, E>,
        mut out: TensorMut<'_, E>,
        phase: Phase,
    ) -> Result<()> {
        let (segment, first) = (self.infini.segment, self.open);
        let Inputs { q, k, v } = tokens.local();
        self.open += q.shape().seq;
        hold(k, &mut self.keys, segment, first);
        hold(v, &mut self.values, segment, first);
        if let Some(plain_keys) = &mut self.plain_keys {
            hold(tokens.k, plain_keys, segment, first);
        }
        let held = self.open;
        let k = view(&self.keys, [self.shape.kv_heads, segment, self.shape.key_dim], held)?;
        let v = view(&self.values, [self.shape.kv_heads, segment, self.shape.value_dim], held)?;
        let attention = self.infini.attention()?;
        let plan = match phase {
            Phase::Prompt => attention.plan(q.shape(), k.shape(), v.shape())?,
            Phase::Generated => attention.plan_decode(q.shape(), k.shape(), v.shape())?,
        };
        self.workspace.reserve(plan.workspace_bytes());
        plan.forward(Inputs { q, k, v }, out.reborrow(), None, &mut self.workspace)?;
        self.remember(tokens, out)
    }

    /// What new tokens read of the memory; the segment that they may have made whole.
    fn remember(&mut self, tokens: &Tokens<'_, E>, out: TensorMut<'_, E>) -> Result<()> {
        let StateHeads { kv_heads, key_dim, value_dim, .. } = self.shape;
        let (infini, held) = (&self.infini, self.open);
        let whole = held == infini.segment;
        let keys = self.plain_keys.as_ref().unwrap_or(&self.keys);
        let k = view(keys, [kv_heads, infini.segment, key_dim], held)?;
        let v = view(&self.values, [kv_heads, infini.segment, value_dim], held)?;
        let sizes = sizes(self.shape, tokens.q.shape().seq);
        let (dims, group, cpu) = (sizes.dims, sizes.group(), infini.machine()?);
        let scratches = scratches(&mut self.workspace, cpu, kv_heads, Head::floats(dims))?;
        let spans = Spans::new(1, sizes.seq, None)?;
        let items = out.into_patches(spans, group).zip(self.memory.units_mut(1)).enumerate();
        for_each_item(items, scratches, |(kv_head, (mut out, memory)), floats| {
            let mut head = Head::borrow(sizes.seq, floats, (dims, cpu.level), (memory.0, memory.1));
            for own in 0..group {
                let h = kv_head * group + own;
                let gate = (Gate::new(tokens.gate[h]), infini.empty);
                head.read(tokens.q.head(0, h), (&mut out, 0, own), gate);
            }
            if whole {
                let mut head = Head::load(floats, dims, cpu.level, (memory.0, memory.1));
                head.write(k.head(0, kv_head), v.head(0, kv_head), infini.update);
                head.store((memory.0, memory.1));
            }
        });
        if whole {
            self.open = 0;
        }
        Ok(())
    }
}

/// Copies tokens to where the open segment holds them, head by head.
fn hold<E: Element>(from: TensorRef<'_, E>, to: &mut [E], segment: usize, first: usize) {
    let Shape { seq, heads, dim, .. } = from.shape();
    for head in 0..heads {
        let rows = to[(head * segment + first) * dim..][..seq * dim].chunks_exact_mut(dim);
        rows.enumerate().for_each(|(t, row)| row.copy_from_slice(from.row(0, t, head)));
    }
}

/// The first `held` tokens of `[heads, segment, dim]`.
fn view<E: Element>(
    data: &[E],
    [heads, segment, dim]: [usize; 3],
    held: usize,
) -> Result<TensorRef<'_, E>> {
    let shape = Shape { batch: 1, seq: held, heads, dim };
    TensorRef::from_strides(data, shape, Strides { batch: 0, seq: dim, heads: segment * dim })
}
