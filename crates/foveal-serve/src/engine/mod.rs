//! Inference on a thread of its own: requests join and leave a running batch between any two tokens.
//!
//! ```text
//! HTTP ── submit ──▶ queue (bounded) ──▶ step, step, step …            each: one token a text, at most 256 of prompts
//!      ◀── pieces as they are made ────┘   look, measure: a bit of each between two steps
//! ```
//!
//! A text is the one that it is alone, to the bit (see [`foveal_lm::generate::Batcher`]). Whoever stops listening is noticed
//! before the next step: its text ends and its pages are free.

mod gauges;
mod serving;

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use foveal_lm::generate::{Piece, Request, StopReason};
use tokio::sync::mpsc;

use crate::Served;
pub(crate) use gauges::{Gauges, Histogram};

/// What happens to a text.
#[derive(Debug)]
pub(crate) enum Event {
    /// A token was made.
    Piece(Piece),
    /// The text ended, for this reason; so many tokens of its prompt needed no reading.
    Done { stopped: StopReason, shared: usize },
    /// It can't go on.
    Failed(Arc<foveal_lm::Error>),
    /// The server stopped, or had a fault.
    Cut,
}

/// Where the events of some texts arrive, each with the number of its text. Dropping it ends the texts.
pub(crate) type Events = mpsc::UnboundedReceiver<(usize, Event)>;

/// Why nothing was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// So many wait already; try again in so many seconds.
    Full { seconds: u64 },
    /// The server is about to stop.
    Closing,
}

/// Work that shares the thread with texts, a bit at a time.
pub(crate) trait Aside: Send {
    /// Does a bit; breaks when all is done, or nobody waits for it.
    fn step(&mut self, served: &Served) -> ControlFlow<()>;
}

/// Texts to be made, and where their events go.
struct Job {
    number: usize,
    request: Request,
    events: mpsc::UnboundedSender<(usize, Event)>,
}

#[derive(Default)]
struct Inbox {
    jobs: VecDeque<Job>,
    asides: VecDeque<Box<dyn Aside>>,
    /// Texts that the batch has, but has not begun.
    waiting: usize,
    closing: bool,
    /// Nothing is finished any more.
    cut: bool,
    /// The thread is no more.
    ended: bool,
}

/// A handle to the thread.
#[derive(Clone)]
pub(crate) struct Engine(Arc<Shared>);

struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
    gauges: Gauges,
    queue: usize,
    parallel: usize,
}

impl Engine {
    /// For `parallel` texts at once and `queue` that wait.
    pub(crate) fn new(queue: usize, parallel: usize) -> Engine {
        let (inbox, wake) = (Mutex::default(), Condvar::new());
        Engine(Arc::new(Shared { inbox, wake, gauges: Gauges::default(), queue, parallel }))
    }

    /// Begins some texts, all of them or none.
    pub(crate) fn submit(&self, requests: Vec<Request>) -> Result<Events, Refused> {
        let (sender, events) = mpsc::unbounded_channel();
        let mut inbox = self.inbox();
        if inbox.closing {
            return Err(Refused::Closing);
        }
        let waiting = inbox.jobs.len() + inbox.waiting;
        // What an idle server could begin at once is never too much.
        if waiting + requests.len() > self.0.queue && waiting > 0 {
            let seconds = self.0.gauges.seconds_to_wait(waiting, self.0.parallel);
            return Err(Refused::Full { seconds });
        }
        for (number, request) in requests.into_iter().enumerate() {
            inbox.jobs.push_back(Job { number, request, events: sender.clone() });
        }
        drop(inbox);
        self.0.wake.notify_one();
        Ok(events)
    }

    /// Begins other work.
    pub(crate) fn beside(&self, aside: Box<dyn Aside>) -> Result<(), Refused> {
        /// More than a few can't be meant.
        const MOST: usize = 8;
        let mut inbox = self.inbox();
        if inbox.closing {
            return Err(Refused::Closing);
        }
        if inbox.asides.len() >= MOST {
            return Err(Refused::Full { seconds: 1 });
        }
        inbox.asides.push_back(aside);
        drop(inbox);
        self.0.wake.notify_one();
        Ok(())
    }

    /// Takes nothing more in. What has begun goes on, and the thread ends with it.
    pub(crate) fn close(&self) {
        self.inbox().closing = true;
        self.0.wake.notify_one();
    }

    /// Ends everything.
    pub(crate) fn cut(&self) {
        let mut inbox = self.inbox();
        (inbox.closing, inbox.cut) = (true, true);
        drop(inbox);
        self.0.wake.notify_one();
    }

    /// Whether nothing more is taken in.
    pub(crate) fn is_closing(&self) -> bool {
        self.inbox().closing
    }

    /// Whether the thread has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.inbox().ended
    }

    /// Texts that have not begun.
    pub(crate) fn waiting(&self) -> usize {
        let inbox = self.inbox();
        inbox.jobs.len() + inbox.waiting
    }

    pub(crate) fn gauges(&self) -> &Gauges {
        &self.0.gauges
    }

    /// A panic while it was held has not left it half changed: all changes are single assignments.
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
