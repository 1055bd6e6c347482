//! What all processes do together, made of shifts.

use std::ops::Range;

use foveal::{Cpu, nn};

use crate::{Error, Processes, before};

/// Numbers that are added at a time.
const PIECE: usize = 1 << 16;

/// The bytes of all processes, in their order.
///
/// # Errors
/// Those of [`Processes::shift_bytes`].
pub fn all_gather(processes: &dyn Processes, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    let mut all = vec![vec![]; processes.count()];
    for by in 1..processes.count() {
        let mut len = [0; 8];
        processes.shift_bytes(by, &(own.len() as u64).to_le_bytes(), &mut len)?;
        let mut bytes = vec![0; u64::from_le_bytes(len) as usize];
        processes.shift_bytes(by, own, &mut bytes)?;
        all[before(processes, by)] = bytes;
    }
    all[processes.rank()] = own.to_vec();
    Ok(all)
}

/// The first process that has failed, with what it says: so that all stop where one does.
///
/// # Errors
/// Those of [`Processes::shift_bytes`].
pub fn first_failure(
    processes: &dyn Processes,
    own: Option<&str>,
) -> Result<Option<(usize, String)>, Error> {
    let message = own.map_or_else(Vec::new, |reason| format!("!{reason}").into_bytes());
    let all = all_gather(processes, &message)?;
    let failed = all.iter().enumerate().find(|(_, message)| !message.is_empty());
    Ok(failed.map(|(rank, message)| (rank, String::from_utf8_lossy(&message[1..]).into_owned())))
}

/// Whether all processes have the same for each of some things, `(what, value)`.
///
/// # Errors
/// [`Error::Differs`] with the first thing that another process has otherwise; those of [`Processes::shift_bytes`].
pub fn same_everywhere(processes: &dyn Processes, own: &[(&str, String)]) -> Result<(), Error> {
    let rows = own.iter().map(|(_, value)| value.replace('\n', " ")).collect::<Vec<_>>();
    let all = all_gather(processes, rows.join("\n").as_bytes())?;
    // The first process's word counts, so that all say the same.
    let text = |rank: usize| String::from_utf8_lossy(&all[rank]).into_owned();
    let first = text(0);
    for rank in 1..all.len() {
        let other = text(rank);
        let pairs = own.iter().zip(first.split('\n').zip(other.split('\n')));
        for ((what, _), (a, b)) in pairs {
            if a != b {
                let what = (*what).to_owned();
                let (own, other) = (a.to_owned(), b.to_owned());
                let (own, other, rank) = match processes.rank() == rank {
                    true => (other, own, 0),
                    false => (own, other, rank),
                };
                return Err(Error::Differs { what, rank, own, other });
            }
        }
    }
    Ok(())
}

/// The numbers that process `n` of `count` adds up.
fn slice(len: usize, n: usize, count: usize) -> Range<usize> {
    len * n / count..len * (n + 1) / count
}

/// Adds parts of the same length up, those of the first process first, and leaves the sum in the first part of every process.
/// All have as many parts.
///
/// The sum is one chain of additions in the order of the parts: its bits do not depend on the number of processes. Each sends
/// and receives about twice the length of a part, and allocates as much as one slice of all parts.
///
/// # Errors
/// Those of [`Processes::shift`]; [`Error::Kernel`] for parts of different lengths.
pub fn sum_parts(processes: &dyn Processes, parts: &mut [Vec<f32>], cpu: Cpu) -> Result<(), Error> {
    let (rank, count) = (processes.rank(), processes.count());
    let Some(len) = parts.first().map(Vec::len) else { return Ok(()) };
    let own = slice(len, rank, count);
    let mut received: Vec<Vec<Vec<f32>>> = vec![vec![]; count];
    for by in 1..count {
        let to = slice(len, (rank + by) % count, count);
        for part in &*parts {
            let mut numbers = vec![0.0; own.len()];
            processes.shift(by, &part[to.clone()], &mut numbers)?;
            received[before(processes, by)].push(numbers);
        }
    }
    received[rank] = parts.iter().map(|part| part[own.clone()].to_vec()).collect();
    let mut in_order = received.into_iter().flatten();
    let mut sum = in_order.next().unwrap_or_default();
    for part in in_order {
        let pieces = sum.chunks_mut(PIECE).zip(part.chunks(PIECE));
        cpu.for_each(pieces, |(sum, part)| {
            nn::add(sum, part, cpu.level).expect("slices of one length");
        });
    }
    for by in 1..count {
        let from = slice(len, before(processes, by), count);
        processes.shift(by, &sum, &mut parts[0][from])?;
    }
    parts[0][own].copy_from_slice(&sum);
    Ok(())
}
