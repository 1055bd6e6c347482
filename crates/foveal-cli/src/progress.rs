//! How far a long prompt has been read, on a line of the terminal that goes away afterwards.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// Shorter work is done before a line could be read.
const WAIT: Duration = Duration::from_millis(400);
const EVERY: Duration = Duration::from_millis(100);

/// A line on standard error, if that is a terminal.
#[derive(Debug)]
pub(crate) struct Progress {
    what: &'static str,
    total: usize,
    start: Instant,
    shown: Option<Instant>,
    terminal: bool,
}

impl Progress {
    /// Of `total` tokens, none is done; 0 if nobody knows how many.
    pub(crate) fn new(what: &'static str, total: usize) -> Progress {
        let terminal = stderr().is_terminal();
        Progress { what, total, start: Instant::now(), shown: None, terminal }
    }

    /// So many are done.
    pub(crate) fn show(&mut self, done: usize) {
        let elapsed = self.start.elapsed();
        let due = self.shown.map_or(elapsed > WAIT, |shown| shown.elapsed() > EVERY);
        if !self.terminal || !due || done == 0 {
            return;
        }
        self.shown = Some(Instant::now());
        let rate = done as f64 / elapsed.as_secs_f64();
        let left = (self.total.saturating_sub(done)) as f64 / rate;
        let &mut Progress { what, total, .. } = self;
        let line = match total {
            0 => format!("{what} {done} tokens, {rate:.0} tok/s"),
            _ => format!("{what} {done} of {total} tokens, {rate:.0} tok/s, {left:.0} s left"),
        };
        let _ = write!(stderr().lock(), "\r{line}\x1b[K");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            let _ = write!(stderr().lock(), "\r\x1b[K");
        }
    }
}
