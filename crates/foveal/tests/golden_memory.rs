//! Memory mechanisms against golden vectors: outputs, final memories and gradients, on every level and by the definition.

mod support;

use foveal::linear::{State, StateShape};
use foveal::memory::infini::{Gradients, Infini, InfiniBackward, Tokens, Upstream};
use foveal::memory::memorizing::{self, Memorizing};
use foveal::memory::reference::{Memories, Memorized, Segments, infini};
use foveal::memory::{Empty, Update};
use foveal::position::{Rope, RopeConfig, RopeLayout, RopeTable};
use foveal::reference::Input;
use foveal::sparse::StateHeads;
use foveal::{Cpu, Phase, Scale, Shape, Tensor, Workspace};
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
    let mut state = State::zeros(shape, 1).unwrap();
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

/// The documents of each sequence of a case.
fn documents(case: &Case) -> Vec<(usize, std::ops::Range<usize>)> {
    let Shape { batch, seq, .. } = shape(case.tensor("q"));
    let (segment, resets) =
        (case.number("segment") as usize, case.tensors.get("reset_before_segment"));
    let mut documents = vec![];
    for b in 0..batch {
        let segments = seq / segment;
        let begins = |n: &usize| resets.is_some_and(|x| x.data[b * segments + n] != 0.0) && *n > 0;
        let mut cuts: Vec<usize> = (0..segments).filter(begins).map(|n| n * segment).collect();
        cuts.insert(0, 0);
        cuts.push(seq);
        documents.extend(cuts.windows(2).map(|pair| (b, pair[0]..pair[1])));
    }
    documents
}

/// The tokens of one document.
fn cut(array: &Array, (batch, tokens): &(usize, std::ops::Range<usize>)) -> Array {
    let Shape { seq, heads, dim, .. } = shape(array);
    let own = (batch * seq + tokens.start) * heads * dim..(batch * seq + tokens.end) * heads * dim;
    Array { shape: vec![1, tokens.len(), heads, dim], data: array.data[own].to_vec() }
}

fn bias(case: &Case) -> Option<(Shape, Vec<f64>)> {
    let bias = case.tensors.get("bias")?;
    let [heads, seq, dim] = bias.shape[..] else { panic!("{}: {:?}", case.name, bias.shape) };
    let mut turned = vec![];
    for (t, h) in (0..seq).flat_map(|t| (0..heads).map(move |h| (t, h))) {
        turned.extend_from_slice(&bias.data[(h * seq + t) * dim..][..dim]);
    }
    Some((Shape { batch: 1, seq, heads, dim }, turned))
}

/// Back to `[heads, query, key]`.
fn by_head(Shape { seq, heads, dim, .. }: Shape, x: &[f64]) -> Vec<f64> {
    let sites = (0..heads).flat_map(|h| (0..seq).map(move |t| (h, t)));
    sites.flat_map(|(h, t)| x[(t * heads + h) * dim..][..dim].to_vec()).collect()
}

fn options(case: &Case) -> Memorizing {
    let number = |name: &str| case.number(name) as usize;
    let local = case.options["local"].as_str().unwrap();
    Memorizing::new(number("segment"), number("top_k"), number("memory_capacity"))
        .unwrap()
        .previous(local.contains("previous segment"))
}

fn positions(selected: impl Iterator<Item = usize>, top: usize, start: usize) -> Vec<f64> {
    let mut own: Vec<f64> = selected.map(|at| (at + start) as f64).collect();
    own.resize(top, -1.0);
    own
}

fn memorizing_by_definition(case: &Case) {
    let local = case.options["local"].as_str().unwrap();
    let number = |name: &str| case.number(name) as usize;
    let bias = bias(case);
    let (mut results, mut selected) = (vec![vec![]; 3], vec![]);
    for document in documents(case) {
        let own = ["q", "k", "v"].map(|name| cut(case.tensor(name), &document));
        let [q, k, v] = own.each_ref().map(|x| Input { data: &x.data, shape: shape(x) });
        let call = Memorized {
            tokens: [q, k, v],
            past: [k, v],
            gate: &case.tensor("gate").data,
            scale: &case.tensor("scale").data,
            bias: bias.as_ref().map(|bias| &bias.1[..]),
            selected: None,
            segment: number("segment"),
            top: number("top_k"),
            capacity: number("memory_capacity"),
            previous: local.contains("previous segment"),
        };
        let own = foveal::memory::reference::memorizing(&call);
        for (to, from) in results.iter_mut().zip([own.out, own.local, own.memory]) {
            to.extend(from);
        }
        let start = document.1.start as f64;
        selected.extend(own.selected.iter().map(|x| x.map_or(-1.0, |x| x as f64 + start)));
    }
    let tolerance = case.tolerance("f64");
    for (name, got) in ["out", "out_local", "out_memory"].iter().zip(&results) {
        case.check(name, got, tolerance);
    }
    assert_eq!(selected, case.tensor("selected").data, "{}", case.name);
}

fn memorizing_answers(case: &Case, cpu: Cpu) -> Vec<(&'static str, Vec<f64>)> {
    let [q, _, v] = ["q", "k", "v"].map(|name| shape(case.tensor(name)));
    let kv_heads = shape(case.tensor("k")).heads;
    let heads = StateHeads { heads: q.heads, kv_heads, key_dim: q.dim, value_dim: v.dim };
    let [gate, scale] = ["gate", "scale"].map(|name| case.tensor(name).to_f32());
    let bias = bias(case)
        .map(|(shape, x)| Tensor::from_vec(x.iter().map(|&x| x as f32).collect(), shape).unwrap());
    let memorizing = options(case).cpu(cpu);
    let names = ["out", "out_local", "out_memory", "selected", "grad.q", "grad.k", "grad.v"];
    let mut rows: Vec<Vec<f64>> = vec![vec![]; names.len()];
    let mut sums = [vec![0.0; q.heads], vec![0.0; q.heads], vec![]];
    if let Some(bias) = &bias {
        sums[2] = vec![0.0; bias.as_slice().len()];
    }
    for document in documents(case) {
        let [q, k, v, d_out] =
            ["q", "k", "v", "d_out"].map(|name| tensor(&cut(case.tensor(name), &document)));
        let mut tokens = memorizing::Tokens::new(q.view(), k.view(), v.view(), &gate, &scale);
        if let Some(bias) = &bias {
            tokens = tokens.bias(bias.view());
        }
        let before = memorizing.state(heads, memorizing.store::<f32>(heads).unwrap()).unwrap();
        let mut state = before.clone();
        let forward = state.forward(&tokens, Phase::Prompt).unwrap();
        let d = before.backward(&tokens, &forward, d_out.view()).unwrap();
        let (top, start) = (case.number("top_k") as usize, document.1.start);
        let sites = (0..document.1.len()).flat_map(|t| (0..heads.heads).map(move |h| (t, h)));
        let selected = |(t, h)| positions(forward.selected.of(t, h), top, start);
        let own = [
            wide(forward.out.as_slice()),
            wide(forward.local.as_slice()),
            wide(forward.memory.as_slice()),
            sites.flat_map(selected).collect(),
            wide(d.d_q.as_slice()),
            wide(d.d_k.as_slice()),
            wide(d.d_v.as_slice()),
        ];
        rows.iter_mut().zip(own).for_each(|(to, from)| to.extend(from));
        let d_bias = d.d_bias.map_or(vec![], Tensor::into_vec);
        for (sum, own) in sums.iter_mut().zip([&d.d_gate, &d.d_scale, &d_bias]) {
            sum.iter_mut().zip(own).for_each(|(a, &b)| *a += f64::from(b));
        }
    }
    let [d_gate, d_scale, d_bias] = sums;
    let mut answers: Vec<_> = names.into_iter().zip(rows).collect();
    answers.extend([("grad.gate", d_gate), ("grad.scale", d_scale)]);
    if let Some(bias) = &bias {
        answers.push(("grad.bias", by_head(bias.shape(), &d_bias)));
    }
    answers
}

#[test]
fn memorizing_transformers() {
    let cases = cases("memorizing");
    assert_eq!(cases.len(), 8);
    for case in &cases {
        memorizing_by_definition(case);
        for cpu in cpus() {
            let how = format!("{}", cpu.level);
            compare(case, &how, &memorizing_answers(case, cpu), case.tolerance("f32"));
        }
    }
}
