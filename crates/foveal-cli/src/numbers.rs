//! Numbers on the command line and in messages.

use std::fmt::Display;
use std::num::NonZeroUsize;

/// A number in a range, for clap: refuses NaN and infinities.
fn within(text: &str, allowed: impl Fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    let number: f32 = text.parse().map_err(|_| format!("expected a number, {expected}"))?;
    if number.is_finite() && allowed(number) {
        Ok(number)
    } else {
        Err(format!("expected {expected}"))
    }
}

pub(crate) fn temperature(text: &str) -> Result<f32, String> {
    within(text, |x| x >= 0.0, "0 or more")
}

pub(crate) fn top_p(text: &str) -> Result<f32, String> {
    within(text, |x| x > 0.0 && x <= 1.0, "above 0 and at most 1")
}

pub(crate) fn min_p(text: &str) -> Result<f32, String> {
    within(text, |x| (0.0..1.0).contains(&x), "at least 0 and below 1")
}

pub(crate) fn repeat_penalty(text: &str) -> Result<f32, String> {
    within(text, |x| x > 0.0, "above 0")
}

/// A number of threads: more than any machine has is a slip of the finger.
pub(crate) fn threads(text: &str) -> Result<NonZeroUsize, String> {
    let expected = || "expected 1 to 4096".to_owned();
    let threads: NonZeroUsize = text.parse().map_err(|_| expected())?;
    if threads.get() <= 4096 { Ok(threads) } else { Err(expected()) }
}

/// A number of tokens, of which there is one at least.
pub(crate) fn tokens(text: &str) -> Result<usize, String> {
    let tokens = text.parse().ok().filter(|tokens| (1..=1 << 30).contains(tokens));
    tokens.ok_or_else(|| "expected 1 to 1073741824".to_owned())
}

/// A number of bytes, in the unit that suits it.
pub(crate) fn bytes(count: usize) -> impl Display {
    match count {
        0..1024 => format!("{count} B"),
        1024..1_048_576 => format!("{:.1} KiB", count as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", count as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", count as f64 / 1_073_741_824.0),
    }
}

/// Tokens a second.
pub(crate) fn rate(tokens: usize, seconds: f64) -> f64 {
    if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
}

/// The most memory that this process has had resident, where the system says so (Linux).
pub(crate) fn resident_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}
