//! The trainable layer of attention against golden vectors, all gradients and the cache included.

#[path = "../../foveal/tests/support/golden.rs"]
#[allow(dead_code, missing_docs, unreachable_pub)]
mod golden;
#[path = "../../foveal/tests/support/rope.rs"]
#[allow(missing_docs, unreachable_pub)]
mod rope;
mod support;

use std::ops::Range;

use foveal::cache::{KvRows, KvStore};
use foveal::mask::{Dense, Extent};
use foveal::position::{Rope, RopeLayout};
use foveal::{Mask, Scale};
use foveal_lm::mixer::{Affine, AttentionParameters, LayerState, MultiHeadAttention};
use golden::{Case, cases};
use support::{Problem, cpus, named, wide};

/// The name that the golden files give a parameter: two families of names.
fn golden_name(case: &Case, name: &str) -> String {
    if !case.tensors.contains_key("w_q") {
        return match name.split_once('.') {
            Some((part, kind)) => format!("{part}_proj.{kind}"),
            None if name == "sinks" => name.to_owned(),
            None => format!("{name}.weight"),
        };
    }
    name.split_once('.').map_or(name.to_owned(), |(part, kind)| format!("{}_{part}", &kind[..1]))
}

fn golden_problem(case: &Case) -> Problem {
    let number = |names: &[&str]| {
        let found = names.iter().find_map(|name| case.options[*name].as_u64());
        found.map(|x| x as usize)
    };
    let heads = number(&["num_attention_heads", "heads"]).unwrap();
    let head_dim = number(&["head_dim"]).unwrap();
    let x = case.tensor("x");
    let [sequences, seq, width] = x.shape[..] else { panic!("{:?}", x.shape) };
    let offset = case.options["order"].as_str().is_some_and(|order| order.contains("(1+w)"));
    let parameter = |name: &str| -> Option<Vec<f32>> {
        let tensor = case.tensors.get(&golden_name(case, name))?;
        let norm = offset && name.ends_with("norm");
        Some(tensor.to_f32().iter().map(|x| x + if norm { 1.0 } else { 0.0 }).collect())
    };
    let affine = |part: &str| Affine {
        weight: parameter(&format!("{part}.weight")).unwrap(),
        bias: parameter(&format!("{part}.bias")),
    };
    let source = case.tensors.get("x_k").map(|keys| [keys, case.tensor("x_v")]);
    let width_of = |n: usize| source.map_or(width, |source| source[n].shape[2]);
    let rope = case.options["rope_parameters"].as_object().map(|_| {
        let options = &case.options["rope_parameters"];
        Rope::new(rope::rope_config(options, head_dim, RopeLayout::HalfSplit)).unwrap()
    });
    let positions = case.tensors.get("position_ids");
    let reach = number(&["window"]);
    let mask = match (case.options["causal"].as_bool().unwrap(), reach) {
        (true, Some(reach)) => Mask::window(reach),
        (true, None) => Mask::causal(),
        (false, _) => case.tensors.get("mask").map_or(Mask::full(), |mask| {
            // [batch, 1, 1, keys], for every query.
            let keys = mask.shape[3];
            let rows = mask.flags();
            let all = rows.chunks(keys).flat_map(|row| row.repeat(seq)).collect::<Vec<_>>();
            let extent = Extent { batch: mask.shape[0], heads: 1, queries: seq, keys };
            Dense::new(&all, extent).unwrap().into()
        }),
    };
    Problem {
        layer: MultiHeadAttention {
            width,
            key_width: width_of(0),
            value_width: width_of(1),
            heads,
            kv_heads: number(&["num_key_value_heads"]).unwrap_or(heads),
            head_dim,
            scale: Scale::Value(case.number("scale") as f32),
            softcap: None,
            mask,
            reach,
            norm_epsilon: case.options["rms_norm_eps"].as_f64().unwrap_or(0.0) as f32,
        },
        parameters: AttentionParameters {
            query: affine("q"),
            key: affine("k"),
            value: affine("v"),
            output: affine("o"),
            query_norm: parameter("q_norm"),
            key_norm: parameter("k_norm"),
            sinks: case.tensors.get("sinks").map(golden::Array::to_f32),
        },
        sequences,
        x: x.to_f32(),
        source: source.map(|source| source.map(golden::Array::to_f32)),
        rope,
        positions: positions.map_or(vec![0; sequences * seq], golden::Array::indices),
        d_y: case.tensor("d_out").to_f32(),
    }
}

/// What the states hold, `[sequences, positions, kv_heads, head_dim]`.
fn held(
    states: &[LayerState],
    rows: fn(&LayerState, usize, Range<usize>) -> Option<KvRows<'_>>,
) -> Vec<f64> {
    let mut all = vec![];
    for state in states {
        for position in 0..state.end() {
            for head in 0..state.kv_heads() {
                let row = rows(state, head, position..position + 1);
                let Some(KvRows::F32(row)) = row else { panic!() };
                all.extend(wide(row.row(0)));
            }
        }
    }
    all
}

fn check_golden(mechanism: &str, count: usize) {
    let cases = cases(mechanism);
    assert_eq!(cases.len(), count);
    for case in &cases {
        let problem = golden_problem(case);
        let tolerance = case.tolerance("f32");
        let seq = problem.tokens();
        let follows = problem.source.is_none() && case.options["causal"] == true;
        let cuts =
            if follows { vec![vec![seq], vec![3, seq - 3], vec![1; seq]] } else { vec![vec![seq]] };
        for (cpu, lengths) in cpus().flat_map(|cpu| cuts.iter().map(move |cut| (cpu, cut))) {
            let results = problem.run(lengths, cpu);
            case.check("out", &wide(&results.y), tolerance);
            case.check("grad.x", &wide(&results.d_x), tolerance);
            let names = named(&results.gradients);
            for (name, gradient) in &names {
                let name = format!("grad.{}", golden_name(case, name));
                case.check(&name, &wide(gradient), tolerance);
            }
            let parameters = case.tensors.keys().filter(|name| name.starts_with("grad."));
            let inputs = if problem.source.is_some() { 3 } else { 1 };
            assert_eq!(
                parameters.count(),
                names.len() + inputs,
                "{}: all were compared",
                case.name
            );
            if let Some([d_keys, d_values]) = &results.d_source {
                case.check("grad.x_k", &wide(d_keys), tolerance);
                case.check("grad.x_v", &wide(d_values), tolerance);
            }
            if case.tensors.contains_key("cache_k") {
                let keys =
                    held(&results.states, |state, head, at| state.tile(head, at).keys.rows());
                let values =
                    held(&results.states, |state, head, at| state.tile(head, at).values.rows());
                case.check("cache_k", &keys, tolerance);
                case.check("cache_v", &values, tolerance);
            }
        }
    }
}

#[test]
fn multi_head_layers() {
    check_golden("mha_layer", 4);
}

#[test]
fn grouped_layers() {
    check_golden("gqa_layer", 4);
}

#[test]
fn grouped_layers_with_normalized_queries_and_keys() {
    check_golden("qknorm_gqa_layer", 3);
}

#[test]
fn grouped_layers_with_sinks() {
    check_golden("sinks_gqa_layer", 2);
}
