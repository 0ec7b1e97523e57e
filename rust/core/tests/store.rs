//! The token store: what is read is what was written, or an error.

use std::fs;
use std::io::{Seek, Write};
use std::path::PathBuf;

use barqtrain_core::{verify, Key, Layout, StoreError, StoreWriter, HEADER};

mod common;
use common::Rng;

const KEY: Key = [7; 32];

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("barq-store-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("tokens")
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn write(folder: &Folder, documents: &[Vec<i32>]) -> Layout {
    let mut writer = StoreWriter::claim(&folder.file(), KEY).unwrap().unwrap();
    for document in documents {
        writer.push(document).unwrap();
    }
    writer.finish().unwrap()
}

/// The store as documents, read without our code.
fn read(folder: &Folder, layout: Layout) -> Vec<Vec<i32>> {
    let bytes = fs::read(folder.file()).unwrap();
    let (front, offsets) = bytes.split_at(layout.offsets_at() as usize);
    let tokens: Vec<i32> = front[HEADER as usize..]
        .chunks_exact(4)
        .map(|b| i32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let offsets: Vec<usize> = offsets
        .chunks_exact(8)
        .map(|b| u64::from_le_bytes(b.try_into().unwrap()) as usize)
        .collect();
    offsets
        .windows(2)
        .map(|w| tokens[w[0]..w[1]].to_vec())
        .collect()
}

#[test]
fn what_is_read_is_what_was_written() {
    let folder = Folder::new("round-trip");
    let mut rng = Rng(1);
    for count in [0, 1, 2, 3, 50] {
        let documents: Vec<Vec<i32>> = (0..count)
            .map(|_| {
                let length = rng.below(3) * rng.below(3000);
                (0..length).map(|_| rng.below(1 << 31) as i32).collect()
            })
            .collect();
        let layout = write(&folder, &documents);
        assert_eq!(layout.documents, count as u64);
        assert_eq!(verify(&folder.file(), Some(&KEY)).unwrap(), layout);
        assert_eq!(verify(&folder.file(), None).unwrap(), layout);
        assert_eq!(read(&folder, layout), documents);
        assert_eq!(folder.names(), ["tokens"]);
    }
}

#[test]
fn no_damage_goes_unseen() {
    let folder = Folder::new("damage");
    let layout = write(&folder, &[vec![1, 2, 3], vec![], vec![-5, 6]]);
    let good = fs::read(folder.file()).unwrap();
    let mut file = fs::File::options().write(true).open(folder.file()).unwrap();
    let mut refused = |bytes: &[u8], what: String| {
        // Written over: a file that is emptied and written is flushed to the disk by some file systems.
        file.set_len(bytes.len() as u64).unwrap();
        file.rewind().unwrap();
        file.write_all(bytes).unwrap();
        match verify(&folder.file(), None) {
            Err(StoreError::Damaged { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
    };
    for bit in 0..8 * good.len() {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        refused(&bytes, format!("bit {bit} flipped"));
    }
    for size in 0..good.len() {
        refused(&good[..size], format!("cut to {size} bytes"));
    }
    refused(&[&good[..], &[0]].concat(), "a byte more".to_owned());
    let mut rng = Rng(3);
    for _ in 0..2_000 {
        let bytes: Vec<u8> = (0..rng.below(160)).map(|_| rng.below(256) as u8).collect();
        refused(&bytes, "noise".to_owned());
        let mut headed = good.clone();
        for byte in &mut headed[40..56] {
            *byte = rng.below(256) as u8;
        }
        refused(&headed, "noise for counts".to_owned());
    }
    fs::write(folder.file(), &good).unwrap();
    assert_eq!(verify(&folder.file(), Some(&KEY)).unwrap(), layout);
}

#[test]
fn a_store_of_something_else_is_told_apart() {
    let folder = Folder::new("key");
    write(&folder, &[vec![1]]);
    let error = verify(&folder.file(), Some(&[8; 32])).unwrap_err();
    assert!(matches!(error, StoreError::OtherKey { .. }), "{error}");
    assert!(
        error.to_string().contains("was made from other data"),
        "{error}"
    );
    let error = verify(&folder.0.join("nothing"), None).unwrap_err();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    assert!(error.to_string().starts_with("reading "), "{error}");
}

#[test]
fn lengths_must_add_up_to_the_tokens() {
    let folder = Folder::new("lengths");
    let mut writer = StoreWriter::claim(&folder.file(), KEY).unwrap().unwrap();
    for lengths in [&[1, 1][..], &[1, 3], &[4, -1], &[i64::MAX, i64::MAX], &[]] {
        let error = writer.push_all(&[1, 2, 3], lengths).unwrap_err();
        assert!(
            matches!(error, StoreError::LengthsMismatch { tokens: 3, .. }),
            "{error}"
        );
    }
    drop(writer);
    let mut writer = StoreWriter::claim(&folder.file(), KEY).unwrap().unwrap();
    writer.push_all(&[1, 2, 3], &[1, 0, 2]).unwrap();
    let layout = writer.finish().unwrap();
    assert_eq!(read(&folder, layout), [vec![1], vec![], vec![2, 3]]);
}

#[test]
fn one_writes_and_others_are_told_so() {
    let folder = Folder::new("claim");
    let mut writer = StoreWriter::claim(&folder.file(), KEY).unwrap().unwrap();
    writer.push(&[1]).unwrap();
    assert!(StoreWriter::claim(&folder.file(), KEY).unwrap().is_none());
    writer.finish().unwrap();
    // Published: the next claim begins a new file, and given up it leaves the old one.
    let writer = StoreWriter::claim(&folder.file(), KEY).unwrap().unwrap();
    assert_eq!(verify(&folder.file(), None).unwrap().tokens, 1);
    drop(writer);
    assert_eq!(verify(&folder.file(), None).unwrap().tokens, 1);
    assert_eq!(folder.names(), ["tokens"]);
}

#[test]
fn what_a_killed_writer_left_is_overwritten() {
    let folder = Folder::new("killed");
    fs::write(folder.0.join("tokens.partial"), vec![1; 100_000]).unwrap();
    let layout = write(&folder, &[vec![4, 5]]);
    assert_eq!(verify(&folder.file(), Some(&KEY)).unwrap(), layout);
    assert_eq!(folder.names(), ["tokens"]);
}

#[test]
fn a_store_that_is_given_up_leaves_nothing() {
    let folder = Folder::new("drop");
    let mut writer = StoreWriter::claim(&folder.file(), KEY).unwrap().unwrap();
    writer.push(&vec![3; 1 << 20]).unwrap();
    drop(writer);
    assert!(folder.names().is_empty(), "{:?}", folder.names());
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let folder = Folder::new("missing");
    let path = folder.0.join("no").join("tokens");
    let Err(error) = StoreWriter::claim(&path, KEY) else {
        panic!("claimed a path in no folder");
    };
    assert!(error.to_string().contains("no/tokens.partial"), "{error}");
}
