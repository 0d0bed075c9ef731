//! Python binding of `rustbpe-core`: arguments in, sentences out, the GIL released while anything is computed.
//! Every mistake in a value is a ValueError with one sentence, of a type a TypeError. What the methods promise is
//! written in rustbpe.pyi.

mod args;
mod arrow;
mod engine;
mod stream;
mod tokenizer;
mod training;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use rustbpe_core as core;

/// The pieces that the pattern cuts `text` into; joined they are `text` again.
#[pyfunction]
#[pyo3(signature = (text, pattern=core::PATTERN))]
fn split(text: &Bound<'_, PyAny>, pattern: &str) -> PyResult<Vec<String>> {
    let text = args::utf8(text, || "text".into())?;
    engine::split(&text, pattern)
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let build = PyDict::new(module.py());
    build.set_item("version", env!("CARGO_PKG_VERSION"))?;
    build.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    build.set_item("unicode", core::UNICODE)?;
    module.add("__build__", build)?;
    module.add("PATTERN", core::PATTERN)?;
    module.add("GPT4_PATTERN", core::GPT4_PATTERN)?;
    module.add("MAX_FILE_BYTES", core::MAX_FILE_BYTES)?;
    module.add_function(wrap_pyfunction!(split, module)?)?;
    module.add_class::<tokenizer::Tokenizer>()?;
    module.add_class::<stream::StreamDecoder>()
}
