//! A file that one process at a time has.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

/// Opens the file, which is made if there is none, and keeps it from other processes until it is closed, at the
/// latest when this process ends, however it ends. None while another process has it.
///
/// The name may be taken from the file by a rename meanwhile.
#[cfg(unix)]
pub(crate) fn claim_file(path: &Path) -> io::Result<Option<File>> {
    use std::fs::TryLockError;

    let file = options().open(path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // Between open and lock its owner may have renamed or removed it.
    Ok(same_file(&file, path)?.then_some(file))
}

/// As on Unix. Opening is claiming: who shares nothing but deletion lets others rename the file, which is how
/// std renames by name what is open here too, and neither read nor write it.
#[cfg(windows)]
pub(crate) fn claim_file(path: &Path) -> io::Result<Option<File>> {
    use std::os::windows::fs::OpenOptionsExt;

    const FILE_SHARE_DELETE: u32 = 4;
    const ERROR_SHARING_VIOLATION: i32 = 32;
    match options().share_mode(FILE_SHARE_DELETE).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.raw_os_error() == Some(ERROR_SHARING_VIOLATION) => Ok(None),
        Err(error) => Err(error),
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    // Not truncated: it may be another's still.
    options.read(true).write(true).create(true).truncate(false);
    options
}

/// Whether `path` still names the open `file`.
#[cfg(unix)]
fn same_file(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;

    let open = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok((open.dev(), open.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes a rename last: the name is in the folder, not in the file.
#[cfg(unix)]
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

/// Nothing: Windows opens no folder as a file, and NTFS keeps a journal of names.
#[cfg(windows)]
#[allow(clippy::unnecessary_wraps)] // as on Unix
pub(crate) fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}
