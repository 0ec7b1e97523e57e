//! `barqtrain_hf._rust`: hands strings and NumPy arrays to `barqtrain-core` and `barqtrain-text` and back,
//! with the GIL released. No decisions are taken here.

#![forbid(unsafe_code)]

mod batches;
mod planning;
mod store;
mod text;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// The cores' sentences name the argument, the value and the fix already.
fn refuse(error: impl std::error::Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}

#[pymodule]
mod _rust {
    #[pymodule_export]
    use super::batches::assemble;
    #[pymodule_export]
    use super::planning::{balance, fit, pack_sequences, plan_epoch, plan_window};
    #[pymodule_export]
    use super::store::{verify_store, StoreWriter};
    #[pymodule_export]
    use super::text::TextTokenizer;
}
