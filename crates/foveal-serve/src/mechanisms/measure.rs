//! How long a mechanism takes on this machine: a prompt of each length, best of three, between the steps of texts.

use std::ops::ControlFlow;
use std::time::Instant;

use foveal::testing::alone::Text;
use foveal::{Error, Result};
use tokio::sync::oneshot;

use crate::Served;
use crate::engine::Aside;

/// Lengths of prompts.
pub(crate) const TOKENS: [usize; 5] = [256, 512, 1024, 2048, 4096];
const ROUNDS: usize = 3;

/// Milliseconds of each length.
type Curve = std::result::Result<Vec<f64>, Error>;

/// A measurement on its way: one length a step.
pub(crate) struct Measuring {
    name: String,
    curve: Vec<f64>,
    done: Option<oneshot::Sender<Curve>>,
}

impl Measuring {
    pub(crate) fn new(name: String) -> (Measuring, oneshot::Receiver<Curve>) {
        let (done, receiver) = oneshot::channel();
        (Measuring { name, curve: vec![], done: Some(done) }, receiver)
    }
}

impl Aside for Measuring {
    fn step(&mut self, _: &Served) -> ControlFlow<()> {
        if self.done.as_ref().is_none_or(oneshot::Sender::is_closed) {
            return ControlFlow::Break(());
        }
        let result = match seconds(&self.name, TOKENS[self.curve.len()]) {
            Ok(seconds) => {
                self.curve.push(1e3 * seconds);
                if self.curve.len() < TOKENS.len() {
                    return ControlFlow::Continue(());
                }
                Ok(std::mem::take(&mut self.curve))
            }
            Err(error) => Err(error),
        };
        if let Some(done) = self.done.take() {
            let _ = done.send(result);
        }
        ControlFlow::Break(())
    }
}

/// Seconds of a prompt of so many tokens, without the making of inputs and parameters.
fn seconds(name: &str, tokens: usize) -> Result<f64> {
    let mut best = f64::INFINITY;
    Text::new(tokens)?.read(name, &mut |run| {
        for _ in 0..ROUNDS {
            let start = Instant::now();
            run()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(())
    })?;
    Ok(best)
}
