//! What layers carry from one segment of a text to the next while a model is trained.

use crate::Error;

/// What one section carries: arrays of plain numbers, whose meaning is its own. All empty at the beginning of a text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SectionCarried {
    pub(crate) floats: Vec<Vec<f32>>,
    pub(crate) counts: Vec<u64>,
}

/// What a network carries of a batch of texts, each segment of which follows on from the one before.
///
/// Recurrences carry their states, memories what they remember; exact and sparse attention carries nothing: a segment sees
/// itself. Made by [`Network::carried`](super::Network::carried).
#[derive(Clone, Debug, PartialEq)]
pub struct Carried {
    pub(super) sequences: usize,
    /// Tokens that have been read of each text.
    pub(super) tokens: usize,
    /// Of each section of each layer.
    pub(super) layers: Vec<Vec<SectionCarried>>,
}

impl Carried {
    /// Texts.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Tokens that have been read of each.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Goes back to the beginning of texts.
    pub fn clear(&mut self) {
        self.tokens = 0;
        self.layers.iter_mut().flatten().for_each(|section| *section = SectionCarried::default());
    }

    /// All of it as bytes: with the network, all that it is.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![];
        let count = |bytes: &mut Vec<u8>, n: usize| bytes.extend((n as u64).to_le_bytes());
        count(&mut bytes, self.sequences);
        count(&mut bytes, self.tokens);
        for section in self.layers.iter().flatten() {
            count(&mut bytes, section.counts.len());
            section.counts.iter().for_each(|n| bytes.extend(n.to_le_bytes()));
            count(&mut bytes, section.floats.len());
            for numbers in &section.floats {
                count(&mut bytes, numbers.len());
                numbers.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
            }
        }
        bytes
    }

    /// What [`Carried::snapshot`] gave, bit for bit.
    ///
    /// # Errors
    /// [`Error::CarriedBytes`] for bytes of another network, another number of texts, or cut ones. Nothing is changed then.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut reader = Reader { bytes };
        let read = self.read(&mut reader).filter(|_| reader.bytes.is_empty());
        *self = read.ok_or(Error::CarriedBytes)?;
        Ok(())
    }

    fn read(&self, reader: &mut Reader<'_>) -> Option<Carried> {
        let sequences = usize::try_from(reader.number()?).ok();
        let sequences = sequences.filter(|sequences| *sequences == self.sequences)?;
        let tokens = usize::try_from(reader.number()?).ok()?;
        let section = |reader: &mut Reader<'_>| {
            let counts = reader.length(8)?;
            let counts = (0..counts).map(|_| reader.number()).collect::<Option<_>>()?;
            let arrays = reader.length(8)?;
            let floats = (0..arrays).map(|_| reader.floats()).collect::<Option<_>>()?;
            Some(SectionCarried { floats, counts })
        };
        let layers = self.layers.iter().map(|layer| {
            layer.iter().map(|_| section(reader)).collect::<Option<Vec<SectionCarried>>>()
        });
        Some(Carried { sequences, tokens, layers: layers.collect::<Option<_>>()? })
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl Reader<'_> {
    fn number(&mut self) -> Option<u64> {
        let (number, rest) = self.bytes.split_first_chunk()?;
        self.bytes = rest;
        Some(u64::from_le_bytes(*number))
    }

    /// How many things of at least `size` bytes follow: no more than there are bytes.
    fn length(&mut self, size: usize) -> Option<usize> {
        let length = usize::try_from(self.number()?).ok()?;
        Some(length).filter(|&length| length <= self.bytes.len() / size)
    }

    fn floats(&mut self) -> Option<Vec<f32>> {
        let count = self.length(4)?;
        let (floats, rest) = self.bytes.split_at(4 * count);
        self.bytes = rest;
        let (floats, _) = floats.as_chunks();
        Some(floats.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{Carried, SectionCarried};

    #[test]
    fn snapshots_give_every_bit_back_and_nothing_else() {
        let section = SectionCarried {
            floats: vec![vec![1.5, -0.0, f32::MIN_POSITIVE], vec![]],
            counts: vec![7],
        };
        let layers = vec![vec![section], vec![SectionCarried::default(); 2]];
        let mut carried = Carried { sequences: 2, tokens: 9, layers };
        let (before, bytes) = (carried.clone(), carried.snapshot());
        carried.clear();
        assert_ne!(carried, before);
        carried.restore(&bytes).unwrap();
        assert_eq!(carried.snapshot(), bytes);
        assert_eq!(carried.tokens(), 9);
        for cut in 0..bytes.len() {
            assert!(carried.restore(&bytes[..cut]).is_err(), "{cut}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(carried.restore(&longer).is_err());
        carried.sequences = 3;
        assert!(carried.restore(&bytes).is_err());
        let mut other = Carried { sequences: 2, tokens: 0, layers: vec![vec![]] };
        assert!(other.restore(&bytes).is_err());
    }
}
