//! Sections of recurrences by their definitions in f64: a matrix for each head, token by token.

use foveal_lm::testing::TinyTensor;
use serde_json::Value;

use crate::latent::tensor;
use crate::sections::{Rows, Tensors, dot};

const NAMES: [&str; 8] = [
    "linear",
    "performer",
    "efficient",
    "retention",
    "scalar_decay",
    "gla",
    "delta",
    "gated_delta",
];

/// Whether a mixer has such a section.
pub(crate) fn among(mixer: &Value) -> bool {
    match mixer {
        Value::Array(all) => all.iter().any(among),
        one => NAMES.contains(&one["name"].as_str().unwrap()),
    }
}

fn taps(section: &Value) -> usize {
    let usual = if section["name"].as_str().unwrap().ends_with("delta") { 4 } else { 0 };
    section["conv"].as_u64().map_or(usual, |taps| taps as usize)
}

/// The tensors that a section has beyond its layer's.
pub(crate) fn tensors(
    section: &Value,
    heads: usize,
    (layer, n): (usize, usize),
    (width, dim): (usize, usize),
) -> Vec<TinyTensor> {
    let name = section["name"].as_str().unwrap();
    let matrix =
        |part: &str, shape: &[usize]| tensor(layer, &format!("sections.{n}.{part}"), shape);
    // Of a name that does not end in "weight".
    let vector = |part: &str, len| {
        let made = matrix(part, &[len]);
        let hugging_face = made.hugging_face.strip_suffix(".weight").unwrap().to_owned();
        TinyTensor { hugging_face, ..made }
    };
    let mut all = vec![];
    if matches!(name, "scalar_decay" | "gated_delta") {
        all.push(matrix("decay_proj", &[heads, width]));
        all.extend([vector("a_log", heads), vector("dt_bias", heads)]);
    }
    if name == "gla" {
        let rank = section["rank"].as_u64().unwrap_or(16) as usize;
        all.push(matrix("decay_down", &[rank, width]));
        all.push(matrix("decay_up", &[heads * dim, rank]));
        all.push(vector("decay_up.bias", heads * dim));
    }
    if name.ends_with("delta") {
        all.push(matrix("beta_proj", &[heads, width]));
    }
    if matches!(name, "retention" | "scalar_decay" | "gla" | "delta" | "gated_delta") {
        all.push(matrix("gate_proj", &[heads * dim, width]));
        all.push(matrix("norm", &[dim]));
    }
    if taps(section) > 0 {
        let shape = [heads * dim, 1, taps(section)];
        all.extend(["q_conv", "k_conv", "v_conv"].map(|part| matrix(part, &shape)));
    }
    all
}

/// What a recurrent section gives, `[tokens][heads · dim]`; `None` for another one.
pub(crate) fn mix(
    section: &Value,
    tensors: &Tensors<'_>,
    (n, first): (usize, usize),
    (heads, dim): (usize, usize),
) -> Option<Rows> {
    let name = section["name"].as_str().unwrap();
    if !NAMES.contains(&name) {
        return None;
    }
    let part = |part: &str| format!("sections.{n}.{part}");
    let project = |name: &str, x: &Rows| (tensors.project)(&part(name), x);
    let cut = |x: &Rows| -> Rows {
        x.iter().map(|row| row[first * dim..(first + heads) * dim].to_vec()).collect()
    };
    let [q, k] = if name == "retention" { tensors.rotated } else { tensors.plain };
    let convolve = |x: Rows, name: &str| match taps(section) {
        0 => x,
        taps => convolved(&x, &(tensors.vector)(&part(&format!("{name}.weight"))), taps),
    };
    let (q, k) = (convolve(cut(q), "q_conv"), convolve(cut(k), "k_conv"));
    let v = if tensors.bare { cut(tensors.v) } else { convolve(cut(tensors.v), "v_conv") };
    let decay = decays(section, tensors, n, (heads, dim));
    let beta: Rows = match name.ends_with("delta") {
        true => {
            let most = if section["negative_eigenvalues"] == true { 2.0 } else { 1.0 };
            let rows = project("beta_proj", tensors.inputs);
            rows.into_iter()
                .map(|row| row.into_iter().map(|x| most * sigmoid(x)).collect())
                .collect()
        }
        false => vec![],
    };
    let mut out = vec![vec![]; q.len()];
    for head in 0..heads {
        let mut state = Memory::new(dim);
        for t in 0..q.len() {
            let own = |x: &Rows| x[t][head * dim..(head + 1) * dim].to_vec();
            let (q, k, v) = (own(&q), own(&k), own(&v));
            out[t].extend(match name {
                "linear" => {
                    let map = |x: f64| match section["map"] == "relu" {
                        true => x.max(0.0),
                        false => {
                            if x > 0.0 {
                                x + 1.0
                            } else {
                                x.exp()
                            }
                        }
                    };
                    let phi = |x: &[f64]| x.iter().map(|&x| map(x)).collect::<Vec<_>>();
                    state.write(&phi(&k), &v);
                    let below = dot(&phi(&q), &state.sums) + 1e-6;
                    state.read(&phi(&q)).into_iter().map(|x| x / below).collect()
                }
                "efficient" => {
                    let weight: Vec<f64> = k.iter().map(|k| k.exp()).collect();
                    state.write(&weight, &v);
                    let sum: f64 = q.iter().map(|q| q.exp()).sum();
                    let p: Vec<f64> =
                        q.iter().zip(&state.sums).map(|(q, z)| q.exp() / sum / z).collect();
                    state.read(&p)
                }
                "delta" | "gated_delta" => {
                    let (q, k) = (unit(&q), unit(&k));
                    state.decay(&decay(head, t));
                    let held = state.read(&k);
                    let new = v.iter().zip(held).map(|(v, held)| beta[t][head] * (v - held));
                    state.write(&k, &new.collect::<Vec<_>>());
                    state.scaled(&q)
                }
                _ => {
                    state.decay(&decay(head, t));
                    state.write(&k, &v);
                    state.scaled(&q)
                }
            });
        }
    }
    if tensors.bare || matches!(name, "linear" | "performer" | "efficient") {
        return Some(out);
    }
    let gate = project("gate_proj", tensors.inputs);
    let weight = (tensors.vector)(&part("norm.weight"));
    for (row, gate) in out.iter_mut().zip(&gate) {
        for (x, gate) in row.chunks_mut(dim).zip(gate.chunks(dim)) {
            let root = (dot(x, x) / dim as f64 + 1e-6).sqrt();
            for ((x, w), gate) in x.iter_mut().zip(&weight).zip(gate) {
                *x = *x / root * w * gate * sigmoid(*gate);
            }
        }
    }
    Some(out)
}

/// The decays of a head's token, of each channel.
fn decays<'a>(
    section: &Value,
    tensors: &Tensors<'a>,
    n: usize,
    (heads, dim): (usize, usize),
) -> Box<dyn Fn(usize, usize) -> Vec<f64> + 'a> {
    let project = |part: &str, x: &Rows| (tensors.project)(&format!("sections.{n}.{part}"), x);
    let vector = |part: &str| (tensors.vector)(&format!("sections.{n}.{part}"));
    match section["name"].as_str().unwrap() {
        "retention" => Box::new(move |head, _| vec![1.0 - (-5.0 - head as f64).exp2(); dim]),
        "scalar_decay" | "gated_delta" => {
            let rows = project("decay_proj", tensors.inputs);
            let (a_log, bias) = (vector("a_log"), vector("dt_bias"));
            Box::new(move |head, t| {
                let step = (rows[t][head] + bias[head]).exp().ln_1p();
                vec![(-a_log[head].exp() * step).exp(); dim]
            })
        }
        "gla" => {
            let rows = project("decay_up", &project("decay_down", tensors.inputs));
            assert_eq!(rows[0].len(), heads * dim);
            Box::new(move |head, t| {
                let own = &rows[t][head * dim..(head + 1) * dim];
                own.iter().map(|&x| sigmoid(x).powf(1.0 / 16.0)).collect()
            })
        }
        _ => Box::new(move |_, _| vec![1.0; dim]),
    }
}

/// silu of each channel's sum over the newest `taps` inputs.
fn convolved(x: &Rows, weight: &[f64], taps: usize) -> Rows {
    let number = |t: usize, channel: usize| {
        let past = (0..taps).filter(|i| t + i + 1 >= taps);
        let sum: f64 =
            past.map(|i| weight[channel * taps + i] * x[t + i + 1 - taps][channel]).sum();
        sum * sigmoid(sum)
    };
    (0..x.len()).map(|t| (0..x[t].len()).map(|channel| number(t, channel)).collect()).collect()
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn unit(x: &[f64]) -> Vec<f64> {
    let length = (dot(x, x) + 1e-6).sqrt();
    x.iter().map(|x| x / length).collect()
}

/// A head's matrix, `[key][value]`, and the sum of its keys.
pub(crate) struct Memory {
    pub(crate) matrix: Rows,
    pub(crate) sums: Vec<f64>,
}

impl Memory {
    pub(crate) fn new(dim: usize) -> Memory {
        Memory { matrix: vec![vec![0.0; dim]; dim], sums: vec![0.0; dim] }
    }

    fn decay(&mut self, by: &[f64]) {
        for (row, by) in self.matrix.iter_mut().zip(by) {
            row.iter_mut().for_each(|x| *x *= by);
        }
    }

    pub(crate) fn write(&mut self, k: &[f64], v: &[f64]) {
        for (row, k) in self.matrix.iter_mut().zip(k) {
            row.iter_mut().zip(v).for_each(|(x, v)| *x += k * v);
        }
        self.sums.iter_mut().zip(k).for_each(|(sum, k)| *sum += k);
    }

    pub(crate) fn read(&self, q: &[f64]) -> Vec<f64> {
        let column = |d: usize| self.matrix.iter().zip(q).map(|(row, q)| q * row[d]).sum();
        (0..self.sums.len()).map(column).collect()
    }

    fn scaled(&self, q: &[f64]) -> Vec<f64> {
        let scale = (self.sums.len() as f64).sqrt().recip();
        self.read(q).into_iter().map(|x| scale * x).collect()
    }
}
