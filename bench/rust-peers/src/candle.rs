//! candle-nn's flash attention: `[batch, seq, heads, dim]` in, `[batch, heads, seq, dim]` out.

use crate::Prepared;
use crate::case::{Case, Mask, swapped};
use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};

/// The crate's version, as `Cargo.toml` has it.
pub const VERSION: &str = "candle-nn 0.11.1";

struct Call {
    sets: Vec<[Tensor; 3]>,
    turn: usize,
    mask: AttnMask,
    scale: f32,
    note: String,
}

/// Builds a case.
///
/// # Errors
/// If candle refuses it.
pub fn prepare(case: &Case) -> Result<Box<dyn Prepared>> {
    let (shapes, inputs) = (case.shapes(), case.inputs());
    let set = || -> Result<[Tensor; 3]> {
        let tensor = |n: usize| Tensor::from_slice(&inputs[n], &shapes[n], &Device::Cpu);
        Ok([tensor(0)?, tensor(1)?, tensor(2)?])
    };
    let sets = (0..case.copies).map(|_| set()).collect::<Result<_>>()?;
    let (mask, name) = mask(case)?;
    let scale = 1.0 / (case.head_dim as f32).sqrt();
    let note = format!("cpu flash attention, {name}");
    Ok(Box::new(Call { sets, turn: 0, mask, scale, note }))
}

fn mask(case: &Case) -> Result<(AttnMask, &'static str)> {
    let Case { seq_q, seq_k, .. } = *case;
    match case.mask {
        Mask::Full => Ok((AttnMask::None, "no mask")),
        Mask::Causal => {
            ensure!(seq_k >= seq_q, "candle's causal needs a key for every query");
            Ok((AttnMask::causal_with_offset(seq_k - seq_q), "causal"))
        }
        Mask::CausalMask | Mask::Window(_) | Mask::Random(_) => {
            let pairs = (0..seq_q).flat_map(|i| (0..seq_k).map(move |j| (i, j)));
            let number = |(i, j)| if case.allows(i, j) { 0.0 } else { f32::NEG_INFINITY };
            let numbers: Vec<f32> = pairs.map(number).collect();
            let mask = Tensor::from_vec(numbers, (seq_q, seq_k), &Device::Cpu)?;
            Ok((AttnMask::Mask(mask), "explicit mask"))
        }
    }
}

impl Prepared for Call {
    fn execute(&mut self) -> Result<Vec<f32>> {
        let out = self.run()?;
        let (batch, heads, seq, dim) = out.dims4()?;
        let numbers = out.flatten_all()?.to_vec1::<f32>()?;
        Ok(swapped(&numbers, [batch, heads, seq, dim]))
    }

    fn time(&mut self, executions: usize) -> Result<()> {
        for _ in 0..executions {
            std::hint::black_box(self.run()?);
        }
        Ok(())
    }

    fn note(&self) -> &str {
        &self.note
    }
}

impl Call {
    fn run(&mut self) -> Result<Tensor> {
        self.turn = (self.turn + 1) % self.sets.len();
        let [q, k, v] = &self.sets[self.turn];
        Ok(flash_attn::<f32>(q, k, v, self.scale, self.mask.clone(), None, None)?)
    }
}
