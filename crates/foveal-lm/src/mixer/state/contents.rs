//! What a layer's state consists of, by name, for a file; and what a file has of it.
//!
//! ```text
//! layer.L.keys …                       the store of a layer            layer.L.first_keys …   that of its first tokens
//! layer.L.section.N.keys …             the store of a section
//! layer.L.section.N.matrices …         plain numbers of a section, f32
//! ```
//!
//! A state names its parts twice, in the same order: to be written ([`Contents`]), and to be filled ([`Taken`]), which
//! refuses what has another length than a state of so many tokens has, before anything is allocated for it.

use std::borrow::Cow;

use safetensors::{Dtype, SafeTensors};

use super::snapshot::{Array, Span};
use super::store::Store;
use crate::Error;

/// Stores and plain numbers of a state: with the options that made it and its position, all that it is.
#[derive(Debug, Default)]
pub(crate) struct Contents<'a> {
    prefix: String,
    stores: Vec<(String, &'a Store)>,
    numbers: Vec<(String, Cow<'a, [f32]>)>,
}

impl<'a> Contents<'a> {
    /// From here on names begin so.
    pub(crate) fn within(&mut self, prefix: String) {
        self.prefix = prefix;
    }

    pub(crate) fn store(&mut self, name: &str, store: &'a Store) {
        self.stores.push((format!("{}{name}", self.prefix), store));
    }

    pub(crate) fn numbers(&mut self, name: &str, numbers: &'a [f32]) {
        self.numbers.push((format!("{}{name}", self.prefix), Cow::Borrowed(numbers)));
    }

    /// A number of tokens, as two halves of 16 bits.
    pub(crate) fn count(&mut self, name: &str, count: usize) {
        let halves = [count >> 16, count & 0xffff].map(|half| half as f32);
        self.numbers.push((format!("{}{name}", self.prefix), Cow::Owned(halves.to_vec())));
    }

    /// The stores in order, each with its whole name.
    pub(crate) fn stores(&self) -> &[(String, &'a Store)] {
        &self.stores
    }

    /// The numbers, likewise.
    pub(crate) fn all_numbers(&self) -> &[(String, Cow<'a, [f32]>)] {
        &self.numbers
    }
}

/// What a file has of a state.
#[derive(Debug)]
pub(crate) struct Taken<'f> {
    file: &'f SafeTensors<'f>,
    prefix: String,
    /// Of the stores that have not been filled yet.
    spans: std::vec::IntoIter<Span>,
}

impl<'f> Taken<'f> {
    pub(crate) fn new(file: &'f SafeTensors<'f>, spans: Vec<Span>) -> Taken<'f> {
        Taken { file, prefix: String::new(), spans: spans.into_iter() }
    }

    /// From here on names begin so.
    pub(crate) fn within(&mut self, prefix: String) {
        self.prefix = prefix;
    }

    /// Whether all stores of the file have been taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.spans.len() == 0
    }

    /// Fills the next store.
    ///
    /// # Errors
    /// Those of [`Store::restore`].
    pub(crate) fn store(&mut self, name: &str, store: &mut Store) -> Result<(), Error> {
        let span = self.spans.next().unwrap_or(Span { coded: 0..0, end: 0 });
        // One that is missing has no length, which is refused where it should have one.
        let array = |array: Array| {
            let found = self.file.tensor(&format!("{}{name}{}", self.prefix, array.name()));
            found.map_or(&[][..], |found| found.data())
        };
        store.restore(&span, array)
    }

    /// Fills plain numbers.
    ///
    /// # Errors
    /// [`foveal::Error::LengthMismatch`] unless the file has as many.
    pub(crate) fn numbers(&self, name: &str, numbers: &mut [f32]) -> Result<(), Error> {
        let bytes = self.bytes(name, numbers.len())?;
        let found = bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x));
        numbers.iter_mut().zip(found).for_each(|(number, found)| *number = found);
        Ok(())
    }

    /// So many plain numbers, which are not allocated unless the file has them.
    ///
    /// # Errors
    /// [`foveal::Error::LengthMismatch`] unless the file has as many.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        self.bytes(name, len)?;
        let mut numbers = vec![0.0; len];
        self.numbers(name, &mut numbers)?;
        Ok(numbers)
    }

    /// What [`Contents::count`] wrote.
    ///
    /// # Errors
    /// [`foveal::Error::LengthMismatch`] unless the file has it; [`foveal::Error::OutOfRange`] for what is none.
    pub(crate) fn count(&self, name: &str) -> Result<usize, Error> {
        let mut halves = [0.0; 2];
        self.numbers(name, &mut halves)?;
        let limit = 1 << 16;
        let half = |x: f32| {
            let got = x as usize;
            let (what, whole) = ("half of a number of tokens in a file", got as f32 == x);
            match whole && got < limit {
                true => Ok(got),
                false => Err(foveal::Error::OutOfRange { what, got, limit }),
            }
        };
        Ok(half(halves[0])? << 16 | half(halves[1])?)
    }

    fn bytes(&self, name: &str, expected: usize) -> Result<&'f [u8], Error> {
        let found = self.file.tensor(&format!("{}{name}", self.prefix)).ok();
        let found = found.filter(|found| found.dtype() == Dtype::F32);
        let bytes = found.map_or(&[][..], |found| found.data());
        let (what, got) = ("numbers of a state in a file", bytes.len() / size_of::<f32>());
        match got == expected {
            true => Ok(bytes),
            false => Err(foveal::Error::LengthMismatch { what, expected, got }.into()),
        }
    }
}
