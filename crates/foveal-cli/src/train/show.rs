//! A run as people like to watch it: a line that is written anew on a terminal, plain lines in a log.

use std::io::{IsTerminal, Write, stderr};
use std::path::Path;
use std::time::{Duration, Instant};

use foveal_lm::train::{End, Evaluation, Event, Step, Trainer};

use crate::{numbers, output};

/// How often the line changes.
const EVERY: Duration = Duration::from_millis(100);
/// Lines of a log, about.
const LINES: u64 = 50;
/// Cells of the bar, and of the small curve: the line has to fit into 80 columns.
const CELLS: usize = 9;
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// What is shown.
#[derive(Debug)]
pub(super) struct Show {
    terminal: bool,
    shown: Option<Instant>,
    first: u64,
    steps: u64,
    /// A mean of the last losses, and its course.
    smooth: Option<f64>,
    course: Vec<f64>,
    /// Tokens and seconds of the newest steps.
    pace: (f64, f64),
    best: Option<Evaluation>,
}

impl Show {
    pub(super) fn new(trainer: &Trainer) -> Show {
        let (config, state) = (trainer.config(), trainer.state());
        let count = trainer.parameters().values().len();
        let text = format!(
            "{count} parameters, {} a step, {} steps",
            match (config.data.batch * config.train.accumulate, config.has_pairs()) {
                (pairs, true) => format!("{pairs} pairs"),
                (sequences, false) => format!("{} tokens", config.data.sequence * sequences),
            },
            config.schedule.steps,
        );
        output::note(&match state.step {
            0 => text,
            step => format!("{text}, {step} of them done"),
        });
        Show {
            terminal: stderr().is_terminal(),
            shown: None,
            first: state.step,
            steps: config.schedule.steps,
            smooth: None,
            course: vec![],
            pace: (0.0, 0.0),
            best: None,
        }
    }

    pub(super) fn event(&mut self, trainer: &Trainer, event: &Event<'_>) {
        match event {
            Event::Step(step) => self.step(step),
            Event::Evaluated(evaluation) => {
                if evaluation.best {
                    self.best = Some(**evaluation);
                }
                let mark = if evaluation.best { ", the best so far" } else { "" };
                let Evaluation { step, loss, .. } = evaluation;
                let perplexity = loss.exp();
                self.note(&format!(
                    "step {step}: validation {loss:.4} nats a token, perplexity {perplexity:.2}{mark}"
                ));
            }
            Event::Sample(text) => {
                let step = trainer.state().step;
                self.note(&format!("step {step}: {}", output::one_line(text)));
            }
            _ => {}
        }
    }

    fn step(&mut self, step: &Step) {
        let smooth = self.smooth.map_or(step.loss, |smooth| 0.95 * smooth + 0.05 * step.loss);
        self.smooth = Some(smooth);
        self.course.push(smooth);
        self.pace.0 = 0.9 * self.pace.0 + step.tokens as f64;
        self.pace.1 = 0.9 * self.pace.1 + step.seconds;
        let rate = self.pace.0 / self.pace.1.max(1e-9);
        let left = (self.steps.saturating_sub(step.step)) as f64 * step.seconds;
        let memory = numbers::resident_bytes().map(|bytes| format!(" {}", numbers::bytes(bytes)));
        let memory = memory.unwrap_or_default();
        if self.terminal {
            if self.shown.is_some_and(|shown| shown.elapsed() < EVERY) {
                return;
            }
            self.shown = Some(Instant::now());
            let line = format!(
                "{}/{} {} {smooth:.4} {} {} {} left{memory}",
                step.step,
                self.steps,
                bar(step.step, self.steps),
                curve(&self.course),
                pace(rate),
                time(left),
            );
            let _ = write!(stderr().lock(), "\r{line}\x1b[K");
            return;
        }
        let every = self.steps.div_ceil(LINES);
        if step.step.is_multiple_of(every) || step.step == self.first + 1 || step.step == self.steps
        {
            output::note(&format!(
                "step {}/{}  loss {:.4}  gradient {:.3}  rate {:.2e}  {}  {} left {memory}",
                step.step,
                self.steps,
                step.loss,
                step.gradient,
                step.learning_rate,
                pace(rate),
                time(left),
            ));
        }
    }

    /// A line that stays.
    fn note(&mut self, line: &str) {
        self.clear();
        output::note(line);
    }

    /// Takes the changing line away.
    pub(super) fn clear(&mut self) {
        if self.shown.take().is_some() {
            let _ = write!(stderr().lock(), "\r\x1b[K");
        }
    }

    pub(super) fn end(&self, trainer: &Trainer, end: End, folder: &Path) {
        let state = trainer.state();
        let folder = folder.display();
        output::note(&match end {
            End::Interrupted => format!(
                "interrupted after step {}; go on with: foveal train --resume {folder}",
                state.step
            ),
            End::Stale => format!(
                "stopped after step {}: no better evaluation since step {}, whose model is kept",
                state.step,
                state.best_step().unwrap_or(0)
            ),
            _ => {
                format!("{} steps, {} tokens in {}", state.step, state.tokens, time(state.seconds))
            }
        });
        if end != End::Interrupted {
            output::note(&format!(
                "the model is in {folder}, the curves are in {folder}/report.html"
            ));
        }
    }
}

fn bar(done: u64, all: u64) -> String {
    let filled = (done as f64 / all.max(1) as f64 * CELLS as f64) as usize;
    let (filled, rest) = ("█".repeat(filled.min(CELLS)), CELLS - filled.min(CELLS));
    format!("▕{filled}{}▏", " ".repeat(rest))
}

/// The course of the loss, in so many characters.
fn curve(course: &[f64]) -> String {
    let size = course.len().div_ceil(CELLS).max(1);
    let means: Vec<f64> =
        course.chunks(size).map(|part| part.iter().sum::<f64>() / part.len() as f64).collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let height = |mean: f64| ((mean - low) / (high - low).max(1e-12) * 7.0).round() as usize;
    means.iter().map(|&mean| BLOCKS[height(mean).min(7)]).collect()
}

fn pace(rate: f64) -> String {
    if rate < 10_000.0 {
        format!("{rate:.0} tok/s")
    } else {
        format!("{:.1}k tok/s", rate / 1000.0)
    }
}

fn time(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{}:{:02} min", seconds / 60, seconds % 60),
        _ => format!("{}:{:02} h", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_fall_as_losses_do() {
        assert_eq!(curve(&[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), "█▇▆▅▄▃▂▁");
        assert_eq!(curve(&[1.0, 1.0]), "▁▁");
        assert_eq!(curve(&[]), "");
        assert_eq!(curve(&vec![0.0; 1000]).chars().count(), CELLS);
        assert_eq!(bar(1, 2).chars().filter(|&c| c == '█').count(), CELLS / 2);
        assert_eq!(bar(9, 2).chars().count(), CELLS + 2);
        assert_eq!(
            (time(59.4), time(61.0), time(3700.0)),
            ("59 s".into(), "1:01 min".into(), "1:01 h".into())
        );
    }
}
