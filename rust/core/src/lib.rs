//! The data side of barqtrain_hf, without Python: standard library only. Its tests draw their cases with
//! proptest.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod assemble;
mod balance;
mod checksum;
mod claim;
mod deal;
mod fill;
mod open_rows;
mod overflow;
mod packing;
mod parallel;
mod plan;
mod random;
mod store;
mod store_error;
#[cfg(test)]
mod store_fuzz;

pub use assemble::{
    assemble, AssembleError, Batch, PackedRows, Padding, Tokens, IGNORE_INDEX, NO_LOSS,
};
pub use balance::{balance, UnevenError};
pub use overflow::{fit, Fitted, Losses, Overflow};
pub use packing::{pack_sequences, PackError, Plan};
pub use parallel::map_with;
pub use plan::{plan_epoch, plan_window, WindowPlan};
pub use store::{verify, Key, Layout, StoreError, StoreWriter, HEADER};
