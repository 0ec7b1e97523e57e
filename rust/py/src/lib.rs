//! `barqtrain_hf._rust`: hands NumPy arrays to `barqtrain-core` and back, with the GIL released.
//! No decisions are taken here.

#![forbid(unsafe_code)]

mod planning;

use pyo3::prelude::*;

#[pymodule]
mod _rust {
    #[pymodule_export]
    use super::planning::{fit, pack_sequences, plan_epoch};
}
