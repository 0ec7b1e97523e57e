//! Which of the rows of one optimiser step go to which rank.
//!
//! Rows hold equally many tokens, yet cost unequally: attention is quadratic in the length of a
//! document, so a row of one long document takes longer than one of many short ones, and every rank
//! waits for the slowest.

use std::fmt;

/// Rows that cannot be dealt out evenly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnevenError {
    /// How many rows there are.
    pub rows: usize,
    /// Over how many ranks.
    pub ranks: usize,
    /// In how many turns.
    pub turns: usize,
}

impl fmt::Display for UnevenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rows cannot be shared evenly by {} ranks in {} turns: pass a multiple of their product, which \
             must be positive.",
            self.rows, self.ranks, self.turns
        )
    }
}

impl std::error::Error for UnevenError {}

/// Deals the rows of a step to ranks, equally many to each in every turn, so that the costs of the ranks
/// are close.
///
/// A turn is what all ranks compute before they wait for each other, or the whole step if they wait
/// once: the dearest rows are dealt in the first turn, the cheapest in the last. So rows of one turn cost
/// about the same, and what is left between the ranks evens out over the turns.
///
/// Within a turn longest processing time first (Graham, 1969), with a limit on the number of rows: the
/// dearest row goes to the rank with the least cost so far that can still take one. Ties go to the lower
/// index.
///
/// Returns the rows in their new order: turn after turn, and in each rank after rank.
///
/// # Errors
/// When the ranks and turns do not divide the number of rows, or there are none.
pub fn balance(costs: &[u64], ranks: usize, turns: usize) -> Result<Vec<u32>, UnevenError> {
    let parts = ranks.checked_mul(turns).filter(|&parts| parts > 0);
    let Some(share) = parts
        .filter(|&parts| costs.len().is_multiple_of(parts))
        .map(|parts| costs.len() / parts)
    else {
        return Err(UnevenError {
            rows: costs.len(),
            ranks,
            turns,
        });
    };
    let mut dearest: Vec<u32> = (0u32..).take(costs.len()).collect();
    dearest.sort_by_key(|&row| std::cmp::Reverse(costs[row as usize]));
    let mut dealt = Vec::with_capacity(costs.len());
    let mut spent = vec![0u64; ranks];
    let mut taken: Vec<Vec<u32>> = vec![Vec::with_capacity(share); ranks];
    for turn in dearest.chunks((ranks * share).max(1)) {
        for &row in turn {
            let cheapest = (0..ranks)
                .filter(|&rank| taken[rank].len() < share)
                .min_by_key(|&rank| spent[rank]);
            // Always one: there are as many places as rows.
            if let Some(rank) = cheapest {
                spent[rank] = spent[rank].saturating_add(costs[row as usize]);
                taken[rank].push(row);
            }
        }
        taken.iter_mut().for_each(|rows| dealt.append(rows));
    }
    Ok(dealt)
}
