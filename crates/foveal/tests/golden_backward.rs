//! Gradients against golden vectors: the definition in f64, and the engine in f32 on every level.

mod support;

use foveal::reference::{Derivatives, Input, Options, attention_backward};
use foveal::{Attention, Cpu, Mask, Scale, Shape, Tensor};
use support::attention::{
    Problem, bucketed_problems, dropout_problems, entry, packed_problems, problems, shape,
    t5_bucket,
};
use support::backward::{Call, Wanted, gather};
use support::cpus;
use support::golden::check;

/// Gradients by the names of the golden tensors.
type Answer = Vec<(&'static str, Vec<f64>)>;

fn compare(problem: &Problem, form: &str, answer: &Answer, tolerance: f64) {
    let golden = problem.case.tensors.keys().filter(|name| name.starts_with("grad."));
    for name in golden {
        let got = answer.iter().find(|(own, _)| own == name);
        let (_, got) = got.unwrap_or_else(|| panic!("{}: no {name}", problem.case.name));
        let what = format!("{} {name} with the {form} mask", problem.case.name);
        check(&what, got, &problem.case.tensor(name).data, tolerance);
    }
}

/// The gradient of the log-sum-exp, or zeros.
fn d_lse(problem: &Problem, shape: Shape) -> Vec<f64> {
    let zeros = || vec![0.0; shape.checked_len().unwrap()];
    problem.case.tensors.get("d_lse").map_or_else(zeros, |d_lse| d_lse.data.clone())
}

/// The shape of a golden bias `[batch, heads, queries, keys]`.
fn bias_shape(problem: &Problem) -> Option<Shape> {
    problem.terms.bias.as_ref().map(|bias| {
        let &[batch, heads, seq, dim] = &bias.shape[..] else { panic!("{:?}", bias.shape) };
        Shape { batch, seq, heads, dim }
    })
}

fn define(problem: &Problem, mask: &Mask) -> Answer {
    let terms = &problem.terms;
    let sinks: Option<Vec<f64>> = problem.case.tensors.get("sinks").map(|sinks| sinks.data.clone());
    let dropped =
        |at, row, j| terms.dropout.as_ref().map_or(1.0, |factors| entry(factors, at, row, j));
    let extent = problem.extent();
    let options = Options {
        softcap: problem.case.options["softcap"].as_f64(),
        bias: Some(&|at, row, j| terms.added(extent, at, row, j)),
        sinks: sinks.as_deref(),
        dropout: Some(&dropped),
        ..Options::new(problem.scale, mask)
    };
    let inputs = problem.inputs.each_ref().map(|(shape, data)| Input { data, shape: *shape });
    let d_out = problem.case.tensor("d_out");
    let per_row = inputs[0].shape.per_row();
    let d_lse = d_lse(problem, per_row);
    let upstream =
        [Input { data: &d_out.data, shape: shape(d_out) }, Input { data: &d_lse, shape: per_row }];
    let Derivatives { d_q, d_k, d_v, d_scores, d_sinks, .. } =
        attention_backward(inputs, &options, upstream).unwrap();
    let (q, keys) = (inputs[0].shape, extent.keys);
    let behind = |i: usize, j: usize| (i + keys) as isize - (q.seq + j) as isize;
    let mut answer =
        vec![("grad.q", d_q), ("grad.k", d_k), ("grad.v", d_v), ("grad.sinks", d_sinks)];
    let slopes = gather(&d_scores, (q, keys), q.heads, |[_, i, head, j]| {
        (head, -(behind(i, j).abs() as f64))
    });
    answer.push(("grad.slopes", slopes));
    if let Some((_, both)) = terms.table {
        let table = gather(&d_scores, (q, keys), 32 * q.heads, |[_, i, head, j]| {
            (t5_bucket(behind(i, j), both) * q.heads + head, 1.0)
        });
        answer.push(("grad.table", table));
    }
    if let Some(Shape { batch, seq, heads, dim }) = bias_shape(problem) {
        let own = |index, extent| if extent == 1 { 0 } else { index };
        let bias = gather(&d_scores, (q, keys), batch * heads * seq * dim, |[b, i, h, j]| {
            (((own(b, batch) * heads + own(h, heads)) * seq + own(i, seq)) * dim + j, 1.0)
        });
        answer.push(("grad.bias", bias));
    }
    answer
}

#[test]
fn the_definition_agrees_with_the_golden_gradients() {
    let more = [packed_problems(), bucketed_problems(), dropout_problems()];
    for problem in problems().iter().chain(more.iter().flatten()) {
        // Slopes and tables are read as f32.
        let rounded = problem.terms.slopes.is_some() || problem.terms.table.is_some();
        let tolerance = problem.case.tolerance(if rounded { "f32" } else { "f64" });
        for (form, mask) in &problem.masks {
            compare(problem, form, &define(problem, mask), tolerance);
        }
    }
}

fn run(problem: &Problem, mask: &Mask, cpu: Cpu) -> Answer {
    let tensor = |shape: Shape, data: &[f64]| {
        Tensor::from_vec(data.iter().map(|&x| x as f32).collect(), shape).unwrap()
    };
    let [q, k, v] = problem.inputs.each_ref().map(|(shape, data)| tensor(*shape, data));
    let d_out = problem.case.tensor("d_out");
    let per_row = q.shape().per_row();
    let d_lse = Some(tensor(per_row, &d_lse(problem, per_row)));
    let call = Call { q, k, v, d_out: tensor(shape(d_out), &d_out.data), d_lse };
    let scale = Scale::Value(problem.scale as f32);
    let attention = Attention::new().mask(mask.clone()).scale(scale).cpu(cpu);
    let terms = &problem.terms;
    let wanted = Wanted {
        bias: bias_shape(problem),
        slopes: terms.slopes.as_ref().map_or(0, Vec::len),
        table: terms.table.as_ref().map_or(0, |(table, _)| table.len()),
        sinks: terms.sinks.as_ref().map_or(0, Vec::len),
    };
    let got = call.run_with(&terms.describe(attention), wanted);
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let mut answer = vec![
        ("grad.q", wide(&got.d_q)),
        ("grad.k", wide(&got.d_k)),
        ("grad.v", wide(&got.d_v)),
        ("grad.slopes", wide(&got.d_slopes)),
        ("grad.table", wide(&got.d_table)),
        ("grad.sinks", wide(&got.d_sinks)),
    ];
    if let Some(Shape { batch, seq, heads, dim }) = wanted.bias {
        // From the order of the engine's axes to that of the file.
        let at = |n: usize| {
            let (j, i) = (n % dim, n / dim % seq);
            let (h, b) = (n / dim / seq % heads, n / dim / seq / heads);
            f64::from(got.d_bias[((b * seq + i) * heads + h) * dim + j])
        };
        answer.push(("grad.bias", (0..batch * seq * heads * dim).map(at).collect()));
    }
    answer
}

#[test]
fn the_engine_agrees_with_the_golden_gradients() {
    let more = [packed_problems(), bucketed_problems()];
    for problem in problems().iter().chain(more.iter().flatten()) {
        for (form, mask) in &problem.masks {
            for cpu in cpus() {
                let answer = run(problem, mask, cpu);
                compare(problem, form, &answer, problem.case.tolerance("f32"));
            }
        }
    }
}
