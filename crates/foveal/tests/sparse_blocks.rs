//! Longformer and BigBird against the definition under a dense mask, and what they may not depend on.

mod support;

use foveal::mask::{Pattern, Site};
use foveal::plan::Backward;
use foveal::sparse::{AngularHash, BigBird, BlockPlan, Longformer, Moba, Reformer};
use foveal::{Attention, Cpu, Error, Forward, Level, Tensor, Threads};
use std::num::NonZeroUsize;
use support::backward::Call;
use support::cpus;
use support::sizes::Sizes;
use support::sparse::{assert_like, dense_of, inputs, worst_error};

fn one() -> Cpu {
    Cpu { level: Level::detect().unwrap(), threads: Threads::ONE }
}

fn square(batch: usize, tokens: usize, heads: usize, kv_heads: usize) -> Sizes {
    Sizes { batch, queries: tokens, keys: tokens, heads, kv_heads, dim: 3, value_dim: 2 }
}

/// Forward and backward where both projections are the same: the gradient is the sum of both.
fn run(layer: &Longformer, call: &Call<f32>) -> (Forward<f32>, Backward<f32>) {
    let forward = layer.forward(inputs(call), inputs(call)).unwrap();
    let [local, global] =
        layer.backward(inputs(call), inputs(call), &forward, call.d_out.view()).unwrap();
    let add = |a: &Tensor<f32>, b: &Tensor<f32>| {
        let sum = a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| a + b);
        Tensor::from_vec(sum.collect(), a.shape()).unwrap()
    };
    let backward = Backward {
        d_q: add(&local.d_q, &global.d_q),
        d_k: add(&local.d_k, &global.d_k),
        d_v: add(&local.d_v, &global.d_v),
    };
    (forward, backward)
}

/// A Longformer and its index sets, as published.
struct Case {
    layer: Longformer,
    reach: usize,
    gaps: Vec<usize>,
    global: Vec<usize>,
    causal: bool,
}

impl Case {
    fn new(reach: usize, gaps: &[usize], global: &[usize], causal: bool) -> Case {
        let layer = Longformer::new(reach).gaps(gaps.to_vec()).global(vec![global.to_vec()]);
        let layer = if causal { layer.causal() } else { layer };
        Case { layer, reach, gaps: gaps.to_vec(), global: global.to_vec(), causal }
    }

    fn sees(&self, head: usize, i: usize, j: usize) -> bool {
        let gap = self.gaps[head % self.gaps.len()];
        let steps = (0..=self.reach).map(|step| step * gap);
        let near = steps.into_iter().any(|step| i + step == j || j + step == i);
        let far = self.global.contains(&i) || self.global.contains(&j);
        (near || far) && (j <= i || !self.causal)
    }

    fn check(&self, sizes: Sizes, cpu: Cpu, bound: f64) {
        let call = Call { d_lse: None, ..Call::<f32>::random(sizes, 1) };
        let mask = dense_of([sizes.heads, sizes.queries, sizes.keys], |h, i, j| self.sees(h, i, j));
        let worst = worst_error(&run(&self.layer.clone().cpu(cpu), &call), &call, &mask);
        let Case { reach, gaps, global, causal, .. } = self;
        assert!(worst < bound, "{reach} {gaps:?} {global:?} {causal} {sizes:?}: {worst:e}");
    }
}

#[test]
fn every_small_longformer_agrees_with_the_dense_mask() {
    let globals: [&[usize]; 5] = [&[], &[0], &[3], &[0, 7, 2], &[1, 2, 3, 8]];
    for (reach, causal) in (0..5).flat_map(|reach| [false, true].map(|causal| (reach, causal))) {
        for gaps in [&[1][..], &[2], &[3], &[7], &[1, 2], &[3, 1]] {
            for global in globals {
                let case = Case::new(reach, gaps, global, causal);
                for tokens in (0..=24).filter(|&n| global.iter().all(|&g| g < n)) {
                    case.check(square(1, tokens, 2, 2), one(), 3e-6);
                }
                case.check(square(2, 20, 2, 1), one(), 3e-6);
            }
        }
    }
}

#[test]
fn the_mask_is_the_published_index_sets() {
    for causal in [false, true] {
        let case = Case::new(2, &[1, 3], &[4, 11], causal);
        for (i, j, q_head) in
            (0..20).flat_map(|i| (0..20).flat_map(move |j| (0..2).map(move |h| (i, j, h))))
        {
            let site = Site { batch: 0, q_head, kv_head: 0 };
            let got = case.layer.mask().allows(site, i as isize, j);
            assert_eq!(got, case.sees(q_head, i, j), "{causal} head {q_head}: {i} {j}");
        }
    }
}

#[test]
fn every_level_and_number_of_threads_agrees_over_several_tiles() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for causal in [false, true] {
        for gaps in [&[1][..], &[3], &[1, 2, 2, 5]] {
            let case = Case::new(40, gaps, &[0, 300, 301, 611], causal);
            let sizes = Sizes { dim: 20, value_dim: 24, ..square(2, 700, 4, 2) };
            for cpu in cpus() {
                case.check(sizes, cpu, 5e-6);
            }
            let call = Call { d_lse: None, ..Call::<f32>::random(sizes, 2) };
            let with = |threads| {
                let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
                run(&case.layer.clone().cpu(Cpu { threads, ..one() }), &call)
            };
            let first = with(1);
            assert_eq!(pool.install(|| with(3)), first);
        }
    }
}

#[test]
fn many_thousand_tokens_agree_with_the_mask() {
    for (gap, causal) in [(1, false), (3, false), (2, true)] {
        let layer = Longformer::new(100).gaps(vec![gap]).global(vec![vec![0, 5000, 8999]]);
        let layer = if causal { layer.causal() } else { layer }.cpu(one());
        let call = Call { d_lse: None, ..Call::<f32>::random(square(1, 9000, 1, 1), 3) };
        let exact = Attention::new().mask(layer.mask()).cpu(one());
        assert_like(&run(&layer, &call), &call, &exact, &format!("{gap} {causal}"));
    }
}

#[test]
fn padding_is_as_if_it_were_not_there() {
    let sizes = square(2, 30, 2, 1);
    let call = Call { d_lse: None, ..Call::<f32>::random(sizes, 4) };
    let layer = Longformer::new(3).global(vec![vec![2, 9], vec![0]]).cpu(one());
    let padded = layer.clone().lengths(vec![17, 30]);
    let forward = padded.forward(inputs(&call), inputs(&call)).unwrap();
    // What padding holds changes nothing.
    let mut other = call.clone();
    for x in [&mut other.q, &mut other.k, &mut other.v] {
        let (width, shape) = (x.shape().heads * x.shape().dim, x.shape());
        let mut data = x.as_slice().to_vec();
        data[17 * width..30 * width].fill(f32::NAN);
        *x = Tensor::from_vec(data, shape).unwrap();
    }
    let again = padded.forward(inputs(&other), inputs(&other)).unwrap();
    assert_eq!(again, forward);
    for (t, h) in (17..30).flat_map(|t| [(t, 0), (t, 1)]) {
        assert!(forward.out.view().row(0, t, h).iter().all(|&x| x == 0.0));
        assert_eq!(forward.lse.view().row(0, t, h)[0], f32::NEG_INFINITY);
    }
    let [local, global] =
        padded.backward(inputs(&other), inputs(&other), &forward, call.d_out.view()).unwrap();
    for d in [&local.d_q, &local.d_k, &local.d_v, &global.d_q, &global.d_k, &global.d_v] {
        assert!(d.as_slice().iter().all(|x| x.is_finite()));
        assert!((17..30).all(|t| d.view().row(0, t, 0).iter().all(|&x| x == 0.0)));
    }
}

#[test]
fn later_tokens_change_no_bit_of_earlier_rows_of_a_causal_longformer() {
    let sizes = Sizes { dim: 8, ..square(1, 300, 2, 2) };
    let layer = Longformer::new(9).gaps(vec![1, 2]).global(vec![vec![0, 40, 200]]).causal();
    let layer = layer.cpu(one());
    let call = Call::<f32>::random(sizes, 5);
    let before = layer.forward(inputs(&call), inputs(&call)).unwrap();
    for from in [1, 41, 200, 299] {
        let changed = |x: &Tensor<f32>| {
            let width = x.shape().heads * x.shape().dim;
            let mut data = x.as_slice().to_vec();
            data[from * width..].iter_mut().for_each(|x| *x = x.abs() + 2.0);
            Tensor::from_vec(data, x.shape()).unwrap()
        };
        let (q, k, v) = (changed(&call.q), changed(&call.k), changed(&call.v));
        let other = Call { q, k, v, ..call.clone() };
        let after = layer.forward(inputs(&other), inputs(&other)).unwrap();
        for (t, h) in (0..from).flat_map(|t| [(t, 0), (t, 1)]) {
            assert_eq!(after.out.view().row(0, t, h), before.out.view().row(0, t, h));
            assert_eq!(after.lse.view().row(0, t, h), before.lse.view().row(0, t, h));
        }
    }
}

#[test]
fn bad_longformers_are_refused_with_the_rule() {
    let call = Call::<f32>::random(square(2, 9, 2, 2), 1);
    let base = Longformer::new(2);
    for (layer, rule) in [
        (base.clone().gaps(vec![0]), "at least 1"),
        (base.clone().gaps(vec![1, 2, 3]), "one gap for all"),
        (base.clone().gaps(vec![]), "one gap for all"),
        (base.clone().global(vec![vec![9]]), "global token 9 is out of range; there are 9"),
        (base.clone().global(vec![vec![0]; 3]), "one list for all"),
        (base.clone().lengths(vec![9]), "one for each sequence"),
        (base.clone().lengths(vec![9, 10]), "length 10 is out of range"),
        (base.clone().lengths(vec![9, 4]).global(vec![vec![4]]), "global token 4"),
    ] {
        let error = layer.forward(inputs(&call), inputs(&call)).unwrap_err();
        assert!(error.to_string().contains(rule), "{error}");
    }
    let short = Call::<f32>::random(Sizes { queries: 8, ..square(2, 9, 2, 2) }, 1);
    let refused = base.forward(inputs(&short), inputs(&short));
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
    let refused = base.forward(inputs(&call), inputs(&short));
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
}

#[test]
fn published_plans_draw_as_the_released_code_does() {
    for (blocks, random) in [(30, 3), (12, 3), (11, 4), (9, 4), (8, 3), (4, 2), (3, 3), (1, 1)] {
        for seed in 0..20 {
            let plan = BlockPlan::published([2, blocks, random], seed).unwrap();
            for (head, row) in (0..blocks).flat_map(|row| [(0, row), (1, row)]) {
                let choices = plan.choices(head, row);
                let drawn: Vec<usize> = choices.iter().flatten().copied().collect();
                if row == 0 || row + 1 == blocks {
                    assert!(drawn.is_empty());
                    continue;
                }
                for (n, &block) in drawn.iter().enumerate() {
                    assert!(block.abs_diff(row) > 1 && block != 0, "{blocks} {row} {block}");
                    assert!(!drawn[..n].contains(&block), "a block twice");
                }
                let most = 2 * random + 5;
                if most < blocks {
                    assert_eq!(drawn.len(), random);
                    assert!(drawn.iter().all(|&block| block + 1 < most), "{drawn:?}");
                } else if random + 5 < blocks {
                    let few = random / 2;
                    let (near, far) = choices.split_at(few);
                    assert!(near.iter().flatten().all(|&block| block + 1 < random + 5));
                    let rest = random + 5..blocks - 1;
                    assert!(far.iter().flatten().all(|block| rest.contains(block)), "{far:?}");
                }
            }
        }
        let again = |seed| BlockPlan::published([2, blocks, random], seed).unwrap();
        assert_eq!(again(5), again(5));
    }
    let [first, other] = [1, 2].map(|seed| BlockPlan::published([1, 99, 3], seed).unwrap());
    assert_ne!(first, other);
}

#[test]
fn bigbird_of_any_length_agrees_with_its_sets() {
    for causal in [false, true] {
        for (block, tokens) in [(3, 40), (4, 41), (16, 500), (64, 700)] {
            let blocks = usize::div_ceil(tokens, block);
            let plan = BlockPlan::published([2, blocks, 2], 7).unwrap();
            let pattern = BigBird { block, plan: plan.clone(), causal };
            let sees = |head: usize, i: usize, j: usize| {
                let (row, column) = (i / block, j / block);
                let global = [row, column].iter().any(|&b| b == 0 || b + 1 == blocks);
                let drawn = plan.choices(head, row).contains(&Some(column));
                (global || row.abs_diff(column) <= 1 || drawn) && (j <= i || !causal)
            };
            let call = Call { d_lse: None, ..Call::<f32>::random(square(2, tokens, 2, 1), 8) };
            let attention = Attention::new().mask(pattern.mask().unwrap()).cpu(one());
            let forward = attention.forward(call.q.view(), call.k.view(), call.v.view()).unwrap();
            let backward = attention.backward(inputs(&call), &forward, call.d_out.view()).unwrap();
            let mask = dense_of([2, tokens, tokens], sees);
            let worst = worst_error(&(forward, backward), &call, &mask);
            assert!(worst < 5e-6, "{block} {tokens} {causal}: {worst:e}");
        }
    }
}

#[test]
fn bad_plans_are_refused_with_the_rule() {
    let given = |choices: &[Option<usize>]| BlockPlan::given([1, 3, 1], choices);
    let range = given(&[None, Some(3), None]).unwrap_err();
    assert_eq!(range, Error::OutOfRange { what: "random block of a plan", got: 3, limit: 3 });
    assert!(matches!(given(&[None; 2]), Err(Error::BufferLength { expected: 3, got: 2, .. })));
    for many in [BlockPlan::published([1, 4, 5], 0), BlockPlan::given([1, 4, 5], &[None; 20])] {
        assert!(many.unwrap_err().to_string().contains("no more than there are blocks"));
    }
    let plan = given(&[None; 3]).unwrap();
    let zero = BigBird { block: 0, plan: plan.clone(), causal: false };
    assert!(matches!(zero.mask(), Err(Error::InvalidParameter { .. })));
    // More tokens than the plan has blocks for.
    let mask = BigBird { block: 2, plan, causal: false }.mask().unwrap();
    let call = Call::<f32>::random(square(1, 7, 1, 1), 1);
    let refused = Attention::new().mask(mask).forward(call.q.view(), call.k.view(), call.v.view());
    assert!(matches!(refused, Err(Error::MaskShape { .. })));
}

/// The fewest layers after which paths lead from every token to every one that it may reach, by search.
fn paths(sees: &[&dyn Fn(usize, usize) -> bool], tokens: usize, causal: bool) -> Option<usize> {
    // A token keeps what it has reached.
    (0..=2 * tokens).find(|&layers| {
        (0..tokens).all(|from| {
            let mut at = vec![false; tokens];
            at[from] = true;
            for layer in (0..layers).rev() {
                let sees = sees[layer % sees.len()];
                at = (0..tokens)
                    .map(|j| (0..tokens).any(|i| at[i] && (i == j || sees(i, j))))
                    .collect();
            }
            (0..tokens).all(|j| at[j] || causal && j > from)
        })
    })
}

#[test]
fn reach_is_the_length_of_the_longest_shortest_path() {
    use foveal::Mask;
    use foveal::sparse::{Combine, Picture, SparseTransformer, reach};
    let tokens = 20;
    let at = |mask: &Mask, i: usize, j: usize| {
        mask.allows(Site { batch: 0, q_head: 0, kv_head: 0 }, i as isize, j)
    };
    let layer =
        |pattern: SparseTransformer, layer| pattern.combine(Combine::Interleaved { layer }).mask();
    let (strided, fixed) =
        (SparseTransformer::strided(4).unwrap(), SparseTransformer::fixed(5, 1).unwrap());
    let plan = BlockPlan::published([1, 7, 1], 2).unwrap();
    let bigbird = BigBird { block: 3, plan, causal: false }.mask().unwrap();
    let x = foveal::testing::normal(foveal::Shape { batch: 1, seq: tokens, heads: 1, dim: 8 }, 3);
    let x = x.unwrap();
    let buckets = AngularHash::new(8, 8, 2, 1).unwrap().buckets(x.view(), one()).unwrap();
    let moba = Moba::new(4, 2).unwrap();
    let moba = moba.mask(&moba.choose(x.view(), x.view()).unwrap(), tokens);
    let cases: [(&str, Vec<Mask>, Option<usize>); 11] = [
        ("causal", vec![Mask::causal()], Some(1)),
        ("window of 4", vec![Mask::window(4)], Some(7)),
        ("itself", vec![Mask::window(1)], None),
        ("strided", vec![strided.mask()], Some(2)),
        ("strided in turn", vec![layer(strided, 0), layer(strided, 1)], Some(2)),
        ("fixed", vec![fixed.mask()], Some(2)),
        ("fixed in turn", vec![layer(fixed, 0), layer(fixed, 1)], Some(2)),
        ("Longformer", vec![Longformer::new(1).global(vec![vec![3]]).mask()], Some(2)),
        ("BigBird", vec![bigbird], Some(2)),
        ("Reformer", vec![Reformer::new(5).unwrap().mask(&buckets)], None),
        ("MoBA", vec![moba], Some(3)),
    ];
    for (name, masks, expected) in cases {
        let pictures: Vec<_> =
            masks.iter().map(|mask| Picture::new(mask, 1, tokens).unwrap()).collect();
        let causal = pictures.iter().all(Picture::is_causal);
        let sees: Vec<_> = masks.iter().map(|mask| move |i, j| at(mask, i, j)).collect();
        let sees: Vec<&dyn Fn(usize, usize) -> bool> = sees.iter().map(|x| x as _).collect();
        assert_eq!(paths(&sees, tokens, causal), expected, "{name}, by search");
        assert_eq!(reach(&pictures), expected, "{name}");
    }
    assert_eq!(reach(&[]), None);
    assert!(Picture::new(&Mask::full(), 1, 4097).is_err());
}
