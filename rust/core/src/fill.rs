//! Rows filled with documents of all lengths, in random order.

use crate::open_rows::{lengths, OpenRows};
use crate::packing::{row_capacity, Plan};
use crate::plan::WindowPlan;
use crate::random::Random;

/// A row with at most this share of its capacity free counts as full.
const FULL_SHARE: usize = 1024;
/// Documents of at most this share of a row are short: they fill rows in random order.
const SHORT_SHARE: usize = 8;

/// A document and how many tokens it has, moved as one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Document(u64);

impl From<(u32, u32)> for Document {
    /// From (index, length).
    fn from((index, length): (u32, u32)) -> Self {
        Self(u64::from(length) << 32 | u64::from(index))
    }
}

impl Document {
    pub(crate) fn index(self) -> u32 {
        self.0 as u32
    }

    pub(crate) fn length(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// Rows of documents that lie one after the other in some list, and behind them the documents that wait.
#[derive(Debug, Default)]
pub(crate) struct Filled {
    /// Where each row ends.
    pub(crate) ends: Vec<u32>,
    /// All documents, those that wait included.
    pub(crate) documents: usize,
}

impl Filled {
    /// Documents in rows.
    pub(crate) fn ready(&self) -> usize {
        self.ends.last().map_or(0, |&end| end as usize)
    }
}

/// Packs documents, block after block, in memory that is used again.
#[derive(Default)]
pub(crate) struct Filler {
    max_length: usize,
    /// The short documents taken, then whatever was there before; and the long ones.
    short: Vec<Document>,
    long: Vec<Document>,
    count_short: usize,
    count_long: usize,
    longest: u32,
    tokens: usize,

    /// Where the next document of each length goes; then where that of each row does.
    next: Vec<u32>,
    /// Long documents, longest first, then the short ones.
    documents: Vec<Document>,
    /// The row of each of them.
    row_of: Vec<u32>,
    open: OpenRows,
    /// Whether the documents of each row wait; the rows whose do, and the others.
    waits: Vec<bool>,
    waiting: Vec<u32>,
    ready: Vec<u32>,
}

impl Filler {
    /// Takes at most `most` documents, of an index and a length each.
    pub(crate) fn take(
        &mut self,
        documents: impl Iterator<Item = (u32, u32)>,
        most: usize,
        max_length: usize,
    ) {
        for list in [&mut self.short, &mut self.long] {
            if list.len() < most {
                list.resize(most, Document::default());
            }
        }
        let (short, long) = (&mut self.short[..most], &mut self.long[..most]);
        let limit = u32::try_from(max_length / SHORT_SHARE).unwrap_or(u32::MAX);
        let (mut count_short, mut count_long, mut longest, mut tokens) = (0, 0, 0, 0u64);
        for (index, length) in documents {
            // Written to both lists and left in one of them: in which is unpredictable, and a branch would
            // be guessed wrong too often.
            let document = Document::from((index, length));
            short[count_short] = document;
            long[count_long] = document;
            let is_long = length > limit;
            count_short += usize::from(!is_long);
            count_long += usize::from(is_long);
            longest = longest.max(length);
            tokens += u64::from(length);
        }
        (self.count_short, self.count_long) = (count_short, count_long);
        (self.longest, self.tokens) = (longest, tokens as usize);
        self.max_length = max_length;
    }

    /// Puts the long documents taken in random order, so that those of equal length do not go as they came;
    /// the short ones always are.
    pub(crate) fn shuffle_long(&mut self, random: &mut Random) {
        random.shuffle(&mut self.long[..self.count_long]);
    }

    /// Packs what was taken into shuffled rows, and takes the emptiest ones apart again: at most one in
    /// `share`, and only where all documents may wait.
    pub(crate) fn fill(
        &mut self,
        random: Random,
        share: Option<usize>,
        may_wait: Option<&dyn Fn(u32) -> bool>,
    ) -> WindowPlan {
        let mut order = vec![0; self.count_short + self.count_long];
        let filled = self.fill_into(random, share, may_wait, &mut order);
        let carried = order.split_off(filled.ready());
        let ends = filled.ends.iter().map(|&end| end as usize);
        let offsets = std::iter::once(0).chain(ends).collect();
        WindowPlan {
            plan: Plan { order, offsets },
            carried,
        }
    }

    /// `fill` into a list that is long enough.
    pub(crate) fn fill_into(
        &mut self,
        mut random: Random,
        share: Option<usize>,
        may_wait: Option<&dyn Fn(u32) -> bool>,
        order: &mut [u32],
    ) -> Filled {
        self.sort(&mut random);
        let capacity = row_capacity(self.max_length, self.tokens);
        let lengths = lengths(&self.documents);
        self.open.fill(capacity, lengths, &mut self.row_of);
        self.finish(random, share, may_wait, order)
    }

    /// `fill_into` of two, in less time than one after the other; all may wait.
    pub(crate) fn fill_both(
        fillers: &mut [Self; 2],
        mut random: [Random; 2],
        share: Option<usize>,
        orders: [&mut [u32]; 2],
    ) -> [Filled; 2] {
        let [a, b] = fillers;
        a.sort(&mut random[0]);
        b.sort(&mut random[1]);
        OpenRows::fill_both(
            [&mut a.open, &mut b.open],
            [
                row_capacity(a.max_length, a.tokens),
                row_capacity(b.max_length, b.tokens),
            ],
            [&a.documents, &b.documents],
            [&mut a.row_of, &mut b.row_of],
        );
        let [random_a, random_b] = random;
        let [order_a, order_b] = orders;
        [
            a.finish(random_a, share, None, order_a),
            b.finish(random_b, share, None, order_b),
        ]
    }

    /// Sorts the long documents by a stable counting sort; the short ones follow in random order.
    fn sort(&mut self, random: &mut Random) {
        let long = &self.long[..self.count_long];
        let class = |document: &Document| (self.longest - document.length()) as usize;
        let classes = (self.longest as usize).saturating_sub(self.max_length / SHORT_SHARE);
        self.next.clear();
        self.next.resize(classes + 2, 0);
        for document in long {
            self.next[class(document) + 1] += 1;
        }
        let mut before = 0;
        for count in &mut self.next {
            before += *count;
            *count = before;
        }
        let count = self.count_long + self.count_short;
        self.documents.resize(count, Document::default());
        self.row_of.resize(count, 0);
        for document in long {
            let slot = &mut self.next[class(document)];
            self.documents[*slot as usize] = *document;
            *slot += 1;
        }
        let short = &mut self.short[..self.count_short];
        random.shuffle(short);
        self.documents[self.count_long..].copy_from_slice(short);
    }

    fn finish(
        &mut self,
        mut random: Random,
        share: Option<usize>,
        may_wait: Option<&dyn Fn(u32) -> bool>,
        order: &mut [u32],
    ) -> Filled {
        self.choose_waiting(share, may_wait);
        let unless_waiting = (0u32..).zip(&self.waits).filter(|(_, &waits)| !waits);
        self.ready.clear();
        self.ready.extend(unless_waiting.map(|(row, _)| row));
        random.shuffle(&mut self.ready);
        self.group(order)
    }

    /// Finds the rows whose documents wait.
    fn choose_waiting(&mut self, share: Option<usize>, may_wait: Option<&dyn Fn(u32) -> bool>) {
        let rows = self.open.count();
        self.waits.clear();
        self.waits.resize(rows, false);
        self.waiting.clear();
        let Some(share) = share else {
            return;
        };
        if let Some(may_wait) = may_wait {
            // First those that must not.
            for (&document, &row) in self.documents.iter().zip(&self.row_of) {
                self.waits[row as usize] |= !may_wait(document.index());
            }
        }
        let least = self.max_length / FULL_SHARE;
        let emptiest = self.open.by_free_space();
        let emptiest = emptiest.take_while(|&(_, free)| free > least);
        let waiting = emptiest.filter(|&(row, _)| !self.waits[row as usize]);
        let waiting = waiting.map(|(row, _)| row).take(rows.div_ceil(share));
        self.waiting.extend(waiting);
        self.waits.fill(false);
        for &row in &self.waiting {
            self.waits[row as usize] = true;
        }
    }

    /// Turns "document -> row" into "row -> documents", keeping the order of placement within a row.
    fn group(&mut self, order: &mut [u32]) -> Filled {
        self.next.clear();
        self.next.resize(self.open.count(), 0);
        let mut end = 0;
        let mut place = |row: u32| {
            self.next[row as usize] = end;
            end += self.open.size(row);
            end
        };
        let ends = self.ready.iter().map(|&row| place(row)).collect();
        // Behind the rows that are ready come those that are taken apart.
        self.waiting.iter().for_each(|&row| {
            place(row);
        });
        for (&document, &row) in self.documents.iter().zip(&self.row_of) {
            let next = &mut self.next[row as usize];
            order[*next as usize] = document.index();
            *next += 1;
        }
        Filled {
            ends,
            documents: self.documents.len(),
        }
    }
}
