//! Multi-head latent attention over rows that all heads share.
//!
//! ```text
//! cache row j = [c_j | kᴿ_j]      k_jh = [W_UK,h c_j | kᴿ_j]      v_jh = W_UV,h c_j      q_ih = [q_C | q_R]
//! plain:      o_ih = Σ_j softmax_j(scale · ⟨q_ih, k_jh⟩) v_jh
//! absorbed:   q̂_ih = [W_UK,hᵀ q_C | q_R]      ĉ_ih = Σ_j softmax_j(scale · ⟨q̂_ih, row_j⟩) c_j      o_ih = W_UV,h ĉ_ih
//! ```
//!
//! Both are the same by associativity, and equal within rounding. Per query, head and key, plain attention takes
//! 2 (n + r + v) operations after 2 c (n + v) for each key and head to make it; absorbed attention takes 2 (2c + r) and
//! reads a row once for all heads. So prompts run plain and generated rows absorbed, unless asked otherwise. The scale is that of a
//! head's own key, 1/√(n + r). DeepSeek-V2 (arXiv:2405.04434), §2.1.

mod absorbed;
mod plain;

use crate::cache::KvStore;
use crate::cpu::{Cpu, Phase};
use crate::error::{Error, Result};
use crate::parallel::Threads;
use crate::plan::{MAX_DIM, Plan, expect};
use crate::problem::{Attention, Scale};
use crate::projection::{Matrix, MatrixShape};
use crate::tensor::{Shape, TensorMut, TensorRef};
use crate::workspace::Workspace;
use std::ops::Range;

/// The sizes of latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LatentDims {
    /// Query heads.
    pub heads: usize,
    /// c: compressed numbers of a token.
    pub latent: usize,
    /// r: numbers of the rotated key that heads share.
    pub rope: usize,
    /// n: numbers of a head's own part of a key.
    pub nope: usize,
    /// v: numbers of a head's value.
    pub value: usize,
}

impl LatentDims {
    /// Numbers of a head's query: its own part, then the rotated one.
    pub fn query(&self) -> usize {
        self.nope + self.rope
    }

    /// Numbers of a cached row.
    pub fn row(&self) -> usize {
        self.latent + self.rope
    }

    /// Rows of the up-projection that belong to a head.
    fn up(&self) -> usize {
        self.nope + self.value
    }

    fn check(&self) -> Result<()> {
        for (what, dim) in [
            ("latent dimension", self.latent),
            ("value dimension", self.value),
            ("query dimension", self.nope.saturating_add(self.rope)),
            ("dimension of a latent row", self.latent.saturating_add(self.rope)),
        ] {
            if !(1..=MAX_DIM).contains(&dim) {
                let expected = "1 to 4096";
                return Err(Error::InvalidParameter { what, expected, got: dim.to_string() });
            }
        }
        Ok(())
    }
}

/// Which of the two equal ways a call takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LatentForm {
    /// Keys and values of all heads are made from the rows.
    Plain,
    /// Queries are taken to where the rows are.
    Absorbed,
}

impl LatentForm {
    /// The faster one: plain for prompts, absorbed for generated rows.
    pub fn of(phase: Phase) -> LatentForm {
        match phase {
            Phase::Prompt => LatentForm::Plain,
            Phase::Generated => LatentForm::Absorbed,
        }
    }
}

/// A layer's latent attention.
///
/// ```
/// use foveal::cache::LatentCache;
/// use foveal::latent::{LatentAttention, LatentCall, LatentDims, LatentForm, LatentScratch};
/// use foveal::projection::{Matrix, MatrixShape};
/// use foveal::{Attention, Mask, Phase, Shape, Tensor, Workspace};
/// # fn main() -> foveal::Result<()> {
/// let dims = LatentDims { heads: 4, latent: 32, rope: 8, nope: 16, value: 16 };
/// let up = vec![0.1; 4 * (16 + 16) * 32];
/// let up = Matrix::from_floats(MatrixShape { out_features: 4 * 32, in_features: 32 }, &up)?;
/// let layer = LatentAttention::new(Attention::new().mask(Mask::causal()), dims, up)?;
///
/// let mut cache = LatentCache::<f32>::new((32, 8), 100)?;
/// let rows = Tensor::<f32>::zeros(Shape { batch: 1, seq: 10, heads: 1, dim: 40 })?;
/// cache.append(rows.view())?;
/// let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 10, heads: 4, dim: 24 })?;
/// let mut out = Tensor::<f32>::zeros(Shape { dim: 16, ..q.shape() })?;
/// let phase = Phase::Prompt;
/// let call = LatentCall { q: q.view(), stores: &[&cache], phase, form: LatentForm::of(phase) };
/// let mut memory = LatentScratch::default();
/// layer.forward(call, (out.view_mut(), None), &mut memory, &mut Workspace::new())?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LatentAttention<'a> {
    attention: Attention<'a>,
    dims: LatentDims,
    up: Matrix<'a>,
    cpu: Cpu,
}

/// The queries of one call and what they attend to.
#[derive(Debug, Clone, Copy)]
pub struct LatentCall<'a> {
    /// `[B, T, H, n + r]`: of each head its own part, then the rotated one.
    pub q: TensorRef<'a, f32>,
    /// Latent rows of each sequence, as [`crate::cache::LatentCache`] holds them: keys of c + r numbers, values of c.
    pub stores: &'a [&'a dyn KvStore],
    /// Which kernels. A row's bits depend on phase and form, never on what shares the call.
    pub phase: Phase,
    /// Which way.
    pub form: LatentForm,
}

/// Memory for intermediate results, kept between calls.
#[derive(Debug, Default)]
pub struct LatentScratch {
    /// Queries `[H, B, T, c + r]`, or keys `[B, heads, held, n + r]`.
    first: Vec<f32>,
    /// Mixed rows `[H, B, T, c]`, or values `[B, heads, held, v]`.
    second: Vec<f32>,
    /// Outputs `[H, B, T, v]`, or a tile of rows `[256, c + r]`.
    third: Vec<f32>,
    lanes: Vec<Lane>,
}

impl LatentScratch {
    /// Fills it with NaN, so that a test sees what is read without having been written.
    #[doc(hidden)]
    pub fn poison(&mut self) {
        let LatentScratch { first, second, third, lanes } = self;
        [first, second, third].into_iter().for_each(|floats| floats.fill(f32::NAN));
        for lane in lanes {
            lane.workspace.poison();
            lane.floats.fill(f32::NAN);
        }
    }
}

/// A thread's memory.
#[derive(Debug, Default)]
struct Lane {
    workspace: Workspace,
    floats: Vec<f32>,
}

/// Output `[B, T, H, v]` and log-sum-exp `[B, T, H, 1]`.
pub type LatentOutputs<'a> = (TensorMut<'a, f32>, Option<TensorMut<'a, f32>>);

impl<'a> LatentAttention<'a> {
    /// Attention with the up-projection of keys and values, `[H · (n + v), c]` in any stored form: of each head first the
    /// n rows of its keys (W_UK), then the v rows of its values (W_UV). A scale that `attention` does not say is 1/√(n + r).
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for sizes beyond those of [`Attention::plan`], and for a scale that is not finite;
    /// [`Error::LengthMismatch`] for a matrix of another shape.
    pub fn new(attention: Attention<'a>, dims: LatentDims, up: Matrix<'a>) -> Result<Self> {
        dims.check()?;
        let MatrixShape { out_features, in_features } = up.shape();
        let rows = dims.heads.saturating_mul(dims.up());
        for (what, expected, got) in [
            ("rows of the up-projection, heads · (key part + value)", rows, out_features),
            ("columns of the up-projection, one a compressed number", dims.latent, in_features),
        ] {
            if expected != got {
                return Err(Error::LengthMismatch { what, expected, got });
            }
        }
        let scale = Scale::Value(attention.resolved_scale(dims.query())?);
        let cpu = attention.resolved_cpu()?;
        Ok(LatentAttention { attention: attention.scale(scale).cpu(cpu), dims, up, cpu })
    }

    /// The output of every query. `scratch` and `workspace` grow as needed.
    ///
    /// # Errors
    /// Those of [`Attention::plan`], [`Attention::plan_decode`] and [`Plan::forward_cached`], for queries of n + r
    /// numbers and stores of latent rows. Nothing is written then.
    pub fn forward(
        &self,
        call: LatentCall<'_>,
        outputs: LatentOutputs<'_>,
        scratch: &mut LatentScratch,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check(&call, &outputs)?;
        match call.form {
            LatentForm::Plain => self.plain(call, outputs, scratch, workspace),
            LatentForm::Absorbed => self.absorbed(call, outputs, scratch, workspace),
        }
    }

    /// Checks all that is not checked by the engine, or would be too late.
    fn check(&self, call: &LatentCall<'_>, (out, lse): &LatentOutputs<'_>) -> Result<()> {
        let LatentDims { heads, value, .. } = self.dims;
        let got = call.q.shape();
        let expected =
            Shape { batch: call.stores.len(), heads, dim: self.dims.query(), seq: got.seq };
        expect("queries of latent attention", expected, got)?;
        expect("output of latent attention", Shape { dim: value, ..got }, out.shape())?;
        if let Some(lse) = lse {
            expect("log-sum-exp of latent attention", got.per_row(), lse.shape())?;
        }
        for store in call.stores {
            let seq = store.end() - store.start();
            let shape = |kv_heads, dim| Shape { batch: 1, seq, heads: kv_heads, dim };
            let what = "a store of latent rows: one head, keys of c + r numbers, values of c";
            let (key, value) = store.dims();
            expect(what, shape(1, self.dims.row()), shape(store.kv_heads(), key))?;
            expect(what, shape(1, self.dims.latent), shape(1, value))?;
            if store.coded() {
                let (what, expected) = ("a store of latent rows", "rows of numbers");
                return Err(Error::InvalidParameter { what, expected, got: "codes".to_owned() });
            }
        }
        self.plan(call, heads).map(|_| ())?;
        Ok(())
    }

    /// The most tokens that a sequence holds.
    fn held(stores: &[&dyn KvStore]) -> usize {
        stores.iter().map(|store| store.end() - store.start()).max().unwrap_or(0)
    }

    /// The plan of the call's own form for so many of its heads.
    fn plan(&self, call: &LatentCall<'_>, heads: usize) -> Result<Plan<'_>> {
        let LatentDims { latent, value, .. } = self.dims;
        let q = Shape { heads, ..call.q.shape() };
        let keys = Shape { seq: LatentAttention::held(call.stores), ..q };
        let [q, k, v] = match call.form {
            LatentForm::Plain => [q, keys, Shape { dim: value, ..keys }],
            LatentForm::Absorbed => {
                let row = self.dims.row();
                let k = Shape { heads: 1, dim: row, ..keys };
                [Shape { dim: row, ..q }, k, Shape { dim: latent, ..k }]
            }
        };
        match call.phase {
            Phase::Prompt => self.attention.plan(q, k, v),
            Phase::Generated => self.attention.plan_decode(q, k, v),
        }
    }

    /// A head's rows of the up-projection, of keys or of values.
    fn head(&self, head: usize, part: Part) -> Matrix<'a> {
        let LatentDims { nope, value, .. } = self.dims;
        let first = head * self.dims.up();
        let rows: Range<usize> = match part {
            Part::Keys => first..first + nope,
            Part::Values => first + nope..first + nope + value,
        };
        let MatrixShape { out_features, in_features } = self.up.shape();
        let row_bytes = self.up.bytes().len() / out_features.max(1);
        let bytes = &self.up.bytes()[rows.start * row_bytes..rows.end * row_bytes];
        let shape = MatrixShape { out_features: rows.len(), in_features };
        Matrix::new(self.up.format(), shape, bytes).expect("whole rows of a matrix")
    }

    /// The call of a thread that has other work beside it.
    fn alone(&self) -> Cpu {
        Cpu { threads: Threads::ONE, ..self.cpu }
    }
}

/// The parts of an up-projection.
#[derive(Debug, Clone, Copy)]
enum Part {
    Keys,
    Values,
}

/// Makes a vector at least so long, and returns its beginning.
fn room(floats: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if floats.len() < len {
        floats.resize(len, 0.0);
    }
    &mut floats[..len]
}
