//! The token store.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use barqtrain_core::{Key, Layout, StoreError};
use numpy::PyReadonlyArray1;
use pyo3::exceptions::{PyFileNotFoundError, PyOSError, PyValueError};
use pyo3::prelude::*;

fn raise(error: StoreError) -> PyErr {
    let message = error.to_string();
    match error {
        StoreError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
            PyFileNotFoundError::new_err(message)
        }
        StoreError::Io { .. } => PyOSError::new_err(message),
        _ => PyValueError::new_err(message),
    }
}

/// Where numpy.memmap finds things: (documents, tokens, first byte of the tokens, of the offsets).
type LayoutTuple = (u64, u64, u64, u64);

fn tuple(layout: Layout) -> LayoutTuple {
    let Layout { documents, tokens } = layout;
    (
        documents,
        tokens,
        barqtrain_core::HEADER,
        layout.offsets_at(),
    )
}

/// Reads a store once and checks it: FileNotFoundError, OSError, or ValueError if it is damaged or
/// another.
#[pyfunction]
pub fn verify_store(py: Python<'_>, path: PathBuf, key: Option<Key>) -> PyResult<LayoutTuple> {
    py.detach(|| barqtrain_core::verify(&path, key.as_ref()))
        .map(tuple)
        .map_err(raise)
}

/// Writes a store; what is not finished is removed when this goes away.
#[pyclass(frozen, module = "barqtrain_hf._rust")]
pub struct StoreWriter(Mutex<Option<barqtrain_core::StoreWriter>>);

#[pymethods]
impl StoreWriter {
    /// None while another process writes that store.
    #[staticmethod]
    fn claim(py: Python<'_>, path: PathBuf, key: Key) -> PyResult<Option<Self>> {
        let writer = py
            .detach(|| barqtrain_core::StoreWriter::claim(&path, key))
            .map_err(raise)?;
        Ok(writer.map(|writer| Self(Mutex::new(Some(writer)))))
    }

    /// Adds documents that lie end to end.
    fn push(
        &self,
        py: Python<'_>,
        tokens: PyReadonlyArray1<'_, i32>,
        lengths: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<()> {
        let (tokens, lengths) = (tokens.as_slice()?, lengths.as_slice()?);
        py.detach(|| self.with(|writer| writer.push_all(tokens, lengths).map_err(raise)))
    }

    /// Publishes the store.
    fn finish(&self, py: Python<'_>) -> PyResult<LayoutTuple> {
        let writer = self.take();
        py.detach(|| writer.ok_or_else(closed)?.finish().map_err(raise))
            .map(tuple)
    }

    /// Gives the store up and removes what was written.
    fn abandon(&self) {
        drop(self.take());
    }
}

impl StoreWriter {
    fn with(
        &self,
        work: impl FnOnce(&mut barqtrain_core::StoreWriter) -> PyResult<()>,
    ) -> PyResult<()> {
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        work(writer.as_mut().ok_or_else(closed)?)
    }

    fn take(&self) -> Option<barqtrain_core::StoreWriter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn closed() -> PyErr {
    PyValueError::new_err("the store is finished or given up: claim it again.")
}
