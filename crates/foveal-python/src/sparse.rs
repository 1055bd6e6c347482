//! Mechanisms that choose keys.

use crate::call::{Given, Mechanism, cpu, owned, scale};
use crate::error::{Error, Result};
use crate::output::Output;
use foveal::plan::Inputs;
use foveal::sparse::{
    AngularHash, BigBird, BlockPlan, Branches, Buckets, Combine, Factors, Longformer, Moba,
    NativeSizes, NativeSparse, Reformer, ReformerForward, SparseTransformer, SubBlocks, Window,
};
use foveal::{Attention, Backward, Element, Forward, Tensor, TensorRef};

fn inputs<'a, E: Element>(given: &Given<'a>) -> Result<Inputs<'a, E, E>> {
    Ok(Inputs { q: given.tensor(0)?, k: given.tensor(1)?, v: given.tensor(2)? })
}

/// Output and log-sum-exp of forward, copied.
fn forward_of<E: Element>(results: &Given<'_>) -> Result<Forward<E>> {
    Ok(Forward { out: owned(results.tensor(0)?)?, lse: owned(results.view(1)?.per_row()?)? })
}

fn outputs<E: Element>(forward: Forward<E>) -> Vec<Output> {
    vec![Output::tensor(forward.out), Output::per_row(forward.lse)]
}

fn gradients<E: Element>(d: Backward<E>) -> Vec<Option<Output>> {
    [d.d_q, d.d_k, d.d_v].map(|d| Some(Output::tensor(d))).into()
}

/// What no gradient goes through.
const LSE: &str = "the log-sum-exp of a sparse mechanism";

/// The Sparse Transformer.
#[derive(Debug)]
pub(crate) struct Factorised(pub(crate) SparseTransformer);

impl Factorised {
    /// A pattern from the words of its options.
    pub(crate) fn new(
        (pattern, stride, width): (&str, usize, usize),
        (window, sub_blocks): (&str, Option<usize>),
        (combine, layer): (&str, usize),
        by: Option<f32>,
    ) -> Result<Factorised> {
        let refuse =
            |what, expected, got: &str| Err(Error::Option { what, expected, got: got.to_owned() });
        let window = match window {
            "paper" => Window::Paper,
            "code" => Window::Code,
            got => return refuse("window", "paper (l + 1 keys) or code (l keys)", got),
        };
        let factors = match pattern {
            "strided" => Factors::Strided { stride, window },
            "fixed" => {
                let sub_blocks = sub_blocks.map_or(SubBlocks::Same(0), SubBlocks::Cycle);
                Factors::Fixed { stride, summary: width, sub_blocks }
            }
            got => return refuse("pattern", "strided or fixed", got),
        };
        let combine = match combine {
            "merged" => Combine::Merged,
            "per_head" => Combine::PerHead,
            "interleaved" => Combine::Interleaved { layer },
            got => return refuse("combine", "merged, per_head or interleaved", got),
        };
        let layer = SparseTransformer::new(factors)?.combine(combine).scale(scale(by));
        Ok(Factorised(layer.cpu(cpu()?)))
    }
}

impl Mechanism for Factorised {
    const ARRAYS: &'static [&'static str] = &["q", "k", "v"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        Ok(outputs(self.0.forward(inputs::<E>(given)?)?))
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        d.none(1, LSE)?;
        let forward = forward_of(results)?;
        Ok(gradients(self.0.backward(inputs::<E>(given)?, &forward, d.tensor(0)?)?))
    }
}

/// Longformer; the arrays of global rows may be missing.
#[derive(Debug)]
pub(crate) struct Windowed(pub(crate) Longformer);

impl Windowed {
    fn global<'a, E: Element>(given: &Given<'a>) -> Result<Option<Inputs<'a, E, E>>> {
        match given.optional(3) {
            None => Ok(None),
            Some(_) => {
                Ok(Some(Inputs { q: given.tensor(3)?, k: given.tensor(4)?, v: given.tensor(5)? }))
            }
        }
    }
}

impl Mechanism for Windowed {
    const ARRAYS: &'static [&'static str] = &["q", "k", "v", "global_q", "global_k", "global_v"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let local = inputs::<E>(given)?;
        let global = Windowed::global(given)?.unwrap_or(local);
        Ok(outputs(self.0.forward(local, global)?))
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        d.none(1, LSE)?;
        let (local, global) = (inputs::<E>(given)?, Windowed::global(given)?);
        let (forward, d_out) = (forward_of(results)?, d.tensor(0)?);
        let [near, far] = self.0.backward(local, global.unwrap_or(local), &forward, d_out)?;
        if global.is_some() {
            let (near, far) = (gradients(near), gradients(far));
            return Ok(near.into_iter().chain(far).collect());
        }
        let both = Backward {
            d_q: sum(&near.d_q, &far.d_q)?,
            d_k: sum(&near.d_k, &far.d_k)?,
            d_v: sum(&near.d_v, &far.d_v)?,
        };
        Ok(gradients(both))
    }
}

fn sum<E: Element>(a: &Tensor<E>, b: &Tensor<E>) -> Result<Tensor<E>> {
    let pairs = a.as_slice().iter().zip(b.as_slice());
    let sums = pairs.map(|(a, b)| E::from_f32(a.to_f32() + b.to_f32())).collect();
    Ok(Tensor::from_vec(sums, a.shape())?)
}

/// BigBird with random blocks of a seed.
#[derive(Debug)]
pub(crate) struct RandomBlocks {
    pub(crate) block: usize,
    pub(crate) random: usize,
    pub(crate) seed: u64,
    pub(crate) causal: bool,
    pub(crate) scale: Option<f32>,
}

impl RandomBlocks {
    fn attention<E: Element>(&self, q: TensorRef<'_, E>) -> Result<Attention<'static>> {
        let (shape, block) = (q.shape(), self.block);
        let blocks = shape.seq.div_ceil(block.max(1));
        let plan = BlockPlan::published([shape.heads, blocks, self.random], self.seed)?;
        let mask = BigBird { block, plan, causal: self.causal }.mask()?;
        Ok(Attention::new().mask(mask).scale(scale(self.scale)).cpu(cpu()?))
    }
}

impl Mechanism for RandomBlocks {
    const ARRAYS: &'static [&'static str] = &["q", "k", "v"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let Inputs { q, k, v } = inputs::<E>(given)?;
        Ok(outputs(self.attention(q)?.forward(q, k, v)?))
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        d.none(1, LSE)?;
        let (inputs, forward) = (inputs::<E>(given)?, forward_of(results)?);
        Ok(gradients(self.attention(inputs.q)?.backward(inputs, &forward, d.tensor(0)?)?))
    }
}

/// Reformer with directions of a seed.
#[derive(Debug)]
pub(crate) struct Hashed {
    pub(crate) layer: Reformer,
    pub(crate) buckets: usize,
    pub(crate) rounds: usize,
    pub(crate) seed: u64,
}

impl Hashed {
    /// Buckets that are given, or those of the seed.
    fn buckets<E: Element>(&self, given: &Given<'_>, qk: TensorRef<'_, E>) -> Result<Buckets> {
        let Some(buckets) = given.optional(2) else {
            let hash = AngularHash::new(qk.shape().dim, self.buckets, self.rounds, self.seed)?;
            return Ok(hash.buckets(qk, cpu()?)?);
        };
        let &[batch, heads, rounds, tokens] = buckets.shape() else {
            let (what, got) = ("buckets, [batch, heads, rounds, tokens]", buckets.shape().to_vec());
            return Err(Error::Shape { what, expected: vec![0; 4], got });
        };
        let numbers = buckets.indices()?.into_iter().map(|n| n as u32).collect();
        Ok(Buckets::given([batch, heads, rounds, tokens], numbers)?)
    }
}

impl Mechanism for Hashed {
    const ARRAYS: &'static [&'static str] = &["qk", "v", "buckets"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let (qk, v) = (given.tensor::<E>(0)?, given.tensor(1)?);
        let forward = self.layer.forward(qk, v, &self.buckets(given, qk)?)?;
        let mut outputs = outputs(forward.result);
        outputs.push(Output::per_row(forward.self_weight));
        Ok(outputs)
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        d.none(1, LSE)?;
        let (qk, v) = (given.tensor::<E>(0)?, given.tensor(1)?);
        let self_weight = owned(results.view(2)?.per_row()?)?;
        let forward = ReformerForward { result: forward_of(results)?, self_weight };
        let buckets = self.buckets(given, qk)?;
        let (d_qk, d_v) = self.layer.backward((qk, v), &buckets, &forward, d.tensor(0)?)?;
        Ok(vec![Some(Output::tensor(d_qk)), Some(Output::tensor(d_v)), None])
    }
}

/// MoBA. Gradients take the blocks that the rows choose again, which are the same ones.
#[derive(Debug)]
pub(crate) struct Chosen(pub(crate) Moba);

impl Mechanism for Chosen {
    const ARRAYS: &'static [&'static str] = &["q", "k", "v"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let inputs = inputs::<E>(given)?;
        Ok(outputs(self.0.forward(inputs, &self.0.choose(inputs.q, inputs.k)?)?))
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        d.none(1, LSE)?;
        let (inputs, forward) = (inputs::<E>(given)?, forward_of(results)?);
        let choices = self.0.choose(inputs.q, inputs.k)?;
        Ok(gradients(self.0.backward(inputs, &choices, &forward, d.tensor(0)?)?))
    }
}

/// Native Sparse Attention. Compressed tokens that are not given are means, and the window's those of the blocks.
/// Gradients compute forward again.
#[derive(Debug)]
pub(crate) struct Native(pub(crate) NativeSparse, usize);

const GATES: usize = Native::GATES;
const COMPRESSED: usize = 4;
const NEAR: usize = 6;

impl Native {
    /// Where in its arrays the gates lie.
    pub(crate) const GATES: usize = 3;

    /// Sizes in the order l, d, l', n, w.
    pub(crate) fn new(
        [length, stride, block, top, window]: [usize; 5],
        by: Option<f32>,
    ) -> Result<Native> {
        let sizes = NativeSizes { length, stride, block, top, window };
        Ok(Native(NativeSparse::new(sizes)?.scale(scale(by)).cpu(cpu()?), stride))
    }

    /// Tokens from one compressed token to the next.
    pub(crate) fn stride(&self) -> usize {
        self.1
    }

    /// Runs with the branches that the arrays describe.
    fn branches<E: Element, T>(
        &self,
        given: &Given<'_>,
        run: impl FnOnce(Branches<Inputs<'_, E, E>>) -> Result<T>,
    ) -> Result<T> {
        let selected = inputs::<E>(given)?;
        let pooled = |n: usize, of| -> Result<Option<Tensor<E>>> {
            Ok(if given.optional(n).is_none() { Some(self.0.pool(of)?) } else { None })
        };
        let means = [pooled(COMPRESSED, selected.k)?, pooled(COMPRESSED + 1, selected.v)?];
        run(self.arrange(given, means.each_ref().map(Option::as_ref))?)
    }

    /// The branches: compressed tokens that are given, or else those of `means`; the window's likewise, or else the blocks'.
    pub(crate) fn arrange<'a, E: Element>(
        &self,
        given: &Given<'a>,
        means: [Option<&'a Tensor<E>>; 2],
    ) -> Result<Branches<Inputs<'a, E, E>>> {
        let selected = inputs::<E>(given)?;
        let window = match (given.maybe(NEAR)?, given.maybe(NEAR + 1)?) {
            (None, None) => selected,
            (k, v) => Inputs { k: k.unwrap_or(selected.k), v: v.unwrap_or(selected.v), ..selected },
        };
        let part = |n: usize| -> Result<TensorRef<'a, E>> {
            let own = given.maybe::<E>(COMPRESSED + n)?;
            let missing = Error::Missing { what: "compressed tokens" };
            own.or(means[n].map(Tensor::view)).ok_or(missing)
        };
        let compressed = Inputs { k: part(0)?, v: part(1)?, ..selected };
        Ok(Branches { compressed, selected, window })
    }
}

impl Mechanism for Native {
    const ARRAYS: &'static [&'static str] =
        &["q", "k", "v", "gates", "k_compressed", "v_compressed", "k_window", "v_window"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let gates = given.tensor(GATES)?;
        let forward =
            self.branches::<E, _>(given, |inputs| Ok(self.0.forward(inputs, gates)?))?;
        Ok(vec![Output::tensor(forward.out)])
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        _results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        let (gates, d_out) = (given.tensor(GATES)?, d.tensor(0)?);
        let (d, d_gates) = self.branches::<E, _>(given, |inputs| {
            let forward = self.0.forward(inputs, gates)?;
            Ok(self.0.backward(inputs, gates, &forward, d_out)?)
        })?;
        let Branches { compressed, selected, window } = d;
        let tokens = given.tensor::<E>(1)?.shape().seq;
        let d_q = sum(&sum(&compressed.d_q, &selected.d_q)?, &window.d_q)?;
        // What has no array of its own goes to the keys or values that it was made of.
        let mut places = vec![];
        for (n, own, near, mean) in [
            (0, selected.d_k, window.d_k, compressed.d_k),
            (1, selected.d_v, window.d_v, compressed.d_v),
        ] {
            let (mut own, mut apart) = (own, [None, None]);
            match given.optional(COMPRESSED + n) {
                Some(_) => apart[0] = Some(Output::tensor(mean)),
                None => own = sum(&own, &self.0.pool_backward(mean.view(), tokens)?)?,
            }
            match given.optional(NEAR + n) {
                Some(_) => apart[1] = Some(Output::tensor(near)),
                None => own = sum(&own, &near)?,
            }
            places.push((own, apart));
        }
        let [(d_k, [k_mean, k_near]), (d_v, [v_mean, v_near])] =
            <[_; 2]>::try_from(places).unwrap_or_else(|_| unreachable!("keys and values"));
        let [d_q, d_k, d_v] = [d_q, d_k, d_v].map(|d| Some(Output::tensor(d)));
        Ok(vec![d_q, d_k, d_v, Some(Output::tensor(d_gates)), k_mean, v_mean, k_near, v_near])
    }
}
