//! Files that are almost token stores: each is refused, or all that it says lies within it.
//!
//! A part of this crate rather than of its tests, because a file whose checksum is made right again gets
//! further. `BARQ_FUZZ=1000000 cargo test --release store_fuzz` tries as many; a case that fails is named,
//! and `BARQ_FUZZ_FIRST` begins with it. Files are in `TMPDIR`.

use std::fs;
use std::io::{Seek, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::checksum::Xxh64;
use crate::random::Random;
use crate::store::{verify, Key, StoreError, StoreWriter, HEADER};

const CASES: usize = 4_000;
/// A case takes some 20 us; a busy machine may keep any of them waiting.
const HANGS: Duration = Duration::from_secs(20);
const HEADER_LEN: usize = HEADER as usize;
/// Where numbers matter: counts of documents and tokens, and the checksum.
const NUMBERS_AT: [usize; 3] = [40, 48, 56];
const NUMBERS: [u64; 14] = [
    0,
    1,
    2,
    7,
    8,
    1 << 20,
    1 << 31,
    1 << 32,
    (1 << 56) - 1,
    1 << 56,
    (1 << 61) - 1,
    1 << 62,
    u64::MAX - 1,
    u64::MAX,
];

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}")))
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn set(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Makes the checksum right.
fn sum(bytes: &mut [u8]) {
    let mut checksum = Xxh64::new();
    checksum.update(&bytes[HEADER_LEN..]);
    checksum.update(&bytes[..NUMBERS_AT[2]]);
    set(bytes, NUMBERS_AT[2], checksum.finish());
}

/// Stores of all shapes: empty, of empty documents, of odd and even numbers of tokens, over a buffer long.
fn valid(file: &PathBuf) -> Vec<Vec<u8>> {
    let shapes: [&[usize]; 7] = [
        &[],
        &[0],
        &[1],
        &[3, 0, 2],
        &[0, 0, 0, 0],
        &[5; 40],
        &[1000, 1, 400],
    ];
    let mut stores = Vec::new();
    for (index, lengths) in shapes.into_iter().enumerate() {
        let key: Key = [index as u8; 32];
        let mut writer = StoreWriter::claim(file, key).unwrap().unwrap();
        for &length in lengths {
            let document: Vec<i32> = (0..length as i32).map(|i| i.wrapping_mul(7919)).collect();
            writer.push(&document).unwrap();
        }
        writer.finish().unwrap();
        stores.push(fs::read(file).unwrap());
    }
    stores
}

fn a_number(random: &mut Random, bytes: &[u8]) -> u64 {
    let near = bytes.len() as u64 / 4;
    match random.below(4) {
        0 => NUMBERS[random.below(NUMBERS.len())],
        1 => random.next(),
        // Counts that nearly go with the size.
        2 => near.wrapping_add(random.below(40) as u64).wrapping_sub(20),
        _ => random.below(bytes.len() + 1) as u64,
    }
}

/// One change; what it is not possible on stays as it is.
fn mutate(bytes: &mut Vec<u8>, stores: &[Vec<u8>], random: &mut Random) {
    let size = bytes.len();
    let at = random.below(size + 1);
    match random.below(9) {
        0 if at < size => bytes[at] ^= 1 << random.below(8),
        1 if at < size => bytes[at] = random.next() as u8,
        2 => bytes.truncate(at),
        3 => bytes.extend((0..random.below(70)).map(|_| random.next() as u8)),
        4 if size >= HEADER_LEN => {
            let place = NUMBERS_AT[random.below(3)];
            let value = a_number(random, bytes);
            set(bytes, place, value);
        }
        // Most offsets of documents are at the end.
        5 if size >= HEADER_LEN + 8 => {
            let words = (size - HEADER_LEN) / 8;
            let place = size - 8 * (1 + random.below(words.min(50)));
            let value = a_number(random, bytes);
            set(bytes, place, value);
        }
        6 => {
            let end = at + random.below(size - at + 1);
            bytes.drain(at..end);
        }
        7 => {
            let other = &stores[random.below(stores.len())];
            let from = random.below(other.len());
            let part = other[from..from + random.below(other.len() - from + 1)].to_vec();
            bytes.splice(at..at, part);
        }
        8 if at < size => {
            let end = at + random.below((size - at).min(16) + 1);
            bytes[at..end].fill([0, 0xFF][random.below(2)]);
        }
        _ => {}
    }
}

/// All that a reader of an accepted store relies on.
fn assert_within(bytes: &[u8], documents: u64, tokens: u64) {
    let (documents, tokens) = (documents as usize, tokens as usize);
    let tokens_end = HEADER_LEN + 4 * tokens;
    let offsets_at = tokens_end.next_multiple_of(8);
    assert!(tokens_end <= bytes.len());
    assert_eq!(bytes.len(), offsets_at + 8 * (documents + 1));
    let offsets: Vec<u64> = (0..=documents)
        .map(|index| number(bytes, offsets_at + 8 * index))
        .collect();
    assert_eq!((offsets[0], offsets[documents]), (0, tokens as u64));
    assert!(offsets.windows(2).all(|pair| pair[0] <= pair[1]));
}

struct Case(u64);

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("BARQ_FUZZ_FIRST={} BARQ_FUZZ=1", self.0);
        }
    }
}

#[test]
fn what_is_accepted_lies_within_the_file() {
    let folder = std::env::temp_dir().join(format!("barq-store-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join("tokens");
    let stores = valid(&file);
    let mut written = fs::File::options().write(true).open(&file).unwrap();
    let first = setting("BARQ_FUZZ_FIRST").unwrap_or(0);
    let cases = setting("BARQ_FUZZ").unwrap_or(CASES as u64);
    let (mut accepted, mut slowest) = (0, Duration::ZERO);
    for case in first..first + cases {
        let named = Case(case);
        let mut random = Random::new(&[case]);
        let original = &stores[random.below(stores.len())];
        let mut bytes = original.clone();
        if random.below(50) == 0 {
            bytes = (0..random.below(200))
                .map(|_| random.next() as u8)
                .collect();
        }
        for _ in 0..1 + random.below(4) {
            mutate(&mut bytes, &stores, &mut random);
        }
        let summed = bytes.len() >= HEADER_LEN && random.below(4) > 0;
        if summed {
            sum(&mut bytes);
        }
        // Written over: a file that is emptied and written is flushed to the disk by some file systems.
        written.set_len(bytes.len() as u64).unwrap();
        written.rewind().unwrap();
        written.write_all(&bytes).unwrap();
        let started = Instant::now();
        let found = verify(&file, None);
        slowest = slowest.max(started.elapsed());
        assert!(started.elapsed() < HANGS, "it took {:?}", started.elapsed());
        match found {
            Ok(layout) => {
                assert!(summed || bytes == *original || stores.contains(&bytes));
                assert_within(&bytes, layout.documents, layout.tokens);
                accepted += 1;
            }
            Err(StoreError::Damaged { .. }) => assert!(!stores.contains(&bytes)),
            Err(error) => panic!("{error}"),
        }
        drop(named);
    }
    fs::remove_dir_all(&folder).unwrap();
    println!("{cases} files, {accepted} of them accepted; the slowest took {slowest:?}");
    if cases >= CASES as u64 {
        assert!(accepted > cases / 100, "the cases no longer reach the end");
        assert!(accepted < cases / 2, "the cases are no longer damaged");
    }
}
