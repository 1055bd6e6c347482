//! Recurrences against golden vectors: outputs, states and gradients, on every level and by the definition in f64.

mod support;

use foveal::linear::reference::{Sequences, States, forward, forward_bidirectional};
use foveal::linear::{
    AnyOrder, Delta, Efficient, Gradients, Linear, Recurrence, Recurrent, Results, Retention,
    ScalarDecay, State, StateShape, Tokens, Upstream, VectorDecay,
};
use foveal::reference::Input;
use foveal::{Scale, Shape, Tensor, Workspace};
use support::cpus;
use support::golden::{Array, Case, cases};

/// `[batch, seq, heads, dim]`, where the last axis may be missing.
fn shape(array: &Array) -> Shape {
    match array.shape[..] {
        [batch, seq, heads, dim] => Shape { batch, seq, heads, dim },
        [batch, seq, heads] => Shape { batch, seq, heads, dim: 1 },
        ref other => panic!("no tokens: {other:?}"),
    }
}

fn tensor(array: &Array) -> Tensor<f32> {
    Tensor::from_vec(array.to_f32(), shape(array)).unwrap()
}

/// The tensors of a case by the names of this crate.
struct Inputs {
    arrays: [Option<Array>; 5],
    present: Option<Vec<bool>>,
    d_out: Array,
    states: [Option<Array>; 2],
    sums: [Option<Array>; 2],
}

impl Inputs {
    fn of(case: &Case) -> Inputs {
        let get = |name: &str| case.tensors.get(name).cloned();
        Inputs {
            arrays: ["q", "k", "v", "log_decay", "beta"].map(get),
            present: get("key_mask").map(|mask| mask.flags()),
            d_out: case.tensor("d_out").clone(),
            states: ["initial_state", "d_final_state"].map(get),
            sums: ["initial_z", "d_final_z"].map(get),
        }
    }

    fn shapes(&self) -> [Shape; 3] {
        [0, 1, 2].map(|n| shape(self.arrays[n].as_ref().unwrap()))
    }

    fn state_shape(&self) -> StateShape {
        let [q, _, v] = self.shapes();
        StateShape { sequences: q.batch, heads: v.heads, key_dim: q.dim, value_dim: v.dim }
    }

    fn state(&self, which: usize, sums: usize) -> State {
        let mut state = State::zeros(self.state_shape(), sums).unwrap();
        if let Some(array) = &self.states[which] {
            state.matrices_mut().copy_from_slice(&array.to_f32());
        }
        if let Some(array) = self.sums[which].as_ref().filter(|_| sums > 0) {
            state.key_sums_mut().copy_from_slice(&array.to_f32());
        }
        state
    }
}

/// Every golden tensor that has a name among the answers is compared; each `out` and gradient has to have one.
fn compare(case: &Case, how: &str, answers: &[(&str, Vec<f64>)], tolerance: f64) {
    for (name, array) in &case.tensors {
        let answer = answers.iter().find(|(own, _)| own == name);
        let wanted = name == "out" || name.starts_with("grad.") || name.starts_with("final");
        assert!(!wanted || answer.is_some(), "{}: no {name}", case.name);
        if let Some((_, got)) = answer {
            let what = format!("{} {name}, {how}", case.name);
            support::golden::check(&what, got, &array.data, tolerance);
        }
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn definition<R: Recurrence>(case: &Case, inputs: &Inputs, mechanism: &R, all_keys: bool) {
    let input = |n: usize| {
        inputs.arrays[n].as_ref().map(|array| Input { data: &array.data, shape: shape(array) })
    };
    let sequences = Sequences {
        q: input(0).unwrap(),
        k: input(1).unwrap(),
        v: input(2).unwrap(),
        log_decay: input(3),
        beta: input(4),
        present: inputs.present.as_deref(),
        cuts: None,
    };
    let mut states = States::zeros(inputs.state_shape(), mechanism.form().sums);
    if let Some(array) = &inputs.states[0] {
        states.matrices.clone_from(&array.data);
    }
    if let Some(array) = inputs.sums[0].as_ref().filter(|_| mechanism.form().sums > 0) {
        states.key_sums.clone_from(&array.data);
    }
    let out = match all_keys {
        true => forward_bidirectional(mechanism, &sequences, &mut states),
        false => forward(mechanism, &sequences, &mut states),
    };
    let tolerance = case.tolerance("f64");
    case.check("out", &out, tolerance);
    if case.tensors.contains_key("final_state") {
        case.check("final_state", &states.matrices, tolerance);
    }
    if case.tensors.contains_key("final_z") {
        case.check("final_z", &states.key_sums, tolerance);
    }
}

fn engine<R: Recurrence + Clone>(case: &Case, inputs: &Inputs, mechanism: &R) {
    for cpu in cpus() {
        let answers = answers(inputs, &Recurrent::new(mechanism.clone()).cpu(cpu));
        compare(case, cpu.level.name(), &answers, case.tolerance("f32"));
    }
}

type Answers = Vec<(&'static str, Vec<f64>)>;

fn answers<R: Recurrence>(inputs: &Inputs, recurrent: &Recurrent<R>) -> Answers {
    let form = recurrent.mechanism().form();
    let tensors = inputs.arrays.each_ref().map(|x| x.as_ref().map(tensor));
    let [Some(q), Some(k), Some(v), log_decay, beta] = &tensors else { panic!("three inputs") };
    let mut tokens = Tokens::new(q.view(), k.view(), v.view());
    if let Some(log_decay) = log_decay {
        tokens = tokens.log_decay(log_decay.view());
    }
    if let Some(beta) = beta {
        tokens = tokens.beta(beta.view());
    }
    if let Some(present) = &inputs.present {
        tokens = tokens.present(present);
    }
    let initial = inputs.state(0, form.sums);
    let mut state = initial.clone();
    let mut out = Tensor::zeros(v.shape()).unwrap();
    let mut reads = Tensor::zeros(v.shape()).unwrap();
    let results = Results { out: out.view_mut(), reads: form.beta.then(|| reads.view_mut()) };
    recurrent.forward_into(&tokens, results, &mut state, &mut Workspace::new()).unwrap();
    let d_out = tensor(&inputs.d_out);
    let mut d_state = inputs.state(1, form.sums);
    let reads = form.beta.then(|| reads.view());
    let upstream = Upstream { reads, ..Upstream::new(d_out.view(), &initial) };
    let gradients = recurrent.backward(&tokens, upstream, &mut d_state).unwrap();
    let mut answers = vec![
        ("out", wide(out.as_slice())),
        ("final_state", wide(state.matrices())),
        ("final_z", wide(state.key_sums())),
        ("grad.q", wide(gradients.d_q.as_slice())),
        ("grad.k", wide(gradients.d_k.as_slice())),
        ("grad.v", wide(gradients.d_v.as_slice())),
        ("grad.initial_state", wide(d_state.matrices())),
        ("grad.initial_z", wide(d_state.key_sums())),
    ];
    let gates = [("grad.log_decay", gradients.d_log_decay), ("grad.beta", gradients.d_beta)];
    let gates = gates.into_iter().filter_map(|(name, x)| Some((name, wide(x?.as_slice()))));
    answers.extend(gates);
    answers
}

fn bidirectional<R: AnyOrder>(inputs: &Inputs, recurrent: &Recurrent<R>) -> Answers {
    let sums = recurrent.mechanism().form().sums;
    let tensors = inputs.arrays.each_ref().map(|x| x.as_ref().map(tensor));
    let [Some(q), Some(k), Some(v), _, _] = &tensors else { panic!("three inputs") };
    let mut tokens = Tokens::new(q.view(), k.view(), v.view());
    if let Some(present) = &inputs.present {
        tokens = tokens.present(present);
    }
    let initial = inputs.state(0, sums);
    let mut state = initial.clone();
    let out = recurrent.forward_bidirectional(&tokens, &mut state).unwrap();
    let d_out = tensor(&inputs.d_out);
    let [mut d_q, mut d_k, mut d_v] = [q, k, v].map(|x| Tensor::<f32>::zeros(x.shape()).unwrap());
    let gradients = Gradients {
        d_q: d_q.view_mut(),
        d_k: d_k.view_mut(),
        d_v: d_v.view_mut(),
        d_log_decay: None,
        d_beta: None,
    };
    let mut d_state = inputs.state(1, sums);
    let upstream = Upstream::new(d_out.view(), &initial);
    recurrent
        .backward_bidirectional_into(
            &tokens,
            upstream,
            gradients,
            &mut d_state,
            &mut Workspace::new(),
        )
        .unwrap();
    vec![
        ("out", wide(out.as_slice())),
        ("final_state", wide(state.matrices())),
        ("final_z", wide(state.key_sums())),
        ("grad.q", wide(d_q.as_slice())),
        ("grad.k", wide(d_k.as_slice())),
        ("grad.v", wide(d_v.as_slice())),
    ]
}

#[test]
fn linear_transformer() {
    for case in cases("linear_attention") {
        let inputs = Inputs::of(&case);
        let linear = Linear::new();
        if case.options["causal"].as_bool().unwrap() {
            definition(&case, &inputs, &linear, false);
            engine(&case, &inputs, &linear);
            continue;
        }
        all_keys(&case, &inputs, &linear);
    }
}

/// Every query reads all keys: by the definition and on every level.
fn all_keys<R: AnyOrder + Clone>(case: &Case, inputs: &Inputs, mechanism: &R) {
    definition(case, inputs, mechanism, true);
    for cpu in cpus() {
        let answers = bidirectional(inputs, &Recurrent::new(mechanism.clone()).cpu(cpu));
        compare(case, cpu.level.name(), &answers, case.tolerance("f32"));
    }
}

#[test]
fn efficient_attention() {
    for case in cases("efficient_attention") {
        all_keys(&case, &Inputs::of(&case), &Efficient::new());
    }
}

fn each<R: Recurrence + Clone>(group: &str, mechanism: impl Fn(&Case) -> Option<R>) {
    let mut compared = 0;
    for case in cases(group) {
        let Some(mechanism) = mechanism(&case) else { continue };
        let inputs = Inputs::of(&case);
        // The default of all these mechanisms.
        let scale = (inputs.shapes()[0].dim as f64).powf(-0.5);
        assert!((scale - case.number("scale")).abs() < 1e-15);
        definition(&case, &inputs, &mechanism, false);
        engine(&case, &inputs, &mechanism);
        compared += 1;
    }
    assert!(compared > 0, "{group}");
}

#[test]
fn retention() {
    each("retention", |case| {
        let heads = case.tensor("q").shape[2];
        Some(Retention::new(heads))
    });
}

#[test]
fn scalar_decay() {
    each("scalar_decay", |case| {
        // Mamba-2 has other inputs: below.
        case.tensors.contains_key("q").then(ScalarDecay::new)
    });
}

#[test]
fn gated_linear_attention() {
    each("vector_decay", |_| Some(VectorDecay::new()));
}

#[test]
fn delta_rule() {
    each("delta_rule", |_| Some(Delta::new()));
}

#[test]
fn gated_delta_rule() {
    each("gated_delta_rule", |_| Some(Delta::gated()));
}

/// Mamba-2: the value is Δ x, the logarithm of the decay Δ a, and x skips ahead with a weight for each head.
#[test]
fn mamba_2() {
    let all = cases("scalar_decay");
    let case = all.iter().find(|case| case.name == "mamba2_ssd").unwrap();
    let [x, dt, b, c] = ["x", "dt", "b", "c"].map(|name| tensor(case.tensor(name)));
    let [a, d] = ["a", "d"].map(|name| case.tensor(name).to_f32());
    let (heads, dim) = (x.shape().heads, x.shape().dim);
    let each = |n: usize| (n / dim, n / dim % heads);
    let gate = |n: usize, a: &[f32]| dt.as_slice()[n] * a[n % heads];
    let log_decay = (0..dt.as_slice().len()).map(|n| gate(n, &a)).collect();
    let log_decay = Tensor::from_vec(log_decay, dt.shape()).unwrap();
    let values = x.as_slice().iter().enumerate().map(|(n, x)| dt.as_slice()[each(n).0] * x);
    let values = Tensor::from_vec(values.collect(), x.shape()).unwrap();
    let tokens = Tokens::new(c.view(), b.view(), values.view()).log_decay(log_decay.view());
    let mechanism = ScalarDecay::new().scale(Scale::Value(1.0));
    for cpu in cpus() {
        let recurrent = Recurrent::new(mechanism).cpu(cpu);
        let mut initial = recurrent.state(&tokens).unwrap();
        initial.matrices_mut().copy_from_slice(&case.tensor("initial_state").to_f32());
        let mut state = initial.clone();
        let out = recurrent.forward(&tokens, &mut state).unwrap();
        let skipped = out.as_slice().iter().zip(x.as_slice()).enumerate();
        let out: Vec<f64> = skipped.map(|(n, (o, x))| f64::from(o + d[each(n).1] * x)).collect();
        let d_out = tensor(case.tensor("d_out"));
        let mut d_state = initial.clone();
        d_state.matrices_mut().copy_from_slice(&case.tensor("d_final_state").to_f32());
        let upstream = Upstream::new(d_out.view(), &initial);
        let own = recurrent.backward(&tokens, upstream, &mut d_state).unwrap();
        let (d_value, d_log) = (own.d_v.as_slice(), own.d_log_decay.unwrap());
        let (d_log, d_out) = (d_log.as_slice(), d_out.as_slice());
        let (mut d_a, mut d_d) = (vec![0.0; heads], vec![0.0; heads]);
        let mut d_dt: Vec<f64> = vec![0.0; d_log.len()];
        let mut d_x = vec![0.0; d_value.len()];
        for (n, &log) in d_log.iter().enumerate() {
            d_a[n % heads] += f64::from(log * dt.as_slice()[n]);
            d_dt[n] += f64::from(log * a[n % heads]);
        }
        for (n, &x) in x.as_slice().iter().enumerate() {
            let (token, head) = each(n);
            d_d[head] += f64::from(d_out[n] * x);
            d_dt[token] += f64::from(d_value[n] * x);
            d_x[n] = f64::from(d_value[n] * dt.as_slice()[token] + d_out[n] * d[head]);
        }
        let answers = [
            ("out", out),
            ("final_state", wide(state.matrices())),
            ("grad.x", d_x),
            ("grad.dt", d_dt),
            ("grad.a", d_a),
            ("grad.b", wide(own.d_k.as_slice())),
            ("grad.c", wide(own.d_q.as_slice())),
            ("grad.d", d_d),
            ("grad.initial_state", wide(d_state.matrices())),
        ];
        compare(case, cpu.level.name(), &answers, case.tolerance("f32"));
    }
}
