//! What is asked of a configuration whose model reads pairs of texts, and of others: keys that count for nothing are refused.

use super::model::Family;
use super::{Config, ModelSection, Objective, Order};
use crate::train::Error;

impl Config {
    /// Whether pairs of texts are what is learned.
    pub fn has_pairs(&self) -> bool {
        self.train.objective == Objective::Translation
    }

    pub(super) fn check_pairs(&self) -> Result<(), Error> {
        let (pairs, family) = (self.has_pairs(), self.model.architecture);
        match (pairs, family == Family::EncoderDecoder) {
            (true, false) => {
                let expected = "\"encoder_decoder\" with train.objective = \"translation\"";
                Err(Error::config("model.architecture", "that of one text", expected))
            }
            (false, true) => {
                let expected = "\"translation\" with model.architecture = \"encoder_decoder\"";
                Err(Error::config("train.objective", "that of one text", expected))
            }
            (true, true) => self.check_translation(),
            (false, false) => self.check_one_text(),
        }
    }

    /// What an encoder–decoder has not.
    fn check_translation(&self) -> Result<(), Error> {
        let Config { model, data, train, .. } = self;
        let usual = ModelSection::default();
        let foreign = [
            ("model.from", model.from.is_some()),
            ("model.kv_heads", model.kv_heads.is_some()),
            ("model.head_dim", model.head_dim.is_some()),
            ("model.rope_base", model.rope_base != usual.rope_base),
            ("model.norm_epsilon", model.norm_epsilon != usual.norm_epsilon),
            ("model.tied_head", !model.tied_head),
            ("model.mixer", model.mixer.is_some()),
            ("model.copying", !model.copying.is_empty()),
            ("train.recompute", train.recompute),
        ];
        if let Some((key, _)) = foreign.into_iter().find(|(_, set)| *set) {
            let expected = "left out with model.architecture = \"encoder_decoder\"";
            return Err(Error::config(key, "set", expected));
        }
        if data.order == Order::Streams {
            let expected = "\"shuffled\" with train.objective = \"translation\"";
            return Err(Error::config("data.order", "\"streams\"", expected));
        }
        if data.task.is_some() && !data.train.is_empty() {
            return Err(Error::config("data.task", "set", "left out beside data.train"));
        }
        if data.sequence < 2 {
            return Err(Error::config("data.sequence", data.sequence, "2 at least, for pairs"));
        }
        Ok(())
    }

    /// What models of one text have not.
    fn check_one_text(&self) -> Result<(), Error> {
        let Config { model, data, .. } = self;
        let usual = ModelSection::default();
        let foreign = [
            ("model.encoder_layers", model.encoder_layers.is_some()),
            ("model.norms", model.norms != usual.norms),
            ("model.positions", model.positions != usual.positions),
            ("data.task", data.task.is_some()),
        ];
        match foreign.into_iter().find(|(_, set)| *set) {
            Some((key, _)) => {
                let expected = "left out without train.objective = \"translation\"";
                Err(Error::config(key, "set", expected))
            }
            None => Ok(()),
        }
    }
}
