//! The mechanisms that exist, as data: what `foveal list` prints and the tables of the documentation are made from.

/// A family of mechanisms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Group {
    /// Softmax attention, computed exactly.
    Exact,
}

impl Group {
    /// The name, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Group::Exact => "exact",
        }
    }
}

/// A mechanism: its name in configurations and commands, and what there is of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mechanism {
    /// The name, the same everywhere.
    pub name: &'static str,
    /// Its family.
    pub group: Group,
    /// One sentence.
    pub summary: &'static str,
    /// Where it was published.
    pub paper: &'static str,
    /// Whether whole sequences can be computed.
    pub forward: bool,
    /// Whether gradients can be computed.
    pub backward: bool,
    /// Whether tokens can be computed one by one from a cache or state.
    pub decode: bool,
}

/// All mechanisms, by group.
pub const MECHANISMS: &[Mechanism] = &[
    Mechanism {
        name: "full",
        group: Group::Exact,
        summary: "every token sees all tokens before it; multi-head, grouped-query and multi-query",
        paper: "arXiv:1706.03762, arXiv:2305.13245",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "window",
        group: Group::Exact,
        summary: "every token sees a number of the newest tokens, its own included",
        paper: "arXiv:2004.05150, section 3.1",
        forward: true,
        backward: true,
        decode: true,
    },
    Mechanism {
        name: "differential",
        group: Group::Exact,
        summary: "the difference of two softmaxes over the same values, normalised",
        paper: "arXiv:2410.05258",
        forward: true,
        backward: true,
        decode: true,
    },
];

#[cfg(test)]
mod tests {
    use super::MECHANISMS;

    #[test]
    fn names_are_unique_and_fit_for_configurations() {
        for (i, mechanism) in MECHANISMS.iter().enumerate() {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            assert!(mechanism.name.chars().all(plain), "{}", mechanism.name);
            assert!(MECHANISMS[..i].iter().all(|other| other.name != mechanism.name));
        }
    }
}
