//! From an iterable of texts to a trained tokenizer: batches, Ctrl-C, progress, report.

use std::ffi::CString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyUserWarning, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rustbpe_core as core;

use crate::args::{strs, to_python, Texts};

/// Text gathered before the threads count it: enough to make starting them cheap.
const BATCH_BYTES: usize = 16 << 20;
/// Between two looks at Ctrl-C and the progress callback.
const TICK: Duration = Duration::from_millis(100);
/// What a thread's table needs to be of any use.
const LEAST_LIMIT: usize = 1 << 17;

pub struct Options {
    pub threads: usize,
    pub limit: Option<usize>,
    pub folder: Option<PathBuf>,
    pub progress: Option<Py<PyAny>>,
}

/// What training did; seconds are of the wall clock and add up to nearly all of it.
#[derive(Default)]
pub struct Report {
    documents: usize,
    bytes: usize,
    unique_pieces: usize,
    merges: usize,
    asked_merges: usize,
    spilled_runs: usize,
    read: f64,
    split: f64,
    count: f64,
    init: f64,
    merge: f64,
}

impl Report {
    pub fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (report, seconds) = (PyDict::new(py), PyDict::new(py));
        for (name, value) in [
            ("documents", self.documents),
            ("bytes", self.bytes),
            ("unique_pieces", self.unique_pieces),
            ("merges", self.merges),
            ("asked_merges", self.asked_merges),
            ("spilled_runs", self.spilled_runs),
        ] {
            report.set_item(name, value)?;
        }
        let phases = ["read", "split", "count", "init", "merge"];
        for (name, value) in
            phases.into_iter().zip([self.read, self.split, self.count, self.init, self.merge])
        {
            seconds.set_item(name, value)?;
        }
        report.set_item("seconds", seconds)?;
        Ok(report)
    }
}

/// Calls `progress(phase, done, total)` and notices Ctrl-C, both at most every TICK.
pub struct Ticker {
    progress: Option<Py<PyAny>>,
    last: Instant,
}

impl Ticker {
    pub fn new(progress: Option<Py<PyAny>>) -> Self {
        Self { progress, last: Instant::now() }
    }

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

    /// Run `work` with the GIL released; its argument, called with what is done, ticks and says whether to go on.
    pub fn watch<T: Send>(
        &mut self,
        py: Python<'_>,
        phase: &str,
        total: usize,
        work: impl FnOnce(&mut dyn FnMut(usize) -> bool) -> core::Result<T> + Send,
    ) -> PyResult<T> {
        let mut raised = None;
        let mut go_on = |done| {
            if self.last.elapsed() < TICK {
                return true;
            }
            raised = Python::attach(|py| self.tick(py, phase, done, total)).err();
            raised.is_none()
        };
        let result = py.detach(|| work(&mut go_on));
        result.map_err(|error| raised.unwrap_or_else(|| to_python(error)))
    }
}

/// Count every piece of `texts`, batch by batch.
fn count(
    texts: &Bound<'_, PyAny>,
    pattern: &core::Pattern,
    options: &Options,
    ticker: &mut Ticker,
    report: &mut Report,
) -> PyResult<core::Counts> {
    let py = texts.py();
    let folder = options.folder.clone().unwrap_or_else(std::env::temp_dir);
    let mut counter =
        core::Counter::new(pattern, options.threads, options.limit.unwrap_or(usize::MAX), &folder);
    let mut texts = Texts::new(texts)?;
    let mut working = 0.0;
    let start = Instant::now();
    let (mut batch, mut waiting, mut first, mut index) = (Vec::new(), 0, 0, 0);
    loop {
        let source = texts.next(index)?;
        let last = source.is_none();
        if let Some(source) = source {
            index += source.rows();
            waiting += source.weight();
            batch.push(source);
        }
        if waiting < BATCH_BYTES && !last {
            ticker.tick(py, "count", report.bytes, 0)?;
            continue;
        }
        let texts = strs(&batch, first)?;
        report.bytes += texts.iter().map(|text| text.len()).sum::<usize>();
        let (start, done) = (Instant::now(), report.bytes);
        ticker.watch(py, "count", 0, |go_on| counter.add(&texts, &mut || go_on(done)))?;
        working += start.elapsed().as_secs_f64();
        batch.clear();
        (waiting, first) = (0, index);
        if last {
            break;
        }
    }
    report.documents = index;
    report.read = start.elapsed().as_secs_f64() - working;
    ticker.report(py, "count", report.bytes, report.bytes)?;
    let (split, count) = counter.seconds();
    let start = Instant::now();
    let done = report.bytes;
    let counts = ticker.watch(py, "count", done, |go_on| counter.finish(&mut || go_on(done)))?;
    report.split = if split > 0.0 { working * split / (split + count) } else { 0.0 };
    report.count = working - report.split + start.elapsed().as_secs_f64();
    Ok(counts)
}

/// The merges of `texts`, at most `n_merges`, and the report.
pub fn train(
    texts: &Bound<'_, PyAny>,
    n_merges: usize,
    pattern: &core::Pattern,
    options: Options,
) -> PyResult<(Vec<(u32, u32)>, Report)> {
    let py = texts.py();
    let least = LEAST_LIMIT * options.threads;
    if let Some(limit) = options.limit.filter(|&limit| limit < least) {
        return Err(PyValueError::new_err(format!(
            "memory_limit must be at least {least} bytes for {} threads, got {limit}",
            options.threads
        )));
    }
    let mut ticker = Ticker::new(options.progress.as_ref().map(|progress| progress.clone_ref(py)));
    let mut report = Report { asked_merges: n_merges, ..Report::default() };
    let counts = count(texts, pattern, &options, &mut ticker, &mut report)?;
    (report.unique_pieces, report.spilled_runs) = (counts.len(), counts.spilled);
    let training = ticker.watch(py, "merge", n_merges, |go_on| core::train(counts, n_merges, go_on))?;
    (report.init, report.merge, report.merges) = (training.init, training.merge, training.merges.len());
    ticker.report(py, "merge", report.merges, n_merges)?;
    Ok((training.merges, report))
}

/// Fewer merges than asked for are no error, but the caller should hear of them.
pub fn warn(py: Python<'_>, got: usize, asked: usize) -> PyResult<()> {
    if got >= asked {
        return Ok(());
    }
    let sentence = CString::new(format!(
        "the texts gave a vocabulary of {got} tokens, {asked} were asked for: every piece is one token already"
    ))?;
    PyErr::warn(py, &py.get_type::<PyUserWarning>(), &sentence, 1)
}
