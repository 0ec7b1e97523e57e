//! The data side of barqtrain_hf, without Python: standard library only, so that
//! `cargo test --offline` runs anywhere.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod balance;
mod open_rows;
mod overflow;
mod packing;
mod parallel;
mod plan;
mod random;

pub use balance::{balance, row_cost, UnevenError};
pub use overflow::{fit, Fitted, Losses, Overflow};
pub use packing::{pack_sequences, PackError, Plan};
pub use plan::{plan_epoch, plan_window, WindowPlan};
