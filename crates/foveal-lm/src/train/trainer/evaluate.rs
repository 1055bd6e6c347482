//! The loss on text that a model is not trained on.
//!
//! Processes share the batches out: call n of shuffled sequences is computed by process n mod W, stream s always by process
//! s mod W. Losses are summed in the order of the text, whoever computed them.

use std::collections::BTreeMap;

use super::{Carried, Evaluation, Trainer, precision};
use crate::train::data::{Sequences, Text};
use crate::train::{Error, Loss, StepOptions};

impl Trainer {
    /// The loss on the text that is kept back: of the same sequences each time. All processes call it.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] with what the network refuses; [`Error::Elsewhere`] and [`Error::Processes`].
    pub fn evaluate(&mut self) -> Result<Option<Evaluation>, Error> {
        let Some(mut text) = self.validation.take() else { return Ok(None) };
        let found = self.loss_over(&mut text);
        self.validation = Some(text);
        let found = self.together(found)?;
        let (sum, tokens) = self.sum_of_all(&found)?;
        let loss = sum / tokens.max(1) as f64;
        let step = self.state.step;
        let best = self.state.best_loss().is_none_or(|best| loss < best);
        if best {
            self.state.set_best(loss, step);
        } else {
            self.state.stale += 1;
        }
        Ok(Some(Evaluation { step, loss, tokens, best }))
    }

    /// The losses of this process's calls, with their places in the text.
    fn loss_over(&mut self, text: &mut Text) -> Result<Vec<(usize, Loss)>, Error> {
        text.rewind();
        let (streams, per_call) = (text.position().streams.len(), self.most_per_call(text));
        let mut carried = self.nothing_carried(text, per_call)?;
        let calls = streams.max(per_call) / per_call;
        let limit = match self.config.train.evaluate_batches {
            0 => usize::MAX,
            limit => limit,
        };
        let (rank, count) = self.place();
        let mut losses = vec![];
        let (mut n, mut place) = (0, 0);
        while n < limit && text.position().epoch == 0 {
            let batches = text.calls(0..calls * per_call, per_call);
            let next = place + batches.len();
            for (call, batch) in batches.into_iter().enumerate() {
                // What is carried stays where it is.
                let owner = if streams > 0 { call } else { place + call };
                if owner % count == rank {
                    let loss = self.loss_of(batch, n, carried.get_mut(call))?;
                    losses.push((place + call, loss));
                }
            }
            place = next;
            n += 1;
        }
        Ok(losses)
    }

    fn loss_of(
        &mut self,
        batch: Sequences,
        n: usize,
        mut carried: Option<&mut Carried>,
    ) -> Result<Loss, Error> {
        // The same tokens are hidden each time.
        let batch = self.hidden(batch, [0, n as u64]);
        if let Some(own) = carried.as_mut().filter(|_| batch.fresh.first() == Some(&true)) {
            own.clear();
        }
        let mut options = StepOptions::new(self.cpu, &mut self.scratch);
        options.precision = precision(self.config.train.precision);
        let values = self.parameters.values();
        Ok(self.learner.loss(values, (&batch, carried), &mut options)?)
    }

    /// The sum of losses and the number of targets of all processes.
    fn sum_of_all(&self, own: &[(usize, Loss)]) -> Result<(f64, usize), Error> {
        let numbers: Vec<f64> = own
            .iter()
            .flat_map(|(place, loss)| [*place as f64, loss.sum, loss.targets as f64])
            .collect();
        let mut by_place = BTreeMap::new();
        for numbers in self.all_numbers(&numbers)? {
            let (entries, _) = numbers.as_chunks::<3>();
            by_place.extend(
                entries
                    .iter()
                    .map(|[place, sum, targets]| (*place as usize, (*sum, *targets as usize))),
            );
        }
        let add = |(sum, tokens), (loss, targets): &(f64, usize)| (sum + loss, tokens + targets);
        Ok(by_place.values().fold((0.0, 0), add))
    }
}
