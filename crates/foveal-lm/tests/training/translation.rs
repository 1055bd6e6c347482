//! The encoder–decoder: gradients against differences, what may be seen, a task that is learned, and what is refused.

use foveal::{Cpu, Dropout};
use foveal_lm::Error;
use foveal_lm::train::{
    EncoderDecoder, EncoderDecoderConfig, IGNORED, Loss, NormPlace, Pairs, Parameters,
    PositionKind, Scratch, StepOptions,
};

use crate::mechanisms::Adam;
use crate::setup::{noise, text};

const CONFIG: EncoderDecoderConfig = EncoderDecoderConfig {
    vocab: 40,
    width: 16,
    inner: 20,
    heads: 2,
    layers: [2, 2],
    context: 12,
    norms: NormPlace::Post,
    positions: PositionKind::Sinusoidal,
};

fn configs() -> [EncoderDecoderConfig; 4] {
    let of = |norms, positions| EncoderDecoderConfig { norms, positions, ..CONFIG };
    [
        of(NormPlace::Post, PositionKind::Sinusoidal),
        of(NormPlace::Pre, PositionKind::Sinusoidal),
        of(NormPlace::Post, PositionKind::Learned),
        of(NormPlace::Pre, PositionKind::Learned),
    ]
}

struct Case {
    network: EncoderDecoder,
    parameters: Parameters,
    texts: [Vec<u32>; 3],
}

impl Case {
    fn new(config: EncoderDecoderConfig) -> Case {
        let network = EncoderDecoder::new(config).unwrap();
        let mut parameters = network.initial(3).unwrap();
        let mut noise = noise(2);
        // Large enough that attention is far from even, and every bias matters.
        parameters.values_mut().iter_mut().for_each(|x| *x += 0.25 * noise());
        let mut targets = text(2 * 7, 6);
        targets[4] = IGNORED;
        Case { network, parameters, texts: [text(2 * 9, 4), text(2 * 7, 5), targets] }
    }

    fn pairs(&self) -> Pairs<'_> {
        let [source, tokens, targets] = &self.texts;
        Pairs { sequences: 2, source, tokens, targets }
    }

    fn gradients(&self, values: &[f32], set: impl Fn(&mut StepOptions<'_>)) -> (Loss, Vec<f32>) {
        let mut scratch = Scratch::new();
        scratch.poison();
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        set(&mut options);
        let mut gradients = self.parameters.zeros();
        let loss = self.network.gradients(values, &self.pairs(), &mut gradients, &mut options);
        (loss.unwrap(), gradients)
    }
}

fn length(x: impl Iterator<Item = f32>) -> f64 {
    x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn gradients_agree_with_differences() {
    for config in configs() {
        let case = Case::new(config);
        let set = |options: &mut StepOptions<'_>| {
            options.smoothing = 0.1;
            options.dropout = Some(Dropout { rate: 0.1, seed: 9 });
        };
        let values = case.parameters.values();
        let (_, gradients) = case.gradients(values, set);
        let mut noise = noise(8);
        for entry in case.parameters.entries() {
            let own = &gradients[entry.range.clone()];
            let size = length(own.iter().copied());
            // A bias that all keys share moves no weight.
            if entry.name.ends_with("k_proj.bias") {
                assert!(size < 1e-5, "{config:?} {}: {size:e}", entry.name);
                continue;
            }
            assert!(size > 0.0, "{config:?}: {} has no gradient", entry.name);
            for random in [false, true, true] {
                let along: Vec<f32> =
                    own.iter().map(|&d| if random { noise().signum() } else { d }).collect();
                let norm = length(along.iter().copied());
                let mut moved = values.to_vec();
                let mut loss = |by: f64| {
                    let numbers =
                        moved[entry.range.clone()].iter_mut().zip(&values[entry.range.clone()]);
                    let by = (by * 0.004 / norm) as f32;
                    numbers.zip(&along).for_each(|((x, from), d)| *x = from + by * d);
                    case.gradients(&moved, set).0.mean()
                };
                let near = loss(1.0) - loss(-1.0);
                let slope = (8.0 * near - (loss(2.0) - loss(-2.0))) / (12.0 * 0.004);
                let pairs = own.iter().zip(&along);
                let got = pairs.map(|(d, x)| f64::from(*d) * f64::from(*x)).sum::<f64>() / norm;
                let error = (got - slope).abs() / size.max(1e-2);
                assert!(error < 0.01, "{config:?} {}: {got:e} for {slope:e}", entry.name);
            }
        }
    }
}

#[test]
fn the_decoder_sees_what_is_before_it_and_all_of_the_source() {
    for config in configs() {
        let mut case = Case::new(config);
        for (n, target) in case.texts[2].iter_mut().enumerate() {
            if n % 7 >= 3 {
                *target = IGNORED;
            }
        }
        let values = case.parameters.values().to_vec();
        let loss = |case: &Case| case.gradients(&values, |_| ()).0;
        let before = loss(&case);
        case.texts[1][5] = (case.texts[1][5] + 1) % 40;
        assert_eq!(loss(&case), before);
        case.texts[0][8] = (case.texts[0][8] + 1) % 40;
        let after = loss(&case);
        assert_ne!(after, before);
        case.texts[1][1] = (case.texts[1][1] + 1) % 40;
        assert_ne!(loss(&case), after);
    }
}

#[test]
fn reversing_is_learned_and_not_by_heart() {
    let config = EncoderDecoderConfig {
        vocab: 8,
        width: 32,
        inner: 64,
        heads: 2,
        layers: [1, 1],
        norms: NormPlace::Pre,
        ..CONFIG
    };
    let network = EncoderDecoder::new(config).unwrap();
    let mut parameters = network.initial(5).unwrap();
    let mut adam = Adam::new(parameters.values().len());
    let mut scratch = Scratch::new();
    // Token 0 begins; the rest is the source backwards.
    let batch = |seed: u64| {
        let source: Vec<u32> = text(32 * 6, seed).into_iter().map(|token| 1 + token % 7).collect();
        let targets: Vec<u32> =
            source.chunks(6).flat_map(|row| row.iter().rev()).copied().collect();
        let tokens: Vec<u32> = targets
            .chunks(6)
            .flat_map(|row| [0].into_iter().chain(row[..5].iter().copied()))
            .collect();
        [source, tokens, targets]
    };
    let mut loss = f64::INFINITY;
    for step in 0..1500 {
        let [source, tokens, targets] = &batch(1000 + step);
        let pairs = Pairs { sequences: 32, source, tokens, targets };
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        loss = network.loss(parameters.values(), &pairs, &mut options).unwrap().mean();
        if loss < 0.05 {
            break;
        }
        options.smoothing = 0.02;
        let mut gradients = parameters.zeros();
        network.gradients(parameters.values(), &pairs, &mut gradients, &mut options).unwrap();
        adam.step(&mut parameters, &gradients, 0.005);
    }
    assert!(loss < 0.05, "{loss}");
    // What it says by itself is what it was taught, and ends where its positions do: nobody has taught it an end.
    let [source, _, targets] = &batch(0);
    let right = source.chunks(6).zip(targets.chunks(6)).filter(|(source, target)| {
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        let said = network.greedy(parameters.values(), source, 0, &mut options).unwrap();
        assert!(said.len() <= config.context && !said.contains(&0));
        said.starts_with(target)
    });
    assert!(right.count() >= 28);
}

#[test]
fn what_does_not_fit_is_refused() {
    for wrong in [
        EncoderDecoderConfig { heads: 3, ..CONFIG },
        EncoderDecoderConfig { layers: [0, 1], ..CONFIG },
        EncoderDecoderConfig { vocab: 0, ..CONFIG },
    ] {
        assert!(matches!(EncoderDecoder::new(wrong), Err(Error::Config { .. })));
    }
    let case = Case::new(CONFIG);
    let mut scratch = Scratch::new();
    let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
    let values = case.parameters.values();
    let mut run = |source: &[u32], tokens: &[u32], targets: &[u32]| {
        let pairs = Pairs { sequences: 1, source, tokens, targets };
        case.network.loss(values, &pairs, &mut options)
    };
    assert!(matches!(run(&[40], &[1], &[1]), Err(Error::Token { found: 40, .. })));
    assert!(matches!(run(&[1], &[1], &[41]), Err(Error::Token { found: 41, .. })));
    assert!(matches!(run(&[1; 13], &[1], &[1]), Err(Error::Kernel(_))));
    assert!(matches!(run(&[1], &[1, 2], &[1]), Err(Error::Kernel(_))));
    assert_eq!(run(&[1], &[1], &[IGNORED]).unwrap().targets, 0);
    let say = |values: &[f32], source: &[u32], end| {
        let mut scratch = Scratch::new();
        let mut options = StepOptions::new(Cpu::detect().unwrap(), &mut scratch);
        case.network.greedy(values, source, end, &mut options)
    };
    assert!(matches!(say(values, &[40], 0), Err(Error::Token { found: 40, .. })));
    assert!(matches!(say(values, &[1], 40), Err(Error::Token { found: 40, .. })));
    assert!(matches!(say(values, &[1; 13], 0), Err(Error::Kernel(_))));
    assert!(matches!(say(&values[1..], &[1], 0), Err(Error::Kernel(_))));
    assert!(matches!(say(&vec![f32::NAN; values.len()], &[1], 0), Err(Error::NotFinite { .. })));
    let mut broken = values.to_vec();
    broken[case.parameters.entries()[0].range.clone()].fill(f32::NAN);
    let mut gradients = case.parameters.zeros();
    let loss = case.network.gradients(&broken, &case.pairs(), &mut gradients, &mut options);
    assert!(matches!(loss, Err(Error::NotFinite { .. })));
}
