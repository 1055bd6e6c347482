//! What a mechanism's kernels see: the mapped rows of some neighbouring tokens of one head.

use crate::simd::Level;
use crate::simd::near::Near;
use crate::simd::sweep::{self, Decay, Layout, Read, Sweep, TokenRows, Write};
use crate::simd::token::{self, Features};

/// Tokens that are gathered at once. No bit depends on it.
pub(crate) const BLOCK: usize = 32;

/// A state in the form in which kernels take it through tokens.
#[derive(Debug)]
pub(crate) struct Matrix<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) layout: Layout,
}

impl Matrix<'_> {
    /// A sweep that writes and reads; other parts are filled in by the caller.
    pub(crate) fn sweep<'b>(
        &'b mut self,
        tokens: usize,
        write: Option<Write<'b>>,
        read: Option<Read<'b>>,
    ) -> Sweep<'b> {
        Sweep {
            state: self.data,
            layout: self.layout,
            tokens,
            reverse: false,
            decay: Decay::None,
            before: None,
            write,
            read,
            after: None,
            near: None,
        }
    }
}

/// What tokens do with a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Each writes its key, then reads with its query.
    Both,
    /// Keys without queries.
    Write,
    /// Queries without keys.
    Read,
}

/// Neighbouring tokens of one head, forward.
#[derive(Debug)]
pub struct Block<'a> {
    pub(crate) level: Level,
    /// What the tokens do; what they lack is absent (keys) or means nothing (queries, values).
    pub(crate) step: Step,
    /// Tokens.
    pub(crate) len: usize,
    /// Numbers of a padded query or key, and of a padded value.
    pub(crate) strides: (usize, usize),
    /// Mapped queries.
    pub(crate) q: TokenRows<'a>,
    /// Mapped keys.
    pub(crate) k: TokenRows<'a>,
    /// Values.
    pub(crate) v: TokenRows<'a>,
    /// Factors of the state, one number a token or one padded key.
    pub(crate) decay: &'a [f32],
    pub(crate) beta: &'a [f32],
    /// Rows are key channels.
    pub(crate) state: Matrix<'a>,
    /// Sums of keys, each padded.
    pub(crate) z: &'a mut [f32],
    /// Out: what was read, padded values.
    pub(crate) out: &'a mut [f32],
    /// In and out: what each row of `out` is multiplied by besides the scale; ones at first.
    pub(crate) factors: &'a mut [f32],
    /// Out, for delta rules: what each key read before its token wrote, padded values.
    pub(crate) reads: &'a mut [f32],
    /// Rows of padded keys that a mechanism makes for itself.
    pub(crate) made: [&'a mut [f32]; 3],
    /// Rows that come next.
    pub(crate) near: Option<&'a Near>,
}

impl<'a> Block<'a> {
    /// Queries and keys that were gathered.
    pub(crate) fn features(&self) -> Features<'a> {
        Features { q: self.q.data, k: self.k.data, stride: self.strides.0 }
    }

    /// Rows of key channels.
    pub(crate) fn keys(&self, data: &'a [f32]) -> TokenRows<'a> {
        TokenRows { data, stride: self.strides.0 }
    }

    /// S ← decay S + k vᵀ, out = Sᵀ q.
    pub(crate) fn write_and_read(&mut self, decay: Decay<'_>) {
        self.write_and_read_rows(self.q, self.k, decay);
    }

    /// The same with other rows of queries and keys.
    pub(crate) fn write_and_read_rows(
        &mut self,
        q: TokenRows<'_>,
        k: TokenRows<'_>,
        decay: Decay<'_>,
    ) {
        let (writes, reads) = parts(self.step, decay);
        let write = writes.then_some(Write { rows: k, columns: self.v });
        let read = reads.then_some(Read { by: q, out: self.out });
        let sweep = self.state.sweep(self.len, write, read);
        sweep::sweep(self.level, Sweep { decay, near: self.near, ..sweep });
    }
}

/// Whether a sweep writes and whether it reads. What decays does both, whether it is wanted or not.
fn parts(step: Step, decay: Decay<'_>) -> (bool, bool) {
    let both = !matches!(decay, Decay::None);
    (both || step != Step::Read, both || step != Step::Write)
}

/// Passes over a sequence of which gradients are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// From the last token to the first, before everything else.
    First,
    /// From the first token to the last: the state is made again, transposed.
    Ahead,
    /// From the last token to the first: the gradient of the state.
    Back,
}

/// Which gradients a pass has written. Those of queries and keys are added to what other passes wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Of the mapped queries.
    pub q: bool,
    /// Of the mapped keys.
    pub k: bool,
    /// Of the values.
    pub v: bool,
    /// Of the logarithms of decays.
    pub decay: bool,
    /// Of the writing strengths.
    pub beta: bool,
}

impl Written {
    /// What either has written.
    pub(super) fn and(self, other: Written) -> Written {
        Written {
            q: self.q | other.q,
            k: self.k | other.k,
            v: self.v | other.v,
            decay: self.decay | other.decay,
            beta: self.beta | other.beta,
        }
    }
}

/// Neighbouring tokens of one head, backward.
#[derive(Debug)]
pub struct BlockGradient<'a> {
    pub(crate) level: Level,
    /// What the tokens do; what they lack is absent (keys) or zero.
    pub(crate) step: Step,
    pub(crate) len: usize,
    pub(crate) strides: (usize, usize),
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    /// The gradient of the output times the scale; passes may change it.
    pub(crate) g: &'a mut [f32],
    pub(crate) decay: &'a [f32],
    pub(crate) beta: &'a [f32],
    /// For delta rules, what each key read before its token wrote.
    pub(crate) reads: &'a [f32],
    /// What the pass of the same number kept: [`Recurrence::kept`](super::Recurrence::kept) numbers a token.
    pub(crate) kept: &'a mut [f32],
    /// The state, transposed: rows are value channels.
    pub(crate) ahead: Matrix<'a>,
    /// The gradient of the state: rows are key channels.
    pub(crate) back: Matrix<'a>,
    /// The same, transposed.
    pub(crate) back_transposed: Matrix<'a>,
    /// Sums of keys, and gradients of them, each padded.
    pub(crate) sums: (&'a mut [f32], &'a mut [f32]),
    /// Scratch of one padded key.
    pub(crate) spare: &'a mut [f32],
    pub(crate) d_q: &'a mut [f32],
    pub(crate) d_k: &'a mut [f32],
    pub(crate) d_v: &'a mut [f32],
    /// Gradients of logarithms of decays, one number a token or one padded key.
    pub(crate) d_decay: &'a mut [f32],
    pub(crate) d_beta: &'a mut [f32],
    /// The sum of `d_decay` over later tokens, in two parts.
    pub(crate) suffix: [&'a mut [f32]; 2],
    /// Rows that come next: read, and written.
    pub(crate) near: [&'a Near; 2],
}

impl<'a> BlockGradient<'a> {
    pub(crate) fn features(&self) -> Features<'a> {
        Features { q: self.q, k: self.k, stride: self.strides.0 }
    }

    /// Rows of key channels.
    pub(crate) fn keys(&self, data: &'a [f32]) -> TokenRows<'a> {
        TokenRows { data, stride: self.strides.0 }
    }

    /// d log a, from what was kept: its sum over this and all later tokens, in rows of `width` numbers.
    pub(crate) fn sum_over_later_tokens(&mut self, width: usize) {
        let [high, low] = &mut self.suffix;
        token::sum_later(self.level, self.kept, width, [high, low], self.d_decay);
    }

    /// dq = S g with S ← decay S + k vᵀ.
    pub(crate) fn read_gradient_of_queries(&mut self, decay: Decay<'_>) {
        self.read_gradient_of_query_rows(self.k, decay);
    }

    /// The same with other rows of keys.
    pub(crate) fn read_gradient_of_query_rows(&mut self, k: &[f32], decay: Decay<'_>) {
        let (keys, values) = self.strides;
        let (writes, reads) = parts(self.step, decay);
        let rows = TokenRows { data: self.v, stride: values };
        let write = Write { rows, columns: TokenRows { data: k, stride: keys } };
        let by = TokenRows { data: self.g, stride: values };
        let read = reads.then_some(Read { by, out: self.d_q });
        let sweep = self.ahead.sweep(self.len, writes.then_some(write), read);
        let near = self.near[0].with(self.near[1]);
        sweep::sweep(self.level, Sweep { decay, near: Some(&near), ..sweep });
    }

    /// dv = dSᵀ k and dk = dS v with dS ← decay (dS + q gᵀ), from the last token to the first.
    pub(crate) fn read_gradients_of_writes(&mut self, decay: Decay<'_>, transposed: Decay<'_>) {
        self.read_gradients_of_written_rows((self.q, self.k), decay, transposed);
    }

    /// The same with other rows of queries and keys.
    pub(crate) fn read_gradients_of_written_rows(
        &mut self,
        (q, k): (&[f32], &[f32]),
        decay: Decay<'_>,
        transposed: Decay<'_>,
    ) {
        let (keys, values) = self.strides;
        // Queries write to the gradient of the state, and keys read it.
        let (reads, writes) = parts(self.step, decay);
        let g = TokenRows { data: self.g, stride: values };
        let q = TokenRows { data: q, stride: keys };
        let by = TokenRows { data: k, stride: keys };
        let write = writes.then_some(Write { rows: q, columns: g });
        let read = reads.then_some(Read { by, out: self.d_v });
        let sweep = self.back.sweep(self.len, write, read);
        sweep::sweep(self.level, Sweep { decay, reverse: true, near: Some(self.near[0]), ..sweep });
        let by = TokenRows { data: self.v, stride: values };
        let write = writes.then_some(Write { rows: g, columns: q });
        let read = reads.then_some(Read { by, out: self.d_k });
        let sweep = self.back_transposed.sweep(self.len, write, read);
        sweep::sweep(
            self.level,
            Sweep { decay: transposed, reverse: true, near: Some(self.near[1]), ..sweep },
        );
    }
}
