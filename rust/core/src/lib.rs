//! The data side of barqtrain_hf, without Python: standard library only, so that
//! `cargo test --offline` runs anywhere.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod packing;

pub use packing::{pack_in_order, pack_sequences, PackError, Plan};
