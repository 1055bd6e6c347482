//! Layers against what transformers computes in f64: `crates/foveal/tests/golden`.

use foveal::cache::KvRows;
use foveal::position::{Rope, RopeConfig, RopeLayout, RopeScaling, Yarn, YarnAmplitude};
use foveal::projection::{self, Format};
use foveal::{Cpu, Level, Phase, Threads, Workspace};
use safetensors::SafeTensors;

use super::*;
use crate::mixer::CacheStorage;
use crate::weights::Weight;

/// A golden layer's file.
struct Golden(Vec<u8>);

const TOLERANCE: f32 = 5e-5;
const DIMS: LatentDims = LatentDims { heads: 3, latent: 12, rope: 6, nope: 10, value: 8 };

impl Golden {
    fn open(name: &str) -> Golden {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../foveal/tests/golden");
        Golden(std::fs::read(format!("{folder}/{name}.safetensors")).unwrap())
    }

    /// A tensor of f64 as f32, with its shape.
    fn tensor(&self, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), safetensors::Dtype::F64);
        let numbers = tensor.data().as_chunks().0.iter();
        Some((tensor.shape().to_vec(), numbers.map(|&x| f64::from_le_bytes(x) as f32).collect()))
    }

    fn linear(&self, part: &str) -> Option<Linear> {
        let (shape, values) = self.tensor(&format!("{part}.weight"))?;
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Some(Linear::new(Weight::new(part, &shape, Format::F32, bytes).unwrap(), None))
    }

    fn norm(&self, part: &str) -> Option<Vec<f32>> {
        Some(self.tensor(&format!("{part}.weight"))?.1)
    }

    fn mixer(&self, scale: f32) -> MultiHeadLatentAttention {
        let query = match self.linear("q_proj") {
            Some(query) => Query::Direct(query),
            None => Query::LowRank {
                down: self.linear("q_a_proj").unwrap(),
                norm: self.norm("q_a_layernorm").unwrap(),
                up: self.linear("q_b_proj").unwrap(),
            },
        };
        MultiHeadLatentAttention {
            dims: DIMS,
            scale,
            reach: 1000,
            query,
            down: self.linear("kv_a_proj_with_mqa").unwrap(),
            norm: self.norm("kv_a_layernorm").unwrap(),
            up: self.linear("kv_b_proj").unwrap(),
            output: self.linear("o_proj").unwrap(),
            rope: 0,
        }
    }

    /// The first of the positions, which go up by one.
    fn first_position(&self) -> usize {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let ids = file.tensor("position_ids").unwrap();
        usize::try_from(i64::from_le_bytes(*ids.data().first_chunk().unwrap())).unwrap()
    }

    /// Runs each sequence as calls of the given lengths, over and over: outputs and states.
    fn run(
        &self,
        mixer: &MultiHeadLatentAttention,
        rope: &Rope,
        how: (Cpu, Phase, &[usize]),
    ) -> (Vec<f32>, Vec<LayerState>) {
        let (cpu, phase, lengths) = how;
        let (shape, x) = self.tensor("x").unwrap();
        let [_, tokens, width] = shape[..] else { panic!("{shape:?}") };
        let mut activations = attention::Activations::default();
        let mut workspace = Workspace::new();
        let (mut y, mut states) = (vec![], vec![]);
        for x in x.chunks(tokens * width) {
            let mut state = mixer.state(&CacheOptions::default(), 1000).unwrap();
            let (mut lengths, mut at) = (lengths.iter().cycle(), 0);
            while at < tokens {
                let end = tokens.min(at + lengths.next().unwrap());
                let first = self.first_position();
                let positions: Vec<usize> = (first + at..first + end).collect();
                activations.set_positions(std::slice::from_ref(rope), &positions, None).unwrap();
                let mut run = Run {
                    cpu,
                    phase,
                    activations: projection::Activations::F32,
                    workspace: &mut workspace,
                };
                let mut part = vec![f32::NAN; (end - at) * width];
                let x = &x[at * width..end * width];
                mixer
                    .forward(
                        x,
                        &mut part,
                        std::slice::from_mut(&mut state),
                        &mut activations,
                        &mut run,
                    )
                    .unwrap();
                run.workspace.poison();
                y.extend(part);
                at = end;
            }
            states.push(state);
        }
        (y, states)
    }

    /// In one call, token by token and in pieces, by both phases and on every level.
    fn check(&self, scale: f32, scaling: RopeScaling) {
        let mixer = self.mixer(scale);
        let config = RopeConfig { scaling, ..RopeConfig::new(DIMS.rope, RopeLayout::Interleaved) };
        let rope = Rope::new(config).unwrap();
        for level in Level::available() {
            let cpu = Cpu { level, threads: Threads::ONE };
            for phase in [Phase::Prompt, Phase::Generated] {
                for lengths in [&[64][..], &[1], &[4, 1], &[3, 2]] {
                    let (y, states) = self.run(&mixer, &rope, (cpu, phase, lengths));
                    close("out", &y, &self.tensor("out").unwrap().1);
                    self.check_rows(&states);
                }
            }
        }
    }

    /// What is kept is the normalised latent and the rotated key, and nothing else.
    fn check_rows(&self, states: &[LayerState]) {
        let (mut latent, mut key) = (vec![], vec![]);
        for state in states {
            assert_eq!(state.bytes(), state.end() * DIMS.row() * size_of::<f32>());
            let tile = state.tile(0, 0..state.end());
            let Some(KvRows::F32(rows)) = tile.keys.rows() else { panic!("stored as f32") };
            for n in 0..rows.count() {
                latent.extend(&rows.row(n)[..DIMS.latent]);
                key.extend(&rows.row(n)[DIMS.latent..]);
            }
        }
        close("latent", &latent, &self.tensor("latent").unwrap().1);
        close("key", &key, &self.tensor("k_rope_interleaved").unwrap().1);
    }
}

fn close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let off = (found - expected).abs();
        assert!(off <= TOLERANCE * (1.0 + largest), "{what} {i}: {found}, expected {expected}");
    }
}

#[test]
fn queries_of_low_rank() {
    Golden::open("deepseekv3_mla_qlora").check(0.25, RopeScaling::None);
}

#[test]
fn direct_queries() {
    Golden::open("deepseekv3_mla_direct_q").check(0.25, RopeScaling::None);
}

#[test]
fn yarn_goes_into_the_scale() {
    let amplitude = YarnAmplitude::Mscale { mscale: 1.0, mscale_all_dim: 1.0 };
    let yarn = Yarn { amplitude, ..Yarn::new(8.0, 64.0) };
    let factor = 1.0 + 0.1 * 8f32.ln();
    Golden::open("deepseekv3_mla_yarn_mscale")
        .check(0.25 * factor * factor, RopeScaling::Yarn(yarn));
}

#[test]
fn codes_are_refused() {
    let mixer = Golden::open("deepseekv3_mla_direct_q").mixer(0.25);
    for storage in [CacheStorage::Q8, CacheStorage::Q4] {
        let refused = mixer.state(&CacheOptions { storage, ..CacheOptions::default() }, 1000);
        assert!(matches!(refused, Err(Error::CacheOptions { .. })), "{refused:?}");
    }
    for (storage, bytes) in [(CacheStorage::F16, 2), (CacheStorage::Bf16, 2)] {
        let options = CacheOptions { storage, ..CacheOptions::default() };
        let mut state = mixer.state(&options, 1000).unwrap();
        let rows = vec![0.5; 3 * DIMS.row()];
        let shape = Shape { batch: 1, seq: 3, heads: 1, dim: DIMS.row() };
        let none = TensorRef::new(&[], Shape { dim: 0, ..shape }).unwrap();
        state.append(None, TensorRef::new(&rows, shape).unwrap(), none).unwrap();
        assert_eq!(state.bytes(), 3 * DIMS.row() * bytes);
    }
}
