//! Which of the rows of one optimiser step go to which rank.
//!
//! Rows hold equally many tokens, yet cost unequally: attention is quadratic in the length of a
//! document, so a row of one long document takes longer than one of many short ones, and every rank
//! waits for the slowest.

use std::fmt;

/// What a row costs: `linear * L + L^2`, summed over its documents of `L` tokens.
///
/// `linear` is the length at which attention costs as much as all that is linear in tokens, about
/// six times the hidden size for a transformer.
#[must_use]
pub fn row_cost(lengths: impl IntoIterator<Item = u64>, linear: u64) -> u64 {
    lengths
        .into_iter()
        .map(|length| length.saturating_mul(length.saturating_add(linear)))
        .fold(0, u64::saturating_add)
}

/// Rows that cannot be dealt out evenly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnevenError {
    /// How many rows there are.
    pub rows: usize,
    /// Over how many ranks.
    pub ranks: usize,
}

impl fmt::Display for UnevenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rows cannot be shared evenly by {} ranks: pass a multiple of a positive number of ranks.",
            self.rows, self.ranks
        )
    }
}

impl std::error::Error for UnevenError {}

/// Deals rows to ranks, equally many to each, so that the costs of the ranks are close.
///
/// Longest processing time first (Graham, 1969), with a limit on the number of rows: the dearest row
/// goes to the rank with the least cost so far that can still take one. Ties go to the lower index.
///
/// Returns the rows in their new order: rank `r` has `[r * n .. (r + 1) * n]`, `n = rows / ranks`.
///
/// # Errors
/// When `ranks` is zero or does not divide the number of rows.
pub fn balance(costs: &[u64], ranks: usize) -> Result<Vec<u32>, UnevenError> {
    if ranks == 0 || !costs.len().is_multiple_of(ranks) {
        return Err(UnevenError {
            rows: costs.len(),
            ranks,
        });
    }
    let share = costs.len() / ranks;
    let mut dearest: Vec<u32> = (0u32..).take(costs.len()).collect();
    dearest.sort_by_key(|&row| std::cmp::Reverse(costs[row as usize]));
    let mut taken: Vec<(u64, Vec<u32>)> = vec![(0, Vec::with_capacity(share)); ranks];
    for row in dearest {
        let cheapest = taken
            .iter_mut()
            .filter(|(_, rows)| rows.len() < share)
            .min_by_key(|(cost, _)| *cost);
        // Always one: there are as many places as rows.
        if let Some((cost, rows)) = cheapest {
            *cost = cost.saturating_add(costs[row as usize]);
            rows.push(row);
        }
    }
    Ok(taken.into_iter().flat_map(|(_, rows)| rows).collect())
}
