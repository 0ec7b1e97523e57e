//! Random numbers that are the same on every machine and in every release.

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): 64 bits of state, one multiplication chain a number.
///
/// A stream of numbers is named by a list of integers, such as (seed, epoch, window), so that any part
/// of a run can draw its numbers without those before it.
pub(crate) struct Random(u64);

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Random {
    pub(crate) fn new(name: &[u64]) -> Self {
        let mut random = Self(GOLDEN);
        for &part in name {
            // Mixed once per part: (1, 0) and (0, 1) are different streams.
            random.0 = random.next() ^ part;
        }
        random
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which must not be zero. The excess of any value is below bound / 2^64.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// Fisher and Yates's shuffle.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_paper() {
        // The first outputs of SplitMix64 for the seed 1234567, as published with its C source.
        let mut random = Random(1_234_567);
        let numbers: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(
            numbers,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn every_name_is_a_stream_of_its_own() {
        let mut firsts: Vec<u64> = (0..10)
            .flat_map(|seed| (0..10).map(move |epoch| Random::new(&[seed, epoch]).next()))
            .collect();
        firsts.sort_unstable();
        firsts.dedup();
        assert_eq!(firsts.len(), 100);
    }

    #[test]
    fn a_shuffle_is_a_permutation_and_every_place_is_likely() {
        let mut seen = [[0u32; 5]; 5];
        let mut random = Random::new(&[3]);
        for _ in 0..5000 {
            let mut items = [0usize, 1, 2, 3, 4];
            random.shuffle(&mut items);
            for (place, item) in items.into_iter().enumerate() {
                seen[item][place] += 1;
            }
        }
        // Each count has mean 1000 and standard deviation 28.
        assert!(
            seen.iter().flatten().all(|&n| (850..1150).contains(&n)),
            "{seen:?}"
        );
    }
}
