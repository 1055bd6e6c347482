//! The recurrences that a configuration names, as one type.

use foveal::linear::{
    Delta, Draw, Efficient, Favor, FeatureMap, Linear, RandomFeatures, Recurrent, Retention,
    ScalarDecay, VectorDecay,
};

use crate::Error;
use crate::config::{KernelMap, Mechanism};

/// ε of what is as long as 1: queries and keys of delta rules.
pub(crate) const UNIT_EPSILON: f32 = 1e-6;
/// By what logarithms of GLA's decays are divided.
pub(crate) const TAU: f32 = 16.0;

/// One of them.
#[derive(Clone, Debug)]
pub(crate) enum Rule {
    Linear(Recurrent<Linear>),
    Performer(Recurrent<Favor>),
    Efficient(Recurrent<Efficient>),
    Retention(Recurrent<Retention>),
    Scalar(Recurrent<ScalarDecay>),
    Vector(Recurrent<VectorDecay>),
    Delta(Recurrent<Delta>),
}

/// Runs the same expression on whichever recurrence it is.
macro_rules! with_rule {
    ($rule:expr, $name:ident => $body:expr) => {
        match $rule {
            $crate::mixer::Rule::Linear($name) => $body,
            $crate::mixer::Rule::Performer($name) => $body,
            $crate::mixer::Rule::Efficient($name) => $body,
            $crate::mixer::Rule::Retention($name) => $body,
            $crate::mixer::Rule::Scalar($name) => $body,
            $crate::mixer::Rule::Vector($name) => $body,
            $crate::mixer::Rule::Delta($name) => $body,
        }
    };
}
pub(crate) use with_rule;

impl Rule {
    /// `None` if the mechanism is no recurrence.
    ///
    /// # Errors
    /// For features that can't be drawn; unless there is a key and a value for each query head.
    pub(crate) fn new(
        mechanism: &Mechanism,
        (heads, kv_heads): (usize, usize),
        head_dim: usize,
    ) -> Result<Option<Rule>, Error> {
        let rule = match mechanism {
            Mechanism::Linear { map } => {
                let map = match map {
                    KernelMap::EluPlusOne => FeatureMap::EluPlusOne,
                    KernelMap::Relu => FeatureMap::Relu,
                    KernelMap::Exp => FeatureMap::Exp,
                };
                Rule::Linear(Recurrent::new(Linear::new().map(map)))
            }
            &Mechanism::Performer { features, seed } => {
                let features = RandomFeatures::new(Draw::Orthogonal, features, head_dim, seed)?;
                Rule::Performer(Recurrent::new(Favor::new(features)))
            }
            Mechanism::Efficient {} => Rule::Efficient(Recurrent::new(Efficient::new())),
            Mechanism::Retention {} => Rule::Retention(Recurrent::new(Retention::new(heads))),
            Mechanism::ScalarDecay { .. } => Rule::Scalar(Recurrent::new(ScalarDecay::new())),
            Mechanism::Gla { .. } => Rule::Vector(Recurrent::new(VectorDecay::new())),
            Mechanism::Delta { .. } => Rule::Delta(Recurrent::new(Delta::new())),
            Mechanism::GatedDelta { .. } => Rule::Delta(Recurrent::new(Delta::gated())),
            _ => return Ok(None),
        };
        if kv_heads != heads {
            let expected = format!("{heads}, a key and a value for each query head");
            return Err(Error::config("key/value heads of a recurrence", kv_heads, expected));
        }
        Ok(Some(rule))
    }

    /// Whether queries and keys are rotated.
    pub(crate) fn rotated(&self) -> bool {
        matches!(self, Rule::Retention(_))
    }

    /// Whether queries and keys are as long as 1.
    pub(crate) fn unit_keys(&self) -> bool {
        matches!(self, Rule::Delta(_))
    }

    /// Whether what it gives is normalised and gated.
    pub(crate) fn gated(&self) -> bool {
        !matches!(self, Rule::Linear(_) | Rule::Performer(_) | Rule::Efficient(_))
    }
}
