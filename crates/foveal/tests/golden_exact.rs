//! The engine in f32 against golden vectors: every level, both phases, every form of each mask.

mod support;

use foveal::{Attention, Cpu, Mask, Scale, SoftmaxState, Tensor};
use support::attention::{Answer, Problem, bucketed_problems, packed_problems, problems};
use support::cpus;
use support::golden::cases;

#[derive(Debug, Clone, Copy)]
enum Phase {
    Prompt,
    Generated,
}

fn widen(x: &Tensor<f32>) -> Vec<f64> {
    x.as_slice().iter().map(|&x| x.into()).collect()
}

fn run(problem: &Problem, mask: &Mask, cpu: Cpu, phase: Phase) -> Answer {
    let [q, k, v] = problem.inputs.each_ref().map(|(shape, data)| {
        Tensor::from_vec(data.iter().map(|&x| x as f32).collect(), *shape).unwrap()
    });
    let scale = Scale::Value(problem.scale as f32);
    let attention = Attention::new().mask(mask.clone()).scale(scale).cpu(cpu);
    let attention = problem.terms.describe(attention);
    let result = match phase {
        Phase::Prompt => attention.forward(q.view(), k.view(), v.view()),
        Phase::Generated => attention.decode(q.view(), k.view(), v.view()),
    };
    let result = result.unwrap();
    (widen(&result.out), widen(&result.lse))
}

fn check(phase: Phase, problems: &[Problem]) {
    for cpu in cpus() {
        for problem in problems {
            let tolerance = problem.case.tolerance("f32");
            problem.check(tolerance, &|problem, mask| run(problem, mask, cpu, phase));
        }
    }
}

#[test]
fn prompts() {
    check(Phase::Prompt, &problems());
}

#[test]
fn generated_rows() {
    let mut problems = problems();
    problems.retain(|problem| problem.extent().queries <= foveal::MAX_GENERATED_ROWS);
    assert!(problems.len() >= 38);
    check(Phase::Generated, &problems);
}

#[test]
fn bucketed_biases() {
    check(Phase::Prompt, &bucketed_problems());
    let (short, long): (Vec<_>, Vec<_>) =
        bucketed_problems().into_iter().partition(|problem| problem.extent().queries <= 64);
    assert_eq!((short.len(), long.len()), (1, 1));
    check(Phase::Generated, &short);
}

#[test]
fn packed_documents() {
    check(Phase::Prompt, &packed_problems());
    check(Phase::Generated, &packed_problems());
}

#[test]
fn states_merge_to_the_golden_results() {
    for case in cases("merge") {
        let (outs, lses) = (case.tensor("part_out"), case.tensor("part_lse"));
        let (dim, parts) = (outs.shape[outs.shape.len() - 1], outs.shape[0]);
        let rows = lses.data.len() / parts;
        let (outs, lses) = (outs.to_f32(), lses.to_f32());
        let part = |part: usize, row: usize| {
            let n = part * rows + row;
            SoftmaxState::from_output(&outs[n * dim..(n + 1) * dim], lses[n])
        };
        let (mut out, mut lse) = (vec![], vec![]);
        for row in 0..rows {
            let mut state = SoftmaxState::new(dim);
            (0..parts).for_each(|p| state.merge(&part(p, row)));
            let mut row = vec![f32::NAN; dim];
            lse.push(f64::from(state.finish(&mut row)));
            out.extend(row.into_iter().map(f64::from));
        }
        case.check("out", &out, case.tolerance("f32"));
        case.check("lse", &lse, case.tolerance("f32"));
    }
}
