//! What is trained: a network of one text, or one of pairs.

use crate::Error;
use crate::train::data::Sequences;
use crate::train::{Carried, EncoderDecoder, Loss, Network, StepOptions};

/// A network without its numbers.
#[derive(Debug)]
pub(in crate::train) enum Learner {
    /// Of one text.
    One(Box<Network>),
    /// Of pairs.
    Pairs(Box<EncoderDecoder>),
}

impl Learner {
    /// Adds the gradients of a call to `gradients`.
    pub(super) fn gradients(
        &self,
        parameters: &[f32],
        (batch, carried): (&Sequences, Option<&mut Carried>),
        gradients: &mut [f32],
        options: &mut StepOptions<'_>,
    ) -> Result<Loss, Error> {
        match self {
            Learner::One(network) => {
                network.gradients(parameters, &batch.view(), carried, gradients, options)
            }
            Learner::Pairs(network) => {
                network.gradients(parameters, &batch.pairs(), gradients, options)
            }
        }
    }

    /// The loss of a call.
    pub(super) fn loss(
        &self,
        parameters: &[f32],
        (batch, carried): (&Sequences, Option<&mut Carried>),
        options: &mut StepOptions<'_>,
    ) -> Result<Loss, Error> {
        match self {
            Learner::One(network) => network.loss(parameters, &batch.view(), carried, options),
            Learner::Pairs(network) => network.loss(parameters, &batch.pairs(), options),
        }
    }

    /// What so many texts carry, at their beginning: pairs nothing.
    pub(super) fn carried(&self, sequences: usize) -> Result<Option<Carried>, Error> {
        match self {
            Learner::One(network) => network.carried(sequences).map(Some),
            Learner::Pairs(_) => Ok(None),
        }
    }

    /// Tensors of the model's file that are not learned.
    pub(super) fn fixed_tensors(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        match self {
            Learner::One(_) => vec![],
            Learner::Pairs(network) => network.fixed_tensors(),
        }
    }
}
