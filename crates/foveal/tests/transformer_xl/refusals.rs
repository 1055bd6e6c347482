//! What does not fit is refused by name, and plans say what they do.

use super::Encoding;
use super::support::backward::Call;
use super::support::sizes::Sizes;
use foveal::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use foveal::{Attention, Error, Mask, Shape, Tensor, TensorMut, Workspace};

const SIZES: Sizes =
    Sizes { batch: 1, queries: 4, keys: 6, heads: 2, kv_heads: 2, dim: 8, value_dim: 8 };

#[test]
fn an_encoding_of_other_heads_or_dims_is_refused() {
    let call = Call::<f32>::random(SIZES, 1);
    let shapes = [call.q.shape(), call.k.shape(), call.v.shape()];
    for other in [Sizes { heads: 4, ..SIZES }, Sizes { dim: 4, ..SIZES }] {
        let encoding = Encoding::random(6, other, 2);
        let attention = Attention::new().relative_encoding(encoding.view());
        let [q, k, v] = shapes;
        let refused = attention.plan(q, k, v).unwrap_err();
        assert!(matches!(refused, Error::ShapeMismatch { .. }), "{refused}");
        assert!(attention.plan_decode(q, k, v).is_err());
    }
}

#[test]
fn a_plan_says_what_it_adds() {
    let encoding = Encoding::random(5, SIZES, 3);
    let attention = Attention::new().mask(Mask::causal()).relative_encoding(encoding.view());
    let q = Shape { batch: 1, seq: 4, heads: 2, dim: 8 };
    let plan = attention.plan(q, q, q).unwrap();
    assert_eq!(plan.explain().terms, "relative encoding of 5 distances");
    assert_eq!(plan.explain().kernel, foveal::plan::Kernel::Tiled);
}

#[test]
fn gradients_that_do_not_fit_are_refused() {
    let call = Call::<f32>::random(SIZES, 4);
    let encoding = Encoding::random(6, SIZES, 5);
    let with = Attention::new().relative_encoding(encoding.view());
    let without = Attention::new();
    let mut keys = [0.0; 7 * 16];
    let mut bias = [0.0; 17];
    let mut check = |attention: &Attention<'_>, distances: usize, u: usize| {
        let shape = Shape { batch: 1, seq: distances, heads: 2, dim: 8 };
        let terms = TermGradients {
            d_relative_keys: (distances > 0)
                .then(|| TensorMut::new(&mut keys[..distances * 16], shape).unwrap()),
            d_content_bias: (u > 0).then_some(&mut bias[..u]),
            ..TermGradients::default()
        };
        let forward = attention.forward(call.q.view(), call.k.view(), call.v.view()).unwrap();
        let plan = attention.plan(call.q.shape(), call.k.shape(), call.v.shape()).unwrap();
        let [mut d_q, mut d_k, mut d_v] =
            [&call.q, &call.k, &call.v].map(|x| Tensor::<f32>::zeros(x.shape()).unwrap());
        let gradients =
            Gradients { d_q: d_q.view_mut(), d_k: d_k.view_mut(), d_v: d_v.view_mut(), terms };
        plan.backward(
            Inputs { q: call.q.view(), k: call.k.view(), v: call.v.view() },
            Saved { out: forward.out.view(), lse: forward.lse.view() },
            Upstream { d_out: call.d_out.view(), d_lse: None },
            gradients,
            &mut Workspace::for_backward::<f32>(&plan),
        )
    };
    assert!(check(&with, 6, 16).is_ok());
    assert!(check(&with, 6, 0).is_ok());
    assert!(check(&with, 0, 16).is_ok());
    assert!(matches!(check(&with, 7, 16), Err(Error::ShapeMismatch { .. })));
    assert!(matches!(check(&with, 6, 17), Err(Error::LengthMismatch { .. })));
    assert!(matches!(check(&without, 6, 0), Err(Error::InvalidParameter { .. })));
    assert!(matches!(check(&without, 0, 16), Err(Error::InvalidParameter { .. })));
}
