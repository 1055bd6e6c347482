//! Gradients of a call: nothing written beside them, the same with one thread, and near the definition.

use super::case::{Case, Layout};
use super::memory::{Memory, bits};
use super::{Call, Outcome};
use crate::numbers::Numbers;
use foveal::plan::{Gradients, Saved, TermGradients, Upstream};
use foveal::reference::{Input, Options, attention_backward};
use foveal::{Cpu, Element, Plan, Shape, TensorRef, Threads, Workspace};

/// What comes from above, and what forward kept.
struct Above<E> {
    out: Memory<E>,
    lse: Memory<f32>,
    d_out: Memory<E>,
    d_lse: Memory<f32>,
}

impl<E: Element> Call<'_, E> {
    /// `rounding` is what storing a number may change, relative to it; the options are the definition's.
    pub(super) fn assert_gradients(
        &self,
        plan: &Plan<'_>,
        outcome: &Outcome<E>,
        (rounding, options): (f64, &Options<'_>),
    ) {
        let case = self.case;
        let mut numbers = Numbers::new(case.numbers ^ 1);
        let (shape, layout) = (plan.out_shape(), Layout { repeat: false, ..case.layouts[3] });
        let mut out = Memory::new(shape, layout);
        let mut lse = Memory::new(shape.per_row(), layout);
        out.write(&outcome.out);
        lse.write(&outcome.lse);
        let d_out = Memory::new(shape, case.layouts[3]).fill(&mut numbers);
        let d_lse = Memory::new(shape.per_row(), case.layouts[3]).fill(&mut numbers);
        let above = Above { out, lse, d_out, d_lse };
        let gradients = self.gradients(plan, &above);
        if case.cpu.threads != Threads::ONE {
            let cpu = Cpu { threads: Threads::ONE, ..case.cpu };
            let alone = self.attention.clone().cpu(cpu);
            let plan = alone.plan(case.q, case.k, case.v).expect("threads decide nothing");
            for (one, many) in self.gradients(&plan, &above).iter().zip(&gradients) {
                assert_eq!(bits(one), bits(many));
            }
        }
        if case.poison == 0 {
            self.assert_near_definition(&above, &gradients, (rounding, options));
        }
    }

    /// Gradients of queries, keys and values on poisoned memory.
    fn gradients(&self, plan: &Plan<'_>, above: &Above<E>) -> [Vec<E>; 3] {
        let Case { q, k, v, layouts, .. } = *self.case;
        let memory = |shape, layout| Memory::<E>::new(shape, Layout { repeat: false, ..layout });
        let mut memories = [memory(q, layouts[0]), memory(k, layouts[1]), memory(v, layouts[2])];
        let [d_q, d_k, d_v] = memories.each_mut().map(Memory::view_mut);
        let mut workspace = Workspace::for_backward::<E>(plan);
        workspace.poison();
        let saved = Saved { out: above.out.view(), lse: above.lse.view() };
        let upstream = Upstream { d_out: above.d_out.view(), d_lse: Some(above.d_lse.view()) };
        let gradients = Gradients { d_q, d_k, d_v, terms: TermGradients::default() };
        plan.backward(self.inputs(), saved, upstream, gradients, &mut workspace)
            .expect("what forward accepts has gradients");
        memories.each_ref().map(|memory| {
            memory.assert_untouched_between_rows();
            memory.elements()
        })
    }

    fn assert_near_definition(
        &self,
        above: &Above<E>,
        gradients: &[Vec<E>; 3],
        (rounding, options): (f64, &Options<'_>),
    ) {
        let Case { q, k, v, .. } = *self.case;
        if k.heads == 0 {
            return;
        }
        let inputs = [self.q.view(), self.k.view(), self.v.view(), above.d_out.view()];
        let data = inputs.map(wide);
        let d_lse = wide(above.d_lse.view());
        let input = |n: usize| Input { data: &data[n], shape: inputs[n].shape() };
        let upstream = [input(3), Input { data: &d_lse, shape: q.per_row() }];
        let expected = attention_backward([input(0), input(1), input(2)], options, upstream)
            .expect("the engine accepted it");
        let most = |x: &[f64]| x.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        let [max_q, max_k, max_v, max_d_out] = data.each_ref().map(|x| most(x));
        // No dS is larger than this, no score larger than that; every sum is relative to them.
        let d_score = 2.0 * max_d_out * max_v * v.dim as f64 + most(&d_lse);
        let score = self.scale().abs() * max_q * max_k * q.dim as f64;
        let error = rounding + 4e-6 * (1.0 + score);
        let rows = (q.seq * q.heads / k.heads) as f64;
        for (got, expected, size) in [
            (&gradients[0], &expected.d_q, self.scale().abs() * d_score * max_k),
            (&gradients[1], &expected.d_k, self.scale().abs() * d_score * max_q * rows),
            (&gradients[2], &expected.d_v, max_d_out * rows),
        ] {
            for (got, expected) in got.iter().zip(expected) {
                super::assert_near(got.to_f32(), *expected, error * (size + 1e-6), self.case);
            }
        }
    }
}

/// The elements in row-major order.
pub(super) fn wide<E: Element>(x: TensorRef<'_, E>) -> Vec<f64> {
    let Shape { batch, seq, heads, .. } = x.shape();
    let rows =
        (0..batch).flat_map(|b| (0..seq).flat_map(move |t| (0..heads).map(move |h| (b, t, h))));
    rows.flat_map(|(b, t, h)| x.row(b, t, h)).map(|x| f64::from(x.to_f32())).collect()
}
