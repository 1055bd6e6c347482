//! What the decoder says by itself: the likeliest token each time.
//!
//! The source goes through the encoder once, what has been said through the decoder for each token: for a look at a model in
//! training, not for speed.

use foveal::nn::IGNORED;

use super::run::Work;
use super::{EncoderDecoder, Pairs};
use crate::Error;
use crate::train::network::StepOptions;

impl EncoderDecoder {
    /// What the decoder says of one source, up to `end`, which it begins with and which is no part of it, or as many tokens as it
    /// has positions for. Of equally likely tokens the first is taken.
    ///
    /// # Errors
    /// Those of [`EncoderDecoder::loss`].
    pub fn greedy(
        &self,
        parameters: &[f32],
        source: &[u32],
        end: u32,
        options: &mut StepOptions<'_>,
    ) -> Result<Vec<u32>, Error> {
        let whole = Pairs { sequences: 1, source, tokens: &[end], targets: &[IGNORED] };
        self.check(parameters, &whole)?;
        let (mut tools, _) = options.scratch.begin(options.cpu, options.precision);
        let mut work =
            Work { network: self, parameters, pairs: &whole, dropout: None, tools: &mut tools };
        let (encoded, _) = work.half((0, source), &self.encoder, None)?;
        let mut said = vec![end];
        while said.len() <= self.config.context {
            let tools = &mut tools;
            let mut work = Work {
                network: self,
                parameters,
                pairs: &whole,
                dropout: None,
                tools: &mut *tools,
            };
            let (x, _) = work.half((1, &said), &self.decoder, Some(&encoded))?;
            let last = &x[x.len() - self.config.width..];
            let mut logits = vec![0.0; self.config.vocab];
            self.head.logits(parameters, last, &mut logits, tools)?;
            let token = likeliest(&logits)?;
            if token == end {
                break;
            }
            said.push(token);
        }
        said.remove(0);
        Ok(said)
    }
}

/// The first of the greatest.
fn likeliest(logits: &[f32]) -> Result<u32, Error> {
    if logits.iter().any(|x| x.is_nan()) {
        return Err(Error::NotFinite { place: "the logits".to_owned() });
    }
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    Ok(logits.iter().position(|&x| x == greatest).unwrap_or(0) as u32)
}
