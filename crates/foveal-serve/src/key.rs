//! Who may ask: keys from a file or the environment, of which the server keeps hashes only.
//!
//! A key that is sent is hashed and compared with every hash, each to its last byte, so that the time tells nothing.

use std::fmt;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::Error;

/// The fewest characters of a key.
const SHORTEST: usize = 16;
const LONGEST: usize = 512;

/// Keys, any of which is good. Neither printed nor logged: not even the hashes are.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Keys(Vec<[u8; 32]>);

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

impl Keys {
    /// Adds a key.
    ///
    /// # Errors
    ///
    /// [`Error::Key`] for one that is shorter than 16 characters, longer than 512, or has others than visible ASCII ones.
    pub fn add(&mut self, key: &str) -> Result<(), Error> {
        let visible = key.bytes().all(|byte| byte.is_ascii_graphic());
        if !visible || !(SHORTEST..=LONGEST).contains(&key.len()) {
            return Err(Error::Key { found: key.len(), expected: "16 to 512 of ASCII" });
        }
        self.0.push(hash(key.as_bytes()));
        Ok(())
    }

    /// Adds the keys of a file, one a line; empty lines and those that begin with `#` count for nothing.
    ///
    /// # Errors
    ///
    /// [`Error::KeyFile`], also for a file without keys; [`Error::Key`].
    pub fn add_file(&mut self, path: &Path) -> Result<(), Error> {
        let wrong = |source| Error::KeyFile { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(wrong)?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let before = self.0.len();
        lines.filter(|line| !line.starts_with('#')).try_for_each(|line| self.add(line))?;
        if self.0.len() == before {
            return Err(wrong(std::io::Error::other("it has none")));
        }
        Ok(())
    }

    /// Whether there are none: then everyone may ask.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `key` is one of them.
    pub(crate) fn allow(&self, key: &[u8]) -> bool {
        let hash = hash(key);
        let equal = |known: &[u8; 32]| {
            let differing = known.iter().zip(&hash).fold(0, |bits, (a, b)| bits | (a ^ b));
            std::hint::black_box(differing) == 0
        };
        // Every one is compared, whatever the first ones gave.
        self.0.iter().fold(false, |found, known| found | equal(known))
    }
}

fn hash(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_that_were_added_are_good_and_none_is_shown() {
        let mut keys = Keys::default();
        assert!(keys.is_empty() && !keys.allow(b""));
        for key in ["0123456789abcdef", "another-key-of-some-length"] {
            keys.add(key).unwrap();
        }
        assert!(keys.allow(b"0123456789abcdef") && keys.allow(b"another-key-of-some-length"));
        for key in ["", "0123456789abcde", "0123456789abcdeg", "0123456789abcdef "] {
            assert!(!keys.allow(key.as_bytes()), "{key:?}");
        }
        assert_eq!(format!("{keys:?}"), "Keys(2)");
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let mut keys = Keys::default();
        for key in
            ["", "short", "with a space in it all", "tab\tinside-of-the-key", &"x".repeat(513)]
        {
            assert!(matches!(keys.add(key), Err(Error::Key { .. })), "{key:?}");
        }
        assert!(keys.is_empty());
    }

    #[test]
    fn files_have_a_key_a_line() {
        let path = std::env::temp_dir().join(format!("foveal-keys-{}", std::process::id()));
        std::fs::write(&path, "# mine\n\n0123456789abcdef\n  fedcba9876543210  \n").unwrap();
        let mut keys = Keys::default();
        keys.add_file(&path).unwrap();
        assert!(keys.allow(b"fedcba9876543210") && keys.allow(b"0123456789abcdef"));
        std::fs::write(&path, "# none\n").unwrap();
        assert!(matches!(keys.add_file(&path), Err(Error::KeyFile { .. })));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(keys.add_file(&path), Err(Error::KeyFile { .. })));
    }
}
