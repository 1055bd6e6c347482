//! Attention with the relative encoding of Transformer-XL, against its definition in f64 and against golden vectors.

#[path = "../support/mod.rs"]
mod support;

mod definition;
mod golden;
mod laws;
mod refusals;

use foveal::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use foveal::position::RelativeEncoding;
use foveal::reference::{Input, Options, Relative, attention_with};
use foveal::{Attention, Element, Forward, Shape, Tensor, TensorMut, Workspace};
use support::backward::Call;
use support::sizes::Sizes;
use support::{Random, error};

/// The numbers of a relative encoding.
#[derive(Debug, Clone)]
struct Encoding {
    keys: Tensor<f32>,
    content_bias: Vec<f32>,
    position_bias: Vec<f32>,
}

impl Encoding {
    fn random(distances: usize, sizes: Sizes, seed: u64) -> Encoding {
        let mut random = Random::new(seed);
        let Sizes { heads, dim, .. } = sizes;
        let keys = random.tensor(Shape { batch: 1, seq: distances, heads, dim }, 1.5);
        let mut numbers = |_| (0..heads * dim).map(|_| random.number()).collect();
        let [content_bias, position_bias] = [0, 1].map(&mut numbers);
        Encoding { keys, content_bias, position_bias }
    }

    fn zeros(distances: usize, sizes: Sizes) -> Encoding {
        let Sizes { heads, dim, .. } = sizes;
        let keys = Tensor::zeros(Shape { batch: 1, seq: distances, heads, dim }).unwrap();
        let [content_bias, position_bias] = [(); 2].map(|()| vec![0.0; heads * dim]);
        Encoding { keys, content_bias, position_bias }
    }

    fn view(&self) -> RelativeEncoding<'_> {
        RelativeEncoding::new(self.keys.view(), &self.content_bias, &self.position_bias).unwrap()
    }

    /// Runs `work` with the numbers in f64.
    fn wide<R>(&self, work: impl FnOnce(Relative<'_>) -> R) -> R {
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
        let keys = wide(self.keys.as_slice());
        let [u, v] = [&self.content_bias, &self.position_bias].map(|x| wide(x));
        let keys = Input { data: &keys, shape: self.keys.shape() };
        work(Relative { keys, content_bias: &u, position_bias: &v })
    }
}

/// Output and log-sum-exp as they are defined.
fn define<E: Element>(call: &Call<E>, options: &Options<'_>) -> (Vec<f64>, Vec<f64>) {
    let tensors = [&call.q, &call.k, &call.v];
    let data = tensors
        .map(|x| -> Vec<f64> { x.as_slice().iter().map(|x| f64::from(x.to_f32())).collect() });
    let inputs = std::array::from_fn(|n| Input { data: &data[n], shape: tensors[n].shape() });
    let result = attention_with(inputs, options).unwrap();
    (result.out, result.lse)
}

/// Forward on poisoned memory.
fn forward<E: Element>(attention: &Attention<'_>, call: &Call<E>, decode: bool) -> Forward<E> {
    let (q, k, v) = (call.q.shape(), call.k.shape(), call.v.shape());
    let plan = match decode {
        true => attention.plan_decode(q, k, v).unwrap(),
        false => attention.plan(q, k, v).unwrap(),
    };
    let nan = |shape: Shape| vec![f32::NAN; shape.checked_len().unwrap()];
    let out = nan(plan.out_shape()).into_iter().map(E::from_f32).collect();
    let mut out = Tensor::from_vec(out, plan.out_shape()).unwrap();
    let shape = plan.out_shape().per_row();
    let mut lse = Tensor::from_vec(nan(shape), shape).unwrap();
    let mut workspace = Workspace::for_plan(&plan);
    workspace.poison();
    let inputs = Inputs { q: call.q.view(), k: call.k.view(), v: call.v.view() };
    plan.forward(inputs, out.view_mut(), Some(lse.view_mut()), &mut workspace).unwrap();
    Forward { out, lse }
}

/// All six gradients, and whether those of the encoding are asked for.
#[derive(Debug, Clone, PartialEq)]
struct Backward<E> {
    d_q: Vec<E>,
    d_k: Vec<E>,
    d_v: Vec<E>,
    d_keys: Vec<f32>,
    d_content_bias: Vec<f32>,
    d_position_bias: Vec<f32>,
}

/// Forward and backward; what is written to is filled with NaN before.
fn backward<E: Element>(
    attention: &Attention<'_>,
    call: &Call<E>,
    encoding: &Encoding,
) -> Backward<E> {
    let forward = forward(attention, call, false);
    let plan = attention.plan(call.q.shape(), call.k.shape(), call.v.shape()).unwrap();
    let nan = |x: &Tensor<E>| vec![E::from_f32(f32::NAN); x.as_slice().len()];
    let terms = |n: usize| vec![f32::NAN; n];
    let mut d = Backward {
        d_q: nan(&call.q),
        d_k: nan(&call.k),
        d_v: nan(&call.v),
        d_keys: terms(encoding.keys.as_slice().len()),
        d_content_bias: terms(encoding.content_bias.len()),
        d_position_bias: terms(encoding.position_bias.len()),
    };
    let mut workspace = Workspace::for_backward::<E>(&plan);
    workspace.poison();
    let keys = TensorMut::new(&mut d.d_keys, encoding.keys.shape()).unwrap();
    let gradients = Gradients {
        d_q: TensorMut::new(&mut d.d_q, call.q.shape()).unwrap(),
        d_k: TensorMut::new(&mut d.d_k, call.k.shape()).unwrap(),
        d_v: TensorMut::new(&mut d.d_v, call.v.shape()).unwrap(),
        terms: TermGradients {
            d_relative_keys: Some(keys),
            d_content_bias: Some(&mut d.d_content_bias),
            d_position_bias: Some(&mut d.d_position_bias),
            ..TermGradients::default()
        },
    };
    let inputs = Inputs { q: call.q.view(), k: call.k.view(), v: call.v.view() };
    let saved = Saved { out: forward.out.view(), lse: forward.lse.view() };
    let upstream =
        Upstream { d_out: call.d_out.view(), d_lse: call.d_lse.as_ref().map(Tensor::view) };
    plan.backward(inputs, saved, upstream, gradients, &mut workspace).unwrap();
    d
}

/// Requires all gradients to be those of the definition.
fn check_backward<E: Element>(
    what: &str,
    got: &Backward<E>,
    (call, options): (&Call<E>, &Options<'_>),
    // Of gradients in the storage type, and of those of the encoding.
    bounds: [f64; 2],
) {
    let expected = call.define(options);
    let wide = |x: &[E]| -> Vec<f32> { x.iter().map(|x| x.to_f32()).collect() };
    for (name, got, expected, bound) in [
        ("dQ", wide(&got.d_q), &expected.d_q, bounds[0]),
        ("dK", wide(&got.d_k), &expected.d_k, bounds[0]),
        ("dV", wide(&got.d_v), &expected.d_v, bounds[0]),
        ("dR", got.d_keys.clone(), &expected.d_relative_keys, bounds[1]),
        ("du", got.d_content_bias.clone(), &expected.d_content_bias, bounds[1]),
        ("dv", got.d_position_bias.clone(), &expected.d_position_bias, bounds[1]),
    ] {
        let worst = error(&got, expected);
        assert!(worst <= bound, "{what}: {name} off by {worst:e}");
    }
}
