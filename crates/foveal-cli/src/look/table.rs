//! Weights for the terminal: a bar for each token that a head looks at.

use std::fmt::Write;

use super::{Chosen, Text};
use crate::output;

/// Columns of a whole bar.
const WIDTH: usize = 24;
/// Eighths of a column.
const PARTS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
/// Cividis in the terminal's 256 colours, dark to light.
const COLOURS: [u8; 8] = [18, 24, 60, 66, 102, 144, 185, 227];

/// The heads of `chosen`, each with its `keys` strongest tokens.
pub(super) fn table(text: &Text, chosen: &[Chosen<'_>], keys: usize, colour: bool) -> String {
    let mut table = String::new();
    for Chosen { layer, head, row, mechanism, .. } in chosen {
        let name = mechanism.map(|name| format!(" ({name})")).unwrap_or_default();
        let memory = row.recalled.as_ref().map(|recalled| match recalled.entries.len() {
            0 => format!(", memory {:.2}", recalled.gate),
            entries => format!(", memory {:.2} of {entries} entries", recalled.gate),
        });
        let (memory, entropy) = (memory.unwrap_or_default(), row.entropy);
        // Writing to a string can't fail.
        let _ = writeln!(table, "\nlayer {layer} head {head}{name}, entropy {entropy:.2}{memory}");
        for &(position, weight) in row.weights.iter().take(keys) {
            let bar = bar(weight.abs());
            let bar = if colour { paint(&bar, weight.abs()) } else { bar };
            let label = output::one_line(&text.shown(position));
            let _ = writeln!(table, "  {bar} {weight:.3}  {position:>5}  {label}");
        }
        let shown: f32 = row.weights.iter().take(keys).map(|(_, weight)| weight.abs()).sum();
        // Shares with signs are shares of all magnitudes.
        let signed = row.weights.iter().any(|(_, weight)| *weight < 0.0);
        let rest = if signed { 1.0 } else { row.sum } - shown;
        if rest >= 0.0005 {
            let _ = writeln!(table, "  {:WIDTH$} {rest:.3}         on all others", "");
        }
    }
    table
}

fn bar(weight: f32) -> String {
    let eighths = (weight.clamp(0.0, 1.0) * (WIDTH * 8) as f32).round() as usize;
    let mut bar = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        bar.push(PARTS[eighths % 8]);
    }
    let columns = eighths.div_ceil(8);
    bar + &" ".repeat(WIDTH - columns)
}

fn paint(bar: &str, weight: f32) -> String {
    let level = weight.clamp(0.0, 1.0).sqrt() * (COLOURS.len() - 1) as f32;
    format!("\x1b[38;5;{}m{bar}\x1b[0m", COLOURS[level.round() as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_weights() {
        for eighths in 0..=WIDTH * 8 {
            let bar = bar(eighths as f32 / (WIDTH * 8) as f32);
            assert_eq!(bar.chars().count(), WIDTH);
            let part = |c: char| PARTS.iter().position(|&part| part == c).unwrap_or(8);
            assert_eq!(bar.chars().map(part).sum::<usize>(), eighths);
        }
        assert_eq!(bar(f32::NAN).chars().count(), WIDTH);
        assert_eq!(paint("x", 1.0), "\x1b[38;5;227mx\x1b[0m");
    }
}
