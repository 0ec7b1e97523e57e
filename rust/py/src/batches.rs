//! From a plan to the arrays a model is given.

use barqtrain_core::{PackedRows, Padding, Tokens};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::refuse;

/// (input_ids, labels, position_ids, cu_seq_lens, max_length); the arrays own Rust's memory.
type BatchArrays<'py> = (
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i32>>,
    i64,
);

/// The documents of some rows of a plan, end to end; `padding` is (multiple, token).
#[pyfunction]
#[allow(clippy::too_many_arguments)] // what a data set consists of
pub fn assemble<'py>(
    py: Python<'py>,
    ids: PyReadonlyArray1<'py, i32>,
    labels: Option<PyReadonlyArray1<'py, i32>>,
    starts: PyReadonlyArray1<'py, i64>,
    lengths: PyReadonlyArray1<'py, i64>,
    order: PyReadonlyArray1<'py, u32>,
    offsets: PyReadonlyArray1<'py, i64>,
    rows: Vec<usize>,
    padding: Option<(usize, i64)>,
) -> PyResult<BatchArrays<'py>> {
    let packed = PackedRows {
        tokens: Tokens {
            ids: ids.as_slice()?,
            labels: labels
                .as_ref()
                .map(PyReadonlyArray1::as_slice)
                .transpose()?,
        },
        starts: starts.as_slice()?,
        lengths: lengths.as_slice()?,
        order: order.as_slice()?,
        offsets: offsets.as_slice()?,
    };
    let padding = padding.map(|(multiple, token)| Padding { multiple, token });
    let batch = py.detach(|| packed.batch(&rows, padding)).map_err(refuse)?;
    Ok((
        batch.input_ids.into_pyarray(py),
        batch.labels.into_pyarray(py),
        batch.position_ids.into_pyarray(py),
        batch.cu_seq_lens.into_pyarray(py),
        batch.max_length,
    ))
}
