//! Which attention suits a need: a length of text, memory for it, and whether single tokens of it have to be found again.

use crate::numbers;

use super::figures::Figures;

/// What is asked of an attention.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Which to choose")]
pub(crate) struct Need {
    /// Tokens of the texts that you have.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = numbers::tokens)]
    pub(crate) length: usize,

    /// Bytes that such a text may leave behind; K, M and G are 2^10, 2^20 and 2^30.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) memory: Option<usize>,

    /// Whether any single token of the text may have to be found again.
    #[arg(long)]
    pub(crate) recall: bool,
}

/// A number with a letter.
fn bytes(text: &str) -> Result<usize, String> {
    let expected = || "expected bytes, such as 65536, 64K or 2M".to_owned();
    let (number, shift) = match text.trim_end_matches(['k', 'K', 'm', 'M', 'g', 'G']) {
        number if number.len() == text.len() => (number, 0),
        number if number.len() + 1 == text.len() => {
            let shift = match text.as_bytes()[number.len()].to_ascii_uppercase() {
                b'K' => 10,
                b'M' => 20,
                _ => 30,
            };
            (number, shift)
        }
        _ => return Err(expected()),
    };
    let number: usize = number.parse().map_err(|_| expected())?;
    number.checked_mul(1 << shift).filter(|&bytes| bytes > 0).ok_or_else(expected)
}

/// Whether an attention can see any single token of a text: all of them, those of a pattern in two layers, or those that it finds by
/// content. Windows lose them, matrices and summaries mix them.
pub(super) fn finds_single_tokens(mixer: &str) -> bool {
    const FIND: [&str; 9] = [
        "full",
        "gqa",
        "mqa",
        "sparse_transformer",
        "moba",
        "native_sparse",
        "lsh",
        "memorizing",
        "hybrid",
    ];
    let name = mixer.split(['/', '-']).next().unwrap_or_default();
    FIND.contains(&name) || mixer == "mla" || mixer == "differential"
}

/// One that may be chosen: its name, what counts (less is better), and the bytes of a text of the length asked for.
pub(super) struct Candidate {
    pub(super) name: String,
    pub(super) cost: f64,
    pub(super) bytes: f64,
}

impl Need {
    fn words(&self) -> String {
        let memory = self.memory.map_or_else(String::new, |memory| {
            format!(" that leave at most {} behind", numbers::bytes(memory))
        });
        let recall =
            if self.recall { ", of which any single token may have to be found" } else { "" };
        format!("For texts of {} tokens{memory}{recall}", self.length)
    }

    /// The best that meets it, and why; `unit` says what the cost is.
    pub(super) fn choose(&self, candidates: Vec<Candidate>, unit: &str) -> String {
        let count = candidates.len();
        let fits = |one: &Candidate| {
            self.memory.is_none_or(|memory| one.bytes <= memory as f64)
                && (!self.recall || finds_single_tokens(&one.name))
        };
        let mut left: Vec<Candidate> = candidates.into_iter().filter(fits).collect();
        left.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(a.bytes.total_cmp(&b.bytes)));
        let words = self.words();
        match &left[..] {
            [] => {
                format!("{words}: none of these {count} will do; compare others, or ask for less.")
            }
            [best, rest @ ..] => {
                let bytes = numbers::bytes(best.bytes.round() as usize);
                let next = rest.first().map_or_else(String::new, |next| {
                    format!("; next is {} with {}", next.name, digits(next.cost))
                });
                format!(
                    "{words}: {}, with {} {unit} and {bytes} left behind{next}.",
                    best.name,
                    digits(best.cost)
                )
            }
        }
    }
}

fn digits(x: f64) -> String {
    if x >= 100.0 { format!("{x:.0}") } else { format!("{x:.3}") }
}

/// A recommendation among trained models: the best prediction of held-out text.
pub(super) fn trained(all: &[Figures], need: &Need) -> String {
    let candidate = |one: &Figures| {
        // Where texts are longer than those of training, that is what counts.
        let beyond = (need.length > one.sequence).then(|| one.beyond()).flatten();
        let cost = beyond.or_else(|| one.within())?;
        Some(Candidate { name: one.name.clone(), cost, bytes: one.state_bytes(need.length) })
    };
    need.choose(all.iter().filter_map(candidate).collect(), "bits per byte of held-out text")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates() -> Vec<Candidate> {
        let one = |name: &str, cost, bytes| Candidate { name: name.to_owned(), cost, bytes };
        vec![one("full", 1.0, 1e6), one("gated_delta", 2.0, 1e3), one("gqa", 1.5, 5e5)]
    }

    #[test]
    fn the_best_of_what_fits_is_chosen() {
        let need = |memory, recall| Need { length: 1000, memory, recall };
        let chosen = |need: &Need| need.choose(candidates(), "bits");
        assert!(chosen(&need(None, false)).contains(": full, with 1.000 bits"));
        assert!(chosen(&need(Some(600_000), true)).contains(": gqa,"));
        assert!(chosen(&need(Some(10_000), false)).contains(": gated_delta,"));
        assert!(chosen(&need(Some(10_000), true)).contains("none of these 3"));
    }

    #[test]
    fn bytes_have_letters() {
        assert_eq!(bytes("64K"), Ok(65536));
        assert_eq!(bytes("3"), Ok(3));
        for wrong in ["", "K", "0", "-1", "1KK", "1.5M", "99999999999999999G"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
