//! Why a token store cannot be read or written.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a token store cannot be read or written.
#[derive(Debug)]
pub enum StoreError {
    /// The system refused.
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not, or no longer, what was written.
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The lengths of documents do not add up to their tokens.
    LengthsMismatch {
        /// Tokens given.
        tokens: usize,
        /// Sum of the lengths.
        sum: i64,
    },
    /// The store was made from other data, by another tokenizer or with other settings.
    OtherKey {
        /// Which file.
        path: PathBuf,
    },
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io {
                action,
                path,
                source,
            } => {
                let fix = match source.kind() {
                    io::ErrorKind::StorageFull
                    | io::ErrorKind::QuotaExceeded
                    | io::ErrorKind::FileTooLarge => {
                        ": free some space, or choose a folder on another disk"
                    }
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                        ": choose a folder that you may write to"
                    }
                    _ => "",
                };
                write!(f, "{action} {} failed: {source}{fix}.", path.display())
            }
            Self::Damaged { path, reason } => write!(
                f,
                "{} is damaged: {reason}. Delete it and build it again.",
                path.display()
            ),
            Self::LengthsMismatch { tokens, sum } => write!(
                f,
                "lengths add up to {sum} for {tokens} tokens: pass one length of zero or more for each \
                 document."
            ),
            Self::OtherKey { path } => write!(
                f,
                "{} was made from other data, by another tokenizer or with other settings: delete it, or \
                 choose another path.",
                path.display()
            ),
        }
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
