//! What the property tests share; each of them uses some of it.
#![allow(dead_code)]

use barqtrain_core::Plan;

/// xorshift64*: enough randomness for tests, and no dependency.
pub struct Rng(pub u64);

impl Rng {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }

    /// Mostly short documents, with some near the capacity, where packing gets hard.
    pub fn lengths(&mut self, count: usize, capacity: usize) -> Vec<i64> {
        (0..count)
            .map(|_| {
                let bound = match self.below(4) {
                    0 => capacity,
                    1 => capacity / 2 + 1,
                    _ => capacity / 8 + 1,
                };
                1 + self.below(bound) as i64
            })
            .collect()
    }
}

/// Each document once, no row too full, none empty.
pub fn assert_valid(plan: &Plan, lengths: &[i64], capacity: usize) {
    let mut seen = vec![false; lengths.len()];
    for row in plan.rows() {
        assert!(!row.is_empty(), "a row without documents");
        let tokens: i64 = row.iter().map(|&d| lengths[d as usize]).sum();
        assert!(tokens as usize <= capacity, "{tokens} tokens in {capacity}");
        for &document in row {
            assert!(!seen[document as usize], "document {document} twice");
            seen[document as usize] = true;
        }
    }
    assert!(seen.iter().all(|&s| s), "a document is missing");
    assert_eq!(plan.offsets.first(), Some(&0));
    assert_eq!(plan.offsets.last(), Some(&lengths.len()));
}
