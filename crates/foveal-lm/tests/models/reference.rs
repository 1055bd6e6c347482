//! A model by its definition: loops in f64 over the tensors of a Hugging Face folder, sharing nothing with the library.

use std::cell::RefCell;
use std::f64::consts::{PI, TAU};

use foveal_lm::testing::Tiny;
use serde_json::Value;

/// Rows of numbers, one for each token.
type Rows = Vec<Vec<f64>>;

/// The logits of every token.
pub(crate) fn logits(model: &Tiny, tokens: &[u32]) -> Rows {
    run(&Reference { model, weights: &RefCell::new(None) }, tokens)
}

fn run(reference: &Reference<'_>, tokens: &[u32]) -> Rows {
    let table = reference.vector("model.embed_tokens.weight").unwrap();
    let width = reference.count("hidden_size");
    let scale = if reference.gemma() { (width as f64).sqrt() } else { 1.0 };
    let row = |&token: &u32| {
        let at = token as usize * width;
        table[at..at + width].iter().map(|x| x * scale).collect()
    };
    let mut x: Rows = tokens.iter().map(row).collect();
    for layer in 0..reference.count("num_hidden_layers") {
        reference.layer(layer, &mut x);
    }
    let x = reference.norm("model.norm", &x).unwrap();
    let head = ["lm_head", "model.embed_tokens"];
    let head = head.into_iter().find(|name| reference.has(&format!("{name}.weight"))).unwrap();
    let mut logits = reference.project(head, &x);
    if let Some(cap) = reference.number("final_logit_softcapping") {
        logits.iter_mut().flatten().for_each(|x| *x = cap * (*x / cap).tanh());
    }
    logits
}

/// The weights of a layer, `[head][query][key]`.
pub(crate) type Heads = Vec<Rows>;

/// What each value counts for in what each head gives before norms and gates: for each layer.
pub(crate) fn weights(model: &Tiny, tokens: &[u32]) -> Vec<Heads> {
    let collected = RefCell::new(Some(vec![]));
    run(&Reference { model, weights: &collected }, tokens);
    collected.into_inner().unwrap()
}

struct Reference<'a> {
    model: &'a Tiny,
    /// Where weights are collected, if they are.
    weights: &'a RefCell<Option<Vec<Heads>>>,
}

impl Reference<'_> {
    fn number(&self, key: &str) -> Option<f64> {
        self.model.config[key].as_f64()
    }

    fn count(&self, key: &str) -> usize {
        self.number(key).unwrap() as usize
    }

    fn class(&self) -> &str {
        self.model.config["architectures"][0].as_str().unwrap()
    }

    fn gemma(&self) -> bool {
        self.class().starts_with("Gemma")
    }

    fn has(&self, name: &str) -> bool {
        self.model.values(name).is_some()
    }

    fn vector(&self, name: &str) -> Option<Vec<f64>> {
        Some(self.model.values(name)?.iter().map(|&x| x.into()).collect())
    }

    fn project(&self, name: &str, x: &Rows) -> Rows {
        let weight = self.vector(&format!("{name}.weight")).unwrap();
        let bias = self.vector(&format!("{name}.bias"));
        let row = |x: &Vec<f64>| {
            let products =
                weight.chunks(x.len()).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum());
            let mut y: Vec<f64> = products.collect();
            if let Some(bias) = &bias {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
            y
        };
        x.iter().map(row).collect()
    }

    /// Each row, or each piece of it that is as long as the norm's weight; `None` without such a norm.
    fn norm(&self, name: &str, x: &Rows) -> Option<Rows> {
        let mut weight = self.vector(&format!("{name}.weight"))?;
        let offset = if self.gemma() { 1.0 } else { 0.0 };
        weight.iter_mut().for_each(|w| *w += offset);
        let piece = |x: &[f64]| {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let root = (mean + self.number("rms_norm_eps").unwrap()).sqrt();
            x.iter().zip(&weight).map(|(x, w)| x / root * w).collect::<Vec<_>>()
        };
        Some(x.iter().map(|x| x.chunks(weight.len()).flat_map(piece).collect()).collect())
    }

    fn layer(&self, layer: usize, x: &mut Rows) {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let normed = self.norm(&name("input_layernorm"), x).unwrap();
        let mixed = self.attention(layer, &normed);
        let post = self.has(&name("pre_feedforward_layernorm.weight"));
        let mixed = match post {
            true => self.norm(&name("post_attention_layernorm"), &mixed).unwrap(),
            false => mixed,
        };
        add(x, &mixed);
        let before = if post { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let normed = self.norm(&name(before), x).unwrap();
        let mut inner = self.project(&name("mlp.gate_proj"), &normed);
        let up = self.project(&name("mlp.up_proj"), &normed);
        for (gate, up) in inner.iter_mut().flatten().zip(up.iter().flatten()) {
            let g = *gate;
            let cubic = (2.0 / PI).sqrt() * (g + 0.044715 * g.powi(3));
            let activated = match self.gemma() {
                true => 0.5 * g * (1.0 + cubic.tanh()),
                false => g / (1.0 + (-g).exp()),
            };
            *gate = activated * up;
        }
        let down = self.project(&name("mlp.down_proj"), &inner);
        add(x, &self.norm(&name("post_feedforward_layernorm"), &down).unwrap_or(down));
    }

    fn attention(&self, layer: usize, x: &Rows) -> Rows {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        if self.has(&name("kv_b_proj.weight")) {
            return self.latent_attention(layer, x);
        }
        let plain = ["q", "k"].map(|part| {
            let rows = self.project(&name(&format!("{part}_proj")), x);
            self.norm(&name(&format!("{part}_norm")), &rows).unwrap_or(rows)
        });
        let v = self.project(&name("v_proj"), x);
        let [q, k] = plain.each_ref().map(|rows| self.rotate(layer, rows.clone()));
        let (heads, dim) = (self.count("num_attention_heads"), self.count("head_dim"));
        let group = heads / self.count("num_key_value_heads");
        let scale = self.number("query_pre_attn_scalar").unwrap_or(dim as f64).sqrt().recip();
        let sinks = self.vector(&name("sinks"));
        let cap = self.number("attn_logit_softcapping");
        if let Some(sections) = crate::sections::of(&self.model.config, layer) {
            let tensors = crate::sections::Tensors {
                rotated: [&q, &k],
                plain: [&plain[0], &plain[1]],
                v: &v,
                bare: false,
                inputs: x,
                project: &|part, x| self.project(&name(part), x),
                rotate: &|rows| self.rotate(layer, rows),
                vector: &|part| self.vector(&name(part)).unwrap_or_default(),
            };
            if let Some(all) = &mut *self.weights.borrow_mut() {
                let mix = |v: &Rows| {
                    let tensors = crate::sections::Tensors { v, bare: true, ..tensors };
                    crate::sections::mix(&sections, &tensors, (dim, scale), layer)
                };
                all.push(of_unit_vectors(mix, (x.len(), v[0].len() / dim), (heads, dim)));
            }
            let mixed = crate::sections::mix(&sections, &tensors, (dim, scale), layer);
            return self.project(&name("o_proj"), &mixed);
        }
        let row = |i: usize| {
            let mut out = vec![];
            for head in 0..heads {
                let at = head / group * dim;
                let first = self.window(layer).map_or(0, |window| (i + 1).saturating_sub(window));
                let weight = |j: usize| {
                    let pairs = q[i][head * dim..][..dim].iter().zip(&k[j][at..]);
                    let score = scale * pairs.map(|(q, k)| q * k).sum::<f64>();
                    cap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
                };
                let weights: Vec<f64> = (first..=i).map(weight).collect();
                let sink = sinks.as_ref().map_or(0.0, |sinks| sinks[head].exp());
                let sum = weights.iter().sum::<f64>() + sink;
                let number = |n: usize| {
                    weights.iter().zip(first..).map(|(w, j)| w * v[j][at + n] / sum).sum::<f64>()
                };
                out.extend((0..dim).map(number));
            }
            out
        };
        self.project(&name("o_proj"), &(0..x.len()).map(row).collect())
    }

    /// DeepSeek's, in the plain form: keys and values of all heads.
    fn latent_attention(&self, layer: usize, x: &Rows) -> Rows {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let sizes = ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"];
        let [nope, rope, value, latent] = sizes.map(|key| self.count(key));
        let mut q = match self.has(&name("q_a_proj.weight")) {
            true => {
                let low = self.project(&name("q_a_proj"), x);
                let low = self.norm(&name("q_a_layernorm"), &low).unwrap();
                self.project(&name("q_b_proj"), &low)
            }
            false => self.project(&name("q_proj"), x),
        };
        let mut rows = self.project(&name("kv_a_proj_with_mqa"), x);
        let plain = rows.iter().map(|row| row[..latent].to_vec()).collect();
        let made = self.norm(&name("kv_a_layernorm"), &plain).unwrap();
        let made = self.project(&name("kv_b_proj"), &made);
        for (position, (q, row)) in q.iter_mut().zip(&mut rows).enumerate() {
            self.turn(layer, position, &mut row[latent..]);
            for head in q.chunks_mut(nope + rope) {
                self.turn(layer, position, &mut head[nope..]);
            }
        }
        let scale = self.mscale("mscale_all_dim").powi(2) / ((nope + rope) as f64).sqrt();
        let weights = |i: usize, head: usize| {
            let at = head * (nope + value);
            let weight = |j: usize| {
                let key = made[j][at..at + nope].iter().chain(&rows[j][latent..]);
                let q = &q[i][head * (nope + rope)..][..nope + rope];
                (scale * q.iter().zip(key).map(|(q, k)| q * k).sum::<f64>()).exp()
            };
            (0..=i).map(weight).collect::<Vec<f64>>()
        };
        let heads = q[0].len() / (nope + rope);
        if let Some(all) = &mut *self.weights.borrow_mut() {
            let row = |head: usize, i: usize| {
                let weights = weights(i, head);
                let sum: f64 = weights.iter().sum();
                weights.into_iter().map(|w| w / sum).chain(vec![0.0; x.len() - i - 1]).collect()
            };
            let head = |head: usize| (0..x.len()).map(|i| row(head, i)).collect();
            all.push((0..heads).map(head).collect());
        }
        let row = |i: usize| {
            let outputs = (0..heads).flat_map(|head| {
                let at = head * (nope + value);
                let weights = weights(i, head);
                let sum: f64 = weights.iter().sum();
                let number = |n: usize| {
                    weights.iter().enumerate().map(|(j, w)| w * made[j][at + nope + n] / sum).sum()
                };
                (0..value).map(number).collect::<Vec<f64>>()
            });
            outputs.collect()
        };
        self.project(&name("o_proj"), &(0..x.len()).map(row).collect())
    }

    /// `0.1 · weight · ln factor + 1`, or 1 without YaRN.
    fn mscale(&self, weight: &str) -> f64 {
        let scaling = &self.model.config["rope_scaling"];
        let factor = scaling["factor"].as_f64().unwrap_or(1.0);
        1.0 + 0.1 * scaling[weight].as_f64().unwrap_or(0.0) * factor.ln()
    }

    /// Turns neighbouring numbers, with YaRN's amplitude in DeepSeek's form.
    fn turn(&self, layer: usize, position: usize, x: &mut [f64]) {
        let (frequencies, _) = self.frequencies(layer, x.len());
        let amplitude = self.mscale("mscale") / self.mscale("mscale_all_dim");
        for (pair, frequency) in x.chunks_mut(2).zip(frequencies) {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let (a, b) = (pair[0], pair[1]);
            pair[0] = amplitude * (a * cos - b * sin);
            pair[1] = amplitude * (b * cos + a * sin);
        }
    }

    /// The window of a layer, if it has one.
    fn window(&self, layer: usize) -> Option<usize> {
        let windowed = match self.class() {
            "MistralForCausalLM" => true,
            "Gemma2ForCausalLM" | "GptOssForCausalLM" => layer.is_multiple_of(2),
            "Gemma3ForCausalLM" => layer % 6 != 5,
            _ => false,
        };
        windowed.then(|| self.count("sliding_window"))
    }

    /// Turns number `c` of each head with number `c + dim / 2`.
    fn rotate(&self, layer: usize, mut rows: Rows) -> Rows {
        let dim = self.count("head_dim");
        let (frequencies, amplitude) = self.frequencies(layer, dim);
        for (position, row) in rows.iter_mut().enumerate() {
            for head in row.chunks_mut(dim) {
                for (c, frequency) in frequencies.iter().enumerate() {
                    let (sin, cos) = (position as f64 * frequency).sin_cos();
                    let (a, b) = (head[c], head[c + dim / 2]);
                    head[c] = amplitude * (a * cos - b * sin);
                    head[c + dim / 2] = amplitude * (b * cos + a * sin);
                }
            }
        }
        rows
    }

    /// Radians a position of each pair, and what rotated numbers are multiplied by.
    fn frequencies(&self, layer: usize, dim: usize) -> (Vec<f64>, f64) {
        let local = self.class() == "Gemma3ForCausalLM" && self.window(layer).is_some();
        let theta = if local { 1e4 } else { self.number("rope_theta").unwrap() };
        let plain: Vec<f64> =
            (0..dim / 2).map(|c| theta.powf(-2.0 * c as f64 / dim as f64)).collect();
        let scaling = &self.model.config["rope_scaling"];
        let number = |key: &str| scaling[key].as_f64();
        let Some(factor) = number("factor") else { return (plain, 1.0) };
        let original = number("original_max_position_embeddings").unwrap_or(f64::NAN);
        match scaling["rope_type"].as_str().or(scaling["type"].as_str()) {
            Some("linear") => (plain.iter().map(|w| w / factor).collect(), 1.0),
            Some("llama3") => {
                let [low, high] =
                    ["low_freq_factor", "high_freq_factor"].map(|key| number(key).unwrap());
                let scaled = plain.iter().map(|w| match TAU / w {
                    length if length < original / high => *w,
                    length if length > original / low => w / factor,
                    length => {
                        let smooth = (original / length - low) / (high - low);
                        (1.0 - smooth) * w / factor + smooth * w
                    }
                });
                (scaled.collect(), 1.0)
            }
            Some("yarn") => {
                let turns =
                    |beta: f64| dim as f64 * (original / (beta * TAU)).ln() / (2.0 * theta.ln());
                let (low, high) =
                    (turns(number("beta_fast").unwrap()), turns(number("beta_slow").unwrap()));
                let (low, high) = match scaling["truncate"] {
                    Value::Bool(false) => (low, high),
                    _ => (low.floor(), high.ceil()),
                };
                let (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
                let scaled = plain.iter().enumerate().map(|(c, w)| {
                    let ramp = ((c as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    w / factor * ramp + w * (1.0 - ramp)
                });
                (scaled.collect(), 1.0 + 0.1 * factor.ln())
            }
            other => panic!("{other:?}"),
        }
    }
}

/// What a mechanism that is linear in its values makes of unit vectors in place of them, as many at a time as a value has numbers.
fn of_unit_vectors(
    mix: impl Fn(&Rows) -> Rows,
    (tokens, kv_heads): (usize, usize),
    (heads, dim): (usize, usize),
) -> Heads {
    let mut weights = vec![vec![vec![0.0; tokens]; tokens]; heads];
    for first in (0..tokens).step_by(dim) {
        let unit = |t: usize| (0..dim).map(|n| f64::from(t == first + n)).collect::<Vec<_>>();
        let values = (0..tokens).map(|t| unit(t).repeat(kv_heads)).collect();
        for (i, row) in mix(&values).iter().enumerate() {
            for (weights, row) in weights.iter_mut().zip(row.chunks(dim)) {
                let columns = first..tokens.min(first + dim);
                weights[i][columns.clone()].copy_from_slice(&row[..columns.len()]);
            }
        }
    }
    weights
}

fn add(x: &mut Rows, y: &Rows) {
    for (x, y) in x.iter_mut().flatten().zip(y.iter().flatten()) {
        *x += y;
    }
}
