use super::{Sampler, Sampling};
use crate::Error;
use foveal::random::Random;

const ALL: Sampling = Sampling {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repeat_penalty: 1.0,
    repeat_window: 64,
    seed: 0,
};

fn sampler(sampling: Sampling) -> Sampler {
    Sampler::new(sampling).unwrap()
}

/// Logits of probabilities.
fn logits(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

/// Which tokens can be drawn at all, found by drawing often.
fn drawn(sampling: Sampling, logits: &[f32]) -> Vec<u32> {
    let mut sampler = sampler(sampling);
    let mut seen = vec![false; logits.len()];
    for _ in 0..20_000 {
        seen[sampler.sample(logits).unwrap() as usize] = true;
    }
    (0..).zip(seen).filter(|(_, seen)| *seen).map(|(token, _)| token).collect()
}

fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| (random.unit() * 20.0 - 10.0) as f32).collect()
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let mut greedy = sampler(Sampling::greedy());
    assert_eq!(greedy.sample(&[0.0, 3.0, 3.0, 1.0]).unwrap(), 1);
    assert_eq!(greedy.sample(&[-0.0, 0.0]).unwrap(), 0);
    assert_eq!(greedy.sample(&[f32::NEG_INFINITY, -5.0]).unwrap(), 1);
}

#[test]
fn top_k_of_one_is_greedy() {
    let (mut one, mut greedy) =
        (sampler(Sampling { top_k: 1, temperature: 5.0, ..ALL }), sampler(Sampling::greedy()));
    for seed in 0..100 {
        let logits = noise(1000, seed);
        assert_eq!(one.sample(&logits).unwrap(), greedy.sample(&logits).unwrap());
    }
}

#[test]
fn the_pool_keeps_what_sorting_keeps() {
    use super::candidates::largest;
    for (keep, levels) in [(1, 3), (2, 2), (7, 50), (40, 1000), (999, 5), (1000, 9), (2000, 9)] {
        let logits: Vec<f32> =
            noise(1000, keep as u64).iter().map(|x| (x * levels as f32).round() + 0.0).collect();
        let mut expected: Vec<usize> = (0..1000).collect();
        expected.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        expected.truncate(keep);
        let mut found = Vec::new();
        largest(&logits, keep, &mut found).unwrap();
        let found: Vec<usize> = found.iter().map(|candidate| candidate.token as usize).collect();
        assert_eq!(found, expected, "keep {keep}");
    }
}

#[test]
fn draws_follow_the_softmax_exactly() {
    // Each token is drawn where the cumulative sum passes the random number.
    let weights = [0.5, 0.25, 0.125, 0.125];
    let mut random = Random::new(9);
    let mut sampler = sampler(Sampling { seed: 9, ..ALL });
    for _ in 0..1000 {
        let point = random.unit();
        let expected = match point {
            _ if point < 0.4999999 => Some(0),
            _ if point > 0.5000001 && point < 0.7499999 => Some(1),
            _ if point > 0.7500001 && point < 0.8749999 => Some(2),
            _ if point > 0.8750001 => Some(3),
            _ => None,
        };
        let found = sampler.sample(&logits(&weights)).unwrap();
        assert!(expected.is_none_or(|expected| expected == found), "{point}: {found}");
    }
}

#[test]
fn temperature_reshapes_the_draws() {
    // At temperature ½ the probabilities ¾ and ¼ become 9/10 and 1/10.
    let mut cold = sampler(Sampling { temperature: 0.5, seed: 3, ..ALL });
    let mut random = Random::new(3);
    for _ in 0..1000 {
        let point = random.unit();
        let found = cold.sample(&logits(&[0.75, 0.25])).unwrap();
        assert!((point - 0.9).abs() < 1e-6 || found == u32::from(point > 0.9));
    }
}

#[test]
fn top_p_keeps_the_fewest_that_reach_it() {
    let logits = logits(&[0.1, 0.5, 0.1, 0.3]);
    for (top_p, expected) in
        [(0.01, &[1][..]), (0.49, &[1]), (0.51, &[1, 3]), (0.79, &[1, 3]), (0.81, &[0, 1, 3])]
    {
        assert_eq!(drawn(Sampling { top_p, ..ALL }, &logits), expected, "top-p {top_p}");
    }
    assert_eq!(drawn(ALL, &logits), [0, 1, 2, 3]);
}

#[test]
fn min_p_is_relative_to_the_most_probable() {
    let logits = logits(&[0.1, 0.5, 0.15, 0.25]);
    for (min_p, expected) in
        [(0.19, &[0, 1, 2, 3][..]), (0.21, &[1, 2, 3]), (0.31, &[1, 3]), (0.51, &[1]), (0.99, &[1])]
    {
        assert_eq!(drawn(Sampling { min_p, ..ALL }, &logits), expected, "min-p {min_p}");
    }
}

#[test]
fn top_p_counts_the_probabilities_that_top_k_left() {
    // Of {½, ¼} after top-k the first alone has ⅔.
    let logits = logits(&[0.5, 0.25, 0.125, 0.125]);
    assert_eq!(drawn(Sampling { top_k: 2, top_p: 0.6, ..ALL }, &logits), [0]);
    assert_eq!(drawn(Sampling { top_k: 2, top_p: 0.7, ..ALL }, &logits), [0, 1]);
}

#[test]
fn the_penalty_divides_positive_logits_and_multiplies_others_once() {
    let mut greedy =
        sampler(Sampling { repeat_penalty: 2.0, repeat_window: 2, ..Sampling::greedy() });
    let logits = [3.0, 2.0, -1.0];
    assert_eq!(greedy.sample(&logits).unwrap(), 0);
    greedy.accept(0);
    greedy.accept(0);
    // 3 → 1.5, not 0.75.
    assert_eq!(greedy.sample(&logits).unwrap(), 1);
    assert_eq!(greedy.sample(&[3.0, 1.0, -1.0]).unwrap(), 0);
    greedy.accept(2);
    greedy.accept(2);
    // Out of the window of two: 0 is as it was; −1 → −2.
    assert_eq!(greedy.sample(&logits).unwrap(), 0);
    assert_eq!(greedy.sample(&[-1.5, -1.75, -1.0]).unwrap(), 0);
}

#[test]
fn tokens_outside_the_logits_have_no_penalty() {
    let mut greedy = sampler(Sampling { repeat_penalty: 2.0, ..Sampling::greedy() });
    greedy.accept(u32::MAX);
    assert_eq!(greedy.sample(&[1.0, 2.0]).unwrap(), 1);
}

#[test]
fn the_seed_alone_decides() {
    let logits = noise(500, 1);
    let draw = |seed| {
        let mut sampler = sampler(Sampling { seed, ..ALL });
        (0..50).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn logits_that_are_no_numbers_are_refused() {
    for (sampling, bad) in [(ALL, f32::NAN), (Sampling::greedy(), f32::NAN), (ALL, f32::INFINITY)] {
        let mut logits = vec![1.0; 100];
        logits[37] = bad;
        let error = sampler(sampling).sample(&logits).unwrap_err();
        assert!(matches!(error, Error::Logit { token: 37, .. }), "{error}");
    }
    for none in [&[][..], &[f32::NEG_INFINITY; 3]] {
        assert!(matches!(sampler(ALL).sample(none), Err(Error::NoCandidate)));
    }
}

#[test]
fn parameters_outside_their_ranges_are_refused() {
    for bad in [
        Sampling { temperature: -0.1, ..ALL },
        Sampling { temperature: f32::INFINITY, ..ALL },
        Sampling { temperature: f32::NAN, ..ALL },
        Sampling { top_p: 0.0, ..ALL },
        Sampling { top_p: 1.1, ..ALL },
        Sampling { min_p: 1.0, ..ALL },
        Sampling { min_p: -0.1, ..ALL },
        Sampling { repeat_penalty: 0.0, ..ALL },
        Sampling { repeat_penalty: f32::NAN, ..ALL },
    ] {
        assert!(matches!(Sampler::new(bad), Err(Error::Sampling { .. })), "{bad:?}");
    }
}
