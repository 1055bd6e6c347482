//! Which scores exceed a number.

use super::tile::{KEY_TILE, KeyWords, PANEL, STEP, Steps};
use super::{Simd, dispatch};

dispatch! {
    /// One bit for each score of a tile that is greater than `least`, in the steps that were computed. NaN is not.
    pub(crate) fn above(scores: &[f32], least: f32, steps: Steps) -> KeyWords = above_kernel
}

#[inline(always)]
fn above_kernel<S: Simd>(s: S, scores: &[f32], least: f32, steps: Steps) -> KeyWords {
    assert!(scores.len() >= KEY_TILE);
    let (mut words, least) = (KeyWords::default(), s.splat(least));
    for (panel, (word, (first, end))) in words.iter_mut().zip(steps).enumerate() {
        for v in first * STEP / S::LANES..end * STEP / S::LANES {
            let lane = v * S::LANES;
            // SAFETY: steps lie within a panel's numbers, and panels within the tile.
            let x = unsafe { s.load(scores.as_ptr().add(panel * PANEL + lane)) };
            *word |= u64::from(s.above(x, least)) << lane;
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    #[test]
    fn bits_are_those_of_numbers() {
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0];
        let number = |j: usize| {
            if j.is_multiple_of(5) { odd[j / 5 % 6] } else { (j * 29 % 97) as f32 - 48.0 }
        };
        let scores: Vec<f32> = (0..KEY_TILE).map(number).collect();
        let steps: [Steps; 3] = [[(0, 4); 4], [(1, 3), (0, 0), (3, 4), (0, 1)], [(0, 0); 4]];
        for level in Level::available() {
            for least in [f32::NEG_INFINITY, -3.0, 0.0, 48.0, f32::INFINITY] {
                for steps in steps {
                    let got = above(level, &scores, least, steps);
                    for (j, &score) in scores.iter().enumerate() {
                        let (first, end) = steps[j / PANEL];
                        let computed = (first..end).contains(&(j % PANEL / STEP));
                        let bit = got[j / PANEL] >> (j % PANEL) & 1 == 1;
                        assert_eq!(bit, computed && score > least, "{level} {j} {score} {least}");
                    }
                }
            }
        }
    }
}
