//! Strings of Arrow arrays without a copy, through the Arrow C data interface and its PyCapsules
//! (https://arrow.apache.org/docs/format/CDataInterface.html). The only unsafe code of the crate.
//!
//! What a producer cannot be asked for, the sizes of its buffers, is trusted as the interface wants it; offsets, nulls
//! and UTF-8 are checked.

use std::ffi::{c_char, c_int, c_void, CStr};
use std::slice;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

type Release<T> = Option<unsafe extern "C" fn(*mut T)>;

#[repr(C)]
struct Schema {
    format: *const c_char,
    name: *const c_char,
    metadata: *const c_char,
    flags: i64,
    n_children: i64,
    children: *mut *mut Schema,
    dictionary: *mut Schema,
    release: Release<Schema>,
    private_data: *mut c_void,
}

#[repr(C)]
struct Array {
    length: i64,
    null_count: i64,
    offset: i64,
    n_buffers: i64,
    n_children: i64,
    buffers: *const *const c_void,
    children: *mut *mut Array,
    dictionary: *mut Array,
    release: Release<Array>,
    private_data: *mut c_void,
}

#[repr(C)]
struct ArrayStream {
    get_schema: Option<unsafe extern "C" fn(*mut ArrayStream, *mut Schema) -> c_int>,
    get_next: Option<unsafe extern "C" fn(*mut ArrayStream, *mut Array) -> c_int>,
    get_last_error: Option<unsafe extern "C" fn(*mut ArrayStream) -> *const c_char>,
    release: Release<ArrayStream>,
    private_data: *mut c_void,
}

/// A C struct of ours to release, in one place in memory since producers may point into it.
struct Owned<T: Releasable>(Box<T>);

/// # Safety
/// All zeros must be a released value of the type, and `release` its member.
unsafe trait Releasable {
    const CAPSULE: &'static CStr;
    fn release(&mut self) -> &mut Release<Self>;
}

macro_rules! releasable {
    ($type:ty, $name:literal) => {
        // SAFETY: pointers, integers and Option<fn> may be zero; no `release` means released
        unsafe impl Releasable for $type {
            const CAPSULE: &'static CStr = $name;
            fn release(&mut self) -> &mut Release<Self> {
                &mut self.release
            }
        }
    };
}
releasable!(Schema, c"arrow_schema");
releasable!(Array, c"arrow_array");
releasable!(ArrayStream, c"arrow_array_stream");

impl<T: Releasable> Owned<T> {
    fn empty() -> Self {
        // SAFETY: by the contract of Releasable
        Self(Box::new(unsafe { std::mem::zeroed() }))
    }

    /// Take the struct out of a capsule, which then has nothing to release.
    fn from_capsule(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let pointer = object.cast::<PyCapsule>()?.pointer_checked(Some(T::CAPSULE))?.cast::<T>();
        let mut owned = Self::empty();
        // SAFETY: a capsule of this name holds a valid struct, and we hold the interpreter's lock, so nobody else
        // takes it at the same time; swapping leaves it a released one, which is how the interface moves a struct
        unsafe { std::ptr::swap(&mut *owned.0, pointer.as_ptr()) };
        match owned.0.release() {
            Some(_) => Ok(owned),
            None => Err(PyValueError::new_err("an Arrow capsule must be used once, this one is used up")),
        }
    }
}

impl<T: Releasable> Drop for Owned<T> {
    fn drop(&mut self) {
        if let Some(release) = *self.0.release() {
            // SAFETY: the producer's own function on its own struct, called once: we own the struct
            unsafe { release(&mut *self.0) };
        }
    }
}

/// How the strings of an array lie in its buffers.
#[derive(Clone, Copy)]
enum Layout {
    /// 4-byte offsets, bytes
    Utf8,
    /// 8-byte offsets, bytes
    LargeUtf8,
    /// 16-byte views, any number of byte buffers, their sizes
    View,
}

impl Layout {
    fn of(schema: &Schema) -> PyResult<Self> {
        // SAFETY: the interface makes `format` a C string
        let format = if schema.format.is_null() { c"" } else { unsafe { CStr::from_ptr(schema.format) } };
        match (format.to_bytes(), schema.dictionary.is_null()) {
            (b"u", true) => Ok(Self::Utf8),
            (b"U", true) => Ok(Self::LargeUtf8),
            (b"vu", true) => Ok(Self::View),
            (_, plain) => Err(PyTypeError::new_err(format!(
                "an Arrow array of texts must be utf8, large_utf8 or string_view, got the {}format {format:?}",
                if plain { "" } else { "dictionary-encoded " }
            ))),
        }
    }
}

/// An array of strings.
pub struct Strings {
    array: Owned<Array>,
    layout: Layout,
}

impl Strings {
    /// Ask an object for the array it is; None if it is none.
    pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let Some(method) = object.getattr_opt("__arrow_c_array__")? else { return Ok(None) };
        let (schema, array): (Bound<'_, PyAny>, Bound<'_, PyAny>) = method.call0()?.extract()?;
        let layout = Layout::of(&Owned::<Schema>::from_capsule(&schema)?.0)?;
        Ok(Some(Self { array: Owned::from_capsule(&array)?, layout }))
    }

    pub fn len(&self) -> usize {
        self.array.0.length.max(0) as usize
    }

    /// Every string; `first` is the index of the first one in error messages.
    pub fn texts(&self, first: usize) -> PyResult<Vec<&str>> {
        let array = &*self.array.0;
        if self.len() == 0 {
            return Ok(Vec::new());
        }
        if array.n_buffers < 3 || array.buffers.is_null() || array.offset < 0 {
            return Err(PyValueError::new_err(
                "an Arrow string array must have its buffers, this one has not",
            ));
        }
        // SAFETY: the interface makes `buffers` that many pointers
        let buffers = unsafe { slice::from_raw_parts(array.buffers, array.n_buffers as usize) };
        (0..self.len()).map(|row| self.text(buffers, row, first + row)).collect()
    }

    fn text(&self, buffers: &[*const c_void], row: usize, index: usize) -> PyResult<&str> {
        let wrong = |what: String| PyValueError::new_err(format!("text {index} must be {what}"));
        let at = self.array.0.offset as usize + row;
        // SAFETY: the interface gives the validity bitmap, where there is one, a bit for each row
        let valid = buffers[0].is_null() || unsafe { element::<u8>(buffers[0], at / 8) } >> (at % 8) & 1 == 1;
        if !valid {
            return Err(wrong("str, got null".into()));
        }
        // SAFETY: the interface gives the offsets one element more than there are rows, the views one for each
        let place = unsafe {
            match self.layout {
                Layout::Utf8 => span(
                    buffers[2],
                    element::<i32>(buffers[1], at).into(),
                    element::<i32>(buffers[1], at + 1).into(),
                ),
                Layout::LargeUtf8 => span(buffers[2], element(buffers[1], at), element(buffers[1], at + 1)),
                Layout::View => view(buffers, at),
            }
        };
        let bytes = match place {
            Some((_, 0)) => &[],
            // SAFETY: inside the data buffer: a view was checked against its size, an offset is by the interface's
            // word within it. Alive and unchanged as long as the array, which `self` owns
            Some((start, length)) => unsafe { slice::from_raw_parts(start, length) },
            None => return Err(wrong("inside its Arrow buffers, it is not".into())),
        };
        std::str::from_utf8(bytes)
            .map_err(|error| wrong(format!("UTF-8, its byte {} is not", error.valid_up_to())))
    }
}

/// Element `at` of a buffer, which need not be aligned.
///
/// # Safety
/// The buffer must have that element.
unsafe fn element<T: Copy>(buffer: *const c_void, at: usize) -> T {
    buffer.cast::<T>().add(at).read_unaligned()
}

/// Bytes start..end of a buffer, as a pointer and a length; None when that makes no sense.
fn span(buffer: *const c_void, start: i64, end: i64) -> Option<(*const u8, usize)> {
    let length = usize::try_from(end.checked_sub(start)?).ok()?;
    let start = usize::try_from(start).ok()?;
    (length == 0 || !buffer.is_null()).then(|| (buffer.cast::<u8>().wrapping_add(start), length))
}

/// The bytes of view `at`: up to 12 lie in the view itself, more in one of the buffers behind it.
///
/// # Safety
/// The buffers must be those of a view array with that view.
unsafe fn view(buffers: &[*const c_void], at: usize) -> Option<(*const u8, usize)> {
    const VIEW: usize = 16;
    let start = buffers[1].cast::<u8>().add(at * VIEW);
    let word = |index: usize| -> i64 { element::<i32>(start.cast(), index).into() };
    let length = word(0);
    if (0..=12).contains(&length) {
        return Some((start.add(4), length as usize));
    }
    let (index, offset) = (usize::try_from(word(2)).ok()?, word(3));
    let (sizes, data) = buffers[2..].split_last()?;
    let data = data.get(index)?;
    (offset + length <= element::<i64>(*sizes, index)).then(|| span(*data, offset, offset + length))?
}

/// The arrays of a stream.
pub struct Stream {
    stream: Owned<ArrayStream>,
    layout: Layout,
}

impl Stream {
    /// Ask an object for the stream it is; None if it is none.
    pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let Some(method) = object.getattr_opt("__arrow_c_stream__")? else { return Ok(None) };
        let mut stream = Owned::<ArrayStream>::from_capsule(&method.call0()?)?;
        let mut schema = Owned::<Schema>::empty();
        let code = match stream.0.get_schema {
            // SAFETY: the producer's function on its stream, which is not released, into a struct that holds nothing
            Some(get_schema) => unsafe { get_schema(&mut *stream.0, &mut *schema.0) },
            None => -1,
        };
        check(&mut stream.0, code)?;
        Ok(Some(Self { layout: Layout::of(&schema.0)?, stream }))
    }

    /// The next array; None at the end.
    pub fn next(&mut self) -> PyResult<Option<Strings>> {
        let mut array = Owned::<Array>::empty();
        let code = match self.stream.0.get_next {
            // SAFETY: as in `of`
            Some(get_next) => unsafe { get_next(&mut *self.stream.0, &mut *array.0) },
            None => -1,
        };
        check(&mut self.stream.0, code)?;
        Ok(array.0.release.is_some().then_some(Strings { array, layout: self.layout }))
    }
}

fn check(stream: &mut ArrayStream, code: c_int) -> PyResult<()> {
    if code == 0 {
        return Ok(());
    }
    let message = match stream.get_last_error {
        // SAFETY: the interface allows this call after a failed one and makes the result null or a C string
        Some(get_last_error) => unsafe {
            let message = get_last_error(stream);
            (!message.is_null()).then(|| CStr::from_ptr(message).to_string_lossy().into_owned())
        },
        None => None,
    };
    let message = message.unwrap_or_else(|| format!("error {code}"));
    Err(PyValueError::new_err(format!(
        "an Arrow stream of texts must be readable, this one fails ({message})"
    )))
}
