//! Documents dealt at random into blocks, of which each can be packed by another thread.

use crate::random::Random;

/// Gives each block one document out of every hand, which is as many documents, one after the other, as
/// there are blocks.
///
/// Which document of a hand a block gets is random, so that a block is a random sample of all documents.
/// Yet it finds its own in the order in which they lie, as memory is read fastest, and without the other
/// blocks.
pub(crate) struct Deal {
    blocks: u32,
    /// The place of the first block's document in each hand.
    first: Vec<u32>,
}

impl Deal {
    /// Deals `documents`, below 2^32 of them, into `blocks`, at least one.
    pub(crate) fn new(documents: usize, blocks: u32, random: &mut Random) -> Self {
        let hands = documents.div_ceil(blocks as usize);
        let first = (0..hands).map(|_| random.below(blocks as usize) as u32);
        Self {
            blocks,
            first: first.collect(),
        }
    }

    /// How many documents a block gets at most: in the last hand there may be fewer than blocks.
    pub(crate) fn hands(&self) -> usize {
        self.first.len()
    }

    /// The documents of a block: index and length.
    pub(crate) fn block<'a, L: Copy + Into<u32>>(
        &'a self,
        lengths: &'a [L],
        block: u32,
    ) -> impl Iterator<Item = (u32, u32)> + 'a {
        let hands = lengths.chunks(self.blocks as usize);
        let begins = (0u32..).step_by(self.blocks as usize);
        let hands = begins.zip(hands).zip(&self.first);
        hands.filter_map(move |((begin, hand), &first)| {
            let place = first + block;
            let place = place.checked_sub(self.blocks).unwrap_or(place);
            let length = hand.get(place as usize)?;
            Some((begin + place, (*length).into()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_document_is_in_one_block() {
        for (documents, blocks) in [(0, 1), (1, 2), (6, 6), (100, 6), (101, 6), (107, 6)] {
            let lengths: Vec<u32> = (1..=documents).collect();
            let deal = Deal::new(lengths.len(), blocks, &mut Random::new(&[5]));
            let mut found = Vec::new();
            for block in 0..blocks {
                let before = found.len();
                found.extend(deal.block(&lengths, block));
                assert!(found[before..].is_sorted());
                assert!(deal.hands() - (found.len() - before) <= 1);
            }
            found.sort_unstable();
            let all = (0..).zip(lengths.iter().copied());
            assert!(found.into_iter().eq(all), "{documents} into {blocks}");
        }
    }

    #[test]
    fn a_block_is_a_random_sample() {
        const BLOCKS: u32 = 8;
        let lengths = vec![1u32; 80_000];
        let deal = Deal::new(lengths.len(), BLOCKS, &mut Random::new(&[6]));
        for block in 0..BLOCKS {
            // Where in its hand a document was, and by how much the next one differs from it.
            let (mut places, mut steps) = ([0u32; 8], [0u32; 8]);
            let mut last = 0;
            for (index, _) in deal.block(&lengths, block) {
                places[(index % BLOCKS) as usize] += 1;
                steps[((index + BLOCKS - last) % BLOCKS) as usize] += 1;
                last = index % BLOCKS;
            }
            // Means 1250, standard deviations 33.
            for counts in [places, steps] {
                assert!(
                    counts.iter().all(|n| (1100..1400).contains(n)),
                    "{counts:?}"
                );
            }
        }
    }
}
