//! Stop strings in a stream: text that may still become one is held back.

/// Watches text for stop strings, across the borders of its pieces.
#[derive(Clone, Debug)]
pub(super) struct Stops {
    stops: Vec<String>,
    /// Seen, but not given out: the beginning of a stop string, perhaps.
    held: String,
}

impl Stops {
    /// Empty strings are left out: they would stop everything.
    pub(super) fn new(stops: &[String]) -> Stops {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Stops { stops, held: String::new() }
    }

    /// Takes the next piece of text. Returns what is certain to be no part of a stop string, and whether one is
    /// complete; what follows it is dropped. Of several that end in one piece, the one that begins first counts.
    pub(super) fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = found {
            let mut before = std::mem::take(&mut self.held);
            before.truncate(at);
            return (before, true);
        }
        let rest = self.held.split_off(self.certain());
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What is held back, when nothing more comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the longest end of the held text begins that is a beginning of a stop string.
    fn certain(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest.saturating_sub(1));
        let first = self.held.ceil_char_boundary(first);
        let may_begin = |at: &usize| {
            let end = &self.held[*at..];
            self.stops.iter().any(|stop| stop.starts_with(end))
        };
        let starts = self.held[first..].char_indices().map(|(at, _)| first + at);
        starts.into_iter().find(may_begin).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::Stops;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut watch =
            Stops::new(&stops.iter().map(|stop| (*stop).to_owned()).collect::<Vec<_>>());
        let mut out = Vec::new();
        for piece in pieces {
            let (text, stopped) = watch.push(piece);
            out.push(text);
            if stopped {
                return (out, true);
            }
        }
        out.push(watch.finish());
        (out, false)
    }

    #[test]
    fn without_stops_text_passes_at_once() {
        assert_eq!(
            run(&[], &["a", "", "b"]),
            (vec!["a".into(), "".into(), "b".into(), "".into()], false)
        );
        assert_eq!(run(&[""], &["a"]), (vec!["a".into(), "".into()], false));
    }

    #[test]
    fn a_stop_across_pieces_is_held_back_and_found() {
        let (out, stopped) = run(&["\n\nUser:"], &["Hi\n", "\nUs", "er: no"]);
        assert_eq!((out, stopped), (vec!["Hi".into(), "".into(), "".into()], true));
    }

    #[test]
    fn what_turns_out_to_be_no_stop_is_given_out() {
        let (out, stopped) = run(&["abc"], &["xab", "ab", "d"]);
        assert_eq!((out, stopped), (vec!["x".into(), "ab".into(), "abd".into(), "".into()], false));
        assert_eq!(run(&["abc"], &["ab"]), (vec!["".into(), "ab".into()], false));
    }

    #[test]
    fn the_first_beginning_wins_within_a_piece() {
        assert_eq!(run(&["c", "b"], &["abcd"]), (vec!["a".into()], true));
    }

    #[test]
    fn characters_of_several_bytes_stay_whole() {
        let (out, stopped) = run(&["é!"], &["caf", "é", "é", "!"]);
        assert_eq!((out, stopped), (vec!["caf".into(), "".into(), "é".into(), "".into()], true));
        // "é" and "è" share their first byte.
        assert_eq!(run(&["è"], &["é"]), (vec!["é".into(), "".into()], false));
    }

    /// Whatever the pieces, the text before the first stop comes out, and the stop is found or not.
    #[test]
    fn pieces_make_no_difference() {
        let text = "abababcabéab";
        for stops in [&["abc"][..], &["abab"], &["bé"], &["zz"], &["ababc", "cab"]] {
            let whole = run(stops, &[text]);
            for cut in 1..text.len() {
                let Some((a, b)) = text.split_at_checked(cut) else { continue };
                let cut = run(stops, &[a, b]);
                assert_eq!((cut.0.concat(), cut.1), (whole.0.concat(), whole.1), "{a}|{b}");
            }
        }
    }
}
