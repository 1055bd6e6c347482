//! burn-flex's attention: `[batch, heads, seq, dim]` in and out, causal aligned bottom right.

use crate::Prepared;
use crate::case::{Case, Mask, swapped};
use anyhow::{Result, anyhow};
use burn_backend::TensorData;
use burn_backend::ops::AttentionModuleOptions;
use burn_flex::FlexTensor;
use burn_flex::ops::attention::attention;

/// The crate's version, as `Cargo.toml` has it.
pub const VERSION: &str = "burn-flex 0.22.1";

struct Call {
    sets: Vec<[FlexTensor; 3]>,
    turn: usize,
    /// True where a key may not be seen.
    hidden: Option<FlexTensor>,
    options: AttentionModuleOptions,
    /// `[batch, heads, seq, dim]` of the output.
    shape: [usize; 4],
    note: String,
}

/// Builds a case.
///
/// # Errors
/// Never; the signature is that of all peers.
pub fn prepare(case: &Case) -> Result<Box<dyn Prepared>> {
    let (shapes, inputs) = (case.shapes(), case.inputs());
    let tensor = |n: usize| {
        let [batch, seq, heads, dim] = shapes[n];
        let numbers = swapped(&inputs[n], shapes[n]);
        FlexTensor::from_data(TensorData::new(numbers, [batch, heads, seq, dim]))
    };
    let sets = (0..case.copies).map(|_| [tensor(0), tensor(1), tensor(2)]).collect();
    let is_causal = case.mask == Mask::Causal;
    let hidden = (!is_causal && case.mask != Mask::Full).then(|| hidden(case));
    let options = AttentionModuleOptions { is_causal, ..Default::default() };
    let naive = case.seq_q * case.seq_k <= 256 * 1024;
    let note = format!(
        "{}{}",
        if naive { "naive" } else { "tiled" },
        match case.mask {
            Mask::Full => "",
            Mask::Causal => ", causal",
            _ => ", explicit mask",
        }
    );
    let [batch, seq, heads, dim] = shapes[0];
    let shape = [batch, heads, seq, dim];
    Ok(Box::new(Call { sets, turn: 0, hidden, options, shape, note }))
}

fn hidden(case: &Case) -> FlexTensor {
    let Case { batch, q_heads, seq_q, seq_k, .. } = *case;
    let pairs = (0..seq_q).flat_map(|i| (0..seq_k).map(move |j| (i, j)));
    let one: Vec<bool> = pairs.map(|(i, j)| !case.allows(i, j)).collect();
    let all = one.repeat(batch * q_heads);
    FlexTensor::from_data(TensorData::new(all, [batch, q_heads, seq_q, seq_k]))
}

impl Prepared for Call {
    fn execute(&mut self) -> Result<Vec<f32>> {
        let data = self.run().into_data();
        let numbers = data.try_to_vec::<f32>().map_err(|error| anyhow!("{error:?}"))?;
        Ok(swapped(&numbers, self.shape))
    }

    fn time(&mut self, executions: usize) -> Result<()> {
        for _ in 0..executions {
            std::hint::black_box(self.run());
        }
        Ok(())
    }

    fn note(&self) -> &str {
        &self.note
    }
}

impl Call {
    fn run(&mut self) -> FlexTensor {
        self.turn = (self.turn + 1) % self.sets.len();
        let [q, k, v] = self.sets[self.turn].clone();
        attention(q, k, v, self.hidden.clone(), None, self.options)
    }
}
