//! Backward cases: gradients of queries, keys and values from the results of forward.
//!
//! ```text
//! checked:   dq of sampled rows against the definition in f64
//!            Σ_j dv_j = Σ_i do_i over the rows that see something, Σ_j ⟨k_j, dk_j⟩ = Σ_i ⟨q_i, dq_i⟩ for each head
//! ```
//!
//! A peer's gradients are compared with ours, number by number.

use crate::case::{AttentionCase, DType};
use crate::contender::{Contender, InProcess};
use crate::data::{Inputs, SEED, splitmix, stored, uniform};
use crate::mask::Sight;
use crate::peaks::Roof;
use crate::peer::{self, Peers};
use crate::prepared::{Prepared, Work, level};
use anyhow::{Context, ensure};
use foveal::plan::{Gradients, Inputs as PlanInputs, Saved, TermGradients, Upstream};
use foveal::{Attention, Cpu, Element, Forward, Shape, Tensor, Threads, Workspace};
use half::{bf16, f16};
use std::num::NonZeroUsize;

/// Rows of dQ that are compared.
const SAMPLES: usize = 16;

/// Builds a case and checks its gradients.
///
/// # Errors
/// If they or a peer's are wrong.
pub(crate) fn prepare(case: &AttentionCase, peers: &Peers) -> anyhow::Result<Prepared> {
    match case.dtype {
        DType::F32 => prepare_as::<f32>(case, peers, 1e-4),
        DType::F16 => prepare_as::<f16>(case, peers, 4e-3),
        DType::Bf16 => prepare_as::<bf16>(case, peers, 3e-2),
    }
}

/// `bound` is the largest accepted error relative to the largest number that it is compared with.
fn prepare_as<E: Element>(
    case: &AttentionCase,
    peers: &Peers,
    bound: f64,
) -> anyhow::Result<Prepared> {
    let inputs = Inputs::new(case)?;
    let sight = Sight { mask: case.mask, queries: case.seq_q, keys: case.seq_k, seed: SEED + 3 };
    let threads = Threads::at_most(NonZeroUsize::new(case.threads).context("no threads")?);
    let level = level(&case.level)?;
    let attention = Attention::new().mask(sight.build()?).cpu(Cpu { level, threads });
    let mut call = Call::<E>::new(attention, &inputs)?;
    call.run()?;
    call.check(&sight, bound).context("our gradients are wrong")?;
    let shapes = [&call.q, &call.k, &call.v].map(Tensor::shape);
    let plan = call.attention.plan(shapes[0], shapes[1], shapes[2])?;
    let bytes = plan.backward_workspace_bytes::<E>();
    let note = format!("gradients of: {}; {bytes} bytes of workspace for them", plan.explain());
    let (mut theirs, mut absent) = (Vec::<Box<dyn Contender>>::new(), Vec::new());
    for &peer in &case.peers {
        match peers.case(peer, case) {
            Some(Ok(worker)) => {
                let wrong = || format!("the gradients of {} are wrong", peer.name());
                call.compare(&worker.output()?, peer_bound(case.dtype)).with_context(wrong)?;
                theirs.push(Box::new(worker));
            }
            Some(Err(absence)) => absent.push(absence),
            None => {}
        }
    }
    let heads = (case.batch * case.heads) as f64;
    let flops = 10.0 * case.dim as f64 * heads * sight.pairs() as f64;
    let mut contenders: Vec<Box<dyn Contender>> =
        vec![Box::new(InProcess::new("foveal", note, move || call.run()))];
    contenders.extend(theirs);
    Ok(Prepared {
        contenders,
        absent,
        work: Work { flops, bytes: 0.0 },
        roof: Roof { level, dtype: E::DTYPE, threads: case.threads, bytes: 0 },
    })
}

/// What a peer's gradients may differ from ours, relative to the largest number of the tensor. PyTorch adds
/// 16-bit gradients up in 16 bits, once for each block of queries.
fn peer_bound(dtype: DType) -> f64 {
    2.0 * peer::bound(dtype)
}

/// A call with everything that it reads and writes.
struct Call<E> {
    attention: Attention<'static>,
    q: Tensor<E>,
    k: Tensor<E>,
    v: Tensor<E>,
    forward: Forward<E>,
    d_out: Tensor<E>,
    d_q: Tensor<E>,
    d_k: Tensor<E>,
    d_v: Tensor<E>,
    workspace: Workspace,
}

impl<E: Element> Call<E> {
    fn new(attention: Attention<'static>, inputs: &Inputs) -> anyhow::Result<Call<E>> {
        let (q, k, v) = (stored::<E>(&inputs.q)?, stored::<E>(&inputs.k)?, stored::<E>(&inputs.v)?);
        let forward = attention.forward(q.view(), k.view(), v.view())?;
        let numbers = (0..q.as_slice().len()).map(|n| uniform(SEED + 4, n)).collect();
        let d_out = stored(&Tensor::from_vec(numbers, q.shape())?)?;
        let (d_q, d_k, d_v) = (q.clone(), k.clone(), v.clone());
        let plan = attention.plan(q.shape(), k.shape(), v.shape())?;
        let workspace = Workspace::for_backward::<E>(&plan);
        Ok(Call { attention, q, k, v, forward, d_out, d_q, d_k, d_v, workspace })
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let plan = self.attention.plan(self.q.shape(), self.k.shape(), self.v.shape())?;
        let inputs = PlanInputs { q: self.q.view(), k: self.k.view(), v: self.v.view() };
        let saved = Saved { out: self.forward.out.view(), lse: self.forward.lse.view() };
        let upstream = Upstream { d_out: self.d_out.view(), d_lse: None };
        let gradients = Gradients {
            d_q: self.d_q.view_mut(),
            d_k: self.d_k.view_mut(),
            d_v: self.d_v.view_mut(),
            terms: TermGradients::default(),
        };
        Ok(plan.backward(inputs, saved, upstream, gradients, &mut self.workspace)?)
    }

    /// Compares gradients of queries, keys and values, one after the other, with ours.
    fn compare(&self, theirs: &[f32], bound: f64) -> anyhow::Result<()> {
        let ours = [("dQ", &self.d_q), ("dK", &self.d_k), ("dV", &self.d_v)];
        let len: usize = ours.iter().map(|(_, x)| x.as_slice().len()).sum();
        ensure!(theirs.len() == len, "gradients of {} numbers instead of {len}", theirs.len());
        let mut rest = theirs;
        for (name, ours) in ours {
            let (theirs, next) = rest.split_at(ours.as_slice().len());
            rest = next;
            let ours = wide(ours.as_slice());
            let size = ours.iter().fold(1e-3, |most: f64, x| most.max(x.abs()));
            for (n, (ours, &theirs)) in ours.iter().zip(theirs).enumerate() {
                let error = (ours - f64::from(theirs)).abs() / size;
                ensure!(
                    error <= bound,
                    "number {n} of {name} is {theirs}, ours {ours}: off by {error:.1e} of {bound:.1e}"
                );
            }
        }
        Ok(())
    }

    fn check(&self, sight: &Sight, bound: f64) -> anyhow::Result<()> {
        let Shape { batch, seq, heads, .. } = self.q.shape();
        let all = batch * seq * heads;
        for sample in 0..SAMPLES {
            let index = (splitmix(SEED + 5, sample) % all as u64) as usize;
            let (b, i, h) = (index / heads / seq, index / heads % seq, index % heads);
            let expected = self.define(sight, (b, i, h));
            let got = wide(self.d_q.view().row(b, i, h));
            let size = expected.iter().fold(1e-3, |most: f64, x| most.max(x.abs()));
            for (got, expected) in got.iter().zip(&expected) {
                let error = (got - expected).abs() / size;
                ensure!(error <= bound, "dQ of row {index} is off by {error:.1e} of {bound:.1e}");
            }
        }
        (0..batch * self.k.shape().heads).try_for_each(|head| self.check_sums(sight, head, bound))
    }

    /// dq = scale Σ_j p_j (⟨do, v_j⟩ − Σ p ⟨do, v⟩) k_j.
    fn define(&self, sight: &Sight, (b, i, h): (usize, usize, usize)) -> Vec<f64> {
        let group = self.q.shape().heads / self.k.shape().heads;
        let scale = 1.0 / (self.q.shape().dim as f64).sqrt();
        let query = wide(self.q.view().row(b, i, h));
        let d_out = wide(self.d_out.view().row(b, i, h));
        let seen: Vec<usize> = sight.range(i).filter(|&j| sight.allows(i, j)).collect();
        let keys: Vec<_> = seen.iter().map(|&j| wide(self.k.view().row(b, j, h / group))).collect();
        let scores: Vec<f64> = keys.iter().map(|key| scale * dot(&query, key)).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
        let p: Vec<f64> = scores.iter().map(|score| (score - most).exp() / sum).collect();
        let d_p: Vec<f64> =
            seen.iter().map(|&j| dot(&d_out, &wide(self.v.view().row(b, j, h / group)))).collect();
        let delta = dot(&p, &d_p);
        let mut d_q = vec![0.0; query.len()];
        for ((p, d_p), key) in p.iter().zip(&d_p).zip(&keys) {
            let d_score = scale * p * (d_p - delta);
            d_q.iter_mut().zip(key).for_each(|(d_q, k)| *d_q += d_score * k);
        }
        d_q
    }

    /// What a key/value head gets in all is what its query heads give.
    fn check_sums(&self, sight: &Sight, head: usize, bound: f64) -> anyhow::Result<()> {
        let (q, k) = (self.q.shape(), self.k.shape());
        let (b, kv_head, group) = (head / k.heads, head % k.heads, q.heads / k.heads);
        let (mut given, mut got) = (vec![0.0; self.v.shape().dim], vec![0.0; self.v.shape().dim]);
        let (mut from_q, mut from_k, mut size) = (0.0, 0.0, 1e-3);
        let add = |to: &mut [f64], row: &[f64]| to.iter_mut().zip(row).for_each(|(a, b)| *a += b);
        for i in (0..q.seq).filter(|&i| sight.range(i).any(|j| sight.allows(i, j))) {
            for h in kv_head * group..(kv_head + 1) * group {
                add(&mut given, &wide(self.d_out.view().row(b, i, h)));
                let row = [&self.q, &self.d_q].map(|x| wide(x.view().row(b, i, h)));
                from_q += dot(&row[0], &row[1]);
                size += dot(&row[0], &row[1]).abs();
            }
        }
        for j in 0..k.seq {
            add(&mut got, &wide(self.d_v.view().row(b, j, kv_head)));
            let row = [&self.k, &self.d_k].map(|x| wide(x.view().row(b, j, kv_head)));
            from_k += dot(&row[0], &row[1]);
        }
        let rows = ((q.seq * group) as f64).sqrt();
        for (given, got) in given.iter().zip(&got) {
            let error = (given - got).abs() / rows;
            ensure!(error <= bound, "dV of head {head} sums up to {got}, not {given}");
        }
        let error: f64 = (from_q - from_k) / size;
        ensure!(error.abs() <= bound, "dK of head {head}: ⟨K, dK⟩ is {from_k}, ⟨Q, dQ⟩ {from_q}");
        Ok(())
    }
}

fn wide<E: Element>(row: &[E]) -> Vec<f64> {
    row.iter().map(|x| f64::from(x.to_f32())).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::MaskSpec;

    #[test]
    fn wrong_gradients_are_refused() {
        let case = AttentionCase { seq_q: 9, seq_k: 7, dim: 4, ..AttentionCase::smallest() };
        let inputs = Inputs::new(&case).unwrap();
        let sight = Sight { mask: MaskSpec::Causal, queries: 9, keys: 7, seed: 0 };
        let attention = Attention::new().mask(sight.build().unwrap());
        let mut call = Call::<f32>::new(attention, &inputs).unwrap();
        call.run().unwrap();
        call.check(&sight, 1e-5).unwrap();
        let spoil = |x: &mut Tensor<f32>| x.view_mut().row_mut(0, 5, 0)[1] += 0.01;
        for which in 0..3 {
            let gradient = match which {
                0 => &mut call.d_q,
                1 => &mut call.d_k,
                _ => &mut call.d_v,
            };
            spoil(gradient);
            assert!(call.check(&sight, 1e-5).is_err(), "{which}");
            call.run().unwrap();
        }
        let gradients = [&call.d_q, &call.d_k, &call.d_v].map(|x| x.as_slice().to_vec());
        let mut theirs = gradients.concat();
        call.compare(&theirs, 1e-5).unwrap();
        for n in [0, 36, theirs.len() - 1] {
            let right = std::mem::replace(&mut theirs[n], f32::NAN);
            assert!(call.compare(&theirs, 1e-5).is_err(), "{n}");
            theirs[n] = right;
        }
        assert!(call.compare(&theirs[1..], 1e-5).is_err());
    }
}
