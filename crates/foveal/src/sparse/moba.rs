//! MoBA: each row sees its own block, and the earlier blocks whose mean key suits its query best.
//!
//! ```text
//! score_n = q_i · mean(keys of block n)          for blocks before the row's own, in f32, without a scale
//! row i sees    its own block up to itself, and the k − 1 blocks with the largest scores
//! ```
//!
//! No gradient goes through the choice. The own blocks are one part; for each earlier block, the rows that chose it
//! are gathered and see all of it, and log-sum-exps join what a row has seen. Cost for each query: block/2 +
//! (k − 1) · block keys, and N/block products to choose. Lu et al. 2025, section 2.

use super::choices::{BlockChoices, best};
use super::held::{Held, Stepped};
use super::parts::{Heads, Memory, Part, Runner, Tokens};
use super::pattern::blocks;
use super::prompt::block_parts;
use super::state::StateHeads;
use crate::cpu::{Cpu, Phase};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::mask::{Extent, Mask, Pattern, Site};
use crate::plan::{Backward, Inputs};
use crate::problem::{Attention, Forward, Scale};
use crate::projection::{
    Activations, Call, Input, Matrix, MatrixShape, Output, project, workspace_bytes,
};
use crate::tensor::{Shape, TensorRef};
use crate::workspace::Workspace;
use std::ops::Range;

/// Rows whose scores are held at a time.
const ROWS: usize = 1024;

/// MoBA attention.
///
/// ```
/// use foveal::plan::Inputs;
/// use foveal::sparse::Moba;
/// use foveal::{Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let x = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 4, dim: 16 })?;
/// let inputs = Inputs { q: x.view(), k: x.view(), v: x.view() };
/// let layer = Moba::new(8, 3)?;
/// let choices = layer.choose(x.view(), x.view())?;
/// let forward = layer.forward(inputs, &choices)?;
/// assert_eq!(layer.backward(inputs, &choices, &forward, x.view())?.d_q.shape(), x.shape());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Moba {
    block: usize,
    top: usize,
    scale: Scale,
    cpu: Option<Cpu>,
}

impl Moba {
    /// Blocks of `block` tokens, of which a row sees `top`, its own included.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for blocks of no tokens, and for rows that see no block.
    pub fn new(block: usize, top: usize) -> Result<Moba> {
        let rules = [
            ("tokens of a block", block, "at least 1"),
            ("blocks that a row sees", top, "at least 1: its own counts"),
        ];
        for (what, got, expected) in rules {
            if got == 0 {
                return Err(Error::InvalidParameter { what, expected, got: got.to_string() });
            }
        }
        Ok(Moba { block, top, scale: Scale::default(), cpu: None })
    }

    /// What scores are multiplied by in attention; the choice does not depend on it.
    pub fn scale(self, scale: Scale) -> Moba {
        Moba { scale, ..self }
    }

    /// Which instructions and threads to use, instead of [`Cpu::detect`].
    pub fn cpu(self, cpu: Cpu) -> Moba {
        Moba { cpu: Some(cpu), ..self }
    }

    /// The earlier blocks that suit each of the queries `[B, T, H, D]` best among the keys `[B, S, KV, D]`, chosen by
    /// each query head. Among equals the earlier one counts; a score of NaN counts least. Allocates.
    ///
    /// # Errors
    /// Those of [`Attention::plan`].
    pub fn choose<E: Element>(
        &self,
        q: TensorRef<'_, E>,
        k: TensorRef<'_, E>,
    ) -> Result<BlockChoices> {
        let (shape, keys) = (q.shape(), k.shape());
        let runner = self.runner(shape.dim)?;
        Attention::new().cpu(runner.cpu).plan(shape, keys, keys)?;
        let Shape { batch, seq, heads, dim } = shape;
        let most = self.most(keys.seq);
        let mut choices = BlockChoices::none([batch, heads, seq], most);
        if most == 0 {
            return Ok(choices);
        }
        let mut gate = Gate::new(runner.cpu);
        let mut means = Means::new(self.block, dim);
        for (b, head) in (0..batch).flat_map(|b| (0..heads).map(move |head| (b, head))) {
            if head.is_multiple_of(heads / keys.heads) {
                means = Means::new(self.block, dim);
                let head = head * keys.heads / heads;
                (0..keys.seq).for_each(|t| means.push(k.row(b, t, head)));
            }
            let q = q.part(b..b + 1, head..head + 1);
            self.choose_of((&means, &mut gate), (q, keys.seq), [b, head], &mut choices)?;
        }
        Ok(choices)
    }

    /// What the queries `[1, T, 1, D]` of one head choose among so many keys.
    fn choose_of<E: Element>(
        &self,
        (means, gate): (&Means, &mut Gate),
        (q, keys): (TensorRef<'_, E>, usize),
        [b, head]: [usize; 2],
        choices: &mut BlockChoices,
    ) -> Result<()> {
        let Shape { seq, dim, .. } = q.shape();
        for rows in (0..seq).step_by(ROWS).map(|row| row..(row + ROWS).min(seq)) {
            let count = self.before(rows.end - 1, [seq, keys]);
            let scores = gate.scores(&means.data[..count * dim], q, rows.clone())?;
            for (row, scores) in rows.zip(scores.chunks(count.max(1))) {
                let before = self.before(row, [seq, keys]);
                best(&scores[..before], 0, choices.row_mut([b, head, row]));
            }
        }
        Ok(())
    }

    /// The pairs that choices let through among so many keys, as a mask, for looking at it: exact attention with it
    /// takes the time of full attention.
    pub fn mask(&self, choices: &BlockChoices, keys: usize) -> Mask {
        Mask::pattern(Definition { block: self.block, choices: choices.clone(), keys })
    }

    /// Attention of queries `[B, T, H, Dk]` to keys `[B, S, KV, Dk]` and values `[B, S, KV, Dv]` as chosen; query `i`
    /// is at position `i + S − T`. Allocates the result and what is gathered.
    ///
    /// # Errors
    /// Those of [`Attention::plan`]; [`Error::ShapeMismatch`] for choices of other rows;
    /// [`Error::InvalidParameter`] for a chosen block that is not before the row's own, or is chosen twice.
    pub fn forward<E: Element>(
        &self,
        inputs: Inputs<'_, E, E>,
        choices: &BlockChoices,
    ) -> Result<Forward<E>> {
        let runner = self.prepare(&inputs, choices)?;
        self.join(&runner, inputs, self.own_blocks(&inputs), choices)
    }

    /// The own blocks, and what rows chose.
    fn join<E: Element>(
        &self,
        runner: &Runner,
        inputs: Inputs<'_, E, E>,
        own: Heads,
        choices: &BlockChoices,
    ) -> Result<Forward<E>> {
        let mut result = runner.forward(inputs, &[own])?;
        if !result.out.as_slice().is_empty() {
            let mut memory = Memory::new(runner.cpu);
            for heads in choices.parts(1, self.block) {
                runner.forward_in(&mut memory, inputs, &[heads], &mut result)?;
            }
        }
        Ok(result)
    }

    /// Gradients from what [`Moba::forward`] was given and gave, and the gradient of its output. Allocates the result
    /// and what is gathered.
    ///
    /// # Errors
    /// Those of [`Moba::forward`]; [`Error::ShapeMismatch`] for results of another shape.
    pub fn backward<E: Element>(
        &self,
        inputs: Inputs<'_, E, E>,
        choices: &BlockChoices,
        forward: &Forward<E>,
        d_out: TensorRef<'_, E>,
    ) -> Result<Backward<E>> {
        let runner = self.prepare(&inputs, choices)?;
        let mut d = runner.backward(inputs, forward, d_out, &[self.own_blocks(&inputs)])?;
        if !forward.out.as_slice().is_empty() {
            let mut memory = Memory::new(runner.cpu);
            for heads in choices.parts(1, self.block) {
                runner.backward_in(&mut memory, (inputs, forward, d_out), &[heads], &mut d)?;
            }
        }
        Ok(d)
    }

    /// A state that has seen nothing.
    ///
    /// # Errors
    /// Those of [`Attention::plan_decode`].
    pub fn state<E: Element>(&self, shape: StateHeads) -> Result<MobaState<E>> {
        let held = Held::new(self.runner(shape.key_dim)?, shape)?;
        let gate = Gate::new(held.runner.cpu);
        let means = vec![Means::new(self.block, shape.key_dim); shape.kv_heads];
        Ok(MobaState { layer: *self, held, means, gate })
    }

    fn runner(&self, dim: usize) -> Result<Runner> {
        let cpu = self.cpu.map_or_else(Cpu::detect, Ok)?;
        Ok(Runner { scale: self.scale.resolve(dim)?, cpu })
    }

    /// The most blocks that a row can choose among so many keys.
    fn most(&self, keys: usize) -> usize {
        (self.top - 1).min(keys.saturating_sub(1) / self.block)
    }

    /// The blocks before that of a row.
    fn before(&self, row: usize, [queries, keys]: [usize; 2]) -> usize {
        (row + keys).checked_sub(queries).map_or(0, |position| position / self.block)
    }

    fn prepare<E: Element>(
        &self,
        inputs: &Inputs<'_, E, E>,
        choices: &BlockChoices,
    ) -> Result<Runner> {
        let [q, k, v] = [inputs.q.shape(), inputs.k.shape(), inputs.v.shape()];
        let runner = self.runner(q.dim)?;
        Attention::new().cpu(runner.cpu).plan(q, k, v)?;
        let rule = "blocks before the row's own, each once";
        choices
            .check([q.batch, q.heads, q.seq], rule, |row| 0..self.before(row, [q.seq, k.seq]))?;
        Ok(runner)
    }

    /// All rows and their own blocks.
    fn own_blocks<E: Element>(&self, inputs: &Inputs<'_, E, E>) -> Heads {
        let (q, keys) = (inputs.q.shape(), inputs.k.shape().seq);
        let mask = blocks([q.seq, keys], self.block);
        let part = Part { queries: Tokens::Span(0..q.seq), keys: Tokens::Span(0..keys), mask };
        Heads { sequences: 0..q.batch, heads: 0..q.heads, parts: vec![part] }
    }
}

/// Keys and values of one sequence, all of them, as any query may choose any block; and the mean keys of blocks.
///
/// ```
/// use foveal::sparse::{Moba, StateHeads};
/// use foveal::{Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let heads = StateHeads { heads: 4, kv_heads: 2, key_dim: 16, value_dim: 16 };
/// let mut state = Moba::new(8, 3)?.state(heads)?;
/// let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 1, heads: 4, dim: 16 })?;
/// let prompt = Tensor::<f32>::zeros(Shape { batch: 1, seq: 95, heads: 2, dim: 16 })?;
/// state.append(prompt.view(), prompt.view())?;
/// assert_eq!(state.attend(q.view())?.out.shape(), q.shape());
/// assert_eq!(state.tokens(), 95);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct MobaState<E> {
    layer: Moba,
    held: Held<E>,
    /// Of each key/value head.
    means: Vec<Means>,
    gate: Gate,
}

impl<E: Element> MobaState<E> {
    /// Tokens appended.
    pub fn tokens(&self) -> usize {
        self.held.entries()
    }

    /// Bytes of the keys and values that are held, and of the blocks' means.
    pub fn bytes(&self) -> usize {
        let means = self.means.iter().map(|means| means.data.len()).sum::<usize>();
        self.held.bytes() + means * size_of::<f32>()
    }

    /// Takes these instructions and threads from now on.
    pub fn set_cpu(&mut self, cpu: Cpu) {
        self.held.runner.cpu = cpu;
        self.gate.call.cpu = cpu;
    }

    /// Heads and dims.
    pub fn heads(&self) -> StateHeads {
        self.held.shape
    }

    /// Keys and values of all tokens, rows `[token][kv head]`: appended to an empty state, they make this one again.
    pub fn rows(&self) -> [&[E]; 2] {
        self.held.rows()
    }

    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        self.held.clear();
        self.means.iter_mut().for_each(Means::clear);
    }

    /// Appends tokens: keys `[1, n, KV, Dk]` and values `[1, n, KV, Dv]`. Allocates as it grows.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; the state is unchanged then.
    pub fn append(&mut self, k: TensorRef<'_, E>, v: TensorRef<'_, E>) -> Result<()> {
        for t in 0..self.held.check(k.shape(), v.shape())? {
            self.held.write(self.held.entries(), [k, v], t);
            for (head, means) in self.means.iter_mut().enumerate() {
                means.push(k.row(0, t, head));
            }
        }
        Ok(())
    }

    /// Appends the tokens of a prompt, keys `[1, n, KV, Dk]` and values `[1, n, KV, Dv]`, and attends with all of their
    /// queries, `[1, n, H, Dk]`. However a prompt is cut into such calls, the bits are the same. Allocates the result and
    /// what is gathered.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; the state is unchanged then.
    pub fn prompt(&mut self, inputs: Inputs<'_, E, E>) -> Result<Forward<E>> {
        let rows = self.held.rows_of(self.tokens(), inputs)?;
        let Inputs { q, k, v } = inputs;
        self.append(k, v)?;
        let (layer, runner) = (self.layer, self.held.runner);
        let StateHeads { heads, kv_heads, .. } = self.held.shape;
        let mut choices = BlockChoices::none([1, heads, rows.len()], layer.most(rows.end));
        for head in 0..heads {
            let means = (&self.means[head * kv_heads / heads], &mut self.gate);
            let own = (q.part(0..1, head..head + 1), rows.end);
            layer.choose_of(means, own, [0, head], &mut choices)?;
        }
        let parts = block_parts(&rows, layer.block, |position| position);
        let own = Heads { sequences: 0..1, heads: 0..heads, parts };
        layer.join(&runner, self.held.all(q)?, own, &choices)
    }

    /// Attention of the newest token's queries, `[1, 1, H, Dk]`, to its own block and those that it chooses: the same
    /// as in a prompt. Allocates the result, and the workspace once.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`].
    pub fn attend(&mut self, q: TensorRef<'_, E>) -> Result<Forward<E>> {
        let mut result = self.held.nothing(q.shape())?;
        let (tokens, Moba { block, .. }) = (self.tokens(), self.layer);
        if tokens == 0 {
            return Ok(result);
        }
        let StateHeads { heads, kv_heads, key_dim, .. } = self.held.shape;
        let read = |entries| (Stepped { entries, step: 1 }, Mask::Full);
        let before = (tokens - 1) / block;
        self.held.attend(q, 0..heads, read(before * block..tokens), &mut result)?;
        let mut choices = BlockChoices::none([1, heads, 1], self.layer.most(tokens));
        for head in 0..heads {
            let means = &self.means[head * kv_heads / heads].data[..before * key_dim];
            let scores = self.gate.scores(means, q.part(0..1, head..head + 1), 0..1)?;
            best(scores, 0, choices.row_mut([0, head, 0]));
            for n in choices.of(0, head, 0) {
                let entries = read(n * block..(n + 1) * block);
                self.held.attend(q, head..head + 1, entries, &mut result)?;
            }
        }
        Ok(result)
    }
}

/// The mean keys of the whole blocks of a head, `[blocks, dim]`. Sums run in f64.
#[derive(Debug, Clone)]
struct Means {
    block: usize,
    data: Vec<f32>,
    sum: Vec<f64>,
    /// Keys in the sum.
    count: usize,
}

impl Means {
    fn new(block: usize, dim: usize) -> Means {
        Means { block, data: vec![], sum: vec![0.0; dim], count: 0 }
    }

    fn clear(&mut self) {
        *self = Means::new(self.block, self.sum.len());
    }

    fn push<E: Element>(&mut self, key: &[E]) {
        self.sum.iter_mut().zip(key).for_each(|(sum, x)| *sum += f64::from(x.to_f32()));
        self.count += 1;
        if self.count == self.block {
            self.data.extend(self.sum.iter().map(|sum| (sum / self.block as f64) as f32));
            self.sum.fill(0.0);
            self.count = 0;
        }
    }
}

/// Products of queries and mean keys.
#[derive(Debug, Clone)]
struct Gate {
    call: Call,
    queries: Vec<f32>,
    scores: Vec<f32>,
    workspace: Workspace,
}

impl Gate {
    fn new(cpu: Cpu) -> Gate {
        let call = Call { phase: Phase::Prompt, cpu, activations: Activations::F32 };
        Gate { call, queries: vec![], scores: vec![], workspace: Workspace::new() }
    }

    /// The products of some rows of one head's queries with means `[count, dim]`: `[rows, count]`.
    fn scores<E: Element>(
        &mut self,
        means: &[f32],
        q: TensorRef<'_, E>,
        rows: Range<usize>,
    ) -> Result<&[f32]> {
        let (dim, n) = (q.shape().dim, rows.len());
        let count = means.len() / dim;
        self.scores.clear();
        if count == 0 {
            return Ok(&self.scores);
        }
        self.queries.clear();
        self.queries.extend(rows.flat_map(|t| q.row(0, t, 0)).map(|x| x.to_f32()));
        self.scores.resize(n * count, 0.0);
        let matrix =
            Matrix::from_floats(MatrixShape { out_features: count, in_features: dim }, means)?;
        self.workspace.reserve(workspace_bytes(&[matrix], n, self.call));
        let input = Input { data: &self.queries, rows: n, stride: dim };
        let output = Output { data: &mut self.scores, stride: count };
        project(&matrix, input, output, self.call, &mut self.workspace)?;
        Ok(&self.scores)
    }
}

/// The pairs as they are defined.
#[derive(Debug)]
struct Definition {
    block: usize,
    choices: BlockChoices,
    keys: usize,
}

impl Pattern for Definition {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        let Some(position) = usize::try_from(i).ok().filter(|&i| j <= i) else { return false };
        let (block, row) = (j / self.block, [at.batch, at.q_head, position]);
        block == position / self.block || self.choices.chose(row, self.keys, block)
    }

    fn check(&self, extent: Extent) -> Result<()> {
        self.choices.fits(extent, self.keys)
    }
}
