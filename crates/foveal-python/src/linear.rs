//! Mechanisms with a matrix state, and Linformer.

use crate::call::{Given, Mechanism, cpu, owned, scale};
use crate::error::{Error, Result};
use crate::output::Output;
use foveal::linear::{
    AnyOrder, Delta, Draw, Efficient, Favor, FeatureMap, Gradients, Linear, Linformer,
    LinformerForward, MatrixGradients, RandomFeatures, Recurrence, Recurrent, RecurrentBackward,
    Results, Retention, ScalarDecay, SequenceMatrix, Sharing, State, Tokens, Upstream, VectorDecay,
};
use foveal::plan::Inputs;
use foveal::{Attention, Element, Gradient, Shape, Tensor, Workspace};

const DECAY: usize = 3;
const BETA: usize = 4;
const STATE: usize = 5;
const SUMS: usize = 6;
const PRESENT: usize = 7;
const CUTS: usize = 8;
/// What all of them are given.
const ARRAYS: &[&str] =
    &["q", "k", "v", "log_decay", "beta", "initial_state", "initial_sums", "present", "cu_seqlens"];

/// A mechanism that goes from token to token.
#[derive(Debug)]
pub(crate) struct Causal<R>(pub(crate) R);

/// A mechanism whose tokens all see all.
#[derive(Debug)]
pub(crate) struct AllKeys<R>(pub(crate) R);

/// `linear` with a map of its name.
pub(crate) fn linear(map: &str, epsilon: Option<f32>) -> Result<Linear> {
    let map = match map {
        "identity" => FeatureMap::Identity,
        "elu_plus_one" => FeatureMap::EluPlusOne,
        "relu" => FeatureMap::Relu,
        "exp" => FeatureMap::Exp,
        got => {
            let expected = "identity, elu_plus_one, relu or exp";
            return Err(Error::Option { what: "feature_map", expected, got: got.to_owned() });
        }
    };
    Ok(Linear::new().map(map).normaliser(epsilon))
}

/// `performer` with features of a seed.
pub(crate) fn performer((features, dim, seed): (usize, usize, u64), kernel: &str) -> Result<Favor> {
    let favor = Favor::new(RandomFeatures::new(Draw::Orthogonal, features, dim, seed)?);
    match kernel {
        "softmax" => Ok(favor),
        "relu" => Ok(favor.relu(1e-3)),
        got => {
            let (what, expected) = ("kernel", "softmax or relu");
            Err(Error::Option { what, expected, got: got.to_owned() })
        }
    }
}

/// `efficient`.
pub(crate) fn efficient() -> Efficient {
    Efficient::new()
}

/// `retention` with given decays, or RetNet's.
pub(crate) fn retention(decays: Option<Vec<f32>>, heads: usize, by: Option<f32>) -> Retention {
    let retention = Retention::new(heads).scale(scale(by));
    decays.into_iter().fold(retention, Retention::decays)
}

/// `scalar_decay`.
pub(crate) fn scalar_decay(by: Option<f32>) -> ScalarDecay {
    ScalarDecay::new().scale(scale(by))
}

/// `gla`.
pub(crate) fn gla(by: Option<f32>) -> VectorDecay {
    VectorDecay::new().scale(scale(by))
}

/// `delta` and `gated_delta`.
pub(crate) fn delta(gated: bool, by: Option<f32>) -> Delta {
    let delta = if gated { Delta::gated() } else { Delta::new() };
    delta.scale(scale(by))
}

/// What a call's tokens borrow.
struct Lists {
    present: Option<Vec<bool>>,
    cuts: Option<Vec<usize>>,
}

impl Lists {
    fn new(given: &Given<'_>) -> Result<Lists> {
        let present = given.optional(PRESENT).map(|present| -> Result<Vec<bool>> {
            let truths = present.truths()?;
            let shape = truths.shape;
            let rows = (0..shape[0]).flat_map(|a| {
                (0..shape[1]).flat_map(move |b| (0..shape[2]).map(move |c| [a, b, c]))
            });
            Ok(rows.flat_map(|at| truths.row(at).iter().map(|&x| x != 0)).collect())
        });
        let cuts = given.optional(CUTS).map(|cuts| cuts.indices()).transpose()?;
        Ok(Lists { present: present.transpose()?, cuts })
    }

    fn tokens<'a, E: Element>(&'a self, given: &Given<'a>) -> Result<Tokens<'a, E>> {
        let mut tokens = Tokens::new(given.tensor(0)?, given.tensor(1)?, given.tensor(2)?);
        if let Some(decay) = given.optional(DECAY) {
            // One number a token and head comes without an axis for it.
            let scalar = decay.shape().len() == 3;
            tokens = tokens.log_decay(if scalar { decay.per_row()? } else { decay.tensor()? });
        }
        if let Some(beta) = given.maybe_per_row(BETA)? {
            tokens = tokens.beta(beta);
        }
        let Lists { present, cuts } = self;
        tokens = present.iter().fold(tokens, |tokens, present| tokens.present(present));
        Ok(cuts.iter().fold(tokens, |tokens, cuts| tokens.cuts(cuts)))
    }
}

/// Fills a state of zeros with what was given.
fn fill(mut state: State, given: &Given<'_>, [matrices, sums]: [usize; 2]) -> Result<State> {
    if let Some(from) = given.maybe_floats(matrices)? {
        let shape = state.shape();
        let expected = [shape.sequences, shape.heads, shape.key_dim, shape.value_dim];
        copy(given.view(matrices)?.shape(), &expected, "state", from, state.matrices_mut())?;
    }
    if let Some(from) = given.maybe_floats(sums)? {
        let expected = sums_shape(&state);
        copy(given.view(sums)?.shape(), &expected, "sums of a state", from, state.key_sums_mut())?;
    }
    Ok(state)
}

/// Numbers of the sums of each head.
fn sums_shape(state: &State) -> [usize; 3] {
    let shape = state.shape();
    let heads = (shape.sequences * shape.heads).max(1);
    [shape.sequences, shape.heads, state.key_sums().len() / heads]
}

fn copy(
    got: &[usize],
    expected: &[usize],
    what: &'static str,
    from: &[f32],
    to: &mut [f32],
) -> Result<()> {
    if got != expected {
        let (expected, got) = (expected.to_vec(), got.to_vec());
        return Err(Error::Shape { what, expected, got });
    }
    to.copy_from_slice(from);
    Ok(())
}

/// A state as two arrays.
fn given_back(state: &State) -> [Output; 2] {
    let shape = state.shape();
    let extents = [shape.sequences, shape.heads, shape.key_dim, shape.value_dim];
    [
        Output::new(state.matrices().to_vec(), &extents),
        Output::new(state.key_sums().to_vec(), &sums_shape(state)),
    ]
}

/// Gradients in the order of [`ARRAYS`].
fn in_order<E: Element>(
    d: RecurrentBackward,
    d_state: &State,
    given: &Given<'_>,
) -> Vec<Option<Output>> {
    let rows = |x: Tensor<f32>| match x.shape().dim {
        1 if given.optional(DECAY).is_some_and(|view| view.shape().len() == 3) => {
            Output::per_row(x)
        }
        _ => Output::tensor(x),
    };
    let [matrices, sums] = given_back(d_state);
    vec![
        Some(Output::rounded::<E>(d.d_q)),
        Some(Output::rounded::<E>(d.d_k)),
        Some(Output::rounded::<E>(d.d_v)),
        d.d_log_decay.map(rows),
        d.d_beta.map(Output::per_row),
        given.optional(STATE).map(|_| matrices),
        given.optional(SUMS).map(|_| sums),
        None,
        None,
    ]
}

impl<R: Recurrence + Clone + Send> Mechanism for Causal<R> {
    const ARRAYS: &'static [&'static str] = ARRAYS;

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let (recurrent, lists) = (Recurrent::new(self.0.clone()).cpu(cpu()?), Lists::new(given)?);
        let tokens = lists.tokens::<E>(given)?;
        let mut state = fill(recurrent.state(&tokens)?, given, [STATE, SUMS])?;
        let shape = tokens.v.shape();
        let mut out = Tensor::zeros(shape)?;
        let seq = if self.0.form().beta { shape.seq } else { 0 };
        let mut reads = Tensor::zeros(Shape { seq, ..shape })?;
        let results =
            Results { out: out.view_mut(), reads: self.0.form().beta.then(|| reads.view_mut()) };
        recurrent.forward_into(&tokens, results, &mut state, &mut Workspace::new())?;
        let [matrices, sums] = given_back(&state);
        Ok(vec![Output::tensor(out), matrices, sums, Output::tensor(reads)])
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        let (recurrent, lists) = (Recurrent::new(self.0.clone()).cpu(cpu()?), Lists::new(given)?);
        let tokens = lists.tokens::<E>(given)?;
        let initial = fill(recurrent.state(&tokens)?, given, [STATE, SUMS])?;
        let mut d_state = fill(recurrent.state(&tokens)?, d, [1, 2])?;
        let reads = if self.0.form().beta { results.maybe(3)? } else { None };
        let upstream = Upstream { d_out: d.tensor(0)?, initial: &initial, reads };
        let gradients = recurrent.backward(&tokens, upstream, &mut d_state)?;
        Ok(in_order::<E>(gradients, &d_state, given))
    }
}

impl<R: AnyOrder + Clone + Send> Mechanism for AllKeys<R> {
    const ARRAYS: &'static [&'static str] = ARRAYS;

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let (recurrent, lists) = (Recurrent::new(self.0.clone()).cpu(cpu()?), Lists::new(given)?);
        let tokens = lists.tokens::<E>(given)?;
        let mut state = fill(recurrent.state_bidirectional(&tokens)?, given, [STATE, SUMS])?;
        let out = recurrent.forward_bidirectional(&tokens, &mut state)?;
        let [matrices, sums] = given_back(&state);
        let reads = Tensor::<f32>::zeros(Shape { seq: 0, ..tokens.v.shape() })?;
        Ok(vec![Output::tensor(out), matrices, sums, Output::tensor(reads)])
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        _results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        let (recurrent, lists) = (Recurrent::new(self.0.clone()).cpu(cpu()?), Lists::new(given)?);
        let tokens = lists.tokens::<E>(given)?;
        let initial = fill(recurrent.state_bidirectional(&tokens)?, given, [STATE, SUMS])?;
        let mut d_state = fill(recurrent.state_bidirectional(&tokens)?, d, [1, 2])?;
        let (mut d_q, mut d_k) =
            (Tensor::zeros(tokens.q.shape())?, Tensor::zeros(tokens.k.shape())?);
        let mut d_v = Tensor::zeros(tokens.v.shape())?;
        let gradients = Gradients {
            d_q: d_q.view_mut(),
            d_k: d_k.view_mut(),
            d_v: d_v.view_mut(),
            d_log_decay: None,
            d_beta: None,
        };
        let upstream = Upstream::new(d.tensor(0)?, &initial);
        let mut workspace = Workspace::new();
        recurrent.backward_bidirectional_into(
            &tokens,
            upstream,
            gradients,
            &mut d_state,
            &mut workspace,
        )?;
        let d = RecurrentBackward { d_q, d_k, d_v, d_log_decay: None, d_beta: None };
        Ok(in_order::<E>(d, &d_state, given))
    }
}

/// Softmax attention to mixtures of all keys.
#[derive(Debug)]
pub(crate) struct Mixtures {
    pub(crate) scale: Option<f32>,
}

impl Mixtures {
    /// Runs with the layer that the arrays describe.
    fn layer<T>(
        &self,
        given: &Given<'_>,
        run: impl FnOnce(Linformer<'_>) -> Result<T>,
    ) -> Result<T> {
        let attention = Attention::new().scale(scale(self.scale)).cpu(cpu()?);
        let matrix = |n: usize| -> Result<SequenceMatrix<'_>> {
            let view = given.view(n)?;
            let &[rank, length] = view.shape() else {
                let (what, got) = ("a matrix over tokens, [rank, length]", view.shape().to_vec());
                return Err(Error::Shape { what, expected: vec![0; 2], got });
            };
            Ok(SequenceMatrix::new(view.floats()?, rank, length)?)
        };
        let keys = matrix(3)?;
        let sharing = match given.optional(4) {
            Some(_) => Sharing::Headwise { keys, values: matrix(4)? },
            None => Sharing::KeyValue(keys),
        };
        run(Linformer { attention: &attention, sharing })
    }
}

impl Mechanism for Mixtures {
    const ARRAYS: &'static [&'static str] = &["q", "k", "v", "e", "f"];

    fn forward<E: Element>(&self, given: &Given<'_>) -> Result<Vec<Output>> {
        let inputs =
            Inputs::<E, E> { q: given.tensor(0)?, k: given.tensor(1)?, v: given.tensor(2)? };
        let forward = self.layer(given, |layer| Ok(layer.forward(inputs)?))?;
        Ok(vec![
            Output::tensor(forward.out),
            Output::per_row(forward.lse),
            Output::tensor(forward.keys),
            Output::tensor(forward.values),
        ])
    }

    fn backward<E: Element>(
        &self,
        given: &Given<'_>,
        results: &Given<'_>,
        d: &Given<'_>,
    ) -> Result<Vec<Option<Output>>> {
        d.none(1, "the log-sum-exp of linformer")?;
        let inputs =
            Inputs::<E, E> { q: given.tensor(0)?, k: given.tensor(1)?, v: given.tensor(2)? };
        let forward = LinformerForward {
            out: owned(results.tensor::<E>(0)?)?,
            lse: owned(results.view(1)?.per_row()?)?,
            keys: owned(results.tensor(2)?)?,
            values: owned(results.tensor(3)?)?,
        };
        let mut d_e = vec![0.0; given.view(3)?.floats()?.len()];
        let mut d_f = given.maybe_floats(4)?.map(|f| vec![0.0; f.len()]);
        let matrices = MatrixGradients {
            d_keys: Gradient::Write(&mut d_e),
            d_values: d_f.as_deref_mut().map_or(Gradient::Skip, Gradient::Write),
        };
        let d_out = d.tensor(0)?;
        let back =
            self.layer(given, |layer| Ok(layer.backward(inputs, &forward, d_out, matrices)?))?;
        let like = |n: usize, x: Vec<f32>| {
            Output::new(x, given.optional(n).map_or(&[], |view| view.shape()))
        };
        Ok(vec![
            Some(Output::tensor(back.d_q)),
            Some(Output::tensor(back.d_k)),
            Some(Output::tensor(back.d_v)),
            Some(like(3, d_e)),
            d_f.map(|d_f| like(4, d_f)),
        ])
    }
}
