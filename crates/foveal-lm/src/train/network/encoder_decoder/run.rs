//! One batch through an encoder–decoder, forward and backward.

use foveal::projection::{Matrix, MatrixShape, embed};
use foveal::{Dropout, nn};

use super::layer::Normal;
use super::{EncoderDecoder, Layer, NormPlace, Pairs};
use crate::Error;
use crate::mixer::Saved;
use crate::train::network::head::Objection;
use crate::train::network::tools::{Tools, same};
use crate::train::network::{IGNORED, Loss, StepOptions, place_seed};

/// What a sum with its norm keeps: what came in, and what the norm read.
struct Sum {
    /// What the part read, where that is not what came in.
    normed: Option<Vec<f32>>,
    x: Vec<f32>,
    sum: Option<Vec<f32>>,
}

/// What a layer keeps.
struct Kept {
    own: (Sum, Saved),
    across: Option<(Sum, Saved)>,
    feeding: (Sum, Vec<f32>),
}

/// What a half keeps.
#[derive(Default)]
pub(super) struct Half {
    layers: Vec<Kept>,
    /// What its last norm read.
    end: Option<Vec<f32>>,
}

impl EncoderDecoder {
    /// Adds the gradients of the mean loss of a batch, times [`StepOptions::scale`], to `gradients`. Recomputation is not
    /// there: [`StepOptions::recompute`] is passed over.
    ///
    /// # Errors
    /// [`Error::Token`]; [`Error::Kernel`] for lengths that do not fit each other or the context; [`Error::NotFinite`].
    pub fn gradients(
        &self,
        parameters: &[f32],
        pairs: &Pairs<'_>,
        gradients: &mut [f32],
        options: &mut StepOptions<'_>,
    ) -> Result<Loss, Error> {
        same("gradients of all parameters", self.numbers, gradients.len())?;
        self.run(parameters, pairs, Some(gradients), options)
    }

    /// The loss of a batch, without gradients.
    ///
    /// # Errors
    /// Those of [`EncoderDecoder::gradients`].
    pub fn loss(
        &self,
        parameters: &[f32],
        pairs: &Pairs<'_>,
        options: &mut StepOptions<'_>,
    ) -> Result<Loss, Error> {
        self.run(parameters, pairs, None, options)
    }

    pub(super) fn check(&self, parameters: &[f32], pairs: &Pairs<'_>) -> Result<(), Error> {
        let Pairs { sequences, source, tokens, targets } = *pairs;
        same("parameters of the network", self.numbers, parameters.len())?;
        same("targets of a batch", tokens.len(), targets.len())?;
        for text in [source, tokens] {
            let own = text.len() / sequences.max(1);
            same("whole sequences of a batch", own * sequences, text.len())?;
            if own > self.config.context {
                let (what, limit) = ("token of a text", self.config.context);
                return Err(foveal::Error::OutOfRange { what, got: own - 1, limit }.into());
            }
        }
        let (vocab, wanted) = (self.config.vocab, targets.iter().filter(|&&t| t != IGNORED));
        match source.iter().chain(tokens).chain(wanted).find(|&&token| token as usize >= vocab) {
            Some(&found) => Err(Error::Token { found, vocab }),
            None => Ok(()),
        }
    }

    fn run(
        &self,
        parameters: &[f32],
        pairs: &Pairs<'_>,
        gradients: Option<&mut [f32]>,
        options: &mut StepOptions<'_>,
    ) -> Result<Loss, Error> {
        self.check(parameters, pairs)?;
        if pairs.tokens.is_empty() {
            return Ok(Loss { sum: 0.0, targets: 0 });
        }
        let training = gradients.is_some();
        let (mut tools, _) = options.scratch.begin(options.cpu, options.precision);
        let dropout = options.dropout.filter(|_| training);
        let mut work = Work { network: self, parameters, pairs, dropout, tools: &mut tools };
        let (source, first) = work.half((0, pairs.source), &self.encoder, None)?;
        let (x, second) = work.half((1, pairs.tokens), &self.decoder, Some(&source))?;
        let objection = Objection {
            targets: pairs.targets,
            smoothing: if training { options.smoothing } else { 0.0 },
            scale: training.then_some(options.scale),
        };
        let Some(gradients) = gradients else {
            let (loss, _) = self.head.loss(parameters, (&x, objection), None, &mut tools)?;
            return finite(loss, &source, &x);
        };
        let arena = Some(&mut *gradients);
        let (loss, d) = self.head.loss(parameters, (&x, objection), arena, &mut tools)?;
        finite(loss, &source, &x)?;
        let mut work = Work { network: self, parameters, pairs, dropout, tools: &mut tools };
        let mut d_source = vec![0.0; source.len()];
        let d = d.ok_or(Error::SectionState)?;
        work.back((1, &self.decoder), (d, second), Some((&source, &mut d_source)), gradients)?;
        work.back((0, &self.encoder), (d_source, first), None, gradients)?;
        Ok(loss)
    }
}

/// Refuses a loss that is not finite.
fn finite(loss: Loss, source: &[f32], x: &[f32]) -> Result<Loss, Error> {
    if loss.sum.is_finite() {
        return Ok(loss);
    }
    let bad = |x: &[f32]| x.iter().any(|x| !x.is_finite());
    let place = match (bad(source), bad(x)) {
        (true, _) => "the encoder",
        (_, true) => "the decoder",
        _ => "the logits",
    };
    Err(Error::NotFinite { place: place.to_owned() })
}

/// A batch on its way.
pub(super) struct Work<'a, 'b> {
    pub(super) network: &'a EncoderDecoder,
    pub(super) parameters: &'a [f32],
    pub(super) pairs: &'a Pairs<'a>,
    pub(super) dropout: Option<Dropout>,
    pub(super) tools: &'a mut Tools<'b>,
}

impl Work<'_, '_> {
    /// Rows of a text: embeddings and positions.
    fn embedded(&self, half: usize, text: &[u32]) -> Result<Vec<f32>, Error> {
        let config = &self.network.config;
        let (width, scale) = (config.width, (config.width as f32).sqrt());
        let shape = MatrixShape { out_features: config.vocab, in_features: width };
        let table = Matrix::from_floats(shape, &self.parameters[self.network.shared.clone()])?;
        let mut x = vec![0.0; text.len() * width];
        embed(&table, text, &mut x, self.tools.cpu.level)?;
        let own = text.len() / self.pairs.sequences.max(1);
        let sinusoids = match &self.network.positions {
            Some(_) => vec![],
            None => sinusoids(own, width),
        };
        let positions = match &self.network.positions {
            Some(tables) => &self.parameters[tables[half].clone()],
            None => &sinusoids[..],
        };
        for text in x.chunks_exact_mut((own * width).max(1)) {
            text.iter_mut().zip(positions).for_each(|(x, position)| *x = *x * scale + position);
        }
        self.dropped(half as u64 * 1000, &mut x)?;
        Ok(x)
    }

    /// Drops numbers of rows: the same forward and backward.
    fn dropped(&self, place: u64, x: &mut [f32]) -> Result<(), Error> {
        let Some(Dropout { rate, seed }) = self.dropout else { return Ok(()) };
        let of = Dropout { rate, seed: place_seed(seed, place) };
        Ok(nn::dropout(of, x, (0, self.network.config.width), self.tools.cpu.level)?)
    }

    /// What a part reads of `x`.
    fn enter(&self, norm: &Normal, x: &[f32]) -> Result<Option<Vec<f32>>, Error> {
        match self.network.config.norms {
            NormPlace::Pre => norm.forward(self.parameters, x, self.tools).map(Some),
            NormPlace::Post => Ok(None),
        }
    }

    /// The sum of `x` and what a part gave, and what it keeps.
    fn leave(
        &self,
        norm: &Normal,
        (x, normed, mut y): (Vec<f32>, Option<Vec<f32>>, Vec<f32>),
        place: u64,
    ) -> Result<(Vec<f32>, Sum), Error> {
        self.dropped(place, &mut y)?;
        self.tools.add(&mut y, &x)?;
        Ok(match self.network.config.norms {
            NormPlace::Pre => (y, Sum { normed, x, sum: None }),
            NormPlace::Post => {
                (norm.forward(self.parameters, &y, self.tools)?, Sum { normed, x, sum: Some(y) })
            }
        })
    }

    /// A text through a half.
    pub(super) fn half(
        &mut self,
        (half, text): (usize, &[u32]),
        layers: &[Layer],
        source: Option<&[f32]>,
    ) -> Result<(Vec<f32>, Half), Error> {
        let mut x = self.embedded(half, text)?;
        let mut kept = Half::default();
        for (n, layer) in layers.iter().enumerate() {
            let (y, own) = self.layer(layer, x, source, half * 1000 + n * 10)?;
            x = y;
            kept.layers.push(own);
        }
        if let Some(ends) = &self.network.ends {
            let y = ends[half].forward(self.parameters, &x, self.tools)?;
            kept.end = Some(std::mem::replace(&mut x, y));
        }
        Ok((x, kept))
    }

    fn layer(
        &mut self,
        layer: &Layer,
        x: Vec<f32>,
        source: Option<&[f32]>,
        place: usize,
    ) -> Result<(Vec<f32>, Kept), Error> {
        let (sequences, place) = (self.pairs.sequences, place as u64);
        let attend = |work: &mut Self, x: Vec<f32>, part: &_, source: Option<&[f32]>, place| {
            let (attending, norm): &(super::Attending, Normal) = part;
            let normed = work.enter(norm, &x)?;
            let rows = (normed.as_deref().unwrap_or(&x), source);
            let (y, saved) = attending.forward(work.parameters, rows, sequences, work.tools)?;
            let (y, sum) = work.leave(norm, (x, normed, y), place)?;
            Ok::<_, Error>((y, (sum, saved)))
        };
        let (mut x, own) = attend(self, x, &layer.own, None, place + 1)?;
        let mut across = None;
        if let Some(part) = &layer.across {
            let (y, kept) = attend(self, x, part, source, place + 2)?;
            (x, across) = (y, Some(kept));
        }
        let (feeding, norm) = &layer.feeding;
        let normed = self.enter(norm, &x)?;
        let rows = normed.as_deref().unwrap_or(&x);
        let [y, inner] = feeding.forward(self.parameters, rows, self.tools)?;
        let (y, sum) = self.leave(norm, (x, normed, y), place + 3)?;
        Ok((y, Kept { own, across, feeding: (sum, inner) }))
    }

    /// Gradients through a half, down to its embeddings.
    fn back(
        &mut self,
        (half, layers): (usize, &[Layer]),
        (mut d, mut kept): (Vec<f32>, Half),
        mut source: Option<(&[f32], &mut [f32])>,
        gradients: &mut [f32],
    ) -> Result<(), Error> {
        if let (Some(ends), Some(x)) = (&self.network.ends, &kept.end) {
            let arenas = (self.parameters, &mut *gradients);
            d = ends[half].backward(arenas, (x, &d), self.tools)?;
        }
        for (n, layer) in layers.iter().enumerate().rev() {
            let own = kept.layers.pop().ok_or(Error::SectionState)?;
            let place = (half * 1000 + n * 10) as u64;
            let d_source = source.as_mut().map(|(_, d)| &mut **d);
            d = self.layer_back(layer, (d, own), (d_source, place), gradients)?;
        }
        self.dropped(half as u64 * 1000, &mut d)?;
        let text = if half == 0 { self.pairs.source } else { self.pairs.tokens };
        let (width, level) = (self.network.config.width, self.tools.cpu.level);
        let own = text.len() / self.pairs.sequences.max(1);
        if let Some(tables) = &self.network.positions {
            for (n, d) in d.chunks_exact(width).enumerate() {
                let at = tables[half].start + n % own * width;
                nn::add(&mut gradients[at..at + width], d, level)?;
            }
        }
        let scale = (width as f32).sqrt();
        d.iter_mut().for_each(|d| *d *= scale);
        for (&token, d) in text.iter().zip(d.chunks_exact(width)) {
            let at = self.network.shared.start + token as usize * width;
            nn::add(&mut gradients[at..at + width], d, level)?;
        }
        Ok(())
    }

    fn layer_back(
        &mut self,
        layer: &Layer,
        (d, kept): (Vec<f32>, Kept),
        (mut d_source, place): (Option<&mut [f32]>, u64),
        gradients: &mut [f32],
    ) -> Result<Vec<f32>, Error> {
        let parameters = self.parameters;
        let (feeding, norm) = &layer.feeding;
        let (sum, inner) = kept.feeding;
        let mut d =
            self.sum_back(norm, (d, &sum), place + 3, gradients, |work, d_y, gradients| {
                let rows = (sum.read(), &inner[..]);
                feeding.backward((parameters, gradients), rows, d_y, work.tools)
            })?;
        let parts = [(&layer.across, kept.across, place + 2)];
        for (part, kept, place) in parts {
            let (Some((attending, norm)), Some((sum, saved))) = (part, kept) else { continue };
            let d_source = d_source.as_deref_mut();
            d = self.sum_back(norm, (d, &sum), place, gradients, |work, d_y, gradients| {
                let arenas = (parameters, gradients);
                attending.backward(arenas, (&saved, d_y), d_source, work.tools)
            })?;
        }
        let ((attending, norm), (sum, saved)) = (&layer.own, kept.own);
        self.sum_back(norm, (d, &sum), place + 1, gradients, |work, d_y, gradients| {
            attending.backward((parameters, gradients), (&saved, d_y), None, work.tools)
        })
    }

    /// From the gradient of a sum with its norm to that of what came in; `part` takes that of what was added to that of
    /// what the part read.
    fn sum_back(
        &mut self,
        norm: &Normal,
        (d, sum): (Vec<f32>, &Sum),
        place: u64,
        gradients: &mut [f32],
        part: impl FnOnce(&mut Self, &[f32], &mut [f32]) -> Result<Vec<f32>, Error>,
    ) -> Result<Vec<f32>, Error> {
        let mut d_x = match &sum.sum {
            Some(read) => norm.backward((self.parameters, gradients), (read, &d), self.tools)?,
            None => d,
        };
        let mut d_y = d_x.clone();
        self.dropped(place, &mut d_y)?;
        let mut d_read = part(self, &d_y, gradients)?;
        if sum.normed.is_some() {
            let rows = (&sum.x[..], &d_read[..]);
            d_read = norm.backward((self.parameters, gradients), rows, self.tools)?;
        }
        self.tools.add(&mut d_x, &d_read)?;
        Ok(d_x)
    }
}

impl Sum {
    /// What the part read.
    fn read(&self) -> &[f32] {
        self.normed.as_deref().unwrap_or(&self.x)
    }
}

/// The encodings of the first positions.
pub(super) fn sinusoids(positions: usize, width: usize) -> Vec<f32> {
    let frequencies: Vec<f64> = (0..width.div_ceil(2))
        .map(|pair| 10_000f64.powf(-((2 * pair) as f64) / width as f64))
        .collect();
    let number = |position: usize, i: usize| {
        let angle = position as f64 * frequencies[i / 2];
        (if i.is_multiple_of(2) { angle.sin() } else { angle.cos() }) as f32
    };
    (0..positions)
        .flat_map(|position| (0..width).map(move |i| (position, i)))
        .map(|(position, i)| number(position, i))
        .collect()
}
