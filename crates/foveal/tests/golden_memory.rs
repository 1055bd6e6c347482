//! Memory mechanisms against golden vectors: outputs, final memories and gradients, on every level and by the definition.

mod support;

use foveal::linear::{State, StateShape};
use foveal::memory::infini::{Gradients, Infini, InfiniBackward, Tokens, Upstream};
use foveal::memory::reference::{Memories, Segments, infini};
use foveal::memory::{Empty, Update};
use foveal::position::{Rope, RopeConfig, RopeLayout, RopeTable};
use foveal::reference::Input;
use foveal::{Cpu, Scale, Shape, Tensor, Workspace};
use support::attention::shape;
use support::cpus;
use support::golden::{Array, Case, cases};

fn tensor(array: &Array) -> Tensor<f32> {
    Tensor::from_vec(array.to_f32(), shape(array)).unwrap()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Every golden tensor that has a name among the answers is compared; each result and gradient has to have one.
fn compare(case: &Case, how: &str, answers: &[(&str, Vec<f64>)], tolerance: f64) {
    for (name, array) in &case.tensors {
        let answer = answers.iter().find(|(own, _)| own == name);
        let wanted = ["out", "final", "grad.", "selected"].iter().any(|x| name.starts_with(x));
        assert!(!wanted || answer.is_some(), "{}: no {name}", case.name);
        if let Some((_, got)) = answer {
            let what = format!("{} {name}, {how}", case.name);
            support::golden::check(&what, got, &array.data, tolerance);
        }
    }
}

fn update(case: &Case) -> Update {
    match case.options["rule"].as_str().unwrap() {
        "linear" => Update::Linear,
        "delta" => Update::Delta,
        other => panic!("{}: rule {other}", case.name),
    }
}

fn empty(case: &Case) -> Empty {
    let text = case.options["segment_0"].as_str().unwrap();
    match (text.starts_with("gate bypassed"), text.starts_with("memory read is zero")) {
        (true, false) => Empty::Bypassed,
        (false, true) => Empty::Gated,
        _ => panic!("{}: segment_0 {text}", case.name),
    }
}

/// Rotations of the tokens of a case, if it has some.
fn rotations(case: &Case) -> Option<RopeTable> {
    let rope = case.options["rope"].as_object()?;
    let layout = match rope["layout"].as_str().unwrap() {
        "half-split" => RopeLayout::HalfSplit,
        "interleaved" => RopeLayout::Interleaved,
        other => panic!("{}: layout {other}", case.name),
    };
    let q = shape(case.tensor("q"));
    let theta = rope["base"].as_f64().unwrap();
    let config = RopeConfig { theta, ..RopeConfig::new(q.dim, layout) };
    Some(Rope::new(config).unwrap().table(0..q.seq).unwrap())
}

/// Rotated in f64.
fn rotated(array: &Array, table: &RopeTable) -> Vec<f64> {
    let Shape { seq, heads, dim, .. } = shape(array);
    let mut data = array.data.clone();
    for (n, row) in data.chunks_exact_mut(dim).enumerate() {
        for (i, (cos, sin)) in table.rope().cos_sin(n / heads % seq).enumerate() {
            let (a, b) = match table.rope().layout() {
                RopeLayout::HalfSplit => (i, i + dim / 2),
                _ => (2 * i, 2 * i + 1),
            };
            (row[a], row[b]) = (row[a] * cos - row[b] * sin, row[b] * cos + row[a] * sin);
        }
    }
    data
}

fn state(case: &Case, [matrices, sums]: [&str; 2]) -> State {
    let [q, k, v] = ["q", "k", "v"].map(|name| shape(case.tensor(name)));
    let shape = StateShape { sequences: q.batch, heads: k.heads, key_dim: k.dim, value_dim: v.dim };
    let mut state = State::zeros(shape, true).unwrap();
    if let Some(array) = case.tensors.get(matrices) {
        state.matrices_mut().copy_from_slice(&array.to_f32());
    }
    if let Some(array) = case.tensors.get(sums) {
        state.key_sums_mut().copy_from_slice(&array.to_f32());
    }
    state
}

fn infini_by_definition(case: &Case) {
    let arrays = ["q", "k", "v"].map(|name| case.tensor(name));
    let [q, k, v] = arrays.map(|array| Input { data: &array.data, shape: shape(array) });
    let turned = rotations(case).map(|table| [0, 1].map(|n| rotated(arrays[n], &table)));
    let local = match &turned {
        Some([a, b]) => [Input { data: a, ..q }, Input { data: b, ..k }],
        None => [q, k],
    };
    let zeros = state(case, ["", ""]);
    let given = |name: &str, len| {
        case.tensors.get(name).map_or_else(|| vec![0.0; len], |array| array.data.clone())
    };
    let mut memories = Memories {
        matrices: given("initial_memory", zeros.matrices().len()),
        key_sums: given("initial_z", zeros.key_sums().len()),
    };
    let call = Segments {
        plain: [q, k, v],
        local,
        gate: &case.tensor("beta").data,
        segment: case.number("segment") as usize,
        scale: case.number("scale"),
        update: update(case),
        empty: empty(case),
    };
    let out = infini(&call, &mut memories).unwrap();
    let tolerance = case.tolerance("f64");
    case.check("out", &out, tolerance);
    case.check("final_memory", &memories.matrices, tolerance);
    case.check("final_z", &memories.key_sums, tolerance);
}

fn infini_answers(case: &Case, cpu: Cpu) -> Vec<(&'static str, Vec<f64>)> {
    let [q, k, v, d_out] = ["q", "k", "v", "d_out"].map(|name| tensor(case.tensor(name)));
    let gate = case.tensor("beta").to_f32();
    let table = rotations(case);
    let turn = |x: &Tensor<f32>| {
        let mut x = x.clone();
        table.as_ref().unwrap().rotate(cpu.level, x.view_mut()).unwrap();
        x
    };
    let turned = table.as_ref().map(|_| (turn(&q), turn(&k)));
    let mut tokens = Tokens::new(q.view(), k.view(), v.view(), &gate);
    if let Some((q, k)) = &turned {
        tokens = tokens.rotated(q.view(), k.view());
    }
    let attention = Infini::new(case.number("segment") as usize)
        .unwrap()
        .update(update(case))
        .empty(empty(case))
        .scale(Scale::Value(case.number("scale") as f32))
        .cpu(cpu);
    let initial = state(case, ["initial_memory", "initial_z"]);
    let mut last = initial.clone();
    let out = attention.forward(&tokens, &mut last).unwrap();
    let mut d_memory = state(case, ["d_final_memory", "d_final_z"]);
    let upstream = Upstream { d_out: d_out.view(), initial: &initial };
    let mut d = nan_gradients(&tokens);
    let to = Gradients {
        d_q: d.d_q.view_mut(),
        d_k: d.d_k.view_mut(),
        d_v: d.d_v.view_mut(),
        d_gate: &mut d.d_gate,
        d_rotated: d.d_rotated.as_mut().map(|(q, k)| (q.view_mut(), k.view_mut())),
    };
    let mut workspace = Workspace::new();
    workspace.reserve(1 << 20);
    workspace.poison();
    attention.backward_into(&tokens, upstream, to, &mut d_memory, &mut workspace).unwrap();
    let whole = |own: &Tensor<f32>, turned: Option<Tensor<f32>>| {
        let mut sum = wide(own.as_slice());
        if let (Some(mut turned), Some(table)) = (turned, &table) {
            table.rotate_gradient(cpu.level, turned.view_mut()).unwrap();
            sum.iter_mut().zip(turned.as_slice()).for_each(|(a, &b)| *a += f64::from(b));
        }
        sum
    };
    let (turned_q, turned_k) = d.d_rotated.clone().unzip();
    vec![
        ("out", wide(out.as_slice())),
        ("final_memory", wide(last.matrices())),
        ("final_z", wide(last.key_sums())),
        ("grad.q", whole(&d.d_q, turned_q)),
        ("grad.k", whole(&d.d_k, turned_k)),
        ("grad.v", wide(d.d_v.as_slice())),
        ("grad.beta", wide(&d.d_gate)),
        ("grad.initial_memory", wide(d_memory.matrices())),
        ("grad.initial_z", wide(d_memory.key_sums())),
    ]
}

/// Places for gradients, full of NaN.
fn nan_gradients(tokens: &Tokens<'_, f32>) -> InfiniBackward<f32> {
    let nan = |shape: Shape| {
        Tensor::from_vec(vec![f32::NAN; shape.checked_len().unwrap()], shape).unwrap()
    };
    InfiniBackward {
        d_q: nan(tokens.q.shape()),
        d_k: nan(tokens.k.shape()),
        d_v: nan(tokens.v.shape()),
        d_gate: vec![f32::NAN; tokens.gate.len()],
        d_rotated: tokens.rotated.map(|(q, k)| (nan(q.shape()), nan(k.shape()))),
    }
}

#[test]
fn infini_attention() {
    let cases = cases("infini_attention");
    assert_eq!(cases.len(), 15);
    for case in &cases {
        infini_by_definition(case);
        for cpu in cpus() {
            let how = format!("{}", cpu.level);
            compare(case, &how, &infini_answers(case, cpu), case.tolerance("f32"));
        }
    }
}
