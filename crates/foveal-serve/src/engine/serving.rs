//! The thread's loop: takes in what has come, makes a step, gives out what was made.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use foveal_lm::generate::{BatchOptions, Batcher, Finished, Piece};
use tokio::sync::mpsc::UnboundedSender;

use super::{Aside, Engine, Event, Job};
use crate::Served;

/// A text on its way.
struct Live {
    number: usize,
    events: UnboundedSender<(usize, Event)>,
    since: Instant,
    prompt: usize,
    began: bool,
}

/// What of the inbox the thread takes at a time.
enum Taken {
    Work(Vec<Job>, Option<Box<dyn Aside>>),
    End,
}

/// Closes the engine however the thread ends.
struct Guard<'a>(&'a Engine);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.cut();
        // Whoever has sent a job meanwhile learns that nobody listens.
        let mut inbox = self.0.inbox();
        inbox.jobs.clear();
        inbox.asides.clear();
        inbox.ended = true;
    }
}

impl Engine {
    /// Makes texts until the engine is closed and nothing is left, or all is cut. Uses the threads of the current pool.
    pub(crate) fn run(
        &self,
        served: &Served,
        options: &BatchOptions,
    ) -> Result<(), foveal_lm::Error> {
        let _guard = Guard(self);
        let mut serving = Serving::new(self, served, options)?;
        loop {
            match serving.take() {
                Taken::End => return Ok(()),
                Taken::Work(jobs, aside) => {
                    jobs.into_iter().for_each(|job| serving.begin(job));
                    serving.leave_abandoned();
                    serving.step()?;
                    if let Some(mut aside) = aside
                        && aside.step(served).is_continue()
                    {
                        self.inbox().asides.push_back(aside);
                    }
                }
            }
        }
    }
}

/// The batch and those who wait for its texts.
struct Serving<'a> {
    engine: &'a Engine,
    served: &'a Served,
    options: &'a BatchOptions,
    batcher: Batcher<'a>,
    live: HashMap<usize, Live>,
}

impl<'a> Serving<'a> {
    fn new(
        engine: &'a Engine,
        served: &'a Served,
        options: &'a BatchOptions,
    ) -> Result<Serving<'a>, foveal_lm::Error> {
        let batcher = Batcher::new(&served.model, &served.tokenizer, options)?;
        let serving = Serving { engine, served, options, batcher, live: HashMap::new() };
        serving.count();
        Ok(serving)
    }

    /// Waits for work if there is none.
    fn take(&self) -> Taken {
        let mut inbox = self.engine.inbox();
        loop {
            let idle = inbox.jobs.is_empty() && inbox.asides.is_empty() && self.batcher.is_idle();
            if inbox.cut || (inbox.closing && idle) {
                return Taken::End;
            }
            if !idle {
                let jobs: Vec<Job> = inbox.jobs.drain(..).collect();
                inbox.waiting = self.batcher.waiting() + jobs.len();
                return Taken::Work(jobs, inbox.asides.pop_front());
            }
            let woken = self.engine.0.wake.wait(inbox);
            inbox = woken.unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn begin(&mut self, job: Job) {
        let Job { number, request, events } = job;
        let prompt = request.prompt.len();
        let id = self.batcher.push(request);
        let live = Live { number, events, since: Instant::now(), prompt, began: false };
        self.live.insert(id, live);
    }

    /// Ends what nobody waits for.
    fn leave_abandoned(&mut self) {
        let gone = self.live.iter().filter(|(_, live)| live.events.is_closed());
        let gone: Vec<usize> = gone.map(|(id, _)| *id).collect();
        for id in gone {
            self.batcher.cancel(id);
            self.live.remove(&id);
            self.engine.gauges().abandoned.fetch_add(1, Relaxed);
        }
    }

    fn step(&mut self) -> Result<(), foveal_lm::Error> {
        let start = Instant::now();
        let busy = !self.batcher.is_idle();
        let Serving { batcher, live, engine, .. } = self;
        let gauges = engine.gauges();
        let finished = batcher.step_with(&mut |id, piece: &Piece| {
            let Some(live) = live.get_mut(&id) else { return };
            gauges.made_tokens.fetch_add(1, Relaxed);
            if !live.began {
                live.began = true;
                gauges.first_token.add(live.since.elapsed());
            }
            // Whoever is gone is noticed before the next step.
            let _ = live.events.send((live.number, Event::Piece(piece.clone())));
        });
        if busy {
            gauges.steps.add(start.elapsed());
        }
        // Counted before anybody is told: whoever has an answer finds its pages free.
        match finished {
            Ok(finished) => {
                self.count();
                finished.into_iter().for_each(|finished| self.finish(finished));
            }
            Err(error) => self.start_afresh(error)?,
        }
        Ok(())
    }

    fn finish(&mut self, finished: Finished) {
        let Some(live) = self.live.remove(&finished.id) else { return };
        let gauges = self.engine.gauges();
        let event = match finished.text {
            Ok(text) => {
                gauges.finished.fetch_add(1, Relaxed);
                gauges.prompt_tokens.fetch_add(live.prompt as u64, Relaxed);
                gauges.shared_tokens.fetch_add(finished.shared as u64, Relaxed);
                gauges.whole.add(live.since.elapsed());
                Event::Done { stopped: text.stopped, shared: finished.shared }
            }
            Err(error) => {
                gauges.failed.fetch_add(1, Relaxed);
                Event::Failed(Arc::new(error))
            }
        };
        let _ = live.events.send((live.number, event));
    }

    /// What failed was the whole batch: its texts fail with it, and the next ones get a new one.
    fn start_afresh(&mut self, error: foveal_lm::Error) -> Result<(), foveal_lm::Error> {
        let fresh = Batcher::new(&self.served.model, &self.served.tokenizer, self.options);
        let begun = fresh.map(|batcher| {
            self.batcher = batcher;
            self.count();
        });
        let error = Arc::new(error);
        for (_, live) in self.live.drain() {
            self.engine.gauges().failed.fetch_add(1, Relaxed);
            let _ = live.events.send((live.number, Event::Failed(error.clone())));
        }
        begun
    }

    fn count(&self) {
        let (gauges, batcher) = (self.engine.gauges(), &self.batcher);
        gauges.reading.store(batcher.reading(), Relaxed);
        gauges.running.store(batcher.running(), Relaxed);
        gauges.kv_bytes.store(batcher.kv_bytes(), Relaxed);
        if let Some(pages) = batcher.pages() {
            gauges.pages.store(pages.pages(), Relaxed);
            gauges.free_pages.store(pages.free_pages(), Relaxed);
        }
        self.engine.inbox().waiting = batcher.waiting();
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        for (_, live) in self.live.drain() {
            let _ = live.events.send((live.number, Event::Cut));
        }
    }
}
