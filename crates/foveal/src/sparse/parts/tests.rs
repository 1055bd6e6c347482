use super::*;
use crate::parallel::Threads;
use crate::simd::Level;
use crate::sparse::SparseTransformer;
use crate::sparse::sparse_transformer::Way;

fn tensor(shape: Shape, seed: u64) -> Tensor<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    let len = shape.checked_len().unwrap();
    Tensor::from_vec((0..len).map(|_| next()).collect(), shape).unwrap()
}

#[test]
fn every_row_belongs_to_one_unit_and_every_key_is_first_once() {
    for (heads, kv_heads) in [(1, 1), (6, 3), (8, 1), (16, 16)] {
        for (batch, seq, dim) in [(1, 9, 4), (3, 5000, 64), (5, 1 << 20, 256), (700, 64, 128)] {
            let group = heads / kv_heads;
            let shape = Shape { batch, seq, heads, dim };
            let part = |heads| Heads { sequences: 0..batch, heads, parts: vec![] };
            let each = (0..heads).map(|head| part(head..head + 1)).collect();
            for all in [vec![part(0..heads)], each] {
                let mut rows = vec![0; batch * heads];
                let mut keys = vec![0; batch * kv_heads];
                for unit in units(&all, shape, group) {
                    for b in unit.batch {
                        unit.heads.clone().for_each(|head| rows[b * heads + head] += 1);
                        if unit.first {
                            unit.kv.clone().for_each(|head| keys[b * kv_heads + head] += 1);
                        }
                        let readers = unit.heads.start / group..(unit.heads.end - 1) / group + 1;
                        assert_eq!(unit.kv, readers);
                    }
                }
                assert!(rows.iter().chain(&keys).all(|&n| n == 1), "{shape:?} {kv_heads}");
            }
        }
    }
}

#[test]
fn nothing_is_read_that_was_not_written() {
    let shape = Shape { batch: 2, seq: 300, heads: 4, dim: 16 };
    let [q, k, v, d_out] = [1, 2, 3, 4].map(|seed| tensor(shape, seed));
    let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
    let layers = [SparseTransformer::strided(17), SparseTransformer::fixed(17, 4)];
    for (layer, level) in
        layers.into_iter().flat_map(|x| Level::available().map(move |l| (x.clone(), l)))
    {
        let layer = layer.unwrap().cpu(Cpu { level, threads: Threads::ONE });
        let (runner, heads) = layer.prepare(&inputs, Way::Forward).unwrap();
        let back = layer.prepare(&inputs, Way::Backward).unwrap().1;
        let fresh = runner.forward(inputs, &heads).unwrap();
        let mut memory = Memory::new(runner.cpu);
        let mut poison = || {
            memory.free = vec![vec![f32::NAN; 1 << 17]; 12];
            memory.logs = vec![vec![f32::NAN; 1 << 17]; 4];
            memory.workspace.reserve(1 << 24);
            memory.workspace.poison();
            std::mem::replace(&mut memory, Memory::new(runner.cpu))
        };
        let out = Tensor::zeros(shape).unwrap();
        let lse = vec![f32::NEG_INFINITY; fresh.lse.as_slice().len()];
        let lse = Tensor::from_vec(lse, shape.per_row()).unwrap();
        let mut again = Forward { out, lse };
        runner.forward_in(&mut poison(), inputs, &heads, &mut again).unwrap();
        assert_eq!(again, fresh);
        let expected = runner.backward(inputs, &fresh, d_out.view(), &back).unwrap();
        let [d_q, d_k, d_v] = [0; 3].map(|_| Tensor::zeros(shape).unwrap());
        let mut got = Backward { d_q, d_k, d_v };
        let call = (inputs, &fresh, d_out.view());
        runner.backward_in(&mut poison(), call, &back, &mut got).unwrap();
        assert_eq!(got, expected);
    }
}
