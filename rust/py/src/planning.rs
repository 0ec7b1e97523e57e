//! Which documents share a row.

use barqtrain_core::{Overflow, Plan};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::refuse;

type PlanArrays<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<usize>>);

fn arrays(py: Python<'_>, plan: Plan) -> PlanArrays<'_> {
    (plan.order.into_pyarray(py), plan.offsets.into_pyarray(py))
}

/// Best-fit-decreasing plan: (document indices row after row, offset of each row).
#[pyfunction]
pub fn pack_sequences<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    max_length: usize,
) -> PyResult<PlanArrays<'py>> {
    let lengths = lengths.as_slice()?;
    let plan = py
        .detach(|| barqtrain_core::pack_sequences(lengths, max_length))
        .map_err(refuse)?;
    Ok(arrays(py, plan))
}

/// Shuffled plan of one epoch, in which short documents of all lengths share rows.
#[pyfunction]
pub fn plan_epoch<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    max_length: usize,
    seed: u64,
    epoch: u64,
    rows: Option<usize>,
    threads: usize,
) -> PyResult<PlanArrays<'py>> {
    let lengths = lengths.as_slice()?;
    let plan = py
        .detach(|| barqtrain_core::plan_epoch(lengths, max_length, seed, epoch, rows, threads))
        .map_err(refuse)?;
    Ok(arrays(py, plan))
}

/// (starts, lengths) of the pieces of the documents, and the counts of [`barqtrain_core::Losses`] in
/// the order of its fields.
type FittedArrays<'py> = (
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    (u64, u64, u64, u64, u64),
);

/// Makes every document 1 to `max_length` tokens long.
#[pyfunction]
pub fn fit<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    max_length: usize,
    overflow: &str,
) -> PyResult<FittedArrays<'py>> {
    let policy = overflow.parse::<Overflow>().map_err(refuse)?;
    let lengths = lengths.as_slice()?;
    let fitted = py
        .detach(|| barqtrain_core::fit(lengths, max_length, policy))
        .map_err(refuse)?;
    let losses = fitted.losses;
    Ok((
        fitted.starts.into_pyarray(py),
        fitted.lengths.into_pyarray(py),
        (
            losses.kept_documents,
            losses.split_documents,
            losses.truncated_tokens,
            losses.dropped_documents,
            losses.dropped_tokens,
        ),
    ))
}

type WindowArrays<'py> = (
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<usize>>,
    Bound<'py, PyArray1<u32>>,
);

/// Shuffled rows of one window of a stream, and the documents that wait: (order, offsets, carried).
#[pyfunction]
pub fn plan_window<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    waited: PyReadonlyArray1<'py, u8>,
    max_length: usize,
    name: [u64; 3],
    last: bool,
) -> PyResult<WindowArrays<'py>> {
    let (lengths, waited) = (lengths.as_slice()?, waited.as_slice()?);
    let planned = py
        .detach(|| barqtrain_core::plan_window(lengths, waited, max_length, name, last))
        .map_err(refuse)?;
    let (order, offsets) = arrays(py, planned.plan);
    Ok((order, offsets, planned.carried.into_pyarray(py)))
}

/// Rows in the order in which ranks take them: turn after turn, in each rank after rank.
#[pyfunction]
pub fn balance(costs: Vec<u64>, ranks: usize, turns: usize) -> PyResult<Vec<u32>> {
    barqtrain_core::balance(&costs, ranks, turns).map_err(refuse)
}
