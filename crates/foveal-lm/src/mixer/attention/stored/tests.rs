//! Layers against what transformers computes in f64: `crates/foveal/tests/golden`.

use foveal::position::{RopeConfig, RopeLayout, RopeScaling, Yarn};
use foveal::projection::{self, Format};
use foveal::{Cpu, Phase, Workspace};
use safetensors::SafeTensors;

use super::*;
use crate::config::AttentionConfig;
use crate::linear::Linear;
use crate::mixer::{CacheStorage, Keep};

/// A golden layer: its file, and what the file doesn't say about it.
struct Layer {
    bytes: Vec<u8>,
    config: AttentionConfig,
    reach: usize,
    rope: Rope,
    /// What Gemma adds to its norms' weights.
    norm_offset: f32,
}

#[derive(Clone, Copy)]
struct Shapes {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

const TOLERANCE: f32 = 5e-5;

impl Layer {
    fn open(name: &str, shapes: Shapes, rope: (f64, RopeScaling)) -> Layer {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../foveal/tests/golden");
        let Shapes { heads, kv_heads, head_dim } = shapes;
        let (theta, scaling) = rope;
        let base = RopeConfig::new(head_dim, RopeLayout::HalfSplit);
        Layer {
            bytes: std::fs::read(format!("{folder}/{name}.safetensors")).unwrap(),
            config: AttentionConfig {
                heads,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                rope_layout: crate::config::RopeLayout::HalfSplit,
                qk_norm: false,
                qkv_bias: false,
                output_bias: false,
                softcap: None,
                sinks: false,
                latent: None,
            },
            reach: 1000,
            rope: Rope::new(RopeConfig { theta, scaling, ..base }).unwrap(),
            norm_offset: 0.0,
        }
    }

    /// A tensor of f64 as f32, with its shape.
    fn tensor(&self, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), safetensors::Dtype::F64);
        let numbers = tensor.data().as_chunks().0.iter();
        Some((tensor.shape().to_vec(), numbers.map(|&x| f64::from_le_bytes(x) as f32).collect()))
    }

    fn linear(&self, part: &str) -> Linear {
        let (shape, values) = self.tensor(&format!("{part}.weight")).unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let weight = Weight::new(part, &shape, Format::F32, bytes).unwrap();
        Linear::new(weight, self.tensor(&format!("{part}.bias")).map(|(_, bias)| bias))
    }

    fn norm(&self, part: &str) -> Option<Vec<f32>> {
        let (_, weight) = self.tensor(&format!("{part}.weight"))?;
        Some(weight.into_iter().map(|weight| weight + self.norm_offset).collect())
    }

    fn mixer(&self) -> GroupedQueryAttention {
        let width = self.tensor("x").unwrap().0[2];
        let parameters = AttentionParameters {
            query: self.linear("q_proj"),
            key: self.linear("k_proj"),
            value: self.linear("v_proj"),
            output: self.linear("o_proj"),
            query_norm: self.norm("q_norm"),
            key_norm: self.norm("k_norm"),
            sinks: self.tensor("sinks").map(|(_, sinks)| sinks),
        };
        let layer = MultiHeadAttention {
            width,
            key_width: width,
            value_width: width,
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
            scale: Scale::Value(self.config.scale),
            softcap: self.config.softcap,
            mask: Mask::window(self.reach),
            reach: Some(self.reach),
            norm_epsilon: 1e-6,
        };
        GroupedQueryAttention { layer, parameters, rope: 0 }
    }

    /// The first of the positions, which go up by one.
    fn first_position(&self) -> usize {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let ids = file.tensor("position_ids").unwrap();
        usize::try_from(i64::from_le_bytes(*ids.data().first_chunk().unwrap())).unwrap()
    }

    /// Runs each sequence as calls of the given lengths, over and over, and compares.
    fn check(&self, phase: Phase, lengths: &[usize]) {
        let cpu = Cpu::detect().unwrap();
        let mixer = self.mixer();
        let (shape, x) = self.tensor("x").unwrap();
        let (_, expected) = self.tensor("out").unwrap();
        let [_, tokens, width] = shape[..] else { panic!("{shape:?}") };
        let mut activations = Activations::default();
        let mut workspace = Workspace::new();
        let mut y = Vec::new();
        for x in x.chunks(tokens * width) {
            let mut state =
                mixer.state(&CacheOptions::default(), (Reach::Full, self.reach)).unwrap();
            let mut lengths = lengths.iter().cycle();
            let mut at = 0;
            while at < tokens {
                let end = tokens.min(at + lengths.next().unwrap());
                let first = self.first_position();
                let positions: Vec<usize> = (first + at..first + end).collect();
                activations
                    .set_positions(std::slice::from_ref(&self.rope), &positions, None)
                    .unwrap();
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
                y.extend(part);
                at = end;
            }
        }
        let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (i, (found, expected)) in y.iter().zip(&expected).enumerate() {
            let off = (found - expected).abs();
            assert!(off <= TOLERANCE * (1.0 + largest), "{i}: {found}, expected {expected}");
        }
        assert_eq!(y.len(), expected.len());
    }

    fn check_all(&self) {
        for phase in [Phase::Prompt, Phase::Generated] {
            for lengths in [&[64][..], &[1], &[3, 1, 2]] {
                self.check(phase, lengths);
            }
        }
    }
}

/// A rolling state gives each token what it would get alone with what it sees, at the places that this has.
#[test]
fn rolling_states_are_what_a_short_text_is() {
    let shapes = Shapes { heads: 4, kv_heads: 2, head_dim: 10 };
    let layer = Layer::open("llama_gqa", shapes, (1e4, RopeScaling::None));
    let mixer = layer.mixer();
    let (shape, x) = layer.tensor("x").unwrap();
    let (width, tokens) = (shape[2], 12.min(shape[1]));
    let x = &x[..tokens * width];
    let mut workspace = Workspace::new();
    let mut run = |text: &[f32], options: &CacheOptions, (phase, call): (Phase, usize)| {
        let mut activations = Activations::default();
        let mut state = mixer.state(options, (Reach::Full, layer.reach)).unwrap();
        let mut y = vec![];
        for (n, x) in text.chunks(call * width).enumerate() {
            let positions: Vec<_> = (n * call..n * call + x.len() / width).collect();
            let rolling = match options.keep {
                Keep::Rolling(rolling) => Some(rolling),
                _ => None,
            };
            let ropes = std::slice::from_ref(&layer.rope);
            activations.set_positions(ropes, &positions, rolling).unwrap();
            let cpu = Cpu::detect().unwrap();
            let mut run = Run {
                cpu,
                phase,
                activations: projection::Activations::F32,
                workspace: &mut workspace,
            };
            let mut part = vec![f32::NAN; x.len()];
            let states = std::slice::from_mut(&mut state);
            mixer.forward(x, &mut part, states, &mut activations, &mut run).unwrap();
            y.extend(part);
        }
        y
    };
    for (sinks, window) in (0..=3).flat_map(|sinks| (1..=5).map(move |window| (sinks, window))) {
        let keep = Keep::Rolling(Rolling::new(sinks, window).unwrap());
        let expected: Vec<f32> = (0..tokens)
            .flat_map(|t| {
                let newest = (t + 1).saturating_sub(window).max(sinks);
                let seen = (0..=t).filter(|&j| j < sinks || j >= newest);
                let text: Vec<f32> =
                    seen.flat_map(|j| &x[j * width..(j + 1) * width]).copied().collect();
                let y = run(&text, &CacheOptions::default(), (Phase::Prompt, tokens));
                y[y.len() - width..].to_vec()
            })
            .collect();
        let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        for storage in [CacheStorage::F32, CacheStorage::F16] {
            let options = CacheOptions { storage, keep, ..CacheOptions::default() };
            let tolerance = if storage == CacheStorage::F32 { 2e-6 } else { 2e-3 };
            for call in [(Phase::Prompt, tokens), (Phase::Prompt, 3), (Phase::Generated, 1)] {
                let found = run(x, &options, call);
                for (found, expected) in found.iter().zip(&expected) {
                    let off = (found - expected).abs();
                    assert!(off <= tolerance * (1.0 + largest), "{sinks} {window} {call:?}: {off}");
                }
            }
        }
    }
}

#[test]
fn llama() {
    let shapes = Shapes { heads: 4, kv_heads: 2, head_dim: 10 };
    Layer::open("llama_gqa", shapes, (1e4, RopeScaling::None)).check_all();
}

#[test]
fn one_key_value_head_with_biases_from_a_later_position() {
    let shapes = Shapes { heads: 3, kv_heads: 1, head_dim: 8 };
    let layer = Layer::open("llama_mqa_offset", shapes, (1e4, RopeScaling::None));
    assert!(layer.first_position() > 0);
    layer.check_all();
}

#[test]
fn llama3_frequencies() {
    let shapes = Shapes { heads: 4, kv_heads: 4, head_dim: 16 };
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 64.0,
    };
    Layer::open("llama_llama3_scaling", shapes, (1e4, scaling)).check_all();
}

#[test]
fn yarn_frequencies() {
    let shapes = Shapes { heads: 2, kv_heads: 1, head_dim: 16 };
    let scaling = RopeScaling::Yarn(Yarn::new(4.0, 64.0));
    Layer::open("llama_yarn_scaling", shapes, (1e4, scaling)).check_all();
}

#[test]
fn qwen3() {
    let shapes = Shapes { heads: 6, kv_heads: 3, head_dim: 12 };
    Layer::open("qwen3_qknorm", shapes, (1e6, RopeScaling::None)).check_all();
}

#[test]
fn gemma3_windowed_and_full() {
    let shapes = Shapes { heads: 4, kv_heads: 1, head_dim: 20 };
    for (name, theta, reach) in [("gemma3_local", 1e4, 4), ("gemma3_global", 1e6, 1000)] {
        let layer = Layer::open(name, shapes, (theta, RopeScaling::None));
        Layer { reach, norm_offset: 1.0, ..layer }.check_all();
    }
}

#[test]
fn gpt_oss_windowed_and_full() {
    let shapes = Shapes { heads: 4, kv_heads: 2, head_dim: 12 };
    let yarn = Yarn { truncate: false, ..Yarn::new(32.0, 256.0) };
    for (name, reach) in [("gptoss_window", 4), ("gptoss_full", 1000)] {
        let layer = Layer::open(name, shapes, (1.5e5, RopeScaling::Yarn(yarn)));
        Layer { reach, ..layer }.check_all();
    }
}
