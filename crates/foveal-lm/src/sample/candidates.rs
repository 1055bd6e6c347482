//! The tokens that are left over, the most probable first.

use std::cmp::Ordering;

use crate::Error;

/// A token with its logit and, once asked for, its probability among the candidates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) token: u32,
    pub(super) logit: f32,
    pub(super) probability: f64,
}

/// Descending by logit, ascending by token where logits are equal.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// Fills `out` with the `keep` largest logits above −∞, in order; all of them if `keep` is 0.
///
/// One pass that keeps a pool of at most `2 · keep`: when it is full its better half stays, and what is no better
/// than that half's last doesn't enter.
pub(super) fn largest(logits: &[f32], keep: usize, out: &mut Vec<Candidate>) -> Result<(), Error> {
    let keep = if keep == 0 { logits.len() } else { keep.min(logits.len()) };
    out.clear();
    let mut bar = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > bar && logit != f32::INFINITY {
            // −0 counts as 0, so that the order is that of the numbers.
            out.push(Candidate { token: token as u32, logit: logit + 0.0, probability: 0.0 });
            if out.len() == 2 * keep {
                out.select_nth_unstable_by(keep - 1, order);
                out.truncate(keep);
                bar = out[keep - 1].logit;
            }
        } else if logit.is_nan() || logit == f32::INFINITY {
            return Err(Error::Logit { token, found: logit });
        }
    }
    if out.is_empty() {
        return Err(Error::NoCandidate);
    }
    out.sort_unstable_by(order);
    out.truncate(keep);
    Ok(())
}

/// Gives each candidate, of which the first has the largest logit, its probability at a temperature above 0.
pub(super) fn probabilities(candidates: &mut [Candidate], temperature: f32) {
    let Some(first) = candidates.first() else { return };
    let largest = f64::from(first.logit);
    let mut sum = 0.0;
    for candidate in &mut *candidates {
        candidate.probability =
            exp((f64::from(candidate.logit) - largest) / f64::from(temperature));
        sum += candidate.probability;
    }
    candidates.iter_mut().for_each(|candidate| candidate.probability /= sum);
}

/// `exp(x)` for `x ≤ 0`, to within 2 ULP, and 0 below −700: additions and multiplications only, so that every machine
/// gives the same bits, which the system's mathematics library does not.
///
/// `x = n·ln 2 + r` with `|r| ≤ ln 2 / 2`; the Taylor sum to `r¹³/13!` leaves less than 2⁻⁵⁷.
pub(super) fn exp(x: f64) -> f64 {
    const LN_2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
    const LN_2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
    if x < -700.0 {
        return 0.0;
    }
    let n = (x * std::f64::consts::LOG2_E).round();
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let sum = (1..=13).rev().fold(1.0, |sum, i| 1.0 + sum * (r / f64::from(i)));
    // n ≥ −1010: the exponent stays that of a normal number.
    sum * f64::from_bits(((n as i64 + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_that_of_the_library_to_within_a_few_units() {
        for i in 0..70_000 {
            let x = f64::from(i) * -0.01;
            let (ours, theirs) = (exp(x), x.exp());
            assert!((ours - theirs).abs() <= theirs * 4.0 * f64::EPSILON, "exp({x}) = {ours}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-701.0), 0.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
    }
}
