//! The trainable layer of attention: finite differences of a definition in f64, bits that nothing may change, and what
//! is refused.

mod support;

use std::num::NonZeroUsize;

use foveal::cache::KvStore;
use foveal::position::{Rope, RopeConfig, RopeLayout, RopeScaling, Yarn};
use foveal::projection::Activations;
use foveal::reference::{self, Options};
use foveal::{Cpu, Level, Mask, Phase, Scale, Shape, Threads, Workspace};
use foveal_lm::Error;
use foveal_lm::mixer::{
    Affine, AttentionParameters, Inputs, MultiHeadAttention, Run, Source, StateGradient, Upstream,
};
use support::{Problem, Results, cpus, named, wide};

/// splitmix64, mapped to (-1, 1).
struct Random(u64);

impl Random {
    fn numbers(&mut self, count: usize) -> Vec<f32> {
        let mut number = || {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| number()).collect()
    }
}

/// Everything at once: groups, biases, norms, a partial rotation with an amplitude, sinks, a window.
fn everything(sequences: usize, seq: usize) -> Problem {
    let layer = MultiHeadAttention {
        width: 11,
        key_width: 11,
        value_width: 11,
        heads: 6,
        kv_heads: 2,
        head_dim: 7,
        scale: Scale::Value(0.7),
        softcap: Some(1.5),
        mask: Mask::window(4),
        reach: Some(4),
        norm_epsilon: 1e-3,
    };
    let scaling = RopeScaling::Yarn(Yarn::new(4.0, 16.0));
    let config =
        RopeConfig { rotary_dim: 6, scaling, ..RopeConfig::new(7, RopeLayout::Interleaved) };
    let rope = Some(Rope::new(config).unwrap());
    let positions = (0..sequences * seq).map(|n| n % seq + 100 * (n / seq)).collect();
    Problem { rope, positions, ..problem(layer, sequences, seq, true) }
}

/// Queries over another sequence, with rows of other widths.
fn across() -> Problem {
    let layer = MultiHeadAttention {
        width: 9,
        key_width: 5,
        value_width: 4,
        heads: 3,
        kv_heads: 3,
        head_dim: 4,
        scale: Scale::InverseSqrtDim,
        softcap: None,
        mask: Mask::full(),
        reach: None,
        norm_epsilon: 0.0,
    };
    let mut random = Random(9);
    let source = Some([random.numbers(2 * 6 * 5), random.numbers(2 * 6 * 4)]);
    Problem { source, ..problem(layer, 2, 3, false) }
}

fn problem(layer: MultiHeadAttention, sequences: usize, seq: usize, all: bool) -> Problem {
    let MultiHeadAttention { width, key_width, value_width, heads, kv_heads, head_dim, .. } = layer;
    let mut random = Random((sequences * 100 + seq) as u64);
    let mut affine = |rows: usize, width: usize| Affine {
        weight: random.numbers(rows * width),
        bias: Some(random.numbers(rows)),
    };
    let query = affine(heads * head_dim, width);
    let key = affine(kv_heads * head_dim, key_width);
    let value = affine(kv_heads * head_dim, value_width);
    let output = affine(width, heads * head_dim);
    let mut optional = |len| all.then(|| random.numbers(len));
    let (query_norm, key_norm, sinks) = (optional(head_dim), optional(head_dim), optional(heads));
    Problem {
        parameters: AttentionParameters { query, key, value, output, query_norm, key_norm, sinks },
        layer,
        sequences,
        x: random.numbers(sequences * seq * width),
        source: None,
        rope: None,
        positions: vec![],
        d_y: random.numbers(sequences * seq * width),
    }
}

/// The numbers of a problem in f64, as the definition takes them.
#[derive(Clone)]
struct Numbers {
    parameters: AttentionParameters<Vec<f64>>,
    x: Vec<f64>,
    source: Option<[Vec<f64>; 2]>,
}

impl Numbers {
    fn new(problem: &Problem) -> Numbers {
        Numbers {
            parameters: problem.parameters.as_slices().map(wide, wide),
            x: wide(&problem.x),
            source: problem.source.as_ref().map(|source| source.each_ref().map(|x| wide(x))),
        }
    }

    /// Every group of numbers, in the order of [`gradients`].
    fn groups(&mut self) -> Vec<&mut Vec<f64>> {
        let AttentionParameters { query, key, value, output, query_norm, key_norm, sinks } =
            &mut self.parameters;
        let optional = [
            &mut query.bias,
            &mut key.bias,
            &mut value.bias,
            &mut output.bias,
            query_norm,
            key_norm,
            sinks,
        ];
        let weights = [&mut query.weight, &mut key.weight, &mut value.weight, &mut output.weight];
        let parameters = weights.into_iter().chain(optional.into_iter().flatten());
        let source = self.source.iter_mut().flatten();
        parameters.chain([&mut self.x]).chain(source).collect()
    }
}

/// Σ d_y · y of a layer as it is defined.
fn loss(problem: &Problem, numbers: &Numbers) -> f64 {
    let Problem { layer, sequences, .. } = problem;
    let AttentionParameters { query, key, value, output, query_norm, key_norm, sinks } =
        &numbers.parameters;
    let (keys, values) = match &numbers.source {
        Some([keys, values]) => (keys, values),
        None => (&numbers.x, &numbers.x),
    };
    let head = |x: &[f64], affine, width, norm: &Option<Vec<f64>>| {
        let mut heads = project(x, affine, width);
        normalize(&mut heads, norm.as_deref(), f64::from(layer.norm_epsilon));
        heads
    };
    let mut q = head(&numbers.x, query, layer.width, query_norm);
    let mut k = head(keys, key, layer.key_width, key_norm);
    let v = head(values, value, layer.value_width, &None);
    if let Some(rope) = &problem.rope {
        rotate(&mut q, layer.heads * layer.head_dim, problem, rope);
        rotate(&mut k, layer.kv_heads * layer.head_dim, problem, rope);
    }
    let input = |data: &Vec<f64>, heads: usize| -> Shape {
        let (batch, dim) = (*sequences, layer.head_dim);
        Shape { batch, seq: data.len() / (batch * heads * dim), heads, dim }
    };
    let (q_shape, kv_shape) = (input(&q, layer.heads), input(&k, layer.kv_heads));
    let scale = match layer.scale {
        Scale::Value(scale) => scale.into(),
        _ => 1.0 / (layer.head_dim as f64).sqrt(),
    };
    let softcap = layer.softcap.map(f64::from);
    let options = Options { sinks: sinks.as_deref(), softcap, ..Options::new(scale, &layer.mask) };
    let inputs = [(&q, q_shape), (&k, kv_shape), (&v, kv_shape)]
        .map(|(data, shape)| reference::Input { data, shape });
    let mixed = reference::attention_with(inputs, &options).unwrap().out;
    let y = project(&mixed, output, layer.heads * layer.head_dim);
    y.iter().zip(&problem.d_y).map(|(y, &d)| y * f64::from(d)).sum()
}

fn project(x: &[f64], affine: &Affine<Vec<f64>>, width: usize) -> Vec<f64> {
    let rows = x.chunks(width).flat_map(|x| {
        affine.weight.chunks(width).enumerate().map(move |(n, w)| {
            let product: f64 = w.iter().zip(x).map(|(w, x)| w * x).sum();
            product + affine.bias.as_ref().map_or(0.0, |bias| bias[n])
        })
    });
    rows.collect()
}

fn normalize(heads: &mut [f64], weight: Option<&[f64]>, epsilon: f64) {
    let Some(weight) = weight else { return };
    for head in heads.chunks_mut(weight.len()) {
        let square = head.iter().map(|x| x * x).sum::<f64>() / head.len() as f64;
        for (x, w) in head.iter_mut().zip(weight) {
            *x *= w / (square + epsilon).sqrt();
        }
    }
}

fn rotate(heads: &mut [f64], token: usize, problem: &Problem, rope: &Rope) {
    for (token, &position) in heads.chunks_mut(token).zip(&problem.positions) {
        for head in token.chunks_mut(problem.layer.head_dim) {
            for (pair, (cos, sin)) in head.chunks_exact_mut(2).zip(rope.cos_sin(position)) {
                let (a, b) = (pair[0], pair[1]);
                (pair[0], pair[1]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
}

/// Every gradient with its name, in the order of [`Numbers::groups`].
fn gradients(results: &Results) -> Vec<(&'static str, &[f32])> {
    let mut all = named(&results.gradients);
    all.push(("x", &results.d_x));
    if let Some([keys, values]) = &results.d_source {
        all.extend([("keys", &keys[..]), ("values", &values[..])]);
    }
    all
}

#[test]
fn gradients_are_the_slopes_of_the_definition() {
    const STEP: f64 = 1e-5;
    for problem in [everything(2, 6), across()] {
        let mut numbers = Numbers::new(&problem);
        let results: Vec<_> = cpus().map(|cpu| problem.run(&[problem.tokens()], cpu)).collect();
        for group in 0..numbers.groups().len() {
            for n in 0..numbers.groups()[group].len() {
                let mut at = |step: f64| {
                    let before = numbers.groups()[group][n];
                    numbers.groups()[group][n] += step;
                    let loss = loss(&problem, &numbers);
                    numbers.groups()[group][n] = before;
                    loss
                };
                let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                for results in &results {
                    let (name, gradient) = gradients(results)[group];
                    let largest = gradient.iter().fold(1.0, |most: f32, x| most.max(x.abs()));
                    let error = (f64::from(gradient[n]) - slope).abs();
                    let bound = 5e-6 * f64::from(largest);
                    assert!(error < bound, "{name}[{n}]: {}, slope {slope}", gradient[n]);
                }
            }
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn threads_change_no_bit() {
    let problem = everything(3, 70);
    for level in Level::available() {
        let run = |threads| {
            let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
            let results = problem.run(&[50, 20], Cpu { level, threads });
            let gradients = gradients(&results);
            let all = gradients.into_iter().map(|(_, x)| x).chain([&results.y[..]]);
            all.map(bits).collect::<Vec<_>>()
        };
        let one = run(1);
        assert!(one == run(2), "{level} 2 threads");
        assert!(one == run(3), "{level} 3 threads");
    }
}

#[test]
fn results_of_calls_are_those_of_one_call() {
    // Longer than a tile and a half, so that states give up what their window has left behind.
    let problem = everything(2, 600);
    for cpu in cpus() {
        let whole = problem.run(&[600], cpu);
        let calls = problem.run(&[1, 299, 150, 6, 144], cpu);
        assert!(bits(&whole.y) == bits(&calls.y), "{} y", cpu.level);
        let largest = |x: &[f32]| x.iter().fold(1.0, |most: f32, x| most.max(x.abs()));
        for ((name, a), (_, b)) in gradients(&whole).into_iter().zip(gradients(&calls)) {
            let bound = 1e-5 * largest(a);
            for (n, (a, b)) in a.iter().zip(b).enumerate() {
                assert!((a - b).abs() <= bound, "{} {name}[{n}]: {a} and {b}", cpu.level);
            }
        }
        assert_eq!((whole.states[0].start(), calls.states[0].start()), (0, 256));
    }
}

#[test]
fn sequences_change_no_bit_of_each_other() {
    let both = everything(2, 9);
    for cpu in cpus() {
        let together = both.run(&[9], cpu);
        for n in 0..2 {
            let part = |x: &[f32]| x[n * x.len() / 2..(n + 1) * x.len() / 2].to_vec();
            let alone = Problem {
                parameters: both.parameters.clone(),
                sequences: 1,
                x: part(&both.x),
                d_y: part(&both.d_y),
                positions: both.positions[n * 9..(n + 1) * 9].to_vec(),
                ..everything(1, 9)
            };
            let alone = alone.run(&[9], cpu);
            assert_eq!(bits(&alone.y), bits(&part(&together.y)), "{}", cpu.level);
            assert_eq!(bits(&alone.d_x), bits(&part(&together.d_x)), "{}", cpu.level);
        }
    }
}

#[test]
fn generated_tokens_can_be_trained_on_too() {
    let problem = everything(2, 6);
    for cpu in cpus() {
        let expected = problem.run(&[6], cpu);
        let mut workspace = Workspace::new();
        let mut run = Run {
            cpu,
            phase: Phase::Generated,
            activations: Activations::F32,
            workspace: &mut workspace,
        };
        let mut states = [problem.layer.state().unwrap(), problem.layer.state().unwrap()];
        let (y, saved) = problem.forward(&(0..6), &mut states, &mut run).unwrap();
        let upstream = Upstream { d_y: &problem.d_y, d_state: None };
        let mut gradients = problem.parameters.zeros();
        let parameters = problem.parameters.as_slices();
        let places = &mut gradients.as_slices_mut();
        let before =
            problem.layer.backward(&parameters, &saved, upstream, places, &mut run).unwrap();
        for (a, b) in [(&y, &expected.y), (&before.d_x, &expected.d_x)] {
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4), "{}", cpu.level);
        }
    }
}

#[test]
fn no_tokens_and_no_sequences_are_calls_too() {
    for cpu in cpus() {
        for (sequences, lengths) in [(2, vec![0]), (2, vec![0, 3, 0]), (1, vec![1])] {
            let seq = lengths.iter().sum();
            let results = everything(sequences, seq).run(&lengths, cpu);
            assert!(gradients(&results).iter().all(|(_, x)| x.iter().all(|x| x.is_finite())));
        }
        let problem = everything(1, 1);
        let mut workspace = Workspace::new();
        let mut run = Run {
            cpu,
            phase: Phase::Prompt,
            activations: Activations::F32,
            workspace: &mut workspace,
        };
        let parameters = problem.parameters.as_slices();
        let inputs = Inputs::default();
        let (y, saved) = problem.layer.forward(&parameters, inputs, &mut [], &mut run).unwrap();
        let upstream = Upstream { d_y: &y, d_state: None };
        let mut gradients = problem.parameters.zeros();
        let places = &mut gradients.as_slices_mut();
        problem.layer.backward(&parameters, &saved, upstream, places, &mut run).unwrap();
        assert!(named(&gradients).iter().all(|(_, x)| x.iter().all(|&x| x == 0.0)));
    }
}

/// Takes the state of an encoder once, and then only reads it.
#[test]
fn queries_may_see_what_the_states_hold_already() {
    let problem = across();
    let cpu = cpus().last().unwrap();
    let mut workspace = Workspace::new();
    let mut run =
        Run { cpu, phase: Phase::Prompt, activations: Activations::F32, workspace: &mut workspace };
    let mut states = [problem.layer.state().unwrap(), problem.layer.state().unwrap()];
    let (expected, saved) = problem.forward(&(0..3), &mut states, &mut run).unwrap();
    let parameters = problem.parameters.as_slices();
    let source = Source::Other { keys: &[], values: &[] };
    let inputs = Inputs { x: &problem.x, source, rotation: None };
    let (y, again) = problem.layer.forward(&parameters, inputs, &mut states, &mut run).unwrap();
    assert_eq!(bits(&y), bits(&expected));
    // What comes back to the states is what their own call takes on.
    let mut both = problem.parameters.zeros();
    let upstream = Upstream { d_y: &problem.d_y, d_state: None };
    let places = &mut both.as_slices_mut();
    let d_state =
        problem.layer.backward(&parameters, &again, upstream, places, &mut run).unwrap().d_state;
    assert_eq!(d_state.keys.len(), 2 * 6 * 3 * 4);
    let nothing = vec![0.0; problem.d_y.len()];
    let upstream = Upstream { d_y: &nothing, d_state: Some(&d_state) };
    problem.layer.backward(&parameters, &saved, upstream, places, &mut run).unwrap();
    let expected = problem.run(&[3], cpu);
    for ((name, a), (_, b)) in named(&both).into_iter().zip(named(&expected.gradients)) {
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5), "{name}");
    }
}

#[test]
fn gradients_that_are_left_out_change_no_other() {
    let problem = everything(2, 6);
    let cpu = cpus().last().unwrap();
    let expected = problem.run(&[6], cpu);
    let mut workspace = Workspace::new();
    let mut run =
        Run { cpu, phase: Phase::Prompt, activations: Activations::F32, workspace: &mut workspace };
    let mut states = [problem.layer.state().unwrap(), problem.layer.state().unwrap()];
    let (_, saved) = problem.forward(&(0..6), &mut states, &mut run).unwrap();
    let mut gradients = problem.parameters.zeros();
    let [query, key, value, output] =
        [&mut gradients.query, &mut gradients.key, &mut gradients.value, &mut gradients.output]
            .map(|affine| Affine { weight: &mut affine.weight[..], bias: None });
    let (query_norm, key_norm, sinks) = (None, None, None);
    let mut places = AttentionParameters { query, key, value, output, query_norm, key_norm, sinks };
    let upstream = Upstream { d_y: &problem.d_y, d_state: None };
    let parameters = problem.parameters.as_slices();
    let before =
        problem.layer.backward(&parameters, &saved, upstream, &mut places, &mut run).unwrap();
    assert_eq!(bits(&before.d_x), bits(&expected.d_x));
    for (name, gradient) in named(&gradients) {
        if name.ends_with("weight") {
            let all = named(&expected.gradients);
            let (_, expected) = all.iter().find(|(other, _)| *other == name).unwrap();
            assert_eq!(bits(gradient), bits(expected), "{name}");
        } else {
            assert!(gradient.iter().all(|&x| x == 0.0), "{name}");
        }
    }
}

/// The message of a refusal by a kernel's check.
fn refused<T>(result: Result<T, Error>) -> String {
    let Err(error @ Error::Kernel(_)) = result else { panic!("not refused by a kernel") };
    error.to_string()
}

#[test]
fn inputs_and_parameters_that_do_not_fit_are_refused() {
    let cpu = cpus().last().unwrap();
    let run = |change: &dyn Fn(&mut Problem), states: usize| {
        let mut problem = everything(2, 4);
        change(&mut problem);
        let mut workspace = Workspace::new();
        let mut run = Run {
            cpu,
            phase: Phase::Prompt,
            activations: Activations::F32,
            workspace: &mut workspace,
        };
        let mut states: Vec<_> = (0..states).map(|_| problem.layer.state().unwrap()).collect();
        let table = problem.rope.as_ref().map(|rope| rope.table(0..4).unwrap());
        let source = match &problem.source {
            Some([keys, values]) => Source::Other { keys, values },
            None => Source::Own,
        };
        let inputs = Inputs { x: &problem.x, source, rotation: table.as_ref() };
        let parameters = problem.parameters.as_slices();
        let result = problem.layer.forward(&parameters, inputs, &mut states, &mut run);
        assert!(result.is_ok() || states.iter().all(|state| state.end() == 0), "states moved");
        result
    };
    assert!(run(&|_| {}, 2).is_ok());
    assert!(refused(run(&|_| {}, 3)).contains("expected a length of"));
    assert!(refused(run(&|p| p.x.truncate(87), 2)).contains("got 87"));
    assert!(refused(run(&|p| p.parameters.query.weight.truncate(9), 2)).contains("got 36"));
    let bias = |p: &mut Problem| p.parameters.value.bias.as_mut().unwrap().truncate(13);
    assert!(refused(run(&bias, 2)).contains("bias of values: expected a length of 14, got 13"));
    let norm = |p: &mut Problem| p.parameters.query_norm = Some(vec![1.0; 8]);
    assert!(refused(run(&norm, 2)).contains("norm of queries"));
    let sinks = |p: &mut Problem| p.parameters.sinks = Some(vec![1.0; 5]);
    assert!(refused(run(&sinks, 2)).contains("sinks"));
    assert!(
        refused(run(&|p| p.source = Some([vec![0.0; 88], vec![0.0; 66]]), 2)).contains("values")
    );
    let rope = Rope::new(RopeConfig::new(8, RopeLayout::HalfSplit)).unwrap();
    assert!(refused(run(&|p| p.rope = Some(rope.clone()), 2)).contains("RoPE"));
}

#[test]
fn gradients_that_do_not_fit_are_refused_and_nothing_is_added() {
    let cpu = cpus().last().unwrap();
    let problem = everything(2, 4);
    let mut workspace = Workspace::new();
    let mut run =
        Run { cpu, phase: Phase::Prompt, activations: Activations::F32, workspace: &mut workspace };
    let mut states = [problem.layer.state().unwrap(), problem.layer.state().unwrap()];
    let (_, saved) = problem.forward(&(0..4), &mut states, &mut run).unwrap();
    type Places = AttentionParameters<Vec<f32>>;
    let mut backward = |d_y: &[f32],
                        d_state: Option<&StateGradient>,
                        change: &dyn Fn(&mut Places)| {
        let mut gradients = problem.parameters.zeros();
        change(&mut gradients);
        let upstream = Upstream { d_y, d_state };
        let parameters = problem.parameters.as_slices();
        let places = &mut gradients.as_slices_mut();
        let result = problem.layer.backward(&parameters, &saved, upstream, places, &mut run);
        let message = refused(result.map(|_| ()));
        assert!(named(&gradients).iter().all(|(_, x)| x.iter().all(|&x| x == 0.0)), "{message}");
        message
    };
    let d_y = &problem.d_y;
    assert!(backward(&d_y[1..], None, &|_| {}).contains("expected a length of 88, got 87"));
    type Change<'a> = (&'a dyn Fn(&mut Places), &'a str);
    let changes: [Change<'_>; 5] = [
        (&|p| p.key.weight.truncate(3), "key weights"),
        (&|p| p.output.bias.as_mut().unwrap().truncate(3), "bias of results"),
        (&|p| p.key_norm = Some(vec![0.0; 6]), "norm of keys"),
        (&|p| p.sinks = Some(vec![]), "sinks"),
        (&|p| p.query.weight.push(0.0), "query weights"),
    ];
    for (change, what) in changes {
        let message = backward(d_y, None, change);
        assert!(message.contains(what), "{message}");
    }
    let short =
        StateGradient { start: 0, keys: vec![0.0; 2 * 3 * 14], values: vec![0.0; 2 * 4 * 14] };
    assert!(backward(d_y, Some(&short), &|_| {}).contains("keys of states"));
    let late = StateGradient { start: 9, keys: vec![0.0; 28], values: vec![0.0; 28] };
    assert!(backward(d_y, Some(&late), &|_| {}).contains("keys of states"));

    let mut plain = problem.parameters.clone();
    plain.query_norm = None;
    let mut gradients = plain.zeros();
    let upstream = Upstream { d_y, d_state: None };
    let places = &mut gradients.as_slices_mut();
    let result = problem.layer.backward(&plain.as_slices(), &saved, upstream, places, &mut run);
    assert!(refused(result).contains("before a norm"));
}

#[test]
fn sequences_of_different_lengths_cannot_be_kept_together() {
    let cpu = cpus().last().unwrap();
    let problem = everything(2, 4);
    let mut workspace = Workspace::new();
    let mut run =
        Run { cpu, phase: Phase::Prompt, activations: Activations::F32, workspace: &mut workspace };
    let mut states = [problem.layer.state().unwrap(), problem.layer.state().unwrap()];
    problem.forward(&(0..4), &mut states, &mut run).unwrap();
    states[1].clear();
    let message = refused(problem.forward(&(0..4), &mut states, &mut run));
    assert!(message.contains("every sequence of a batch"), "{message}");
    let other = MultiHeadAttention { head_dim: 8, ..problem.layer.clone() };
    let mut states = [problem.layer.state().unwrap(), other.state().unwrap()];
    let message = refused(problem.forward(&(0..4), &mut states, &mut run));
    assert!(message.contains("keys: expected a length of 7, got 8"), "{message}");
    assert_eq!(states[0].end(), 0, "states have not moved");
}
