//! Reformer against its definition in f64 and its golden vectors, given buckets; and the hash that makes buckets.

mod support;

use foveal::mask::{Dense, Extent, Site};
use foveal::reference::{Input, Options, attention_backward, attention_with};
use foveal::sparse::{
    AngularHash, Buckets, LshState, LshTokens, Reformer, ReformerForward, SelfLogit, StateHeads,
};
use foveal::{Cpu, Error, Level, Mask, Phase, Scale, Shape, Tensor, Threads};
use std::num::NonZeroUsize;
use support::golden::cases;
use support::{Random, cpus};

fn one() -> Cpu {
    Cpu { level: Level::detect().unwrap(), threads: Threads::ONE }
}

/// Causal, strict, and buckets cut by themselves.
type Ways = (bool, bool, bool);

/// How often each row sees each key where each bucket is cut by itself.
fn counts_apart(rounds: &[&[u32]], chunk: usize, causal: bool) -> Vec<Vec<usize>> {
    let tokens = rounds[0].len();
    let mut counts = vec![vec![0; tokens]; tokens];
    for own in rounds {
        let place = |t: usize| own[..t].iter().filter(|&&other| other == own[t]).count() / chunk;
        for (i, j) in (0..tokens).flat_map(|i| (0..tokens).map(move |j| (i, j))) {
            let near = place(j) == place(i) || place(j) + 1 == place(i);
            counts[i][j] += usize::from(own[i] == own[j] && near && (j <= i || !causal));
        }
    }
    counts
}

/// How often each row sees each key, in the words of the paper: sort, cut, look one chunk back. The chunks of all
/// rounds lie in a ring.
fn counts(rounds: &[&[u32]], chunk: usize, (causal, strict, apart): Ways) -> Vec<Vec<usize>> {
    if apart {
        return counts_apart(rounds, chunk, causal);
    }
    let tokens = rounds[0].len();
    let mut ring: Vec<Vec<(usize, (usize, u32))>> = vec![];
    for (round, buckets) in rounds.iter().enumerate() {
        let mut order: Vec<usize> = (0..tokens).collect();
        order.sort_by_key(|&token| (buckets[token], token));
        let entries: Vec<_> = order.into_iter().map(|t| (t, (round, buckets[t]))).collect();
        ring.extend(entries.chunks(chunk).map(<[_]>::to_vec));
    }
    let mut counts = vec![vec![0; tokens]; tokens];
    for n in 0..ring.len() {
        let back = &ring[(n + ring.len() - 1) % ring.len()];
        for &(row, bucket) in &ring[n] {
            for &(key, other) in ring[n].iter().chain(back) {
                let seen = (key <= row || !causal) && (bucket == other || !strict);
                counts[row][key] += usize::from(seen);
            }
        }
    }
    counts
}

struct Case {
    qk: Tensor<f32>,
    v: Tensor<f32>,
    d_out: Tensor<f32>,
    buckets: Buckets,
    chunk: usize,
    ways: Ways,
}

impl Case {
    fn random(shape: Shape, rounds: usize, chunk: usize, ways: Ways) -> Case {
        let mut random = Random::new((shape.seq * 31 + rounds * 7 + chunk) as u64);
        let Shape { batch, seq, heads, .. } = shape;
        let most = seq.div_ceil(chunk).max(2);
        let data = (0..batch * heads * rounds * seq).map(|_| random.below(most) as u32).collect();
        Case {
            qk: random.tensor(shape, 2.0),
            v: random.tensor(Shape { dim: 5, ..shape }, 1.0),
            d_out: random.tensor(Shape { dim: 5, ..shape }, 1.0),
            buckets: Buckets::given([batch, heads, rounds, seq], data).unwrap(),
            chunk,
            ways,
        }
    }

    fn layer(&self) -> Reformer {
        let (causal, strict, apart) = self.ways;
        let layer = Reformer::new(self.chunk).unwrap().causal(causal).cpu(one());
        let layer = layer.scale(Scale::Value(1.5));
        let layer = if strict { layer.strict_buckets() } else { layer };
        if apart { layer.bucket_chunks() } else { layer }
    }

    fn run(&self, layer: &Reformer) -> (ReformerForward<f32>, Tensor<f32>, Tensor<f32>) {
        let (qk, v) = (self.qk.view(), self.v.view());
        let forward = layer.forward(qk, v, &self.buckets).unwrap();
        let (d_qk, d_v) =
            layer.backward((qk, v), &self.buckets, &forward, self.d_out.view()).unwrap();
        (forward, d_qk, d_v)
    }

    /// Output, log-sum-exp and both gradients, as they are defined.
    fn define(&self) -> [Vec<f64>; 4] {
        let shape = self.qk.shape();
        let Shape { batch, seq, heads, dim } = shape;
        let wide = |x: &Tensor<f32>| x.as_slice().iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let [q, v, d_out] = [&self.qk, &self.v, &self.d_out].map(wide);
        let norms: Vec<f64> =
            q.chunks(dim).map(|q| q.iter().map(|x| x * x).sum::<f64>().sqrt()).collect();
        let k: Vec<f64> = q.iter().enumerate().map(|(n, x)| x / norms[n / dim]).collect();
        let mut seen = vec![];
        for (b, head) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let rounds: Vec<_> =
                (0..self.buckets.rounds()).map(|r| self.buckets.of(b, head, r)).collect();
            seen.extend(counts(&rounds, self.chunk, self.ways));
        }
        let visible: Vec<bool> = seen.iter().flatten().map(|&n| n > 0).collect();
        let extent = Extent { batch, heads, queries: seq, keys: seq };
        let mask: Mask = Dense::new(&visible, extent).unwrap().into();
        let bias = |at: Site, row: usize, j: usize| {
            let count = seen[(at.batch * heads + at.q_head) * seq + row][j] as f64;
            count.ln() - if row == j { 1e5 } else { 0.0 }
        };
        let options = Options { bias: Some(&bias), ..Options::new(1.5, &mask) };
        let value = self.v.shape();
        let inputs = [
            Input { data: &q, shape },
            Input { data: &k, shape },
            Input { data: &v, shape: value },
        ];
        let partial = attention_with(inputs, &options).unwrap();
        let zeros = vec![0.0; batch * seq * heads];
        let upstream =
            [Input { data: &d_out, shape: value }, Input { data: &zeros, shape: shape.per_row() }];
        let mut d = attention_backward(inputs, &options, upstream).unwrap();
        for (n, norm) in norms.iter().enumerate() {
            let own = n * dim..(n + 1) * dim;
            let along: f64 = own.clone().map(|x| k[x] * d.d_k[x]).sum();
            own.for_each(|x| d.d_q[x] += (d.d_k[x] - k[x] * along) / norm);
        }
        [partial.out, partial.lse, d.d_q, d.d_v]
    }

    fn check(&self, cpu: Cpu, bound: f64) {
        let (forward, d_qk, d_v) = self.run(&self.layer().cpu(cpu));
        let got = [&forward.result.out, &forward.result.lse, &d_qk, &d_v];
        for (name, (got, expected)) in
            ["out", "lse", "d_qk", "d_v"].into_iter().zip(got.into_iter().zip(self.define()))
        {
            let worst = support::error(got.as_slice(), &expected);
            let Case { chunk, ways, .. } = self;
            let shape = self.qk.shape();
            let rounds = self.buckets.rounds();
            assert!(
                worst < bound,
                "{name} {shape} {rounds} rounds, chunks of {chunk} {ways:?}: {worst:e}"
            );
        }
    }
}

const WAYS: [Ways; 6] = [
    (true, false, false),
    (false, false, false),
    (true, true, false),
    (false, true, false),
    (true, false, true),
    (false, true, true),
];

#[test]
fn every_small_size_agrees_with_the_definition() {
    for seq in (0..=12).chain([19, 33]) {
        for (rounds, chunk) in (1..=3).flat_map(|r| [1, 2, 3, 5, 40].map(|chunk| (r, chunk))) {
            for ways in WAYS {
                let shape = Shape { batch: 2, seq, heads: 2, dim: 4 };
                Case::random(shape, rounds, chunk, ways).check(one(), 5e-6);
            }
        }
    }
}

#[test]
fn the_mask_is_what_some_round_shows() {
    use foveal::mask::Pattern;
    for (seq, chunk, rounds) in [(9, 3, 1), (30, 4, 2), (31, 8, 3), (5, 40, 2), (0, 3, 1)] {
        for ways in WAYS {
            let shape = Shape { batch: 2, seq, heads: 2, dim: 4 };
            let case = Case::random(shape, rounds, chunk, ways);
            let mask = case.layer().mask(&case.buckets);
            for (batch, q_head) in (0..2).flat_map(|b| (0..2).map(move |h| (b, h))) {
                let rounds: Vec<_> =
                    (0..rounds).map(|r| case.buckets.of(batch, q_head, r)).collect();
                let counts = counts(&rounds, chunk, ways);
                let site = Site { batch, q_head, kv_head: q_head };
                for (i, j) in (0..seq).flat_map(|i| (0..seq).map(move |j| (i, j))) {
                    assert_eq!(mask.allows(site, i as isize, j), counts[i][j] > 0, "{i} {j}");
                }
                assert!(!mask.allows(site, -1, 0) && !mask.allows(site, seq as isize, 0));
            }
        }
    }
}

#[test]
fn every_level_and_number_of_threads_agrees_over_several_tiles() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for ways in WAYS {
        let shape = Shape { batch: 1, seq: 700, heads: 2, dim: 20 };
        let case = Case::random(shape, 2, 48, ways);
        for cpu in cpus() {
            case.check(cpu, 1e-5);
        }
        let with = |threads| {
            let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
            case.run(&case.layer().cpu(Cpu { threads, ..one() }))
        };
        let first = with(1);
        assert!(pool.install(|| with(3)) == first);
    }
}

#[test]
fn many_thousand_tokens_sorted_by_and_by_agree_with_one_row_at_a_time() {
    let shape = Shape { batch: 1, seq: 9001, heads: 1, dim: 4 };
    let case = Case::random(shape, 2, 32, (true, false, false));
    let (forward, _, d_v) = case.run(&case.layer());
    let rounds: Vec<_> = (0..2).map(|r| case.buckets.of(0, 0, r)).collect();
    let seen = counts(&rounds, 32, (true, false, false));
    let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    let rows: Vec<Vec<f64>> = case.qk.as_slice().chunks(4).map(wide).collect();
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (mut out, mut expected_d_v) = (vec![], vec![0.0; 9001 * 5]);
    for (i, q) in rows.iter().enumerate() {
        let logits: Vec<(usize, f64)> = (0..=i)
            .filter(|&j| seen[i][j] > 0)
            .map(|j| {
                let product: f64 = q.iter().zip(&rows[j]).map(|(a, b)| a * b).sum();
                let own = if i == j { 1e5 } else { 0.0 };
                (j, 1.5 * product / norm(&rows[j]) - own + (seen[i][j] as f64).ln())
            })
            .collect();
        let max = logits.iter().fold(f64::NEG_INFINITY, |max, x| max.max(x.1));
        let sum: f64 = logits.iter().map(|x| (x.1 - max).exp()).sum();
        let mut row = [0.0; 5];
        for (j, logit) in logits {
            let weight = (logit - max).exp() / sum;
            for c in 0..5 {
                row[c] += weight * f64::from(case.v.as_slice()[j * 5 + c]);
                expected_d_v[j * 5 + c] += weight * f64::from(case.d_out.as_slice()[i * 5 + c]);
            }
        }
        out.extend(row);
    }
    assert!(support::error(forward.result.out.as_slice(), &out) < 5e-6);
    assert!(support::error(d_v.as_slice(), &expected_d_v) < 5e-6);
}

#[test]
fn later_tokens_change_no_bit_of_earlier_rows() {
    let shape = Shape { batch: 1, seq: 300, heads: 2, dim: 8 };
    for apart in [false, true] {
        check_no_leak(Case::random(shape, 2, 16, (true, false, apart)));
    }
}

fn check_no_leak(mut case: Case) {
    let before = case.run(&case.layer()).0.result;
    for from in [299, 200, 1] {
        for x in [&mut case.qk, &mut case.v] {
            let shape = x.shape();
            let mut data = x.as_slice().to_vec();
            data[from * 2 * shape.dim..].iter_mut().for_each(|x| *x = 3.0 - *x);
            *x = Tensor::from_vec(data, shape).unwrap();
        }
        let after = case.run(&case.layer()).0.result;
        for (t, h) in (0..from).flat_map(|t| [(t, 0), (t, 1)]) {
            assert_eq!(after.out.view().row(0, t, h), before.out.view().row(0, t, h));
            assert_eq!(after.lse.view().row(0, t, h), before.lse.view().row(0, t, h));
        }
    }
}

#[test]
fn reformer_agrees_with_its_golden_vectors() {
    for case in cases("reformer") {
        let heads = |name: &str| {
            let array = case.tensor(name);
            let &[batch, seq, dim] = &array.shape[..] else { panic!("{:?}", array.shape) };
            Tensor::from_vec(array.to_f32(), Shape { batch, seq, heads: 1, dim }).unwrap()
        };
        let [qk, v, d_out] = ["qk", "v", "d_out"].map(heads);
        let buckets = case.tensor("buckets");
        let &[batch, rounds, tokens] = &buckets.shape[..] else { panic!("{:?}", buckets.shape) };
        let data = buckets.data.iter().map(|&x| x as u32).collect();
        let buckets = Buckets::given([batch, 1, rounds, tokens], data).unwrap();
        let text = |name: &str| case.options[name].as_str().unwrap();
        let self_logit = match text("self") {
            "logit replaced by -5e4" => SelfLogit::Replace(-5e4),
            "1e5 subtracted from the logit" => SelfLogit::Subtract(1e5),
            other => panic!("{}: {other}", case.name),
        };
        let mut layer = Reformer::new(case.number("chunk") as usize)
            .unwrap()
            .causal(case.options["causal"].as_bool().unwrap())
            .self_logit(self_logit)
            .scale(Scale::Value(case.number("scale") as f32));
        if text("bucket_mismatch") == "hidden" {
            layer = layer.strict_buckets();
        }
        // All rounds together.
        let rounds = &case.tensor("round_lse").data;
        let lse: Vec<f64> = (0..batch * tokens)
            .map(|n| {
                let all = rounds.len() / batch / tokens;
                let of = |r: usize| rounds[(n / tokens * all + r) * tokens + n % tokens];
                let max = (0..all).map(of).fold(f64::NEG_INFINITY, f64::max);
                max + (0..all).map(|r| (of(r) - max).exp()).sum::<f64>().ln()
            })
            .collect();
        for cpu in cpus() {
            let layer = layer.cpu(cpu);
            let forward = layer.forward(qk.view(), v.view(), &buckets).unwrap();
            let (d_qk, d_v) =
                layer.backward((qk.view(), v.view()), &buckets, &forward, d_out.view()).unwrap();
            let results = [("out", &forward.result.out), ("grad.qk", &d_qk), ("grad.v", &d_v)];
            for (name, got) in results {
                let got: Vec<f64> = got.as_slice().iter().map(|&x| x.into()).collect();
                case.check(name, &got, case.tolerance("f32").min(5e-5));
            }
            let got: Vec<f64> = forward.result.lse.as_slice().iter().map(|&x| x.into()).collect();
            support::golden::check("lse of all rounds", &got, &lse, 2e-5);
        }
    }
}

#[test]
fn a_hash_looks_at_directions_alone() {
    let mut random = Random::new(1);
    let shape = Shape { batch: 1, seq: 200, heads: 2, dim: 12 };
    let x: Tensor<f32> = random.tensor(shape, 1.0);
    let times = |by: f32| {
        let data = x.as_slice().iter().map(|x| by * x).collect();
        Tensor::from_vec(data, shape).unwrap()
    };
    for buckets in [2, 16, 128, 200, 4096] {
        let hash = AngularHash::new(12, buckets, 3, 5).unwrap();
        let count = hash.buckets_per_round();
        assert!(count >= buckets && count < 2 * buckets + 64, "{buckets} became {count}");
        for cpu in cpus() {
            let own = hash.buckets(x.view(), cpu).unwrap();
            assert_eq!(own, hash.buckets(times(4.0).view(), cpu).unwrap());
            let opposite = hash.buckets(times(-1.0).view(), cpu).unwrap();
            let mut used = vec![false; count];
            for (head, round) in [(0, 0), (1, 1), (0, 2)] {
                for (&a, &b) in own.of(0, head, round).iter().zip(opposite.of(0, head, round)) {
                    assert_ne!(a, b, "opposite directions");
                    if buckets <= 128 {
                        assert_eq!(b as usize, (a as usize + count / 2) % count);
                    }
                    used[a as usize] = true;
                }
            }
            let distinct = used.iter().filter(|&&used| used).count();
            assert!(distinct > count.min(300) / 2, "{distinct} of {count}");
        }
        assert_ne!(hash, AngularHash::new(12, buckets, 3, 6).unwrap());
        assert_eq!(hash, AngularHash::new(12, buckets, 3, 5).unwrap());
    }
}

#[test]
fn near_directions_share_buckets_more_often() {
    let mut random = Random::new(2);
    let shape = Shape { batch: 1, seq: 2000, heads: 1, dim: 16 };
    let x: Tensor<f32> = random.tensor(shape, 1.0);
    let hash = AngularHash::new(16, 16, 1, 3).unwrap();
    let own = hash.buckets(x.view(), one()).unwrap();
    let mut share = |noise: f32| {
        let data = x.as_slice().iter().map(|x| x + noise * random.number()).collect();
        let moved = Tensor::from_vec(data, shape).unwrap();
        let other = hash.buckets(moved.view(), one()).unwrap();
        own.of(0, 0, 0).iter().zip(other.of(0, 0, 0)).filter(|(a, b)| a == b).count()
    };
    let shares = [0.0, 0.1, 1.0, 100.0].map(&mut share);
    assert_eq!(shares[0], 2000);
    assert!(shares.is_sorted_by(|a, b| a > b), "{shares:?}");
    assert!(shares[1] > 1600 && shares[3] < 400, "{shares:?}");
}

#[test]
fn bad_parameters_are_refused_with_the_rule() {
    for (refusal, rule) in [
        (Reformer::new(0).map(|_| ()), "at least 1"),
        (AngularHash::new(4, 0, 1, 0).map(|_| ()), "an even number"),
        (AngularHash::new(4, 7, 1, 0).map(|_| ()), "an even number"),
        (AngularHash::new(4, 8, 0, 0).map(|_| ()), "at least 1"),
        (Buckets::given([1, 1, 0, 4], vec![]).map(|_| ()), "at least 1"),
    ] {
        let error = refusal.unwrap_err();
        assert!(matches!(error, Error::InvalidParameter { .. }));
        assert!(error.to_string().contains(rule), "{error}");
    }
    let short = Buckets::given([1, 1, 1, 4], vec![0; 3]);
    assert!(matches!(short, Err(Error::BufferLength { expected: 4, got: 3, .. })));
    let shape = Shape { batch: 1, seq: 4, heads: 1, dim: 2 };
    let x = Tensor::<f32>::zeros(shape).unwrap();
    let layer = Reformer::new(2).unwrap();
    let other = Buckets::given([1, 1, 1, 5], vec![0; 5]).unwrap();
    let refused = layer.forward(x.view(), x.view(), &other);
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
    let hash = AngularHash::new(3, 2, 1, 0).unwrap();
    assert!(matches!(hash.buckets(x.view(), one()), Err(Error::ShapeMismatch { .. })));
    // Vectors of zeros have no direction, and no gradient through it.
    let own = Buckets::given([1, 1, 1, 4], vec![0; 4]).unwrap();
    let forward = layer.forward(x.view(), x.view(), &own).unwrap();
    let (d_qk, _) = layer.backward((x.view(), x.view()), &own, &forward, x.view()).unwrap();
    assert!(d_qk.as_slice().iter().all(|x| x.is_finite()));
}

/// Tokens of a text, its queries before and after something like a rotation, and its values.
fn tokens(seq: usize, heads: usize) -> [Tensor<f32>; 3] {
    let mut random = Random::new(seq as u64);
    let shape = Shape { batch: 1, seq, heads, dim: 8 };
    [
        random.tensor(shape, 1.0),
        random.tensor(shape, 1.0),
        random.tensor(Shape { dim: 5, ..shape }, 1.0),
    ]
}

fn of(x: &[Tensor<f32>; 3], range: std::ops::Range<usize>) -> LshTokens<'_, f32> {
    let [hashed, qk, v] = x.each_ref().map(|x| support::tokens(x, range.clone()));
    LshTokens { hashed, qk, v }
}

fn state(cpu: Cpu, heads: usize, chunk: usize, buckets: usize) -> LshState<f32> {
    let layer = Reformer::new(chunk).unwrap().bucket_chunks().cpu(cpu);
    let heads = StateHeads { heads, kv_heads: heads, key_dim: 8, value_dim: 5 };
    layer.state(AngularHash::new(8, buckets, 2, 3).unwrap(), heads).unwrap()
}

#[test]
fn a_prompt_has_the_bits_of_whole_sequences_however_it_is_cut() {
    for cpu in cpus() {
        for (seq, chunk, buckets) in
            [(0, 2, 2), (40, 1, 4), (40, 3, 4), (900, 40, 4), (900, 7, 200)]
        {
            let x = tokens(seq, 2);
            let hash = AngularHash::new(8, buckets, 2, 3).unwrap();
            let layer = Reformer::new(chunk).unwrap().bucket_chunks().cpu(cpu);
            let own = hash.buckets(x[0].view(), cpu).unwrap();
            let whole = layer.forward(x[1].view(), x[2].view(), &own).unwrap().result;
            for step in [900, 300, 13, 1] {
                let mut state = state(cpu, 2, chunk, buckets);
                for start in (0..seq).step_by(step) {
                    let range = start..(start + step).min(seq);
                    let got = state.forward(of(&x, range.clone()), Phase::Prompt).unwrap();
                    for (t, h) in range.clone().flat_map(|t| [(t, 0), (t, 1)]) {
                        let at = t - start;
                        assert_eq!(got.out.view().row(0, at, h), whole.out.view().row(0, t, h));
                        assert_eq!(got.lse.view().row(0, at, h), whole.lse.view().row(0, t, h));
                    }
                }
                assert_eq!(state.tokens(), seq);
            }
        }
    }
}

#[test]
fn generated_tokens_agree_with_the_prompt_and_only_what_is_seen_is_held() {
    for (chunk, buckets, prompt) in [(1, 4, 0), (3, 4, 17), (5, 2, 60)] {
        let x = tokens(150, 2);
        let (mut expected, mut got) =
            (state(one(), 2, chunk, buckets), state(one(), 2, chunk, buckets));
        let all = expected.forward(of(&x, 0..150), Phase::Prompt).unwrap();
        got.forward(of(&x, 0..prompt), Phase::Prompt).unwrap();
        let hash = AngularHash::new(8, buckets, 2, 3).unwrap();
        let own = hash.buckets(x[0].view(), one()).unwrap();
        for t in prompt..150 {
            let one = got.forward(of(&x, t..t + 1), Phase::Generated).unwrap();
            for h in 0..2 {
                let pairs = one.out.view().row(0, 0, h).iter().zip(all.out.view().row(0, t, h));
                pairs.for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "token {t}: {a} {b}"));
            }
            // The next token of a bucket sees the tokens of its own chunk so far and of the one before.
            let seen = |head: usize, token: usize| {
                (0..2).any(|round| {
                    let own = &own.of(0, head, round)[..=t];
                    let count =
                        |end: usize| own[..end].iter().filter(|&&b| b == own[token]).count();
                    count(token) / chunk + 1 >= count(t + 1) / chunk
                })
            };
            let held = (0..2).flat_map(|h| (0..=t).filter(move |&token| seen(h, token))).count();
            assert_eq!(got.entries(), held, "token {t}, chunks of {chunk}");
            assert!(got.entries() <= 2 * 2 * buckets * (2 * chunk - 1).max(1) + 2);
        }
        got.clear();
        assert_eq!((got.tokens(), got.entries(), got.bytes()), (0, 0, 0));
    }
}

#[test]
fn a_state_asks_for_chunks_that_later_tokens_leave_alone() {
    let hash = || AngularHash::new(8, 4, 2, 3).unwrap();
    let heads = StateHeads { heads: 2, kv_heads: 2, key_dim: 8, value_dim: 5 };
    let layer = Reformer::new(4).unwrap();
    let shared = StateHeads { kv_heads: 1, ..heads };
    for (refused, rule) in [
        (layer.state::<f32>(hash(), heads), "chunks of buckets"),
        (layer.bucket_chunks().causal(false).state(hash(), heads), "causal"),
        (layer.bucket_chunks().state(hash(), shared), "one for each query head"),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::InvalidParameter { .. }));
        assert!(error.to_string().contains(rule), "{error}");
    }
    let mut state = state(one(), 2, 4, 4);
    let x = tokens(5, 3);
    let refused = state.forward(of(&x, 0..5), Phase::Prompt);
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
    assert_eq!(state.tokens(), 0);
}
