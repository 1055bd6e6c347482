//! The learning rate of each step, as a share of the highest.
//!
//! ```text
//! warm-up      (s + 1) / w                                        s < w
//! cosine       f + (1 − f) ½ (1 + cos(π (s − w) / (n − w)))
//! WSD          1 until n − d, then 1 − (1 − f) (s − n + d) / d
//! constant     1
//! inverse_sqrt √(max(w, 1) / (s + 1))
//! ```
//!
//! s is the step, from 0; n all steps, w those of the warm-up, d those of the decay, f the last share.
//!
//! Loshchilov and Hutter, "SGDR", 2017 (cosine); Hu et al., "MiniCPM", 2024 (warm-up, stable, decay); Vaswani et al. 2017, §5.3 (inverse
//! root).

use super::config::{Kind, ScheduleSection};

/// The share of step `step`, counted from 0.
pub fn share(schedule: &ScheduleSection, step: u64) -> f64 {
    let steps = schedule.steps;
    let warmup = schedule.warmup.unwrap_or(steps / 20).min(steps);
    if step < warmup {
        return (step + 1) as f64 / warmup as f64;
    }
    let last = schedule.last;
    match schedule.kind {
        Kind::Constant => 1.0,
        Kind::InverseSqrt => (warmup.max(1) as f64 / (step + 1) as f64).sqrt(),
        Kind::Cosine => {
            let way = (step - warmup) as f64 / (steps - warmup).max(1) as f64;
            last + (1.0 - last) * 0.5 * (1.0 + (std::f64::consts::PI * way.min(1.0)).cos())
        }
        Kind::Wsd => {
            let decay = schedule.decay.unwrap_or(steps / 5).min(steps - warmup);
            let gone = (step + decay).saturating_sub(steps) as f64 / decay.max(1) as f64;
            1.0 - (1.0 - last) * gone.min(1.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(kind: Kind, steps: &[u64]) -> Vec<f64> {
        let (warmup, decay) = (Some(10), Some(20));
        let schedule = ScheduleSection { kind, steps: 110, warmup, decay, last: 0.1 };
        steps.iter().map(|&step| (share(&schedule, step) * 1e9).round() / 1e9).collect()
    }

    #[test]
    fn rates_rise_and_fall_where_they_should() {
        let steps = [0, 4, 9, 10, 60, 90, 100, 110, 1000];
        assert_eq!(shares(Kind::Constant, &steps), [0.1, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(shares(Kind::Wsd, &steps), [0.1, 0.5, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1, 0.1]);
        assert_eq!(shares(Kind::InverseSqrt, &[0, 9, 39, 89]), [0.1, 1.0, 0.5, 0.333_333_333]);
        let cosine = shares(Kind::Cosine, &steps);
        assert_eq!(cosine[..5], [0.1, 0.5, 1.0, 1.0, 0.55]);
        assert_eq!(cosine[7..], [0.1, 0.1]);
    }

    #[test]
    fn short_runs_have_rates_too() {
        for kind in [Kind::Constant, Kind::Cosine, Kind::Wsd] {
            for steps in 1..30 {
                let schedule = ScheduleSection { kind, steps, ..ScheduleSection::default() };
                let all: Vec<f64> = (0..steps).map(|step| share(&schedule, step)).collect();
                assert!(all.iter().all(|share| (0.1..=1.0).contains(share)), "{kind:?} {all:?}");
            }
        }
    }
}
