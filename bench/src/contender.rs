//! What takes turns in a comparison, and how turns are taken.
//!
//! ```text
//! round 1: A B C    round 2: A B C    …
//! ```
//!
//! A round gives each contender as many executions as take the asked time, so that all of them meet
//! the same moments of a noisy machine. Ratios are taken within a round. A turn begins with an execution
//! that is not counted, unless one takes so long that what it finds in the caches does not matter.

use std::time::Instant;

/// Seconds of an execution that needs no other before it.
const LONG: f64 = 0.1;

/// What a contender does in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Executions that are timed.
    pub(crate) iterations: usize,
    /// Executions before them that are not.
    pub(crate) lead: usize,
}

/// One side of a comparison.
pub(crate) trait Contender {
    /// Its name in the report.
    fn name(&self) -> &'static str;

    /// A word about what it runs, for the record.
    fn note(&self) -> String {
        String::new()
    }

    /// The seconds that a turn's executions take.
    fn time(&mut self, turn: Turn) -> anyhow::Result<f64>;
}

/// A contender that runs in this process.
pub(crate) struct InProcess<'a> {
    name: &'static str,
    note: String,
    run: Box<dyn FnMut() -> anyhow::Result<()> + 'a>,
}

impl<'a> InProcess<'a> {
    pub(crate) fn new(
        name: &'static str,
        note: String,
        run: impl FnMut() -> anyhow::Result<()> + 'a,
    ) -> Self {
        InProcess { name, note, run: Box::new(run) }
    }
}

impl Contender for InProcess<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn note(&self) -> String {
        self.note.clone()
    }

    fn time(&mut self, turn: Turn) -> anyhow::Result<f64> {
        for _ in 0..turn.lead {
            (self.run)()?;
        }
        let start = Instant::now();
        for _ in 0..turn.iterations {
            (self.run)()?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    /// The least seconds of a contender's turn.
    pub(crate) turn: f64,
}

/// What a contender needed.
#[derive(Debug, Clone)]
pub(crate) struct Samples {
    pub(crate) name: String,
    pub(crate) note: String,
    pub(crate) iterations: usize,
    /// Seconds of one execution, a sample a round.
    pub(crate) seconds: Vec<f64>,
}

impl Samples {
    pub(crate) fn best(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    pub(crate) fn worst(&self) -> f64 {
        self.seconds.iter().copied().fold(0.0, f64::max)
    }

    pub(crate) fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// How many times longer than `ours` this one takes: of bests, and the median over rounds.
    pub(crate) fn ratios(&self, ours: &Samples) -> (f64, f64) {
        let pairs = self.seconds.iter().zip(&ours.seconds);
        let ratios: Vec<f64> = pairs.map(|(theirs, ours)| theirs / ours).collect();
        (self.best() / ours.best(), median(&ratios))
    }
}

pub(crate) fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// Lets contenders take turns; the first is ours.
pub(crate) fn compete(
    contenders: &mut [Box<dyn Contender + '_>],
    effort: Effort,
) -> anyhow::Result<Vec<Samples>> {
    let mut all = Vec::new();
    let mut turns = Vec::new();
    for contender in &mut *contenders {
        let turn = turn(contender.as_mut(), effort)?;
        turns.push(turn);
        all.push(Samples {
            name: contender.name().to_owned(),
            note: contender.note(),
            iterations: turn.iterations,
            seconds: Vec::new(),
        });
    }
    for _ in 0..effort.rounds {
        for ((contender, samples), &turn) in contenders.iter_mut().zip(&mut all).zip(&turns) {
            let seconds = contender.time(turn)?;
            samples.seconds.push(seconds / turn.iterations as f64);
        }
    }
    Ok(all)
}

/// How many executions fill a turn; one that is long is neither repeated nor preceded.
fn turn(contender: &mut dyn Contender, effort: Effort) -> anyhow::Result<Turn> {
    let mut turn = Turn { iterations: 1, lead: 0 };
    if contender.time(turn)? >= LONG.max(effort.turn) {
        return Ok(turn);
    }
    turn.lead = 1;
    loop {
        let seconds = contender.time(turn)?;
        if seconds >= effort.turn / 8.0 || turn.iterations >= 1 << 22 {
            let needed = (effort.turn / (seconds / turn.iterations as f64).max(1e-9)).ceil();
            turn.iterations = (needed as usize).clamp(1, 1 << 23);
            return Ok(turn);
        }
        turn.iterations *= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes so many seconds for an execution, by its own word.
    struct Slow(f64);

    impl Contender for Slow {
        fn name(&self) -> &'static str {
            "slow"
        }

        fn time(&mut self, turn: Turn) -> anyhow::Result<f64> {
            Ok(self.0 * turn.iterations as f64)
        }
    }

    #[test]
    fn turns_are_filled_and_long_executions_are_alone() {
        let effort = Effort { rounds: 7, turn: 0.01 };
        let of = |seconds| turn(&mut Slow(seconds), effort).unwrap();
        assert_eq!(of(0.25 * 0.01), Turn { iterations: 4, lead: 1 });
        assert_eq!(of(0.05), Turn { iterations: 1, lead: 1 });
        assert_eq!(of(0.15), Turn { iterations: 1, lead: 0 });
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let samples = |seconds: &[f64]| Samples {
            name: String::new(),
            note: String::new(),
            iterations: 1,
            seconds: seconds.to_vec(),
        };
        let (ours, theirs) = (samples(&[1.0, 2.0, 10.0]), samples(&[2.0, 4.0, 15.0]));
        assert_eq!(theirs.ratios(&ours), (2.0, 2.0));
        assert_eq!((ours.best(), ours.median(), ours.worst()), (1.0, 2.0, 10.0));
        assert_eq!(median(&[4.0, 1.0]), 2.5);
    }
}
