//! The definition in f64 against results that share no code with it.

mod support;

use foveal::mask::{Pattern, Site};
use foveal::reference::{Input, Options, Partial, attention, attention_with, merge};
use foveal::{Mask, Shape};
use support::attention::{
    Answer, Problem, bucketed_problems, dense, dropout_problems, entry, inputs, packed_problems,
    problems,
};
use support::golden::cases;

fn attend(inputs: &[(Shape, Vec<f64>); 3], scale: f64, mask: &Mask) -> Partial {
    let inputs = inputs.each_ref().map(|(shape, data)| Input { data, shape: *shape });
    attention(inputs, scale, mask).unwrap()
}

fn define(problem: &Problem, mask: &Mask) -> Answer {
    let terms = &problem.terms;
    let sinks: Option<Vec<f64>> = problem.case.tensors.get("sinks").map(|sinks| sinks.data.clone());
    let dropped =
        |at, row, j| terms.dropout.as_ref().map_or(1.0, |factors| entry(factors, at, row, j));
    let options = Options {
        softcap: problem.case.options["softcap"].as_f64(),
        bias: Some(&|at, row, j| terms.added(problem.extent(), at, row, j)),
        sinks: sinks.as_deref(),
        dropout: Some(&dropped),
        ..Options::new(problem.scale, mask)
    };
    let inputs = problem.inputs.each_ref().map(|(shape, data)| Input { data, shape: *shape });
    let Partial { out, lse } = attention_with(inputs, &options).unwrap();
    (out, lse)
}

#[test]
fn attention_agrees_with_the_golden_vectors() {
    let more = [packed_problems(), bucketed_problems(), dropout_problems()];
    for problem in problems().iter().chain(more.iter().flatten()) {
        // Slopes and tables are read as f32, which holds slopes of 2^(−n/2) to 6e-8.
        let rounded = problem.terms.slopes.is_some() || problem.terms.table.is_some();
        let tolerance = if rounded { "f32" } else { "f64" };
        problem.check(problem.case.tolerance(tolerance), &define);
    }
}

#[test]
fn typed_masks_spell_the_golden_masks() {
    for problem in problems().iter().chain(&packed_problems()) {
        let extent = problem.extent();
        for pair in problem.masks.windows(2) {
            let [(_, a), (form, b)] = pair else { unreachable!() };
            for (batch, q_head) in
                (0..extent.batch).flat_map(|b| (0..extent.heads).map(move |h| (b, h)))
            {
                let at = Site { batch, q_head, kv_head: 0 };
                for (r, j) in
                    (0..extent.queries).flat_map(|r| (0..extent.keys).map(move |j| (r, j)))
                {
                    let i = r as isize + extent.keys as isize - extent.queries as isize;
                    let name = &problem.case.name;
                    assert_eq!(a.allows(at, i, j), b.allows(at, i, j), "{name} {form} ({r}, {j})");
                }
            }
        }
    }
}

#[test]
fn parts_merge_to_the_golden_results() {
    for case in cases("merge") {
        let (outs, lses) = (case.tensor("part_out"), case.tensor("part_lse"));
        let count = outs.shape[0];
        let parts: Vec<_> = outs
            .data
            .chunks(outs.data.len() / count)
            .zip(lses.data.chunks(lses.data.len() / count))
            .map(|(out, lse)| Partial { out: out.to_vec(), lse: lse.to_vec() })
            .collect();
        let tolerance = case.tolerance("f64");
        let merged = merge(&parts).unwrap();
        case.check("out", &merged.out, tolerance);
        case.check("lse", &merged.lse, tolerance);
        // In any order, and in any grouping.
        let reversed: Vec<_> = parts.iter().rev().cloned().collect();
        let nested = merge(&[merge(&reversed[..1]).unwrap(), merge(&reversed[1..]).unwrap()]);
        case.check("out", &nested.as_ref().unwrap().out, tolerance);
        case.check("lse", &nested.unwrap().lse, tolerance);
    }
}

#[test]
fn attention_over_parts_of_the_keys_gives_the_golden_parts() {
    // The other two kinds add a bias and a sink to scores.
    let plain = |kind: &str| ["none", "causal", "dead"].contains(&kind);
    let cases = cases("merge").into_iter();
    let cases: Vec<_> =
        cases.filter(|case| plain(case.options["kind"].as_str().unwrap())).collect();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let whole = case.tensors.get("mask").map_or(Mask::full(), dense);
        let parts = case.options["parts"].as_array().unwrap();
        let (mut outs, mut lses, mut start) = (vec![], vec![], 0);
        for length in parts {
            let end = start + length.as_u64().unwrap() as usize;
            let mask = whole.clone().and(Mask::keys(start..end));
            let part = attend(&inputs(&case), case.number("scale"), &mask);
            outs.extend(part.out);
            lses.extend(part.lse);
            start = end;
        }
        case.check("part_out", &outs, case.tolerance("f64"));
        case.check("part_lse", &lses, case.tolerance("f64"));
    }
}

const SHAPE: Shape = Shape { batch: 1, seq: 3, heads: 1, dim: 1 };

/// Three tokens under a causal mask, scale 1.
fn causal(q: [f64; 3], k: [f64; 3], v: [f64; 3]) -> Partial {
    attend(&[q, k, v].map(|x| (SHAPE, x.to_vec())), 1.0, &Mask::causal())
}

#[test]
fn what_is_not_finite_reaches_the_rows_that_see_it_and_no_others() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for (k, v) in [([0.5, bad, 1.0], [1.0, 2.0, 3.0]), ([0.5, 1.0, 1.0], [1.0, bad, 3.0])] {
            let seen = causal([1.0; 3], k, v);
            assert_eq!((seen.out[0], seen.lse[0]), (1.0, 0.5));
            // A key of −∞ has weight 0: its row is finite, without it.
            if k[1] == f64::NEG_INFINITY {
                assert_eq!((seen.out[1], seen.lse[1]), (1.0, 0.5));
            } else {
                assert!(seen.out[1..].iter().all(|x| !x.is_finite()), "{seen:?}");
            }
        }
    }
}

#[test]
fn rows_that_see_nothing_are_zero() {
    let input = |len| vec![1.0; len];
    let keys = Shape { seq: 2, ..SHAPE };
    let inputs = [(SHAPE, input(3)), (keys, input(2)), (keys, input(2))];
    let seen = attend(&inputs, 1.0, &Mask::causal());
    assert_eq!((seen.out[0].to_bits(), seen.lse[0]), (0, f64::NEG_INFINITY));
    assert_eq!((seen.out[1], seen.lse[1]), (1.0, 1.0));
    // Keys that weigh nothing are as good as none.
    let weightless = causal([1.0; 3], [f64::NEG_INFINITY; 3], [1.0; 3]);
    assert_eq!((weightless.out, weightless.lse), (vec![0.0; 3], vec![f64::NEG_INFINITY; 3]));
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let call = |shapes: [Shape; 3], short: usize| {
        let data = shapes.map(|shape| vec![0.0; shape.checked_len().unwrap() - short]);
        let input = |n: usize| Input { data: &data[n], shape: shapes[n] };
        attention([input(0), input(1), input(2)], 1.0, &Mask::full())
    };
    let shape = Shape { batch: 2, seq: 3, heads: 4, dim: 5 };
    assert!(call([shape; 3], 0).is_ok());
    assert!(call([shape; 3], 1).is_err());
    let wrong = [
        Shape { batch: 1, ..shape },
        Shape { seq: 4, ..shape },
        Shape { heads: 3, ..shape },
        Shape { heads: 0, ..shape },
    ];
    for other in wrong {
        assert!(call([shape, shape, other], 0).is_err(), "values {other}");
    }
    assert!(call([Shape { batch: 1, ..shape }, shape, shape], 0).is_err());
    assert!(call([Shape { dim: 1, ..shape }, shape, shape], 0).is_err());
    assert!(call([Shape { heads: 6, ..shape }, shape, shape], 0).is_err());
    let part = Partial { out: vec![0.0; 4], lse: vec![0.0; 2] };
    let longer = Partial { out: vec![0.0; 6], lse: vec![0.0; 3] };
    assert!(merge(&[part.clone(), longer]).is_err());
    assert!(merge(&[part.clone(), Partial { out: vec![0.0; 5], ..part }]).is_err());
    assert_eq!(merge(&[]).unwrap(), Partial { out: vec![], lse: vec![] });
}
