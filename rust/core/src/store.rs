//! A file of tokenised documents, written once and then mapped into memory.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `BARQTOK` and the version of this layout |
//! | 32 | key: a digest of data, tokenizer and settings |
//! | 8 | documents D |
//! | 8 | tokens T |
//! | 8 | XXH64 of all that follows, then of the 56 bytes above |
//! | 4 T | tokens: the id in 31 bits, in the top bit whether it bears no loss |
//! | 0 or 4 | zeros, to a multiple of 8 |
//! | 8 (D + 1) | where each document begins, and T |
//!
//! All numbers are little-endian. A file by the final name is always whole: it is written under another
//! name, flushed to the disk and renamed. The unfinished file is claimed, so of several processes one
//! writes and the others can wait for it; the claim of a killed process is gone with it.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::checksum::Xxh64;
use crate::claim::{claim_file, sync_folder};
pub use crate::store_error::StoreError;

const MAGIC: [u8; 8] = *b"BARQTOK\x01";
/// Bytes before the tokens.
pub const HEADER: u64 = 64;
const CHECKSUM_AT: usize = 56;

/// Digest of everything that a store was made from.
pub type Key = [u8; 32];

/// Where the parts of a store are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Documents in the store.
    pub documents: u64,
    /// Tokens of all of them.
    pub tokens: u64,
}

impl Layout {
    /// Byte at which the offsets of the documents begin.
    #[must_use]
    pub fn offsets_at(&self) -> u64 {
        HEADER + (4 * self.tokens).next_multiple_of(8)
    }

    fn header(&self, key: &Key) -> [u8; CHECKSUM_AT] {
        let mut header = [0; CHECKSUM_AT];
        header[..8].copy_from_slice(&MAGIC);
        header[8..40].copy_from_slice(key);
        header[40..48].copy_from_slice(&self.documents.to_le_bytes());
        header[48..].copy_from_slice(&self.tokens.to_le_bytes());
        header
    }
}

/// Writes a store, document by document. Dropped before [`StoreWriter::finish`], it leaves nothing.
pub struct StoreWriter {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    published: bool,
    key: Key,
    offsets: Vec<u64>,
    checksum: Xxh64,
}

impl StoreWriter {
    /// Begins to write the store that will be at `path`; None while another process does.
    ///
    /// Who was told None and then gets a writer should look first whether the store is there now.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub fn claim(path: &Path, key: Key) -> Result<Option<Self>, StoreError> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let failed = |source| StoreError::io("creating", &partial, source);
        let Some(file) = claim_file(&partial).map_err(failed)? else {
            return Ok(None);
        };
        file.set_len(0).map_err(failed)?;
        let mut writer = Self {
            path: path.to_owned(),
            partial: partial.clone(),
            file: BufWriter::with_capacity(1 << 20, file),
            published: false,
            key,
            offsets: vec![0],
            checksum: Xxh64::new(),
        };
        writer.write(&[0; HEADER as usize])?;
        Ok(Some(writer))
    }

    /// Adds a document.
    ///
    /// # Errors
    /// When the disk is full or broken.
    pub fn push(&mut self, document: &[i32]) -> Result<(), StoreError> {
        let mut bytes = [0; 4096];
        for tokens in document.chunks(bytes.len() / 4) {
            for (slot, token) in bytes.chunks_exact_mut(4).zip(tokens) {
                slot.copy_from_slice(&token.to_le_bytes());
            }
            self.write_summed(&bytes[..4 * tokens.len()])?;
        }
        let end = self.offsets.last().copied().unwrap_or(0) + document.len() as u64;
        self.offsets.push(end);
        Ok(())
    }

    /// Adds documents that lie end to end, by their lengths.
    ///
    /// # Errors
    /// As [`StoreWriter::push`], or when the lengths do not add up to the tokens.
    pub fn push_all(&mut self, mut tokens: &[i32], lengths: &[i64]) -> Result<(), StoreError> {
        let mismatch = StoreError::LengthsMismatch {
            tokens: tokens.len(),
            sum: lengths.iter().fold(0, |sum, &n| n.saturating_add(sum)),
        };
        for &length in lengths {
            let split = usize::try_from(length)
                .ok()
                .and_then(|n| tokens.split_at_checked(n));
            let Some((document, rest)) = split else {
                return Err(mismatch);
            };
            self.push(document)?;
            tokens = rest;
        }
        if tokens.is_empty() {
            Ok(())
        } else {
            Err(mismatch)
        }
    }

    /// Publishes the store under its final name.
    ///
    /// # Errors
    /// When the disk is full or broken; then nothing is left behind.
    pub fn finish(mut self) -> Result<Layout, StoreError> {
        let offsets = std::mem::take(&mut self.offsets);
        let layout = Layout {
            documents: offsets.len() as u64 - 1,
            tokens: offsets.last().copied().unwrap_or(0),
        };
        let gap = layout.offsets_at() - HEADER - 4 * layout.tokens;
        self.write_summed(&[0; 4][..gap as usize])?;
        for offset in offsets {
            self.write_summed(&offset.to_le_bytes())?;
        }
        let header = layout.header(&self.key);
        self.checksum.update(&header);
        let checksum = self.checksum.finish().to_le_bytes();

        let file = &mut self.file;
        file.rewind()
            .and_then(|()| file.write_all(&header))
            .and_then(|()| file.write_all(&checksum))
            .and_then(|()| file.flush())
            .and_then(|()| file.get_ref().sync_all())
            .and_then(|()| std::fs::rename(&self.partial, &self.path))
            .map_err(|source| StoreError::io("writing", &self.path, source))?;
        self.published = true;
        sync_folder(&self.path).map_err(|source| StoreError::io("writing", &self.path, source))?;
        Ok(layout)
    }

    fn write_summed(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.checksum.update(bytes);
        self.write(bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file
            .write_all(bytes)
            .map_err(|source| StoreError::io("writing", &self.path, source))
    }
}

impl Drop for StoreWriter {
    fn drop(&mut self) {
        if !self.published {
            // While the lock is held: after that the name may be another writer's. What cannot be
            // removed stays as a file that the next writer empties.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Reads a whole store once and checks it.
///
/// # Errors
/// [`StoreError::Io`] when it cannot be read; [`StoreError::OtherKey`] when it was made from something
/// else; [`StoreError::Damaged`] when it is not what was written.
pub fn verify(path: &Path, key: Option<&Key>) -> Result<Layout, StoreError> {
    let failed = |source| StoreError::io("reading", path, source);
    let damaged = |reason: String| StoreError::Damaged {
        path: path.to_owned(),
        reason,
    };
    let mut file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let mut header = [0; HEADER as usize];
    if size < HEADER {
        return Err(damaged(format!("it has {size} bytes, fewer than a header")));
    }
    file.read_exact(&mut header).map_err(failed)?;
    if header[..8] != MAGIC {
        return Err(damaged("it does not begin as a token store".to_owned()));
    }
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let (documents, tokens) = (number(40), number(48));
    // Guards the sums below; no file is as long.
    if documents >= 1 << 56 || tokens >= 1 << 56 {
        return Err(damaged(format!(
            "it claims {documents} documents, {tokens} tokens"
        )));
    }
    let layout = Layout { documents, tokens };
    let expected = layout.offsets_at() + 8 * (documents + 1);
    if size != expected {
        return Err(damaged(format!(
            "it has {size} bytes instead of {expected}"
        )));
    }
    if key.is_some_and(|key| header[8..40] != *key) {
        return Err(StoreError::OtherKey {
            path: path.to_owned(),
        });
    }

    let mut checksum = Xxh64::new();
    let mut buffer = vec![0; 1 << 20];
    let mut left = layout.offsets_at() - HEADER;
    while left > 0 {
        let part = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        file.read_exact(&mut buffer[..part]).map_err(failed)?;
        checksum.update(&buffer[..part]);
        left -= part as u64;
    }
    let mut before = 0;
    let mut left = 8 * (documents + 1);
    let mut first = true;
    while left > 0 {
        let part = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        file.read_exact(&mut buffer[..part]).map_err(failed)?;
        checksum.update(&buffer[..part]);
        for bytes in buffer[..part].chunks_exact(8) {
            let mut offset = [0; 8];
            offset.copy_from_slice(bytes);
            let offset = u64::from_le_bytes(offset);
            if offset < before || (first && offset != 0) {
                return Err(damaged(format!(
                    "a document begins at token {offset} after {before}"
                )));
            }
            (before, first) = (offset, false);
        }
        left -= part as u64;
    }
    if before != tokens {
        return Err(damaged(format!(
            "its documents end at token {before} of {tokens}"
        )));
    }
    checksum.update(&header[..CHECKSUM_AT]);
    if checksum.finish() != number(CHECKSUM_AT) {
        return Err(damaged("its checksum is another".to_owned()));
    }
    Ok(layout)
}
