//! `barqtrain_hf._rust`: hands NumPy arrays to `barqtrain-core` and back, with the GIL released.
//! No decisions are taken here.

#![forbid(unsafe_code)]

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

type PlanArrays<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<usize>>);

/// Best-fit-decreasing plan: (document indices row after row, offset of each row).
#[pyfunction]
fn pack_sequences<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    max_length: usize,
) -> PyResult<PlanArrays<'py>> {
    let lengths = lengths.as_slice()?;
    let plan = py
        .detach(|| barqtrain_core::pack_sequences(lengths, max_length))
        .map_err(|error| PyValueError::new_err(error.to_string()))?;
    Ok((plan.order.into_pyarray(py), plan.offsets.into_pyarray(py)))
}

/// Best-fit plan that takes the documents in the given order.
#[pyfunction]
fn pack_in_order<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    order: PyReadonlyArray1<'py, u32>,
    max_length: usize,
) -> PyResult<PlanArrays<'py>> {
    let (lengths, order) = (lengths.as_slice()?, order.as_slice()?);
    let plan = py
        .detach(|| barqtrain_core::pack_in_order(lengths, order, max_length))
        .map_err(|error| PyValueError::new_err(error.to_string()))?;
    Ok((plan.order.into_pyarray(py), plan.offsets.into_pyarray(py)))
}

#[pymodule]
mod _rust {
    #[pymodule_export]
    use super::{pack_in_order, pack_sequences};
}
