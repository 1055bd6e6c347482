//! Where a gradient goes.

/// A place for a gradient, and what becomes of the numbers that are in it.
///
/// Gradients of parameters are usually added up over calls, those of activations written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gradient<T> {
    /// Not wanted, and not computed.
    #[default]
    Skip,
    /// Replaces what is there, which is not read.
    Write(T),
    /// Is added to what is there.
    Add(T),
}

impl<T> Gradient<T> {
    /// The place, or `None` for [`Gradient::Skip`].
    pub fn place(&self) -> Option<&T> {
        match self {
            Gradient::Skip => None,
            Gradient::Write(place) | Gradient::Add(place) => Some(place),
        }
    }

    /// The same with another form of the place.
    pub fn map<U>(self, form: impl FnOnce(T) -> U) -> Gradient<U> {
        match self {
            Gradient::Skip => Gradient::Skip,
            Gradient::Write(place) => Gradient::Write(form(place)),
            Gradient::Add(place) => Gradient::Add(form(place)),
        }
    }

    /// The place, and whether to add to it.
    pub(crate) fn into_place(self) -> Option<(T, bool)> {
        match self {
            Gradient::Skip => None,
            Gradient::Write(place) => Some((place, false)),
            Gradient::Add(place) => Some((place, true)),
        }
    }
}
