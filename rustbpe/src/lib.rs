//! Python binding of `rustbpe-core`: arguments in, sentences out, the GIL released while anything is computed.
//! Every mistake in a value is a ValueError with one sentence, of a type a TypeError.

use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyString};
use rustbpe_core as core;

/// Text gathered before the threads count it: enough to make starting them cheap.
const BATCH_BYTES: usize = 16 << 20;
/// About what a Python str weighs beside its text, so that a stream of empty ones is counted in batches too.
const OBJECT_BYTES: usize = 64;
/// Between two looks at Ctrl-C and the progress callback.
const TICK: Duration = Duration::from_millis(100);

fn to_python(error: core::Error) -> PyErr {
    match error {
        core::Error::Invalid(sentence) => PyValueError::new_err(sentence),
        core::Error::Stopped => PyValueError::new_err("training was stopped"),
    }
}

/// Threads to use: what the user names, else the processors this process may run on.
fn threads(wanted: Option<usize>) -> PyResult<usize> {
    match wanted {
        Some(n @ 1..=1024) => Ok(n),
        Some(n) => Err(PyValueError::new_err(format!("num_threads must be 1 to 1024, got {n}"))),
        None => Ok(available_parallelism().map_or(1, usize::from)),
    }
}

/// A str as UTF-8 without a copy; `name` says which one in the error.
fn utf8(item: &Bound<'_, PyAny>, name: impl FnOnce() -> String) -> PyResult<PyBackedStr> {
    let Ok(text) = item.cast::<PyString>() else {
        return Err(PyTypeError::new_err(format!("{} must be str, got {}", name(), item.get_type().name()?)));
    };
    PyBackedStr::try_from(text.clone()).map_err(|_| {
        PyValueError::new_err(format!("{} must be valid Unicode, it holds a lone surrogate", name()))
    })
}

/// Calls `progress(phase, done, total)` and notices Ctrl-C, both at most every TICK.
struct Ticker {
    progress: Option<Py<PyAny>>,
    last: Instant,
}

impl Ticker {
    fn tick(&mut self, py: Python<'_>, phase: &str, done: usize, total: usize) -> PyResult<()> {
        if self.last.elapsed() < TICK {
            return Ok(());
        }
        self.last = Instant::now();
        self.report(py, phase, done, total)
    }

    fn report(&self, py: Python<'_>, phase: &str, done: usize, total: usize) -> PyResult<()> {
        py.check_signals()?;
        if let Some(progress) = &self.progress {
            progress.call1(py, (phase, done, total))?;
        }
        Ok(())
    }
}

/// Count every piece of `texts`, batch by batch.
fn count(texts: &Bound<'_, PyAny>, threads: usize, ticker: &mut Ticker) -> PyResult<core::Counter> {
    let py = texts.py();
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("texts must be an iterable of str, got one str"));
    }
    let mut counters: Vec<core::Counter> = (0..threads).map(|_| core::Counter::default()).collect();
    let (mut batch, mut waiting, mut done) = (Vec::new(), 0, 0);
    let mut flush = |batch: &mut Vec<PyBackedStr>| {
        let texts: Vec<&str> = batch.iter().map(|text| &**text).collect();
        py.detach(|| core::count_batch(&mut counters, &texts)).map_err(to_python)?;
        batch.clear();
        Ok::<(), PyErr>(())
    };
    for (index, item) in texts.try_iter()?.enumerate() {
        let text = utf8(&item?, || format!("text {index}"))?;
        waiting += text.len() + OBJECT_BYTES;
        done += text.len();
        batch.push(text);
        if waiting >= BATCH_BYTES {
            flush(&mut batch)?;
            waiting = 0;
        }
        ticker.tick(py, "count", done, 0)?;
    }
    flush(&mut batch)?;
    ticker.report(py, "count", done, done)?;
    py.detach(|| core::total(counters)).map_err(to_python)
}

/// Bytes, merges and special tokens. Immutable: share it between threads freely.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer(core::Tokenizer);

#[pymethods]
impl Tokenizer {
    /// Learn from an iterable of str until the vocabulary, special tokens included, has `vocab_size` ids or no pair
    /// is left. `progress(phase, done, total)` hears of "count" in bytes, then "merge" in merges.
    #[staticmethod]
    #[pyo3(signature = (texts, vocab_size, specials, *, num_threads=None, progress=None))]
    fn train(
        texts: &Bound<'_, PyAny>,
        vocab_size: i64,
        specials: Vec<String>,
        num_threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let py = texts.py();
        let least = 256 + specials.len() as i64;
        if !(least..=core::MAX_TOKENS as i64).contains(&vocab_size) {
            return Err(PyValueError::new_err(format!(
                "vocab_size must be {least} to {}, got {vocab_size}",
                core::MAX_TOKENS
            )));
        }
        let n_merges = (vocab_size - least) as usize;
        let mut ticker = Ticker { progress, last: Instant::now() };
        let counter = count(texts, threads(num_threads)?, &mut ticker)?;
        let mut raised = None;
        let mut tick = |done: usize| {
            if ticker.last.elapsed() < TICK {
                return true;
            }
            match Python::attach(|py| ticker.tick(py, "merge", done, n_merges)) {
                Ok(()) => true,
                Err(error) => {
                    raised = Some(error);
                    false
                }
            }
        };
        let merges = py.detach(|| core::train(counter, n_merges, &mut tick));
        let merges = merges.map_err(|error| raised.take().unwrap_or_else(|| to_python(error)))?;
        ticker.report(py, "merge", merges.len(), n_merges)?;
        py.detach(|| core::Tokenizer::new(merges, specials)).map(Self).map_err(to_python)
    }

    /// Read what `to_bytes` wrote; ValueError for anything else.
    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: &[u8]) -> PyResult<Self> {
        py.detach(|| core::Tokenizer::from_bytes(data)).map(Self).map_err(to_python)
    }

    /// The content of the tokenizer's file.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_bytes())
    }

    /// The sha256 of vocabulary, pattern and special tokens, in hexadecimal.
    #[getter]
    fn fingerprint(&self) -> String {
        self.0.fingerprint()
    }

    /// All ids, the special tokens included.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.size()
    }

    /// The names of the special tokens, in the order of their ids, which are the last ones.
    #[getter]
    fn specials(&self) -> Vec<String> {
        self.0.specials().to_vec()
    }

    /// The merges in the order learned: merge i makes id 256 + i.
    #[getter]
    fn merges(&self) -> Vec<(u32, u32)> {
        self.0.merges().to_vec()
    }

    /// The ids of one text. No text gives a special id.
    fn encode(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        let text = utf8(text, || "text".into())?;
        let text: &str = &text;
        let mut ids = Vec::new();
        py.detach(|| self.0.encode(text, &mut ids)).map_err(to_python)?;
        Ok(ids)
    }

    /// The ids of many texts: (uint32 ids one text after the other, int64 offsets, one more than texts), both as
    /// bytearrays in native byte order, for numpy.frombuffer.
    #[pyo3(signature = (texts, *, num_threads=None))]
    fn encode_batch<'py>(
        &self,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<usize>,
    ) -> PyResult<(Bound<'py, PyByteArray>, Bound<'py, PyByteArray>)> {
        let py = texts.py();
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("texts must be an iterable of str, got one str"));
        }
        let texts =
            texts.try_iter()?.enumerate().map(|(index, item)| utf8(&item?, || format!("text {index}")));
        let texts: Vec<PyBackedStr> = texts.collect::<PyResult<_>>()?;
        let threads = threads(num_threads)?;
        let shares = py.detach(|| {
            let texts: Vec<&str> = texts.iter().map(|text| &**text).collect();
            self.0.encode_batch(&texts, threads)
        });
        let shares = shares.map_err(to_python)?;
        let size: usize = shares.iter().map(|share| share.ids.len()).sum();
        let ids = PyByteArray::new_with(py, size * 4, |bytes| {
            let ids = shares.iter().flat_map(|share| &share.ids);
            bytes.chunks_exact_mut(4).zip(ids).for_each(|(cell, id)| cell.copy_from_slice(&id.to_ne_bytes()));
            Ok(())
        })?;
        let offsets = PyByteArray::new_with(py, (texts.len() + 1) * 8, |bytes| {
            let lengths = shares.iter().flat_map(|share| &share.lengths);
            let mut end = 0i64;
            for (cell, &length) in bytes.chunks_exact_mut(8).skip(1).zip(lengths) {
                end += length as i64;
                cell.copy_from_slice(&end.to_ne_bytes());
            }
            Ok(())
        })?;
        Ok((ids, offsets))
    }

    /// The bytes of an iterable of ids; a special token gives its name.
    fn decode_bytes<'py>(&self, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let mut bytes = Vec::new();
        for id in ids.try_iter()? {
            let id = id?;
            let token = match id.extract::<usize>() {
                Ok(id) => self.0.token(id),
                Err(error) if error.is_instance_of::<PyTypeError>(ids.py()) => {
                    return Err(PyTypeError::new_err(format!(
                        "a token id must be int, got {}",
                        id.get_type().name()?
                    )))
                }
                Err(_) => None,
            };
            let Some(token) = token else {
                let size = self.0.size();
                return Err(PyValueError::new_err(format!("a token id must be 0 to {}, got {id}", size - 1)));
            };
            bytes.extend_from_slice(token);
        }
        Ok(PyBytes::new(ids.py(), &bytes))
    }

    fn __repr__(&self) -> String {
        format!("rustbpe.Tokenizer(vocab_size={})", self.0.size())
    }
}

/// The pieces that the pattern cuts `text` into; joined they are `text` again.
#[pyfunction]
fn split(text: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
    let text = utf8(text, || "text".into())?;
    Ok(core::pieces(&text).map(|piece| String::from_utf8_lossy(piece).into_owned()).collect())
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let build = PyDict::new(module.py());
    build.set_item("version", env!("CARGO_PKG_VERSION"))?;
    build.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    build.set_item("unicode", core::UNICODE)?;
    module.add("__build__", build)?;
    module.add("PATTERN", core::PATTERN)?;
    module.add("MAX_FILE_BYTES", core::MAX_FILE_BYTES)?;
    module.add_function(wrap_pyfunction!(split, module)?)?;
    module.add_class::<Tokenizer>()
}
