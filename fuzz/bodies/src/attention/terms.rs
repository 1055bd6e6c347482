//! A call with softcap, biases and sinks: near the definition, the same with one thread and through caches, and with
//! gradients near theirs.

use super::case::Case;
use super::gradients::wide;
use super::{Call, DENSE, Memory, Outcome, Rounding, assert_near, plan};
use crate::numbers::Numbers;
use arbitrary::{Result, Unstructured};
use foveal::mask::Site;
use foveal::plan::Inputs;
use foveal::position::Slopes;
use foveal::reference::{Input, Options, attention_with};
use foveal::{Attention, Element, Phase, Plan, Shape};

/// Which terms a call has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    softcap: Option<f32>,
    alibi: bool,
    sinks: bool,
    /// Whether there is a bias, and which of batch, queries and heads share it.
    bias: Option<[bool; 3]>,
}

impl Terms {
    pub(super) fn read(input: &mut Unstructured<'_>) -> Result<Terms> {
        let softcap = *input.choose(&[None, Some(0.5), Some(3.0), Some(50.0)])?;
        let (alibi, sinks) = (input.arbitrary()?, input.arbitrary()?);
        let bias = if input.arbitrary()? { Some(input.arbitrary()?) } else { None };
        Ok(Terms { softcap, alibi, sinks, bias })
    }

    fn bias_shape(&self, case: &Case) -> Option<Shape> {
        let own = |shared: bool, extent: usize| if shared { extent.min(1) } else { extent };
        self.bias.map(|[batch, seq, heads]| Shape {
            batch: own(batch, case.q.batch),
            seq: own(seq, case.q.seq),
            heads: own(heads, case.q.heads),
            dim: case.k.seq,
        })
    }
}

impl<E: Element> Call<'_, E> {
    /// Runs the call again with terms.
    pub(super) fn assert_terms(&self, terms: Terms, rounding: Rounding) {
        let case = self.case;
        let mut numbers = Numbers::new(case.numbers ^ 2);
        let bias = terms.bias_shape(case).map(|shape| Memory::<f32>::new(shape, DENSE));
        let bias = bias.map(|bias| bias.fill(&mut numbers));
        let sinks: Vec<f32> = (0..case.q.heads).map(|_| numbers.next()).collect();
        let mut attention: Attention<'_> = self.attention.clone();
        if let Some(cap) = terms.softcap {
            attention = attention.softcap(cap);
        }
        if terms.alibi {
            attention = attention.alibi(Slopes::Standard);
        }
        if terms.sinks {
            attention = attention.sinks(&sinks);
        }
        if let Some(bias) = &bias {
            attention = attention.bias(bias.view());
        }
        let plan = plan(&attention, case.phase, [case.q, case.k, case.v]).expect("terms that fit");
        let call = Call { attention: attention.clone(), ..self.clone() };
        let outcome = call.run(&plan).expect("a mask that fitted before");
        call.assert_same_with_one_thread(&outcome);
        if bias.is_none() {
            call.assert_same_with_caches(&outcome);
        }
        if case.poison == 0 && case.k.heads > 0 {
            call.assert_terms_defined((terms, bias.as_ref(), &sinks), (&plan, &outcome), rounding);
        }
    }

    /// Near the definition with the same terms.
    fn assert_terms_defined(
        &self,
        (terms, bias, sinks): (Terms, Option<&Memory<f32>>, &[f32]),
        (plan, outcome): (&Plan<'_>, &Outcome<E>),
        rounding: Rounding,
    ) {
        let case = self.case;
        let heads = case.q.heads;
        let slopes: Vec<f64> =
            (0..heads).map(|head| f64::from(Slopes::Standard.of(head, heads))).collect();
        let added = |at: Site, row: usize, j: usize| {
            let behind = row as f64 + case.k.seq as f64 - case.q.seq as f64 - j as f64;
            let alibi = if terms.alibi { -slopes[at.q_head] * behind.abs() } else { 0.0 };
            let own = |index: usize, extent: usize| if extent == 1 { 0 } else { index };
            let dense = bias.map_or(0.0, |bias| {
                let (view, shape) = (bias.view(), bias.view().shape());
                let [b, t] = [own(at.batch, shape.batch), own(row, shape.seq)];
                f64::from(view.row(b, t, own(at.q_head, shape.heads))[j])
            });
            alibi + dense
        };
        let wide_sinks: Vec<f64> = sinks.iter().map(|&x| f64::from(x)).collect();
        let options = Options {
            softcap: terms.softcap.map(f64::from),
            bias: Some(&added),
            sinks: terms.sinks.then_some(&wide_sinks[..]),
            ..Options::new(self.scale(), &case.mask)
        };
        let Inputs { q, k, v } = self.inputs();
        let data = [q, k, v].map(wide);
        let input = |n: usize, shape| Input { data: &data[n], shape };
        let inputs = [input(0, case.q), input(1, case.k), input(2, case.v)];
        let expected = attention_with(inputs, &options).expect("the engine accepted it");
        let most = |x: &[f64]| x.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        let [max_q, max_k, max_v] = data.each_ref().map(|x| most(x));
        let score = self.scale().abs() * max_q * max_k * case.q.dim as f64;
        // A score and what is added to it, of at most this size, are rounded a few times each.
        let error = 2e-6 * (2.0 + score + (case.q.seq + case.k.seq) as f64);
        for (&got, &expected) in outcome.lse.iter().zip(&expected.lse) {
            assert_near(got, expected, error, &(terms, case));
        }
        for (got, &expected) in outcome.out.iter().zip(&expected.out) {
            let error = error * (1.0 + max_v) + rounding.weight * max_v;
            let error = error + rounding.result * expected.abs();
            assert_near(got.to_f32(), expected, error, &(terms, case));
        }
        if case.phase == Phase::Prompt {
            self.assert_gradients(plan, outcome, (rounding.result, &options));
        }
    }
}
