//! Python arguments -> Rust values, Rust errors -> Python exceptions.

use std::thread::available_parallelism;

use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyOSError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyByteArray, PyList, PyString};
use rustbpe_core as core;

use crate::arrow::{Stream, Strings};

pub fn to_python(error: core::Error) -> PyErr {
    match error {
        core::Error::Invalid(sentence) => PyValueError::new_err(sentence),
        core::Error::Io(sentence) => PyOSError::new_err(sentence),
        core::Error::Stopped => PyValueError::new_err("the work was stopped"),
    }
}

/// An int; what does not fit into 64 bits becomes the nearest that does, so that a range check speaks of it.
#[derive(Clone, Copy)]
pub struct Whole(pub i64);

impl<'py> FromPyObject<'_, 'py> for Whole {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<i64>() {
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                Ok(Self(if object.lt(0)? { i64::MIN } else { i64::MAX }))
            }
            number => number.map(Self),
        }
    }
}

/// Threads to use: what the user names, else the processors this process may run on.
pub fn threads(wanted: Option<Whole>) -> PyResult<usize> {
    match wanted {
        Some(Whole(n @ 1..=1024)) => Ok(n as usize),
        Some(Whole(n)) => Err(PyValueError::new_err(format!("num_threads must be 1 to 1024, got {n}"))),
        None => Ok(available_parallelism().map_or(1, usize::from).min(1024)),
    }
}

/// A str as UTF-8 without a copy; `name` says which one in the error.
pub fn utf8(item: &Bound<'_, PyAny>, name: impl FnOnce() -> String) -> PyResult<PyBackedStr> {
    let Ok(text) = item.cast::<PyString>() else {
        return Err(PyTypeError::new_err(format!("{} must be str, got {}", name(), item.get_type().name()?)));
    };
    PyBackedStr::try_from(text.clone()).map_err(|_| {
        PyValueError::new_err(format!("{} must be valid Unicode, it holds a lone surrogate", name()))
    })
}

/// About what a Python str weighs beside its text, so that a stream of empty ones makes batches too.
const OBJECT_BYTES: usize = 64;
/// What a text of an Arrow array is taken for, before anybody has looked at it.
const ROW_BYTES: usize = 4096;

/// One text, or an array of them.
pub enum Source {
    Text(PyBackedStr),
    Array(Strings),
}

impl Source {
    pub fn rows(&self) -> usize {
        match self {
            Self::Text(_) => 1,
            Self::Array(array) => array.len(),
        }
    }

    /// About its bytes in memory.
    pub fn weight(&self) -> usize {
        match self {
            Self::Text(text) => text.len() + OBJECT_BYTES,
            Self::Array(array) => array.len() * ROW_BYTES + OBJECT_BYTES,
        }
    }
}

/// What an argument `texts` holds, one source after the other.
pub enum Texts<'py> {
    Iterator(Bound<'py, pyo3::types::PyIterator>),
    Stream(Stream),
    Array(Option<Strings>),
}

impl<'py> Texts<'py> {
    pub fn new(texts: &Bound<'py, PyAny>) -> PyResult<Self> {
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("texts must be an iterable of str, got one str"));
        }
        if let Some(stream) = Stream::of(texts)? {
            return Ok(Self::Stream(stream));
        }
        match Strings::of(texts)? {
            Some(array) => Ok(Self::Array(Some(array))),
            None => Ok(Self::Iterator(texts.try_iter()?)),
        }
    }

    /// The next source; `index` is that of its first text.
    pub fn next(&mut self, index: usize) -> PyResult<Option<Source>> {
        match self {
            Self::Stream(stream) => Ok(stream.next()?.map(Source::Array)),
            Self::Array(array) => Ok(array.take().map(Source::Array)),
            Self::Iterator(items) => {
                let Some(item) = items.next().transpose()? else { return Ok(None) };
                if !item.is_instance_of::<PyString>() {
                    if let Some(array) = Strings::of(&item)? {
                        return Ok(Some(Source::Array(array)));
                    }
                }
                utf8(&item, || format!("text {index}")).map(|text| Some(Source::Text(text)))
            }
        }
    }
}

/// The texts of sources, the first of which has index `first`.
pub fn strs(sources: &[Source], first: usize) -> PyResult<Vec<&str>> {
    let mut texts = Vec::with_capacity(sources.len());
    for source in sources {
        match source {
            Source::Text(text) => texts.push(&**text),
            Source::Array(array) => texts.append(&mut array.texts(first + texts.len())?),
        }
    }
    Ok(texts)
}

/// One token id below `size`; `place` says where it stands in the error, if anywhere.
pub fn id(item: &Bound<'_, PyAny>, size: usize, place: impl FnOnce() -> String) -> PyResult<u32> {
    match item.extract::<i64>() {
        Ok(id) if (0..size as i64).contains(&id) => Ok(id as u32),
        Err(error) if error.is_instance_of::<PyTypeError>(item.py()) => Err(PyTypeError::new_err(format!(
            "a token id must be int, got {}{}",
            item.get_type().name()?,
            place()
        ))),
        _ => Err(out_of_range(size, item, place())),
    }
}

fn out_of_range(size: usize, id: impl std::fmt::Display, place: String) -> PyErr {
    PyValueError::new_err(format!("a token id must be 0 to {}, got {id}{place}", size - 1))
}

fn at(index: usize) -> String {
    format!(" at index {index}")
}

/// Token ids below `size`: an array of integers, a tensor, a list or any other iterable.
pub fn ids(object: &Bound<'_, PyAny>, size: usize) -> PyResult<Vec<u32>> {
    if let Ok(list) = object.cast::<PyList>() {
        return list.iter().enumerate().map(|(index, item)| id(&item, size, || at(index))).collect();
    }
    let typed = [typed_ids::<i64>, typed_ids::<u32>, typed_ids::<u16>, typed_ids::<i32>, typed_ids::<u64>];
    for read in typed {
        if let Some(ids) = read(object, size) {
            return ids;
        }
    }
    let items = match object.getattr_opt("tolist")? {
        Some(tolist) => tolist.call0()?.try_iter()?,
        None => object.try_iter()?,
    };
    items.enumerate().map(|(index, item)| id(&item?, size, || at(index))).collect()
}

/// Ids of a buffer with elements T, None for any other object.
fn typed_ids<T>(object: &Bound<'_, PyAny>, size: usize) -> Option<PyResult<Vec<u32>>>
where
    T: Element + Copy + std::fmt::Display + TryInto<u32>,
{
    let buffer = PyBuffer::<T>::get(object).ok()?;
    if buffer.dimensions() != 1 {
        let sentence = format!("token ids must be in one dimension, got {}", buffer.dimensions());
        return Some(Err(PyValueError::new_err(sentence)));
    }
    let checked = |(index, value): (usize, T)| match value.try_into() {
        Ok(id) if (id as usize) < size => Ok(id),
        _ => Err(out_of_range(size, value, at(index))),
    };
    Some(buffer.to_vec(object.py()).and_then(|values| values.into_iter().enumerate().map(checked).collect()))
}

/// Write ids into a one-dimensional writable buffer from `start` on; None if its elements are no T.
pub fn write<T>(row: &Bound<'_, PyAny>, start: usize, ids: &[u32]) -> Option<PyResult<usize>>
where
    T: Element + Copy + TryFrom<u32>,
{
    let buffer = PyBuffer::<T>::get(row).ok()?;
    let refuse = |sentence: String| Some(Err(PyValueError::new_err(sentence)));
    if buffer.dimensions() != 1 {
        return refuse(format!("row must have one dimension, got {}", buffer.dimensions()));
    }
    let Some(cells) = buffer.as_mut_slice(row.py()) else {
        return refuse("row must be writable and contiguous, this one is not".into());
    };
    let end = start.saturating_add(ids.len());
    let Some(cells) = cells.get(start..end) else {
        return refuse(format!(
            "the ids must fit into the row of {}, {} from place {start} on do not",
            cells.len(),
            ids.len()
        ));
    };
    let Ok(values) = ids.iter().map(|&id| T::try_from(id)).collect::<Result<Vec<T>, _>>() else {
        return refuse(format!("ids in a row of {}-byte integers must fit, some do not", size_of::<T>()));
    };
    cells.iter().zip(values).for_each(|(cell, value)| cell.set(value));
    Some(Ok(end))
}

/// A numpy array of `dtype` over bytes of ours.
pub fn numpy<'py>(bytes: Bound<'py, PyByteArray>, dtype: &str) -> PyResult<Bound<'py, PyAny>> {
    static FROM_BUFFER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    FROM_BUFFER.import(bytes.py(), "numpy", "frombuffer")?.call1((bytes, dtype))
}

/// A numpy array of what `values` gives, each as N bytes in native order.
pub fn array<'py, const N: usize>(
    py: Python<'py>,
    length: usize,
    dtype: &str,
    values: impl Iterator<Item = [u8; N]>,
) -> PyResult<Bound<'py, PyAny>> {
    let bytes = PyByteArray::new_with(py, length * N, |bytes| {
        bytes.chunks_exact_mut(N).zip(values).for_each(|(cell, value)| cell.copy_from_slice(&value));
        Ok(())
    })?;
    numpy(bytes, dtype)
}
