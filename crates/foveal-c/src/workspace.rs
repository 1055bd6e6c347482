//! Scratch memory that is kept between calls, behind a lock that is never waited for.

use crate::error::{Error, Result};
use foveal::Workspace;
use std::sync::{Mutex, TryLockError};

/// Scratch memory that is kept between calls; it grows to what the largest of them needs. One call at a time may
/// use it.
#[derive(Debug, Default)]
pub struct foveal_workspace {
    inner: Mutex<Workspace>,
}

/// An empty workspace, to be freed with `foveal_workspace_free`.
#[unsafe(no_mangle)]
pub extern "C" fn foveal_workspace_create() -> *mut foveal_workspace {
    Box::into_raw(Box::default())
}

/// Frees a workspace and its memory. NULL is ignored.
///
/// # Safety
/// `workspace` comes from `foveal_workspace_create`, no call uses it, and it is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn foveal_workspace_free(workspace: *mut foveal_workspace) {
    if !workspace.is_null() {
        // SAFETY: made by `Box::into_raw`, and given up by the caller.
        drop(unsafe { Box::from_raw(workspace) });
    }
}

/// Runs `work` with a workspace of at least `bytes`: the caller's, or one for this call if there is none.
///
/// # Safety
/// A pointer that is not NULL comes from [`foveal_workspace_create`] and has not been freed.
pub(crate) unsafe fn with_workspace(
    workspace: *const foveal_workspace,
    bytes: usize,
    work: impl FnOnce(&mut Workspace) -> foveal::Result<()>,
) -> Result<()> {
    let run = |workspace: &mut Workspace| {
        workspace.try_reserve(bytes)?;
        Ok(work(workspace)?)
    };
    if workspace.is_null() {
        return run(&mut Workspace::new());
    }
    if !workspace.is_aligned() {
        let alignment = align_of::<foveal_workspace>();
        let (what, address) = ("the workspace", workspace.addr());
        return Err(Error::Misaligned { what, address, alignment });
    }
    // SAFETY: not NULL, aligned, and alive by the caller's promise; only the lock is shared.
    let workspace = unsafe { &*workspace };
    match workspace.inner.try_lock() {
        Ok(mut workspace) => run(&mut workspace),
        // Its contents mean nothing between calls, whatever the last one ended with.
        Err(TryLockError::Poisoned(poisoned)) => run(&mut poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => Err(Error::Busy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspace_in_use_is_refused_and_one_after_a_panic_is_not() {
        let workspace = foveal_workspace::default();
        let again = || {
            // SAFETY: alive.
            unsafe { with_workspace(&workspace, 64, |own| own.try_reserve(64)) }
        };
        // SAFETY: alive.
        let nested = unsafe {
            with_workspace(&workspace, 64, |_| {
                assert!(matches!(again(), Err(Error::Busy)));
                Ok(())
            })
        };
        nested.unwrap();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // SAFETY: alive.
            unsafe { with_workspace(&workspace, 64, |_| panic!("in a call")) }
        }));
        assert!(panicked.is_err() && workspace.inner.is_poisoned());
        again().unwrap();
    }
}
