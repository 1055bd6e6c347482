//! Segments with memory through whole layers, with all gradients, in f64 and with the engine.
//!
//! ```text
//! h̃ = [memory; x]    q = x W_qᵀ   k, v = h̃ W_kᵀ, h̃ W_vᵀ   r = R W_rᵀ    attention W_oᵀ, then perhaps norms and a network
//! ```

use super::support::backward::Call;
use super::support::cpus;
use super::support::golden::{Case, cases, check};
use super::{Encoding, backward, forward};
use foveal::position::RelativeEncoding;
use foveal::reference::{Input, Options, Relative, attention_backward, attention_with};
use foveal::{Attention, Cpu, Mask, Scale, Shape, Tensor};
use std::collections::BTreeMap;

/// Numbers of queries, keys, values, keys by distance, u and v, or of their gradients.
type Parts = [Vec<f64>; 6];

/// One call of attention in a layer.
struct Attend<'a> {
    /// Queries, keys (as values) and keys by distance.
    shapes: [Shape; 3],
    parts: &'a Parts,
    mask: Mask,
    scale: f64,
}

/// What computes attention.
trait Kernels {
    /// R, `[distances, features]`.
    fn table(&self, distances: usize, features: usize) -> Vec<f64>;
    fn forward(&self, call: &Attend<'_>) -> Vec<f64>;
    fn backward(&self, call: &Attend<'_>, d_out: &[f64]) -> Parts;
}

struct Definition;

impl Attend<'_> {
    fn with<T>(&self, run: impl FnOnce([Input<'_>; 3], &Options<'_>) -> T) -> T {
        let [q, k, r] = self.shapes;
        let [queries, keys, values, distances, u, v] = self.parts;
        let inputs =
            [(queries, q), (keys, k), (values, k)].map(|(data, shape)| Input { data, shape });
        let keys = Input { data: distances, shape: r };
        let relative = Some(Relative { keys, content_bias: u, position_bias: v });
        run(inputs, &Options { relative, ..Options::new(self.scale, &self.mask) })
    }
}

impl Kernels for Definition {
    fn table(&self, distances: usize, features: usize) -> Vec<f64> {
        let angle =
            |p: usize, c: usize| p as f64 * 10000f64.powf(-2.0 * c as f64 / features as f64);
        let half = features / 2;
        let row = |p| {
            (0..features)
                .map(move |c| if c < half { angle(p, c).sin() } else { angle(p, c - half).cos() })
        };
        (0..distances).flat_map(row).collect()
    }

    fn forward(&self, call: &Attend<'_>) -> Vec<f64> {
        call.with(|inputs, options| attention_with(inputs, options).unwrap().out)
    }

    fn backward(&self, call: &Attend<'_>, d_out: &[f64]) -> Parts {
        let q = call.shapes[0];
        let zeros = vec![0.0; q.per_row().checked_len().unwrap()];
        let upstream =
            [Input { data: d_out, shape: q }, Input { data: &zeros, shape: q.per_row() }];
        let d = call.with(|inputs, options| attention_backward(inputs, options, upstream).unwrap());
        [d.d_q, d.d_k, d.d_v, d.d_relative_keys, d.d_content_bias, d.d_position_bias]
    }
}

/// The kernels in f32.
struct Engine(Cpu);

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

impl Engine {
    fn with<T>(
        &self,
        call: &Attend<'_>,
        d_out: &[f64],
        run: impl FnOnce(&Attention<'_>, &Call<f32>, &Encoding) -> T,
    ) -> T {
        let [q, k, r] = call.shapes;
        let [queries, keys, values, distances, u, v] = call.parts.each_ref().map(|x| narrow(x));
        let tensor = |data, shape| Tensor::from_vec(data, shape).unwrap();
        let encoding = Encoding { keys: tensor(distances, r), content_bias: u, position_bias: v };
        let (q, d_out) = (tensor(queries, q), tensor(narrow(d_out), q));
        let own = Call { q, k: tensor(keys, k), v: tensor(values, k), d_out, d_lse: None };
        let attention = Attention::new()
            .mask(call.mask.clone())
            .scale(Scale::Value(call.scale as f32))
            .cpu(self.0)
            .relative_encoding(encoding.view());
        run(&attention, &own, &encoding)
    }
}

impl Kernels for Engine {
    fn table(&self, distances: usize, features: usize) -> Vec<f64> {
        wide(&RelativeEncoding::sinusoids(distances, features).unwrap())
    }

    fn forward(&self, call: &Attend<'_>) -> Vec<f64> {
        let zeros = vec![0.0; call.parts[0].len()];
        self.with(call, &zeros, |attention, own, _| {
            let (prompt, generated) =
                (forward(attention, own, false), forward(attention, own, true));
            for (a, b) in prompt.out.as_slice().iter().zip(generated.out.as_slice()) {
                assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a} {b}");
            }
            wide(prompt.out.as_slice())
        })
    }

    fn backward(&self, call: &Attend<'_>, d_out: &[f64]) -> Parts {
        let d = self.with(call, d_out, backward);
        [d.d_q, d.d_k, d.d_v, d.d_keys, d.d_content_bias, d.d_position_bias].map(|x| wide(&x))
    }
}

/// `x wᵀ` for rows of `width` numbers.
fn project(x: &[f64], w: &[f64], width: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(width).flat_map(|x| w.chunks(width).map(move |w| dot(x, w))).collect()
}

/// `d w`, the gradient of `x`, for `w` with rows of `width` numbers.
fn back(d: &[f64], w: &[f64], width: usize) -> Vec<f64> {
    let mut d_x = vec![];
    for d in d.chunks(w.len() / width) {
        let mut row = vec![0.0; width];
        for (d, w) in d.iter().zip(w.chunks(width)) {
            row.iter_mut().zip(w).for_each(|(x, w)| *x += d * w);
        }
        d_x.extend(row);
    }
    d_x
}

/// `dᵀ x`, the gradient of `w`, for `x` with rows of `width` numbers.
fn outer(d: &[f64], x: &[f64], width: usize) -> Vec<f64> {
    let rows = x.len() / width;
    let out = d.len() / rows;
    let mut d_w = vec![0.0; out * width];
    for (d, x) in d.chunks(out).zip(x.chunks(width)) {
        for (d, row) in d.iter().zip(d_w.chunks_mut(width)) {
            row.iter_mut().zip(x).for_each(|(w, x)| *w += d * x);
        }
    }
    d_w
}

fn plus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// Gradients by name of the tensor.
#[derive(Default)]
struct Grads(BTreeMap<String, Vec<f64>>);

impl Grads {
    fn add(&mut self, name: &str, d: &[f64]) {
        match self.0.get_mut(name) {
            Some(sum) => sum.iter_mut().zip(d).for_each(|(sum, d)| *sum += d),
            None => drop(self.0.insert(name.to_owned(), d.to_vec())),
        }
    }
}

/// Normalised rows, the rows after weight and offset, and 1/σ of each.
struct Norm {
    centred: Vec<f64>,
    out: Vec<f64>,
    inverse: Vec<f64>,
}

/// A golden case with what computes it.
struct Layer<'a> {
    case: &'a Case,
    kernels: &'a dyn Kernels,
    batch: usize,
    features: usize,
}

/// What a segment's forward keeps.
struct Segment {
    x: Vec<f64>,
    /// `[memory; x]`, before and after the norm of pre-norm layers.
    context: Vec<f64>,
    norm: Option<Norm>,
    parts: Parts,
    shapes: [Shape; 3],
    table: Vec<f64>,
    attended: Vec<f64>,
    /// Of blocks: what the first norm (post-norm) or the second (pre-norm) saw and gave, and inside of the network.
    middle: Option<Middle>,
    out: Vec<f64>,
}

struct Middle {
    /// Post-norm: LN(x + attention). Pre-norm: LN2(x + attention).
    norm: Norm,
    hidden: Vec<f64>,
    /// Post-norm: LN2 of the sum.
    last: Option<Norm>,
}

impl Layer<'_> {
    fn w(&self, name: &str) -> &[f64] {
        &self.case.tensor(name).data
    }

    fn is_block(&self) -> Option<bool> {
        let block = self.case.options["block"].as_str().unwrap();
        block.contains("LN2").then(|| block.contains("normalised inside"))
    }

    fn norm(&self, x: &[f64], prefix: &str) -> Norm {
        let (w, b) = (self.w(&format!("{prefix}ln_w")), self.w(&format!("{prefix}ln_b")));
        let (mut norm, n) =
            (Norm { centred: vec![], out: vec![], inverse: vec![] }, self.features as f64);
        for row in x.chunks(self.features) {
            let mean = row.iter().sum::<f64>() / n;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            let inverse = (variance + 1e-5).sqrt().recip();
            norm.inverse.push(inverse);
            for ((x, w), b) in row.iter().zip(w).zip(b) {
                norm.centred.push((x - mean) * inverse);
                norm.out.push((x - mean) * inverse * w + b);
            }
        }
        norm
    }

    /// The gradient of a norm's input; adds those of weight and offset.
    fn norm_back(&self, norm: &Norm, d: &[f64], prefix: &str, grads: &mut Grads) -> Vec<f64> {
        let (n, w) = (self.features, self.w(&format!("{prefix}ln_w")));
        let mut d_x = vec![];
        for ((d, centred), inverse) in d.chunks(n).zip(norm.centred.chunks(n)).zip(&norm.inverse) {
            let product: Vec<f64> = d.iter().zip(centred).map(|(d, c)| d * c).collect();
            grads.add(&format!("{prefix}ln_w"), &product);
            grads.add(&format!("{prefix}ln_b"), d);
            let scaled: Vec<f64> = d.iter().zip(w).map(|(d, w)| d * w).collect();
            let mean = scaled.iter().sum::<f64>() / n as f64;
            let along = scaled.iter().zip(centred).map(|(d, c)| d * c).sum::<f64>() / n as f64;
            d_x.extend(scaled.iter().zip(centred).map(|(d, c)| inverse * (d - mean - along * c)));
        }
        d_x
    }

    /// The rows of a sequence's tensors one after the other: memory, then segment.
    fn join(&self, memory: &[f64], x: &[f64]) -> Vec<f64> {
        let of = |x: &[f64], b: usize| {
            x[b * x.len() / self.batch..(b + 1) * x.len() / self.batch].to_vec()
        };
        (0..self.batch).flat_map(|b| [of(memory, b), of(x, b)].concat()).collect()
    }

    /// The last `n` rows of each sequence.
    fn last(&self, x: &[f64], n: usize) -> Vec<f64> {
        let len = x.len() / self.batch;
        x.chunks(len.max(1))
            .flat_map(|x| x[len - (n * self.features).min(len)..].to_vec())
            .collect()
    }

    fn attend<'s>(&self, shapes: [Shape; 3], parts: &'s Parts) -> Attend<'s> {
        let mask = match self.case.options["same_length"].as_bool() {
            Some(true) => Mask::window(self.case.number("mem_len") as usize),
            _ => Mask::causal(),
        };
        Attend { shapes, parts, mask, scale: self.case.number("scale") }
    }

    fn segment(&self, memory: &[f64], x: &[f64]) -> Segment {
        let (features, heads) = (self.features, self.case.number("heads") as usize);
        let context = self.join(memory, x);
        let rows = |x: &[f64]| x.len() / features / self.batch;
        let (length, keys) = (rows(x), rows(&context));
        let norm = (self.is_block() == Some(true)).then(|| self.norm(&context, ""));
        let seen = norm.as_ref().map_or(&context, |norm| &norm.out);
        let dim = self.case.number("head_dim") as usize;
        let clamp = self.case.options["clamp_len"].as_u64().map_or(keys, |n| n as usize + 1);
        let distances = keys.min(clamp);
        let table = self.kernels.table(distances, features);
        let shape = |seq| Shape { batch: self.batch, seq, heads, dim };
        let shapes = [shape(length), shape(keys), Shape { batch: 1, ..shape(distances) }];
        let parts = [
            project(&self.last(seen, length), self.w("w_q"), features),
            project(seen, self.w("w_k"), features),
            project(seen, self.w("w_v"), features),
            project(&table, self.w("w_r"), features),
            self.w("u").to_vec(),
            self.w("v").to_vec(),
        ];
        let attended = self.kernels.forward(&self.attend(shapes, &parts));
        let projected = project(&attended, self.w("w_o"), heads * dim);
        let (middle, out) = self.rest(x, projected);
        let x = x.to_vec();
        Segment { x, context, norm, parts, shapes, table, attended, middle, out }
    }

    /// What comes after attention.
    fn rest(&self, x: &[f64], projected: Vec<f64>) -> (Option<Middle>, Vec<f64>) {
        let Some(before) = self.is_block() else { return (None, projected) };
        let sum = plus(x, &projected);
        let norm = self.norm(&sum, if before { "ff_" } else { "" });
        let width = self.case.tensor("ff_b1").data.len();
        let rows = project(&norm.out, self.w("ff_w1"), self.features);
        let biased = rows.chunks(width).flat_map(|row| plus(row, self.w("ff_b1")));
        let hidden: Vec<f64> = biased.map(|x| x.max(0.0)).collect();
        let network = project(&hidden, self.w("ff_w2"), width);
        let network: Vec<f64> =
            network.chunks(self.features).flat_map(|row| plus(row, self.w("ff_b2"))).collect();
        if before {
            return (Some(Middle { norm, hidden, last: None }), plus(&sum, &network));
        }
        let last = self.norm(&plus(&norm.out, &network), "ff_");
        let out = last.out.clone();
        (Some(Middle { norm, hidden, last: Some(last) }), out)
    }

    /// Gradients of x and of attention's projected output.
    fn rest_back(&self, segment: &Segment, d: &[f64], grads: &mut Grads) -> [Vec<f64>; 2] {
        let Some(middle) = &segment.middle else { return [vec![0.0; d.len()], d.to_vec()] };
        let (features, width) = (self.features, self.case.tensor("ff_b1").data.len());
        let d = match &middle.last {
            Some(last) => self.norm_back(last, d, "ff_", grads),
            None => d.to_vec(),
        };
        d.chunks(features).for_each(|d| grads.add("ff_b2", d));
        grads.add("ff_w2", &outer(&d, &middle.hidden, width));
        let mut d_hidden = back(&d, self.w("ff_w2"), width);
        d_hidden
            .iter_mut()
            .zip(&middle.hidden)
            .for_each(|(d, &x)| *d *= f64::from(u8::from(x > 0.0)));
        d_hidden.chunks(width).for_each(|d| grads.add("ff_b1", d));
        grads.add("ff_w1", &outer(&d_hidden, &middle.norm.out, features));
        let d_normed = back(&d_hidden, self.w("ff_w1"), features);
        let d_sum = match &middle.last {
            Some(_) => self.norm_back(&middle.norm, &plus(&d, &d_normed), "", grads),
            None => plus(&d, &self.norm_back(&middle.norm, &d_normed, "ff_", grads)),
        };
        [d_sum.clone(), d_sum]
    }

    /// Adds the gradients of parameters, and returns that of x.
    fn segment_back(&self, segment: &Segment, d_out: &[f64], grads: &mut Grads) -> Vec<f64> {
        let features = self.features;
        let [mut d_x, d_projected] = self.rest_back(segment, d_out, grads);
        let inner = segment.shapes[0].heads * segment.shapes[0].dim;
        grads.add("w_o", &outer(&d_projected, &segment.attended, inner));
        let d_attended = back(&d_projected, self.w("w_o"), inner);
        let [d_q, d_k, d_v, d_r, d_u, d_w] =
            self.kernels.backward(&self.attend(segment.shapes, &segment.parts), &d_attended);
        let seen = segment.norm.as_ref().map_or(&segment.context, |norm| &norm.out);
        let length = segment.shapes[0].seq;
        grads.add("w_q", &outer(&d_q, &self.last(seen, length), features));
        grads.add("w_k", &outer(&d_k, seen, features));
        grads.add("w_v", &outer(&d_v, seen, features));
        grads.add("w_r", &outer(&d_r, &segment.table, features));
        grads.add("u", &d_u);
        grads.add("v", &d_w);
        let memory = vec![0.0; segment.context.len() - segment.x.len()];
        let mut d_seen =
            plus(&back(&d_k, self.w("w_k"), features), &back(&d_v, self.w("w_v"), features));
        d_seen = plus(&d_seen, &self.join(&memory, &back(&d_q, self.w("w_q"), features)));
        if let Some(norm) = &segment.norm {
            d_seen = self.norm_back(norm, &d_seen, "", grads);
        }
        // Gradients stop at the memory.
        d_x = plus(&d_x, &self.last(&d_seen, length));
        d_x
    }

    /// All segments in order, and the memory after them.
    fn segments(&self, inputs: &[Vec<f64>]) -> (Vec<Segment>, Vec<f64>) {
        let mut memory = vec![];
        let mut segments = vec![];
        for x in inputs {
            let segment = self.segment(&memory, x);
            memory = self.last(&segment.context, self.case.number("mem_len") as usize);
            segments.push(segment);
        }
        (segments, memory)
    }

    fn check_training(&self, tolerance: f64) {
        let count = self.case.number("segments") as usize;
        let numbered = |name: &str| -> Vec<Vec<f64>> {
            (1..=count).map(|s| self.w(&format!("{name}{s}")).to_vec()).collect()
        };
        let (segments, _) = self.segments(&numbered("x"));
        let (mut all, mut last) = (Grads::default(), Grads::default());
        for (s, (segment, d_out)) in segments.iter().zip(numbered("d_out")).enumerate() {
            self.case.check(&format!("out{}", s + 1), &segment.out, tolerance);
            let d_x = self.segment_back(segment, &d_out, &mut all);
            all.add(&format!("x{}", s + 1), &d_x);
            if s + 1 == count {
                self.segment_back(segment, &d_out, &mut last);
            } else {
                last.add(&format!("x{}", s + 1), &vec![0.0; d_x.len()]);
            }
        }
        let mut checked = 0;
        for name in self.case.tensors.keys() {
            let what = format!("{} {name}", self.case.name);
            let (grads, of) =
                match (name.strip_prefix("grad."), name.strip_prefix("grad_last_only.")) {
                    (Some(of), _) => (&all, of),
                    (_, Some(of)) => (&last, of),
                    _ => continue,
                };
            check(&what, &grads.0[of], self.w(name), tolerance);
            checked += 1;
        }
        assert!(checked >= 9, "{}: {checked} gradients", self.case.name);
    }

    fn check_evaluation(&self, tolerance: f64) {
        let (x, length) = (self.case.tensor("x"), self.case.number("segment") as usize);
        let seq = x.shape[1];
        let inputs: Vec<Vec<f64>> = (0..seq / length)
            .map(|s| {
                let part = s * length * self.features..(s + 1) * length * self.features;
                x.data.chunks(seq * self.features).flat_map(|x| x[part.clone()].to_vec()).collect()
            })
            .collect();
        let (segments, memory) = self.segments(&inputs);
        let out = segments.iter().fold(vec![], |out, segment| self.join(&out, &segment.out));
        self.case.check("out", &out, tolerance);
        self.case.check("final_memory", &memory, tolerance);
    }
}

#[test]
fn segments_with_memory_and_their_gradients() {
    let cases = cases("transformer_xl");
    assert_eq!(cases.len(), 9);
    for case in &cases {
        let training = case.tensors.contains_key("x1");
        let x = case.tensor(if training { "x1" } else { "x" });
        let (batch, features) = (x.shape[0], x.shape[2]);
        let run = |kernels: &dyn Kernels, tolerance| {
            let layer = Layer { case, kernels, batch, features };
            match training {
                true => layer.check_training(tolerance),
                false => layer.check_evaluation(tolerance),
            }
        };
        run(&Definition, case.tolerance("f64"));
        for cpu in cpus() {
            run(&Engine(cpu), case.tolerance("f32"));
        }
    }
}
