//! What a layer of attention learns.

use foveal::projection::{Matrix, MatrixShape};

use super::{MultiHeadAttention, Views};
use crate::Error;
use crate::linear::{Affine, LinearRef};

/// The parameters of a layer; their gradients; or anything else of which there is one for each parameter.
///
/// `W` holds a matrix, `V` a vector: `Vec<f32>` owns them, `&[f32]` views them, `&mut [f32]` takes gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttentionParameters<W, V = W> {
    /// To queries, `[heads · head_dim, width]`.
    pub query: Affine<W, V>,
    /// To keys, `[kv_heads · head_dim, key_width]`.
    pub key: Affine<W, V>,
    /// To values, `[kv_heads · head_dim, value_width]`.
    pub value: Affine<W, V>,
    /// From all heads' outputs, `[width, heads · head_dim]`.
    pub output: Affine<W, V>,
    /// Weights of each query's RMSNorm, `[head_dim]`; what they are multiplied by, so Gemma's 1 + w.
    pub query_norm: Option<V>,
    /// Weights of each key's RMSNorm, `[head_dim]`.
    pub key_norm: Option<V>,
    /// A logit for each query head that joins its softmax, `[heads]`.
    pub sinks: Option<V>,
}

impl<W, V> AttentionParameters<W, V> {
    /// Something else for each parameter that is there.
    pub fn map<X, Y>(
        self,
        mut matrix: impl FnMut(W) -> X,
        mut vector: impl FnMut(V) -> Y,
    ) -> AttentionParameters<X, Y> {
        let mut affine = |affine: Affine<W, V>| Affine {
            weight: matrix(affine.weight),
            bias: affine.bias.map(&mut vector),
        };
        let [query, key, value, output] =
            [self.query, self.key, self.value, self.output].map(&mut affine);
        let [query_norm, key_norm, sinks] =
            [self.query_norm, self.key_norm, self.sinks].map(|x| x.map(&mut vector));
        AttentionParameters { query, key, value, output, query_norm, key_norm, sinks }
    }

    fn each_ref(&self) -> AttentionParameters<&W, &V> {
        fn affine<W, V>(affine: &Affine<W, V>) -> Affine<&W, &V> {
            Affine { weight: &affine.weight, bias: affine.bias.as_ref() }
        }
        AttentionParameters {
            query: affine(&self.query),
            key: affine(&self.key),
            value: affine(&self.value),
            output: affine(&self.output),
            query_norm: self.query_norm.as_ref(),
            key_norm: self.key_norm.as_ref(),
            sinks: self.sinks.as_ref(),
        }
    }

    fn each_mut(&mut self) -> AttentionParameters<&mut W, &mut V> {
        fn affine<W, V>(affine: &mut Affine<W, V>) -> Affine<&mut W, &mut V> {
            Affine { weight: &mut affine.weight, bias: affine.bias.as_mut() }
        }
        AttentionParameters {
            query: affine(&mut self.query),
            key: affine(&mut self.key),
            value: affine(&mut self.value),
            output: affine(&mut self.output),
            query_norm: self.query_norm.as_mut(),
            key_norm: self.key_norm.as_mut(),
            sinks: self.sinks.as_mut(),
        }
    }
}

impl<W: AsRef<[f32]>> AttentionParameters<W> {
    /// Views of the numbers.
    pub fn as_slices(&self) -> AttentionParameters<&[f32]> {
        self.each_ref().map(AsRef::as_ref, AsRef::as_ref)
    }

    /// Zeros for every number: where gradients are added up. Allocates.
    pub fn zeros(&self) -> AttentionParameters<Vec<f32>> {
        let zeros = |x: &W| vec![0.0; x.as_ref().len()];
        self.each_ref().map(zeros, zeros)
    }
}

impl<W: AsMut<[f32]>> AttentionParameters<W> {
    /// Writable views of the numbers.
    pub fn as_slices_mut(&mut self) -> AttentionParameters<&mut [f32]> {
        self.each_mut().map(AsMut::as_mut, AsMut::as_mut)
    }
}

impl MultiHeadAttention {
    /// The parameters as kernels read them.
    pub(super) fn views<'a>(
        &self,
        parameters: &AttentionParameters<&'a [f32]>,
    ) -> Result<Views<'a>, Error> {
        let MultiHeadAttention { width, key_width, value_width, .. } = *self;
        let (q, kv) = (self.q_width(), self.kv_width());
        let view = |affine: Affine<&'a [f32]>, [out_features, in_features]: [usize; 2]| {
            let shape = MatrixShape { out_features, in_features };
            let weight = Matrix::from_floats(shape, affine.weight)?;
            Ok::<_, Error>(LinearRef { weight, bias: affine.bias })
        };
        let views = Views {
            query: view(parameters.query, [q, width])?,
            key: view(parameters.key, [kv, key_width])?,
            value: view(parameters.value, [kv, value_width])?,
            output: view(parameters.output, [width, q])?,
            query_norm: parameters.query_norm,
            key_norm: parameters.key_norm,
            sinks: parameters.sinks,
        };
        self.check_vectors(&views)?;
        Ok(views)
    }

    /// Refuses vectors of other lengths than the layer's.
    pub(super) fn check_vectors<W, V: AsRef<[f32]>>(
        &self,
        parameters: &AttentionParameters<W, V>,
    ) -> Result<(), Error> {
        let AttentionParameters { query, key, value, output, query_norm, key_norm, sinks } =
            parameters;
        for (what, vector, expected) in [
            ("bias of queries", &query.bias, self.q_width()),
            ("bias of keys", &key.bias, self.kv_width()),
            ("bias of values", &value.bias, self.kv_width()),
            ("bias of an attention's output", &output.bias, self.width),
            ("norm of queries", query_norm, self.head_dim),
            ("norm of keys", key_norm, self.head_dim),
            ("sinks of an attention", sinks, self.heads),
        ] {
            let got = vector.as_ref().map_or(expected, |vector| vector.as_ref().len());
            if got != expected {
                return Err(foveal::Error::LengthMismatch { what, expected, got }.into());
            }
        }
        Ok(())
    }
}
