//! The recurrent baseline: its loss against a definition in f64, its gradients against differences of that.

use foveal::Cpu;
use foveal_lm::train::{Batch, IGNORED, Lstm, LstmConfig, Scratch, StepOptions};

use crate::setup::noise;

const CONFIG: LstmConfig = LstmConfig { vocab: 11, width: 6, layers: 2 };
const SEQUENCES: usize = 3;
const TOKENS: usize = 5;

/// The mean loss, in f64, one token after the other, and the likeliest token at each target.
fn defined(values: &[f64], tokens: &[u32], targets: &[u32]) -> (f64, Vec<u32>) {
    let LstmConfig { vocab, width, layers } = CONFIG;
    let (table, rest) = values.split_at(vocab * width);
    let size = 4 * width * width;
    let (mut sum, mut count, mut best) = (0.0, 0, vec![]);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for (tokens, targets) in tokens.chunks(TOKENS).zip(targets.chunks(TOKENS)) {
        let mut states = vec![(vec![0.0; width], vec![0.0; width]); layers];
        for (&token, &target) in tokens.iter().zip(targets) {
            let mut x = table[token as usize * width..][..width].to_vec();
            for (n, (h, c)) in states.iter_mut().enumerate() {
                let own = &rest[n * (2 * size + 4 * width)..];
                let (w, u, b) = (&own[..size], &own[size..2 * size], &own[2 * size..]);
                let gate = |row: usize| {
                    let dot = |m: &[f64], x: &[f64]| -> f64 {
                        m[row * width..][..width].iter().zip(x).map(|(m, x)| m * x).sum()
                    };
                    dot(w, &x) + dot(u, h) + b[row]
                };
                let gates: Vec<f64> = (0..4 * width).map(gate).collect();
                for d in 0..width {
                    let [i, f, g, o] = [0, 1, 2, 3].map(|gate| gates[gate * width + d]);
                    c[d] = sigmoid(f + 1.0) * c[d] + sigmoid(i) * g.tanh();
                    h[d] = sigmoid(o) * c[d].tanh();
                }
                x.clone_from(h);
            }
            if target == IGNORED {
                continue;
            }
            let logit = |token: usize| -> f64 {
                table[token * width..][..width].iter().zip(&x).map(|(e, x)| e * x).sum()
            };
            let logits: Vec<f64> = (0..vocab).map(logit).collect();
            let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
            sum += total.ln() - logits[target as usize];
            count += 1;
            let likeliest = (0..vocab).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            best.push(likeliest as u32);
        }
    }
    (sum / f64::from(count), best)
}

fn case() -> (Vec<f32>, Vec<u32>, Vec<u32>) {
    let mut parameters = CONFIG.initial(5).unwrap();
    // Large enough that gates are bent.
    let mut noise = noise(3);
    parameters.values_mut().iter_mut().for_each(|x| *x = 2.0 * *x + 0.5 * noise());
    let mut text = |count: usize| -> Vec<u32> {
        (0..count).map(|_| ((noise() + 1.0) * 5.5) as u32 % 11).collect()
    };
    let (tokens, mut targets) = (text(SEQUENCES * TOKENS), text(SEQUENCES * TOKENS));
    targets.iter_mut().step_by(4).for_each(|target| *target = IGNORED);
    (parameters.values().to_vec(), tokens, targets)
}

#[test]
fn loss_and_gradients_are_those_of_the_definition() {
    let (values, tokens, targets) = case();
    let lstm = Lstm::new(CONFIG).unwrap();
    let batch = Batch { sequences: SEQUENCES, tokens: &tokens, targets: &targets };
    let mut scratch = Scratch::new();
    scratch.poison();
    let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
    let mut gradients = vec![0.0; values.len()];
    let loss = lstm.gradients(&values, &batch, &mut gradients, &mut options).unwrap();
    let wide: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
    let (expected, best) = defined(&wide, &tokens, &targets);
    assert!((loss.mean() - expected).abs() < 1e-5, "{} {expected}", loss.mean());
    assert_eq!(lstm.loss(&values, &batch, &mut options).unwrap(), loss);
    assert_eq!(lstm.likeliest(&values, &batch, &mut options).unwrap(), best);
    for n in 0..values.len() {
        let mut moved = wide.clone();
        let mut at = |by: f64| {
            moved[n] = wide[n] + by;
            defined(&moved, &tokens, &targets).0
        };
        let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
        let found = f64::from(gradients[n]);
        assert!((found - slope).abs() < 1e-5 + 1e-4 * slope.abs(), "{n}: {found} {slope}");
    }
}

#[test]
fn later_tokens_change_nothing_before_them_and_others_of_the_batch_nothing_at_all() {
    let (values, tokens, targets) = case();
    let lstm = Lstm::new(CONFIG).unwrap();
    let mut scratch = Scratch::new();
    let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
    let mut loss = |sequences: usize, tokens: &[u32], targets: &[u32]| {
        let batch = Batch { sequences, tokens, targets };
        lstm.loss(&values, &batch, &mut options).unwrap().sum
    };
    let alone: f64 =
        tokens.chunks(TOKENS).zip(targets.chunks(TOKENS)).map(|(a, b)| loss(1, a, b)).sum();
    assert!((alone - loss(SEQUENCES, &tokens, &targets)).abs() < 1e-6);
    let (mut other, mut early) = (tokens[..TOKENS].to_vec(), targets[..TOKENS].to_vec());
    early[TOKENS - 1] = IGNORED;
    let before = loss(1, &other, &early);
    other[TOKENS - 1] = (other[TOKENS - 1] + 1) % 11;
    assert_eq!(loss(1, &other, &early).to_bits(), before.to_bits());
}

#[test]
fn sizes_and_tokens_that_do_not_fit_are_refused() {
    assert!(LstmConfig { width: 0, ..CONFIG }.initial(1).is_err());
    assert!(Lstm::new(LstmConfig { layers: 0, ..CONFIG }).is_err());
    let (values, mut tokens, targets) = case();
    let lstm = Lstm::new(CONFIG).unwrap();
    let mut scratch = Scratch::new();
    let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
    let batch = Batch { sequences: 4, tokens: &tokens, targets: &targets };
    assert!(lstm.loss(&values, &batch, &mut options).is_err());
    assert!(lstm.loss(&values[1..], &Batch { sequences: 3, ..batch }, &mut options).is_err());
    tokens[0] = 11;
    let batch = Batch { sequences: 3, tokens: &tokens, targets: &targets };
    assert!(lstm.loss(&values, &batch, &mut options).is_err());
}
