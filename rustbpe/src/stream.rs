//! Ids -> text, one at a time.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::args::id as one_id;
use crate::tokenizer::{Model, Tokenizer};

/// A character comes out when its last byte is in; a special token gives "".
#[pyclass(frozen, module = "rustbpe")]
pub struct StreamDecoder {
    model: Arc<Model>,
    utf8: Py<PyAny>,
}

#[pymethods]
impl StreamDecoder {
    #[new]
    #[pyo3(signature = (tokenizer, errors="replace"))]
    fn new(py: Python<'_>, tokenizer: &Tokenizer, errors: &str) -> PyResult<Self> {
        let codecs = py.import("codecs")?;
        codecs.call_method1("lookup_error", (errors,))?;
        let utf8 = codecs.call_method1("getincrementaldecoder", ("utf-8",))?.call1((errors,))?.unbind();
        Ok(Self { model: tokenizer.model(), utf8 })
    }

    /// The text that `id` completes.
    fn push<'py>(&self, id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let (core, py) = (&self.model.core, id.py());
        let id = one_id(id, core.size(), String::new)? as usize;
        if id >= core.first_special() {
            return Ok(PyString::new(py, "").into_any());
        }
        self.utf8.bind(py).call_method1("decode", (PyBytes::new(py, core.token(id)),))
    }

    /// The text of what is left at the end, whose last character never became whole.
    fn flush<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.utf8.bind(py).call_method1("decode", (PyBytes::new(py, b""), true))
    }
}
