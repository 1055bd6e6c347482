//! Sections that see across segments by their definitions in f64: all scores of a query, one by one.

use foveal_lm::testing::TinyTensor;
use serde_json::Value;

use crate::latent::tensor;
use crate::recurrent::{Memory, sigmoid};
use crate::sections::{Rows, Tensors, dot};

/// The tensors that a section has beyond its layer's.
pub(crate) fn tensors(
    section: &Value,
    heads: usize,
    (layer, n): (usize, usize),
    (width, dim): (usize, usize),
) -> Vec<TinyTensor> {
    let matrix =
        |part: &str, shape: &[usize]| tensor(layer, &format!("sections.{n}.{part}"), shape);
    // Of a name that does not end in "weight".
    let vector = |part: &str, len| {
        let made = matrix(part, &[len]);
        let hugging_face = made.hugging_face.strip_suffix(".weight").unwrap().to_owned();
        TinyTensor { hugging_face, ..made }
    };
    match section["name"].as_str().unwrap() {
        "transformer_xl" => vec![
            matrix("r_proj", &[heads * dim, width]),
            vector("content_bias", heads * dim),
            vector("position_bias", heads * dim),
        ],
        "infini" => vec![vector("gate", heads)],
        "memorizing" => vec![vector("gate", heads), vector("scale", heads)],
        _ => vec![],
    }
}

/// What such a section gives, `[tokens][heads · dim]`; `None` for another one.
pub(crate) fn mix(
    section: &Value,
    tensors: &Tensors<'_>,
    (n, [(first, heads), (first_kv, kv_heads)]): (usize, [(usize, usize); 2]),
    (dim, scale): (usize, f64),
) -> Option<Rows> {
    let of = match section["name"].as_str().unwrap() {
        "transformer_xl" => transformer_xl,
        "infini" => infini,
        "memorizing" => memorizing,
        _ => return None,
    };
    let mut out = vec![vec![]; tensors.v.len()];
    for head in 0..heads {
        let kv = first_kv + head * kv_heads / heads;
        let cut = |x: &Rows, head: usize| -> Rows {
            x.iter().map(|row| row[head * dim..(head + 1) * dim].to_vec()).collect()
        };
        let [(q, k), (rotated_q, rotated_k)] =
            [tensors.plain, tensors.rotated].map(|[q, k]| (cut(q, first + head), cut(k, kv)));
        let v = cut(tensors.v, kv);
        let own = Head { q, k, rotated_q, rotated_k, v, scale, number: head };
        let rows = of(
            section,
            &own,
            &|part| (tensors.vector)(&format!("sections.{n}.{part}")),
            &|x| (tensors.project)(&format!("sections.{n}.r_proj"), x),
            tensors.inputs[0].len(),
        );
        out.iter_mut().zip(rows).for_each(|(out, row)| out.extend(row));
    }
    Some(out)
}

/// One query head with its keys and values.
struct Head {
    q: Rows,
    k: Rows,
    rotated_q: Rows,
    rotated_k: Rows,
    v: Rows,
    scale: f64,
    number: usize,
}

type Vector<'a> = &'a dyn Fn(&str) -> Vec<f64>;
type Project<'a> = &'a dyn Fn(&Rows) -> Rows;

fn count(section: &Value, key: &str) -> usize {
    section[key].as_u64().unwrap() as usize
}

fn softmax_of(scores: &[f64], values: &[&Vec<f64>], dim: usize) -> Vec<f64> {
    let sum: f64 = scores.iter().map(|score| score.exp()).sum();
    let mut out = vec![0.0; dim];
    for (score, v) in scores.iter().zip(values) {
        out.iter_mut().zip(*v).for_each(|(out, v)| *out += score.exp() / sum * v);
    }
    out
}

fn transformer_xl(
    section: &Value,
    head: &Head,
    vector: Vector<'_>,
    project: Project<'_>,
    width: usize,
) -> Rows {
    let (segment, memory) = (count(section, "segment"), count(section, "memory"));
    let clamp = section["clamp"].as_u64().map_or(usize::MAX, |clamp| clamp as usize);
    let dim = head.v[0].len();
    let own = |x: Vec<f64>| x[head.number * dim..(head.number + 1) * dim].to_vec();
    let (u, v) = (own(vector("content_bias")), own(vector("position_bias")));
    let moved = |x: &[f64], by: &[f64]| x.iter().zip(by).map(|(x, by)| x + by).collect::<Vec<_>>();
    let by_distance = |p: usize| {
        let angle = |c: usize| p as f64 * 10000f64.powf(-2.0 * c as f64 / width as f64);
        let sines = (0..width / 2).map(|c| angle(c).sin());
        own(project(&vec![sines.chain((0..width / 2).map(|c| angle(c).cos())).collect()]).remove(0))
    };
    let table: Rows = (0..head.q.len()).map(|p| by_distance(p.min(clamp))).collect();
    let row = |i: usize| {
        let first = match section["same_length"] == true {
            true => (i + 1).saturating_sub(memory),
            false => (i / segment * segment).saturating_sub(memory),
        };
        let score = |j: usize| {
            let content = dot(&moved(&head.q[i], &u), &head.k[j]);
            head.scale * (content + dot(&moved(&head.q[i], &v), &table[i - j]))
        };
        let values: Vec<_> = head.v[first..=i].iter().collect();
        softmax_of(&(first..=i).map(score).collect::<Vec<_>>(), &values, dim)
    };
    (0..head.q.len()).map(row).collect()
}

fn infini(section: &Value, head: &Head, vector: Vector<'_>, _: Project<'_>, _: usize) -> Rows {
    let segment = count(section, "segment");
    let dim = head.v[0].len();
    let g = sigmoid(vector("gate")[head.number]);
    let map = |x: &[f64]| -> Vec<f64> {
        x.iter().map(|&x| if x > 0.0 { x + 1.0 } else { x.exp() }).collect()
    };
    let (q, k) = match section["rotated"] == false {
        true => (&head.q, &head.k),
        false => (&head.rotated_q, &head.rotated_k),
    };
    let mut memory = Memory::new(dim);
    let mut out = vec![];
    for start in (0..head.q.len()).step_by(segment) {
        let end = (start + segment).min(head.q.len());
        let read = |memory: &Memory, x: &[f64]| {
            let below = dot(x, &memory.sums);
            let scale = if below == 0.0 { 0.0 } else { 1.0 / below };
            memory.read(x).into_iter().map(|x| scale * x).collect::<Vec<_>>()
        };
        let row = |i: usize| -> Vec<f64> {
            let scores: Vec<f64> = (start..=i).map(|j| head.scale * dot(&q[i], &k[j])).collect();
            let local = softmax_of(&scores, &head.v[start..=i].iter().collect::<Vec<_>>(), dim);
            let held = read(&memory, &map(&head.q[i]));
            held.iter().zip(local).map(|(held, local)| g * held + (1.0 - g) * local).collect()
        };
        out.extend((start..end).map(row));
        if end - start < segment {
            continue;
        }
        let written: Vec<(Vec<f64>, Vec<f64>)> = (start..end)
            .map(|j| {
                let key = map(&head.k[j]);
                let held = match section["update"] == "delta" {
                    true => read(&memory, &key),
                    false => vec![0.0; dim],
                };
                (key, head.v[j].iter().zip(held).map(|(v, held)| v - held).collect())
            })
            .collect();
        written.iter().for_each(|(key, value)| memory.write(key, value));
    }
    out
}

fn memorizing(section: &Value, head: &Head, vector: Vector<'_>, _: Project<'_>, _: usize) -> Rows {
    let [segment, top, capacity] = ["segment", "top", "capacity"].map(|key| count(section, key));
    let dim = head.v[0].len();
    let g = sigmoid(vector("gate")[head.number]);
    let scale = vector("scale")[head.number].abs();
    let unit = |x: &[f64]| {
        let length = (dot(x, x) + 1e-6).sqrt();
        x.iter().map(|x| x / length).collect::<Vec<f64>>()
    };
    let row = |i: usize| {
        let start = i / segment * segment;
        let q = unit(&head.q[i]);
        let score = |k: &[f64]| scale * dot(&q, k);
        let before = if section["previous"] == true { segment } else { 0 };
        let near = start.saturating_sub(before)..=i;
        let scores: Vec<f64> = near.clone().map(|j| score(&unit(&head.k[j]))).collect();
        let local = softmax_of(&scores, &head.v[near].iter().collect::<Vec<_>>(), dim);
        let mut entries: Vec<(f64, Vec<f64>)> = (start.saturating_sub(capacity)..start)
            .map(|j| (score(&unit(&head.k[j])), head.v[j].clone()))
            .collect();
        entries.sort_by(|a, b| b.0.total_cmp(&a.0));
        entries.truncate(top);
        let scores: Vec<f64> = entries.iter().map(|(score, _)| *score).collect();
        let values: Vec<_> = entries.iter().map(|(_, v)| v).collect();
        let held = softmax_of(&scores, &values, dim);
        held.iter().zip(local).map(|(held, local)| g * held + (1.0 - g) * local).collect()
    };
    (0..head.q.len()).map(row).collect()
}
