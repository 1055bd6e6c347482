//! Files that appear whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes a file by way of a temporary one in the same folder, which is flushed to disk and then renamed to `path`.
///
/// Until the rename `path` is as it was, and programs that have the old file open or mapped keep the old one.
/// After an error the temporary file is removed.
///
/// # Errors
///
/// Those of the operating system and of `fill`.
pub fn write(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> io::Result<()> {
    write_at(path, |temporary| {
        let mut out = BufWriter::new(File::options().write(true).create_new(true).open(temporary)?);
        fill(&mut out)?;
        out.flush()
    })
}

/// The same for what writes a file by its path: `fill` makes the temporary one.
///
/// # Errors
///
/// Those of the operating system and of `fill`.
pub fn write_at(path: &Path, fill: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let temporary = Temporary(beside(path)?);
    fill(&temporary.0)?;
    File::open(&temporary.0)?.sync_all()?;
    fs::rename(&temporary.0, path)?;
    sync_folder(path)
}

/// Removes the file when dropped; after the rename there is none to remove.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A name in the folder of `path` that no other call has.
fn beside(path: &Path) -> io::Result<PathBuf> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}-{}", std::process::id(), CALLS.fetch_add(1, Ordering::Relaxed)));
    Ok(path.with_file_name(temporary))
}

/// Makes the rename itself last; on systems without folder handles the rename is all there is.
fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}
