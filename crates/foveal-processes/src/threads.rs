//! Processes that are threads of one, with channels between them.

use std::sync::mpsc::{Receiver, Sender, channel};

use crate::{Error, Processes, before};

#[derive(Debug)]
enum Message {
    Numbers(Vec<f32>),
    Bytes(Vec<u8>),
}

/// One of several threads that work as processes do.
///
/// ```
/// use foveal_processes::{Processes, Threads, all_gather};
/// let all = Threads::run(3, |processes| {
///     let own = [processes.rank() as u8];
///     all_gather(&processes, &own)
/// });
/// assert_eq!(all[0].as_ref().unwrap(), &[[0], [1], [2]]);
/// ```
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    /// To each process.
    to: Vec<Sender<Message>>,
    /// From each process.
    from: Vec<Receiver<Message>>,
}

impl Threads {
    /// Runs `work` as so many processes; what each gives, in their order.
    ///
    /// # Panics
    /// If one of them does.
    pub fn run<T: Send>(count: usize, work: impl Fn(Threads) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let work = &work;
            let start = |processes| scope.spawn(move || work(processes));
            let started: Vec<_> = Threads::all(count).into_iter().map(start).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, T>| match thread.join() {
                Ok(result) => result,
                Err(fault) => std::panic::resume_unwind(fault),
            };
            started.into_iter().map(join).collect()
        })
    }

    /// So many processes, to be given a thread each.
    pub fn all(count: usize) -> Vec<Threads> {
        let mut all: Vec<Threads> =
            (0..count).map(|rank| Threads { rank, to: vec![], from: vec![] }).collect();
        for from in 0..count {
            for to in 0..count {
                let (sender, receiver) = channel();
                all[from].to.push(sender);
                all[to].from.push(receiver);
            }
        }
        all
    }

    fn exchange(&self, by: usize, message: Message) -> Result<(usize, Message), Error> {
        let to = (self.rank + by) % self.count();
        let from = before(self, by);
        self.to[to].send(message).map_err(|_| Error::Gone { rank: to })?;
        let message = self.from[from].recv().map_err(|_| Error::Gone { rank: from })?;
        Ok((from, message))
    }
}

fn copy<T: Copy>(rank: usize, got: &[T], into: &mut [T]) -> Result<(), Error> {
    Error::check_length(rank, into.len(), got.len())?;
    into.copy_from_slice(got);
    Ok(())
}

impl Processes for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.to.len()
    }

    fn shift(&self, by: usize, out: &[f32], into: &mut [f32]) -> Result<(), Error> {
        match self.exchange(by, Message::Numbers(out.to_vec()))? {
            (rank, Message::Numbers(got)) => copy(rank, &got, into),
            (rank, Message::Bytes(_)) => Error::check_length(rank, into.len(), 0),
        }
    }

    fn shift_bytes(&self, by: usize, out: &[u8], into: &mut [u8]) -> Result<(), Error> {
        match self.exchange(by, Message::Bytes(out.to_vec()))? {
            (rank, Message::Bytes(got)) => copy(rank, &got, into),
            (rank, Message::Numbers(_)) => Error::check_length(rank, into.len(), 0),
        }
    }
}
