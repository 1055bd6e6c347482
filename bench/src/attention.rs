//! Attention cases: our side, and what it is compared with.

use crate::backward;
use crate::case::{AttentionCase, DType, Phase};
use crate::contender::{Contender, InProcess};
use crate::data::{Inputs, SEED, stored};
use crate::mask::Sight;
use crate::peaks::Roof;
use crate::peer::{self, Peer, Peers};
use crate::prepared::{Absent, Prepared, Work, level};
use crate::verify::Expected;
use anyhow::Context;
use foveal::cache::{ContiguousCache, KvStore};
use foveal::plan::Inputs as PlanInputs;
use foveal::{Attention, Cpu, Element, Mask, Shape, Tensor, TensorRef, Threads, Workspace};
use half::{bf16, f16};
use std::num::NonZeroUsize;

/// Builds a case, checks every contender's result against the definition, and says what bounds it.
///
/// # Errors
/// If our result or a peer's is wrong.
pub(crate) fn prepare(case: &AttentionCase, peers: &Peers) -> anyhow::Result<Prepared> {
    if case.phase == Phase::Backward {
        return backward::prepare(case, peers);
    }
    let inputs = Inputs::new(case)?;
    let sight = Sight { mask: case.mask, queries: case.seq_q, keys: case.seq_k, seed: SEED + 3 };
    let expected = Expected::new(&inputs, &sight);
    let mut ours = ours(case, &inputs, sight.build()?)?;
    ours.run()?;
    expected.check(&ours.output(), bound(case.dtype)).context("our result is wrong")?;
    let note = ours.explain()?;
    let mut contenders: Vec<Box<dyn Contender>> =
        vec![Box::new(InProcess::new("foveal", note, move || ours.run()))];
    let mut absent = Vec::new();
    for &peer in &case.peers {
        match peer {
            Peer::Unfused if peers.has(peer) && case.dtype == DType::F32 => {
                match unfused(case, (&inputs, &sight), &expected)? {
                    Ok(peer) => contenders.push(peer),
                    Err(absence) => absent.push(absence),
                }
            }
            Peer::Unfused => {}
            Peer::Causal => {
                let mut causal = self::ours(case, &inputs, Mask::causal())?;
                let note = causal.explain()?;
                let run = move || causal.run();
                contenders.push(Box::new(InProcess::new("causal", note, run)));
            }
            worker => match peers.case(worker, case) {
                Some(Ok(theirs)) => {
                    let wrong = || format!("the result of {} is wrong", worker.name());
                    let bound = peer::bound(case.dtype);
                    expected.check(&theirs.output()?, bound).with_context(wrong)?;
                    contenders.push(Box::new(theirs));
                }
                Some(Err(absence)) => absent.push(absence),
                None => {}
            },
        }
    }
    Ok(Prepared { contenders, absent, work: work(case, &sight), roof: roof(case, &sight)? })
}

#[cfg(feature = "unfused")]
fn unfused(
    case: &AttentionCase,
    (inputs, sight): (&Inputs, &Sight),
    expected: &Expected,
) -> anyhow::Result<Result<Box<dyn Contender>, Absent>> {
    let Some(mut peer) = crate::unfused::Unfused::new(case, inputs, *sight) else {
        return Ok(Err(Absent::new("unfused", "its scores do not fit into memory")));
    };
    peer.run();
    expected.check(&peer.output(), 5e-5).context("the unfused result is wrong")?;
    let note = peer.note();
    let run = move || {
        peer.run();
        Ok(())
    };
    Ok(Ok(Box::new(InProcess::new("unfused", note, run))))
}

#[cfg(not(feature = "unfused"))]
fn unfused(
    _: &AttentionCase,
    _: (&Inputs, &Sight),
    _: &Expected,
) -> anyhow::Result<Result<Box<dyn Contender>, Absent>> {
    Ok(Err(Absent::new("unfused", "built without the feature `unfused`")))
}

/// The largest accepted error of ours, relative to a row's largest number: rounding of f32, and of the
/// result (and of probabilities in bf16) where it is stored in 16 bits.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 5e-5,
        DType::F16 => 1e-3,
        DType::Bf16 => 8e-3,
    }
}

fn work(case: &AttentionCase, sight: &Sight) -> Work {
    let heads = case.batch * case.heads;
    let flops = 4.0 * case.dim as f64 * heads as f64 * sight.pairs() as f64;
    Work { flops, bytes: kv_bytes(case, sight) as f64 }
}

fn kv_bytes(case: &AttentionCase, sight: &Sight) -> usize {
    2 * case.batch * case.kv_heads * sight.keys_read() * case.dim * case.dtype.bytes()
}

/// Reading is measured on a buffer of the case's size for decoding, and not at all for prompts.
fn roof(case: &AttentionCase, sight: &Sight) -> anyhow::Result<Roof> {
    let bytes = match case.phase {
        Phase::Forward | Phase::Backward => 0,
        Phase::Decode => kv_bytes(case, sight) * case.copies,
    };
    let dtype = match case.dtype {
        DType::F32 => foveal::DType::F32,
        DType::F16 => foveal::DType::F16,
        DType::Bf16 => foveal::DType::Bf16,
    };
    Ok(Roof { level: level(&case.level)?, dtype, threads: case.threads, bytes })
}

/// Our side of a case.
trait Ours {
    fn run(&mut self) -> anyhow::Result<()>;
    /// `[batch, seq, heads, dim]`.
    fn output(&self) -> Vec<f32>;
    fn explain(&self) -> anyhow::Result<String>;
}

fn ours(case: &AttentionCase, inputs: &Inputs, mask: Mask) -> anyhow::Result<Box<dyn Ours>> {
    let threads = Threads::at_most(NonZeroUsize::new(case.threads).context("no threads")?);
    let cpu = Cpu { level: level(&case.level)?, threads };
    let attention = Attention::new().mask(mask).cpu(cpu);
    match (case.phase, case.dtype) {
        (Phase::Forward, DType::F32) => Forward::<f32>::boxed(attention, inputs),
        (Phase::Forward, DType::F16) => Forward::<f16>::boxed(attention, inputs),
        (Phase::Forward, DType::Bf16) => Forward::<bf16>::boxed(attention, inputs),
        (Phase::Backward, _) => anyhow::bail!("gradients are prepared elsewhere"),
        (Phase::Decode, DType::F32) => Decode::<f32>::boxed(attention, inputs, case.copies),
        (Phase::Decode, DType::F16) => Decode::<f16>::boxed(attention, inputs, case.copies),
        (Phase::Decode, DType::Bf16) => Decode::<bf16>::boxed(attention, inputs, case.copies),
    }
}

/// A prompt held in tensors.
struct Forward<E> {
    attention: Attention<'static>,
    q: Tensor<E>,
    k: Tensor<E>,
    v: Tensor<E>,
    out: Tensor<E>,
    workspace: Workspace,
}

impl<E: Element> Forward<E> {
    fn boxed(attention: Attention<'static>, inputs: &Inputs) -> anyhow::Result<Box<dyn Ours>> {
        let (q, k, v) = (stored(&inputs.q)?, stored(&inputs.k)?, stored(&inputs.v)?);
        let out = Tensor::zeros(q.shape())?;
        let workspace = Workspace::for_plan(&attention.plan(q.shape(), k.shape(), v.shape())?);
        Ok(Box::new(Forward::<E> { attention, q, k, v, out, workspace }))
    }
}

impl<E: Element> Ours for Forward<E> {
    fn run(&mut self) -> anyhow::Result<()> {
        let Forward { attention, q, k, v, out, workspace } = self;
        let plan = attention.plan(q.shape(), k.shape(), v.shape())?;
        let inputs = PlanInputs { q: q.view(), k: k.view(), v: v.view() };
        Ok(plan.forward(inputs, out.view_mut(), None, workspace)?)
    }

    fn output(&self) -> Vec<f32> {
        self.out.as_slice().iter().map(|x| x.to_f32()).collect()
    }

    fn explain(&self) -> anyhow::Result<String> {
        let plan = self.attention.plan(self.q.shape(), self.k.shape(), self.v.shape())?;
        Ok(plan.explain().to_string())
    }
}

/// Generated rows over caches.
struct Decode<E> {
    attention: Attention<'static>,
    q: Tensor<E>,
    kv: Shape,
    /// One cache for each sequence, several times over.
    caches: Vec<Vec<ContiguousCache<E>>>,
    turn: usize,
    out: Tensor<E>,
    workspace: Workspace,
}

impl<E: Element> Decode<E> {
    fn boxed(
        attention: Attention<'static>,
        inputs: &Inputs,
        copies: usize,
    ) -> anyhow::Result<Box<dyn Ours>> {
        let (q, kv) = (stored(&inputs.q)?, inputs.k.shape());
        let caches: anyhow::Result<_> = (0..copies).map(|_| fill(inputs)).collect();
        let out = Tensor::zeros(q.shape())?;
        let workspace = Workspace::for_plan(&attention.plan_decode(q.shape(), kv, kv)?);
        Ok(Box::new(Decode::<E> { attention, q, kv, caches: caches?, turn: 0, out, workspace }))
    }
}

/// The caches of all sequences.
fn fill<E: Element>(inputs: &Inputs) -> anyhow::Result<Vec<ContiguousCache<E>>> {
    let Shape { batch, seq, heads, dim } = inputs.k.shape();
    let of = |x: &Tensor<f32>, b: usize| x.as_slice()[b * seq * heads * dim..].to_vec();
    let sequence = |b: usize| {
        let mut cache = ContiguousCache::new(heads, (dim, dim), seq)?;
        let one = Shape { batch: 1, ..inputs.k.shape() };
        let (k, v) = (of(&inputs.k, b), of(&inputs.v, b));
        let len = seq * heads * dim;
        cache.append(TensorRef::new(&k[..len], one)?, TensorRef::new(&v[..len], one)?)?;
        Ok(cache)
    };
    (0..batch).map(sequence).collect()
}

impl<E: Element> Ours for Decode<E> {
    fn run(&mut self) -> anyhow::Result<()> {
        let Decode { attention, q, kv, caches, turn, out, workspace } = self;
        *turn = (*turn + 1) % caches.len();
        let plan = attention.plan_decode(q.shape(), *kv, *kv)?;
        let [first] = &*caches[*turn] else {
            let stores: Vec<&dyn KvStore> = caches[*turn].iter().map(|c| c as _).collect();
            let outputs = (out.view_mut(), None);
            return Ok(plan.forward_cached(q.view(), &stores, outputs, workspace)?);
        };
        Ok(plan.forward_cached(q.view(), &[first as _], (out.view_mut(), None), workspace)?)
    }

    fn output(&self) -> Vec<f32> {
        self.out.as_slice().iter().map(|x| x.to_f32()).collect()
    }

    fn explain(&self) -> anyhow::Result<String> {
        let plan = self.attention.plan_decode(self.q.shape(), self.kv, self.kv)?;
        Ok(plan.explain().to_string())
    }
}
