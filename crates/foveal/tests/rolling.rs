//! Rolling caches: the golden case, the definition in f64 for all small sizes, and what bits may not depend on.

mod support;

use foveal::cache::{
    ContiguousCache, KvStore, QuantizedCache, Rolling, RollingCall, RollingScratch, codes::Bits,
    pieces,
};
use foveal::position::{Rope, RopeConfig, RopeLayout};
use foveal::{Attention, Cpu, Element, Error, Phase, Scale, Shape, Tensor, TensorMut, Workspace};
use half::{bf16, f16};
use support::golden::cases;
use support::{Random, cpus, error, tokens};

/// A text's queries, keys and values, none of them rotated.
struct Text {
    q: Tensor<f32>,
    k: Tensor<f32>,
    v: Tensor<f32>,
    rope: Rope,
    scale: f64,
    sinks: Option<Vec<f32>>,
}

impl Text {
    fn new(tokens: usize, [heads, kv_heads]: [usize; 2], dim: usize) -> Text {
        let mut random = Random::new(tokens as u64);
        let mut tensor = |heads| random.tensor(Shape { batch: 1, seq: tokens, heads, dim }, 1.5);
        let (q, k, v) = (tensor(heads), tensor(kv_heads), tensor(kv_heads));
        let rope = Rope::new(RopeConfig::new(dim, RopeLayout::HalfSplit)).unwrap();
        Text { q, k, v, rope, scale: 0.4, sinks: None }
    }

    fn len(&self) -> usize {
        self.q.shape().seq
    }

    /// The definition: keys kept as they are, all rotated anew by their places at each step.
    fn expected(&self, rolling: Rolling) -> Vec<f64> {
        let Shape { heads, dim, .. } = self.q.shape();
        let group = heads / self.k.shape().heads;
        let mut out = vec![];
        for (t, head) in (0..self.len()).flat_map(|t| (0..heads).map(move |head| (t, head))) {
            let newest = (t + 1).saturating_sub(rolling.window()).max(rolling.sinks());
            let kept: Vec<usize> =
                (0..rolling.sinks().min(t + 1)).chain(newest..(t + 1).max(newest)).collect();
            let q = self.rotated(self.q.view().row(0, t, head), kept.len() - 1);
            let logits = kept.iter().enumerate().map(|(place, &j)| {
                let k = self.rotated(self.k.view().row(0, j, head / group), place);
                self.scale * q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>()
            });
            let weights: Vec<f64> = logits.map(f64::exp).collect();
            let sink = self.sinks.as_ref().map_or(0.0, |sinks| f64::from(sinks[head]).exp());
            let sum = weights.iter().sum::<f64>() + sink;
            out.extend((0..dim).map(|d| {
                let value = |&j: &usize| f64::from(self.v.view().row(0, j, head / group)[d]);
                weights.iter().zip(&kept).map(|(w, j)| w / sum * value(j)).sum::<f64>()
            }));
        }
        out
    }

    fn rotated(&self, x: &[f32], position: usize) -> Vec<f64> {
        let mut y: Vec<f64> = x.iter().map(|&x| x.into()).collect();
        let half = self.rope.frequencies().len();
        for (c, (cos, sin)) in self.rope.cos_sin(position).enumerate() {
            let (a, b) = (f64::from(x[c]), f64::from(x[c + half]));
            (y[c], y[c + half]) = (a * cos - b * sin, b * cos + a * sin);
        }
        y
    }

    /// The text in calls of these lengths, over and over, through the stores.
    fn run(
        &self,
        rolling: Rolling,
        stores: &mut dyn Stores,
        (cpu, phase): (Cpu, Phase),
        lengths: &[usize],
    ) -> Vec<f32> {
        let mut attention = Attention::new().scale(Scale::Value(self.scale as f32)).cpu(cpu);
        if let Some(sinks) = &self.sinks {
            attention = attention.sinks(sinks);
        }
        let (mut workspace, mut scratch) = (Workspace::new(), RollingScratch::default());
        let (mut all, mut at) = (vec![], 0);
        let mut lengths = lengths.iter().cycle();
        while at < self.len() {
            let end = (at + lengths.next().unwrap()).min(self.len());
            let [q, k] = [&self.q, &self.k].map(|x| self.turned(x, at..end, |t| t));
            let capped_q = self.turned(&self.q, at..end, |t| rolling.query_position(t));
            let first = rolling.sinks_among(at..end);
            let v = tokens(&self.v, at..end);
            stores.append((&k, v), (first.end > 0).then_some(first));
            let (out_shape, lse_shape) = (q.shape(), q.shape().per_row());
            let mut out = vec![f32::NAN; out_shape.checked_len().unwrap()];
            let mut lse = vec![f32::NAN; lse_shape.checked_len().unwrap()];
            let outputs = (
                TensorMut::new(&mut out, out_shape).unwrap(),
                TensorMut::new(&mut lse, lse_shape).unwrap(),
            );
            let [first, newest] = stores.parts();
            let (q, capped_q) = (q.view(), capped_q.view());
            let call = RollingCall { phase, q, capped_q, first, newest };
            workspace.poison();
            rolling.forward(&attention, call, outputs, &mut workspace, &mut scratch).unwrap();
            assert!(lse.iter().all(|lse| lse.is_finite()));
            stores.forget((end + 1).saturating_sub(rolling.window()));
            all.extend(out);
            at = end;
        }
        all
    }

    fn turned(
        &self,
        x: &Tensor<f32>,
        range: std::ops::Range<usize>,
        position: impl Fn(usize) -> usize,
    ) -> Tensor<f32> {
        let part = tokens(x, range.clone());
        let Shape { heads, .. } = part.shape();
        let rows = (0..range.len()).flat_map(|t| (0..heads).map(move |head| (t, head)));
        let data = rows.flat_map(|(t, head)| part.row(0, t, head).to_vec()).collect();
        let mut turned = Tensor::from_vec(data, part.shape()).unwrap();
        let positions: Vec<usize> = range.map(position).collect();
        let table = self.rope.table(positions).unwrap();
        table.rotate(foveal::Level::detect().unwrap(), turned.view_mut()).unwrap();
        turned
    }
}

/// The first tokens and the newest, in any stores.
trait Stores {
    fn append(
        &mut self,
        kv: (&Tensor<f32>, foveal::TensorRef<'_, f32>),
        first: Option<std::ops::Range<usize>>,
    );
    fn parts(&self) -> [&dyn KvStore; 2];
    fn forget(&mut self, before: usize);
}

struct Rows<E>([ContiguousCache<E>; 2]);

impl<E: Element> Rows<E> {
    fn new(text: &Text, rolling: Rolling) -> Rows<E> {
        let Shape { heads, dim, seq, .. } = text.k.shape();
        let cache = |capacity| ContiguousCache::new(heads, (dim, dim), capacity).unwrap();
        Rows([cache(rolling.sinks()), cache(seq)])
    }
}

impl<E: Element> Stores for Rows<E> {
    fn append(
        &mut self,
        (k, v): (&Tensor<f32>, foveal::TensorRef<'_, f32>),
        first: Option<std::ops::Range<usize>>,
    ) {
        if let Some(first) = first {
            let shape = Shape { seq: first.len(), ..k.shape() };
            let values: Vec<f32> = (0..first.len())
                .flat_map(|t| (0..shape.heads).map(move |head| (t, head)))
                .flat_map(|(t, head)| v.row(0, t, head).to_vec())
                .collect();
            let values = Tensor::from_vec(values, shape).unwrap();
            self.0[0].append(tokens(k, first), values.view()).unwrap();
        }
        self.0[1].append(k.view(), v).unwrap();
    }
    fn parts(&self) -> [&dyn KvStore; 2] {
        self.0.each_ref().map(|cache| cache as &dyn KvStore)
    }
    fn forget(&mut self, before: usize) {
        self.0[1].forget(before);
    }
}

#[test]
fn golden_case() {
    for case in cases("streaming") {
        let tensor = |name: &str| {
            let array = case.tensor(name);
            Tensor::from_vec(array.to_f32(), support::attention::shape(array)).unwrap()
        };
        let (q, k, v) = (tensor("q"), tensor("k"), tensor("v"));
        let rope = Rope::new(RopeConfig::new(q.shape().dim, RopeLayout::HalfSplit)).unwrap();
        let text = Text { q, k, v, rope, scale: case.number("scale"), sinks: None };
        let (sinks, window) = (case.number("sink_tokens"), case.number("recent_tokens"));
        let rolling = Rolling::new(sinks as usize, window as usize).unwrap();
        // Inputs were rounded to f32.
        case.check("out", &text.expected(rolling), 1e-7);
        for cpu in cpus() {
            for (phase, lengths) in
                [(Phase::Prompt, &[24][..]), (Phase::Prompt, &[3, 1]), (Phase::Generated, &[1])]
            {
                let mut stores = Rows::<f32>::new(&text, rolling);
                let out = text.run(rolling, &mut stores, (cpu, phase), lengths);
                let out: Vec<f64> = out.iter().map(|&x| x.into()).collect();
                case.check("out", &out, case.tolerance("f32"));
            }
        }
    }
}

#[test]
fn all_small_sizes_are_those_of_the_definition() {
    for (sinks, window) in (0..=4).flat_map(|sinks| (1..=6).map(move |window| (sinks, window))) {
        let rolling = Rolling::new(sinks, window).unwrap();
        for (length, heads) in [(1, [1, 1]), (4, [2, 1]), (9, [2, 2]), (17, [6, 2])] {
            let mut text = Text::new(length, heads, 6);
            text.sinks = (length == 9).then(|| vec![0.5, -1.0]);
            let expected = text.expected(rolling);
            for cpu in cpus() {
                for (phase, lengths) in
                    [(Phase::Prompt, &[20][..]), (Phase::Prompt, &[2, 3]), (Phase::Generated, &[1])]
                {
                    let mut stores = Rows::<f32>::new(&text, rolling);
                    let out = text.run(rolling, &mut stores, (cpu, phase), lengths);
                    let off = error(&out, &expected);
                    assert!(off <= 2e-6, "{sinks} {window} {length} {phase:?}: {off}");
                }
            }
        }
    }
}

#[test]
fn long_texts_are_those_of_the_definition_and_held_in_bounds() {
    let text = Text::new(1400, [4, 2], 16);
    for (sinks, window) in [(4, 300), (300, 20), (0, 1), (257, 256)] {
        let rolling = Rolling::new(sinks, window).unwrap();
        let expected = text.expected(rolling);
        for cpu in cpus() {
            let mut stores = Rows::<f32>::new(&text, rolling);
            let out = text.run(rolling, &mut stores, (cpu, Phase::Prompt), &[97]);
            assert!(error(&out, &expected) <= 4e-6);
            let [first, newest] = stores.parts().map(|store| store.end() - store.start());
            assert_eq!(first, sinks);
            assert!(newest < window + 256, "{newest}");
        }
    }
}

#[test]
fn cuts_and_calls_change_no_bit() {
    let text = Text::new(700, [6, 2], 8);
    let same = |rolling: Rolling, run: &mut dyn FnMut(&[usize]) -> Vec<f32>, cuts: &[&[usize]]| {
        let whole = run(cuts[0]);
        for cut in &cuts[1..] {
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&run(cut)), bits(&whole), "{rolling:?} {cut:?}");
        }
    };
    for (sinks, window) in [(4, 100), (0, 30), (260, 280)] {
        let rolling = Rolling::new(sinks, window).unwrap();
        for cpu in cpus() {
            let prompt: [&[usize]; 4] = [&[700], &[1], &[256], &[5, 130, 3]];
            let mut run = |lengths: &[usize]| {
                let mut stores = Rows::<f32>::new(&text, rolling);
                text.run(rolling, &mut stores, (cpu, Phase::Prompt), lengths)
            };
            same(rolling, &mut run, &prompt);
            let mut run = |lengths: &[usize]| {
                let mut stores = Rows::<f16>::new(&text, rolling);
                text.run(rolling, &mut stores, (cpu, Phase::Generated), lengths)
            };
            same(rolling, &mut run, &[&[1], &[64], &[3, 9]]);
        }
    }
}

/// The first tokens as bf16, the newest as codes.
struct Coded(ContiguousCache<bf16>, QuantizedCache);

impl Stores for Coded {
    fn append(
        &mut self,
        (k, v): (&Tensor<f32>, foveal::TensorRef<'_, f32>),
        first: Option<std::ops::Range<usize>>,
    ) {
        if first.is_some() {
            self.0.append(k.view(), v).unwrap();
        }
        self.1.append(k.view(), v).unwrap();
    }
    fn parts(&self) -> [&dyn KvStore; 2] {
        [&self.0, &self.1]
    }
    fn forget(&mut self, before: usize) {
        self.1.forget(before);
    }
}

#[test]
fn other_stores_are_as_close_as_they_round() {
    let text = Text::new(1300, [4, 2], 64);
    let rolling = Rolling::new(4, 900).unwrap();
    let expected = text.expected(rolling);
    for cpu in cpus() {
        let off = |stores: &mut dyn Stores| {
            // Calls that end where tiles do, and at the fourth token.
            let lengths: Vec<usize> =
                [0..4, 4..1300].into_iter().flat_map(pieces).map(|piece| piece.len()).collect();
            error(&text.run(rolling, stores, (cpu, Phase::Prompt), &lengths), &expected)
        };
        let half = off(&mut Rows::<f16>::new(&text, rolling));
        assert!((1e-5..1e-3).contains(&half), "{half}");
        let brain = off(&mut Rows::<bf16>::new(&text, rolling));
        assert!((1e-4..1e-2).contains(&brain), "{brain}");
        for (bits, limit) in [(Bits::Eight, 1e-2), (Bits::Four, 0.2)] {
            let first = ContiguousCache::new(2, (64, 64), 4).unwrap();
            let coded = QuantizedCache::new(bits, 2, (64, 64), 1300).unwrap();
            let coded = off(&mut Coded(first, coded));
            assert!(coded < limit, "{bits:?}: {coded}");
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (sinks, window) in [(3, 0), (usize::MAX, 1), (1, usize::MAX)] {
        assert!(matches!(Rolling::new(sinks, window), Err(Error::InvalidParameter { .. })));
    }
    let rolling = Rolling::new(2, 3).unwrap();
    let text = Text::new(4, [1, 1], 2);
    let (q, shape) = (text.q.view(), text.q.shape());
    let mut cache = ContiguousCache::<f32>::new(1, (2, 2), 4).unwrap();
    cache.append(text.k.view(), text.v.view()).unwrap();
    let run = |attention: &Attention<'_>, first: &dyn KvStore| {
        let (mut out, mut lse) = ([f32::NAN; 8], [f32::NAN; 4]);
        let call = RollingCall { phase: Phase::Prompt, q, capped_q: q, first, newest: &cache };
        let outputs = (
            TensorMut::new(&mut out, shape).unwrap(),
            TensorMut::new(&mut lse, shape.per_row()).unwrap(),
        );
        let (mut workspace, mut scratch) = (Workspace::new(), RollingScratch::default());
        let result = rolling.forward(attention, call, outputs, &mut workspace, &mut scratch);
        assert!(result.is_ok() || out.iter().chain(&lse).all(|x| x.is_nan()));
        result
    };
    let error = run(&Attention::new(), &cache).unwrap_err();
    assert!(matches!(error, Error::LengthMismatch { expected: 2, got: 4, .. }), "{error}");
    let mut first = ContiguousCache::<f32>::new(1, (2, 2), 2).unwrap();
    first.append(tokens(&text.k, 0..2), tokens(&text.v, 0..2)).unwrap();
    run(&Attention::new(), &first).unwrap();
    let biased = Attention::new().alibi(foveal::position::Slopes::Standard);
    assert!(matches!(run(&biased, &first), Err(Error::InvalidParameter { .. })));
}
