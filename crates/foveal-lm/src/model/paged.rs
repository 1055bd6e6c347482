//! States of a model that take pages, and share those of a common beginning.

use super::{Model, State};
use crate::Error;
use crate::mixer::{CacheOptions, Demand, Pages};

impl Model {
    /// Pages for the keys and values of `tokens` tokens, of any number of texts, kept as `options` say.
    ///
    /// # Errors
    ///
    /// Those of [`Model::state_with`]; [`Error::CacheOptions`] for codes of a few bits, [`Error::BatchKeep`] for a choice of
    /// keys, [`Error::SectionPages`] for mixers that are named in the configuration: pages do not hold those.
    pub fn pages(&self, options: &CacheOptions, tokens: usize) -> Result<Pages, Error> {
        let state = self.state_with(options)?;
        if options.keep.budget().is_some() {
            return Err(Error::BatchKeep);
        }
        if !self.takes_pages() {
            return Err(Error::SectionPages);
        }
        let reach = |layer| self.config.reach_within(layer, options.context);
        let reaches = self.config.layers.iter().map(reach);
        let layers: Vec<_> = state.layers.into_iter().zip(reaches.map(Some)).collect();
        Pages::new(options, &layers, tokens)
    }

    /// Whether all that layers keep of a text lies in pages: not so where mixers are named in the configuration.
    pub(crate) fn takes_pages(&self) -> bool {
        !self.config.has_named_mixers()
    }

    /// A state that holds no tokens and takes its pages from `pages`, which another state of this model's may hold too.
    ///
    /// # Errors
    ///
    /// Those of [`Model::state_with`]; [`Error::PageSizes`] for the pages of another model.
    pub fn state_in(&self, pages: &Pages) -> Result<State, Error> {
        let mut state = self.state_with(pages.options())?;
        pages.give(&mut state.layers)?;
        Ok(State { pages: Some(pages.clone()), ..state })
    }
}

impl State {
    /// Its pages, and how many of them the next `tokens` tokens take.
    pub(crate) fn needed(&self, tokens: usize) -> Option<(&Pages, Demand)> {
        let pages = self.pages.as_ref()?;
        Some((pages, pages.needed(self.layers.iter().map(std::slice::from_ref), tokens)))
    }

    /// A state of the first `position` tokens, in the same pages as far as they go; the first to go on gets a page of its
    /// own. `None` if what is held does not allow it: a window has left the tokens behind that the next one would see, or
    /// nothing lies in pages.
    pub fn fork(&self, model: &Model, position: usize) -> Option<State> {
        let pages = self.pages.clone().filter(|_| self.can_fork(model, position))?;
        let mut layers = self.layers.clone();
        layers.iter_mut().for_each(|layer| layer.rewind(position));
        Some(State { layers, position, options: self.options, pages: Some(pages) })
    }

    /// Whether [`State::fork`] gives a state.
    pub(crate) fn can_fork(&self, model: &Model, position: usize) -> bool {
        self.pages.is_some() && model.can_rewind(self, position)
    }
}
