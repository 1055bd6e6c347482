//! Ctrl-C: the first asks for an end, and whoever works looks whether it was asked; the second ends the process.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

/// The exit code of a process that SIGINT ended, as shells give it.
pub(crate) const EXIT: u8 = 130;

static ASKED: AtomicBool = AtomicBool::new(false);

/// From here on Ctrl-C asks instead of ending the process at once.
pub(crate) fn catch() {
    // Where there is no such handler the process ends at once, as it would have.
    let _ = ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::Relaxed) {
            std::process::exit(EXIT.into());
        }
    });
}

/// Whether an end was asked for.
pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Whether to go on.
pub(crate) fn flow() -> ControlFlow<()> {
    if asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// The end that was asked for has come.
pub(crate) fn done() {
    ASKED.store(false, Ordering::Relaxed);
}

/// Whether a failure is only that an end was asked for.
pub(crate) fn is_cause_of(error: &anyhow::Error) -> bool {
    let mut causes = error.chain();
    causes.any(|cause| {
        let cause = cause.downcast_ref::<foveal_lm::Error>();
        matches!(cause, Some(foveal_lm::Error::Interrupted))
    })
}
