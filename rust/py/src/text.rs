//! From text to tokens.

use std::sync::{Mutex, PoisonError};

use barqtrain_text::{Options, Span};
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use crate::refuse;

/// A fast tokenizer with a clone for each thread. Python threads take turns.
#[pyclass(frozen, module = "barqtrain_hf._rust")]
pub struct TextTokenizer(Mutex<barqtrain_text::TextTokenizer>);

#[pymethods]
impl TextTokenizer {
    #[new]
    fn new(
        py: Python<'_>,
        json: &str,
        split_special_tokens: bool,
        threads: usize,
    ) -> PyResult<Self> {
        let read = || barqtrain_text::TextTokenizer::from_json(json, split_special_tokens, threads);
        Ok(Self(Mutex::new(py.detach(read).map_err(refuse)?)))
    }

    /// (ids of all texts end to end, with the top bit set where there is no loss; tokens of each text).
    #[pyo3(signature = (texts, prompts, add_special_tokens, eos, spans=None))]
    #[allow(clippy::type_complexity)]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        prompts: Option<Vec<PyBackedStr>>,
        add_special_tokens: bool,
        eos: Option<String>,
        spans: Option<Vec<Vec<Span>>>,
    ) -> PyResult<(Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i64>>)> {
        let options = Options {
            add_special_tokens,
            eos,
        };
        let documents = py
            .detach(|| {
                // A panic within leaves no half-made state: a call only reads the tokenizer.
                let mut tokenizer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                tokenizer.encode(&texts, prompts.as_deref(), spans.as_deref(), &options)
            })
            .map_err(refuse)?;
        Ok((
            documents.tokens.into_pyarray(py),
            documents.lengths.into_pyarray(py),
        ))
    }
}
