//! Where parameters begin.

use foveal::random::{Random, mix};

/// How a tensor is filled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Initial {
    Constant(f32),
    /// Mean 0 and this deviation.
    Normal(f32),
    /// Between −x and x.
    Uniform(f32),
    /// Logarithms of what is uniform between two numbers.
    LogOfUniform(f32, f32),
    /// What softplus takes to numbers whose logarithms are uniform between those of two.
    SoftplusOfLogUniform(f32, f32),
}

impl Initial {
    /// Fills a tensor with numbers that depend on the seed and its name.
    pub(crate) fn fill(self, numbers: &mut [f32], seed: u64, name: &str) {
        let name = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut random = Random::new(mix(seed) ^ name);
        numbers.iter_mut().for_each(|x| *x = self.number(&mut random));
    }

    fn number(self, random: &mut Random) -> f32 {
        let between =
            |random: &mut Random, low: f64, high: f64| low + (high - low) * random.positive();
        match self {
            Initial::Constant(x) => x,
            Initial::Normal(deviation) => deviation * random.normal(),
            Initial::Uniform(x) => between(random, f64::from(-x), f64::from(x)) as f32,
            Initial::LogOfUniform(low, high) => {
                between(random, low.into(), high.into()).ln() as f32
            }
            Initial::SoftplusOfLogUniform(low, high) => {
                let step = between(random, f64::from(low).ln(), f64::from(high).ln()).exp();
                // ln(e^step − 1).
                (step + (-(-step).exp_m1()).ln()) as f32
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Initial;

    fn numbers(initial: Initial, seed: u64, name: &str) -> Vec<f32> {
        let mut numbers = vec![f32::NAN; 4000];
        initial.fill(&mut numbers, seed, name);
        numbers
    }

    #[test]
    fn numbers_are_spread_as_said_and_depend_on_seed_and_name_alone() {
        let normal = Initial::Normal(0.02);
        let x = numbers(normal, 1, "a");
        assert_eq!(x, numbers(normal, 1, "a"));
        assert_ne!(x, numbers(normal, 2, "a"));
        assert_ne!(x, numbers(normal, 1, "b"));
        let mean = |x: &[f32], f: fn(f64) -> f64| {
            x.iter().map(|&x| f(x.into())).sum::<f64>() / x.len() as f64
        };
        assert!(mean(&x, |x| x).abs() < 0.0015);
        assert!((mean(&x, |x| x * x).sqrt() - 0.02).abs() < 0.001);
        let softplus = |x: f32| f64::from(x).exp().ln_1p();
        let within = |initial, low: f64, high: f64, of: &dyn Fn(f32) -> f64| {
            let x = numbers(initial, 3, "c");
            let least = x.iter().map(|&x| of(x)).fold(f64::INFINITY, f64::min);
            let most = x.iter().map(|&x| of(x)).fold(f64::NEG_INFINITY, f64::max);
            let spread = 0.01 * (high - low);
            assert!(least >= low - 1e-6 && least < low + spread, "{initial:?}: {least}");
            assert!(most <= high + 1e-5 && most > high - spread, "{initial:?}: {most}");
        };
        within(Initial::Uniform(0.5), -0.5, 0.5, &f64::from);
        within(Initial::LogOfUniform(1.0, 16.0), 1.0, 16.0, &|x| f64::from(x).exp());
        let step = Initial::SoftplusOfLogUniform(0.001, 0.1);
        within(step, 0.001f64.ln(), 0.1f64.ln(), &|x| softplus(x).ln());
        assert_eq!(numbers(Initial::Constant(1.0), 0, ""), vec![1.0; 4000]);
    }
}
