//! The class `Tokenizer`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString, PyTuple};
use rustbpe_core as core;

use crate::args::{array, id as one_id, ids, strs, threads, to_python, utf8, write, Source, Texts, Whole};
use crate::engine::pattern;
use crate::training::{train, warn, Options, Report, Ticker};

/// What a tokenizer knows; never changed, only replaced.
pub struct Model {
    pub core: core::Tokenizer,
    fingerprint: OnceLock<String>,
    report: Option<Report>,
}

impl Model {
    fn new(core: core::Tokenizer, report: Option<Report>) -> Arc<Self> {
        Arc::new(Self { core, fingerprint: OnceLock::new(), report })
    }

    fn fingerprint(&self) -> &str {
        self.fingerprint.get_or_init(|| self.core.fingerprint())
    }
}

/// Bytes, merges and special tokens. Share it between threads and processes freely.
#[pyclass(frozen, module = "rustbpe")]
pub struct Tokenizer(RwLock<Arc<Model>>);

impl Tokenizer {
    /// The lock is held for the copy of a pointer, with the GIL held: fork, which holds it too, never meets it taken.
    pub fn model(&self) -> Arc<Model> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn of(core: core::Tokenizer, report: Option<Report>) -> Self {
        Self(RwLock::new(Model::new(core, report)))
    }

    fn encode_ids(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        let (model, text) = (self.model(), utf8(text, || "text".into())?);
        let text: &str = &text;
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        py.detach(|| model.core.encode(text, &mut ids)).map_err(to_python)?;
        Ok(ids)
    }
}

/// Names of special tokens as tiktoken takes them: None for "all".
fn names(
    argument: Option<&Bound<'_, PyAny>>,
    name: &str,
    default: Option<Vec<String>>,
) -> PyResult<Option<Vec<String>>> {
    let Some(argument) = argument else { return Ok(default) };
    if let Ok(text) = argument.cast::<PyString>() {
        return match text.to_cow()?.as_ref() {
            "all" => Ok(None),
            other => {
                Err(PyValueError::new_err(format!("{name} must be \"all\" or a collection, got {other:?}")))
            }
        };
    }
    let names = argument
        .try_iter()?
        .map(|item| utf8(&item?, || format!("an item of {name}")).map(|text| text.to_string()));
    names.collect::<PyResult<_>>().map(Some)
}

fn join<'py>(py: Python<'py>, shares: &[Vec<u32>]) -> PyResult<Bound<'py, PyAny>> {
    let length = shares.iter().map(Vec::len).sum();
    array(py, length, "uint32", shares.iter().flatten().map(|id| id.to_ne_bytes()))
}

/// The text of bytes, by Python's own error handlers where they are no UTF-8.
fn text<'py>(py: Python<'py>, bytes: &[u8], errors: &str) -> PyResult<Bound<'py, PyAny>> {
    match PyString::from_bytes(py, bytes) {
        Ok(text) => Ok(text.into_any()),
        Err(_) => PyBytes::new(py, bytes).call_method1("decode", ("utf-8", errors)),
    }
}

/// All texts of an argument, which must stay for as long as what is made of them.
fn sources(texts: &Bound<'_, PyAny>) -> PyResult<Vec<Source>> {
    let (mut texts, mut sources, mut index) = (Texts::new(texts)?, Vec::new(), 0);
    while let Some(source) = texts.next(index)? {
        index += source.rows();
        sources.push(source);
    }
    Ok(sources)
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        let model =
            pattern(core::GPT4_PATTERN).and_then(|pattern| core::Tokenizer::new(vec![], vec![], pattern));
        Ok(Self::of(model.map_err(to_python)?, None))
    }

    /// Learn a vocabulary of `vocab_size` ids, special tokens included, from str or Arrow string arrays.
    #[staticmethod]
    #[pyo3(signature = (texts, vocab_size, specials=Vec::new(), *, pattern=core::PATTERN, num_threads=None,
                        memory_limit=None, spill_dir=None, progress=None))]
    #[allow(clippy::too_many_arguments)]
    fn train(
        texts: &Bound<'_, PyAny>,
        vocab_size: Whole,
        specials: Vec<String>,
        pattern: &str,
        num_threads: Option<Whole>,
        memory_limit: Option<Whole>,
        spill_dir: Option<PathBuf>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let threads = threads(num_threads)?;
        let options = Options {
            threads,
            limit: memory_limit.map(|Whole(limit)| limit.max(0) as usize),
            folder: spill_dir,
            progress,
        };
        learn(texts, vocab_size, specials, pattern, options).map(|model| Self(RwLock::new(model)))
    }

    /// As rustbpe 0.1.0 has it: learn anew and become the result, without special tokens.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=Whole(8192), pattern=None),
           text_signature = "($self, iterator, vocab_size, buffer_size=8192, pattern=None)")]
    fn train_from_iterator(
        &self,
        iterator: &Bound<'_, PyAny>,
        vocab_size: Whole,
        buffer_size: Whole,
        pattern: Option<&str>,
    ) -> PyResult<()> {
        if buffer_size.0 < 1 {
            return Err(PyValueError::new_err(format!(
                "buffer_size must be at least 1, got {}",
                buffer_size.0
            )));
        }
        let options = Options { threads: threads(None)?, limit: None, folder: None, progress: None };
        let model = learn(iterator, vocab_size, vec![], pattern.unwrap_or(core::GPT4_PATTERN), options)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = model;
        Ok(())
    }

    /// What the training did; None if this tokenizer was not trained but loaded.
    #[getter]
    fn report<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.model().report.as_ref().map(|report| report.to_dict(py)).transpose()
    }

    /// Read what `to_bytes` wrote; ValueError for anything else.
    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: &[u8]) -> PyResult<Self> {
        let core = py.detach(|| core::Tokenizer::from_bytes(data, &pattern)).map_err(to_python)?;
        Ok(Self::of(core, None))
    }

    /// The content of the tokenizer's file.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.model().core.to_bytes())
    }

    /// The sha256 of vocabulary, pattern and special tokens, in hexadecimal.
    #[getter]
    fn fingerprint(&self) -> String {
        self.model().fingerprint().into()
    }

    /// All ids, the special tokens included.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.model().core.size()
    }

    /// The names of the special tokens, in the order of their ids, which are the last ones.
    #[getter]
    fn specials(&self) -> Vec<String> {
        self.model().core.specials().to_vec()
    }

    /// The merges in the order learned: merge i makes id 256 + i.
    #[getter]
    fn merges(&self) -> Vec<(u32, u32)> {
        self.model().core.merges().to_vec()
    }

    /// The regular expression that cuts text into pieces.
    #[getter(pattern)]
    fn pattern_text(&self) -> String {
        self.model().core.pattern().as_str().into()
    }

    /// As rustbpe 0.1.0 has it: `pattern`.
    fn get_pattern(&self) -> String {
        self.pattern_text()
    }

    /// As rustbpe 0.1.0 has it: (bytes, id) of every ordinary token.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, usize)> {
        let model = self.model();
        (0..model.core.first_special()).map(|id| (PyBytes::new(py, model.core.token(id)), id)).collect()
    }

    /// The ids of a text; special tokens in it are an error, unless they are allowed or not disallowed.
    #[pyo3(signature = (text, *, allowed_special=None, disallowed_special=None),
           text_signature = "($self, text, *, allowed_special=(), disallowed_special='all')")]
    fn encode(
        &self,
        text: &Bound<'_, PyAny>,
        allowed_special: Option<&Bound<'_, PyAny>>,
        disallowed_special: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<u32>> {
        let (model, py) = (self.model(), text.py());
        let text = utf8(text, || "text".into())?;
        let text: &str = &text;
        let allowed = names(allowed_special, "allowed_special", Some(vec![]))?;
        let disallowed = names(disallowed_special, "disallowed_special", None)?;
        let specials =
            model.core.specials().iter().map(String::as_str).zip(model.core.first_special() as u32..);
        let is_allowed =
            |name: &str| allowed.as_ref().is_none_or(|names| names.iter().any(|other| other == name));
        let disallowed: Vec<&str> = match &disallowed {
            None => specials.clone().map(|(name, _)| name).filter(|name| !is_allowed(name)).collect(),
            Some(names) => names.iter().map(String::as_str).collect(),
        };
        let allowed: Vec<(&str, u32)> = specials.filter(|(name, _)| is_allowed(name)).collect();
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        let found = py.detach(|| match core::first_of(&disallowed, text) {
            Some((_, index)) => Ok(Some(disallowed[index])),
            None if disallowed.contains(&"") => Ok(Some("")), // which is in every text
            None => model.core.encode_with_specials(text, &allowed, &mut ids).map(|()| None),
        });
        match found.map_err(to_python)? {
            None => Ok(ids),
            Some(name) => Err(PyValueError::new_err(format!(
                "text must not hold the special token {name:?}, it does: allow it, or pass disallowed_special=() to \
                 encode it as text"
            ))),
        }
    }

    /// The ids of a text; the names of special tokens in it are ordinary text.
    fn encode_ordinary(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        self.encode_ids(py, text)
    }

    /// As `encode_ordinary`, as a numpy array.
    #[pyo3(signature = (text, dtype="uint32"))]
    fn encode_to_numpy<'py>(&self, text: &Bound<'py, PyAny>, dtype: &str) -> PyResult<Bound<'py, PyAny>> {
        let py = text.py();
        match (dtype, self.model().core.first_special()) {
            ("uint16", size @ 65537..) => Err(PyValueError::new_err(format!(
                "a vocabulary must have at most 65536 ordinary tokens for uint16, this one has {size}"
            ))),
            ("uint16", _) => {
                let ids = self.encode_ids(py, text)?;
                array(py, ids.len(), dtype, ids.iter().map(|&id| (id as u16).to_ne_bytes()))
            }
            ("uint32", _) => join(py, &[self.encode_ids(py, text)?]),
            _ => Err(PyValueError::new_err(format!("dtype must be uint32 or uint16, got {dtype}"))),
        }
    }

    /// The ordinary ids of many texts: (ids, offsets) as numpy arrays.
    #[pyo3(signature = (texts, *, num_threads=None))]
    fn encode_batch<'py>(
        &self,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<Whole>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let py = texts.py();
        let batch = self.encode_all(texts, num_threads)?;
        let mut end = 0i64;
        let ends = batch.lengths.iter().map(|&length| {
            end += length as i64;
            end.to_ne_bytes()
        });
        let offsets = array(py, batch.lengths.len() + 1, "int64", std::iter::once([0; 8]).chain(ends))?;
        Ok((join(py, &batch.shares)?, offsets))
    }

    /// As rustbpe 0.1.0 has it: the ids of many texts, as lists.
    fn batch_encode(&self, texts: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<u32>>> {
        let batch = self.encode_all(texts, None)?;
        let mut ids = batch.shares.iter().flatten().copied();
        Ok(batch.lengths.iter().map(|&length| ids.by_ref().take(length).collect()).collect())
    }

    /// Write the ordinary ids of a text into a row, between those of `prepend` and `append`; the end is returned.
    #[pyo3(signature = (row, text, *, start=Whole(0), prepend=None, append=None),
           text_signature = "($self, row, text, *, start=0, prepend=(), append=())")]
    fn encode_into(
        &self,
        row: &Bound<'_, PyAny>,
        text: &Bound<'_, PyAny>,
        start: Whole,
        prepend: Option<&Bound<'_, PyAny>>,
        append: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let size = self.model().core.size();
        let mut all = prepend.map_or_else(|| Ok(vec![]), |prepend| ids(prepend, size))?;
        all.append(&mut self.encode_ids(row.py(), text)?);
        all.append(&mut append.map_or_else(|| Ok(vec![]), |append| ids(append, size))?);
        let start = usize::try_from(start.0)
            .map_err(|_| PyValueError::new_err(format!("start must be at least 0, got {}", start.0)))?;
        [write::<u16>, write::<u32>, write::<i32>, write::<i64>]
            .into_iter()
            .find_map(|write| write(row, start, &all))
            .unwrap_or_else(|| {
                let kind = row.get_type().name()?;
                Err(PyTypeError::new_err(format!(
                    "row must be a buffer of uint16, uint32, int32 or int64, this {kind} is not"
                )))
            })
    }

    /// How many ordinary ids a text has.
    fn count(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<usize> {
        let (model, text) = (self.model(), utf8(text, || "text".into())?);
        let text: &str = &text;
        py.detach(|| model.core.count(text)).map_err(to_python)
    }

    /// The ordinary ids of any bytes; `decode_bytes` gives them back.
    fn encode_bytes(&self, py: Python<'_>, data: &[u8]) -> PyResult<Vec<u32>> {
        let (model, mut ids) = (self.model(), Vec::new());
        py.detach(|| model.core.encode_bytes(data, &mut ids)).map_err(to_python)?;
        Ok(ids)
    }

    /// The bytes of ids; a special token gives its name.
    #[pyo3(signature = (ids))]
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.bytes_of(ids)?))
    }

    /// The text of ids; `errors` says what becomes of bytes that are no UTF-8, as for bytes.decode.
    #[pyo3(signature = (ids, errors="replace"))]
    fn decode<'py>(&self, ids: &Bound<'py, PyAny>, errors: &str) -> PyResult<Bound<'py, PyAny>> {
        text(ids.py(), &self.bytes_of(ids)?, errors)
    }

    /// The texts of many lists or arrays of ids, or of a tuple (ids, offsets).
    #[pyo3(signature = (batch, errors="replace", num_threads=None))]
    fn decode_batch<'py>(
        &self,
        batch: &Bound<'py, PyAny>,
        errors: &str,
        num_threads: Option<Whole>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let (model, py) = (self.model(), batch.py());
        let size = model.core.size();
        let (mut all, mut offsets) = (Vec::new(), vec![0]);
        match batch.cast::<PyTuple>() {
            Ok(pair) if pair.len() == 2 => {
                all = ids(&pair.get_item(0)?, size)?;
                offsets =
                    pair.get_item(1)?.call_method0("tolist").or_else(|_| pair.get_item(1))?.extract()?;
                let ascending = offsets.windows(2).all(|two| two[0] <= two[1]);
                if offsets.first() != Some(&0) || offsets.last() != Some(&all.len()) || !ascending {
                    return Err(PyValueError::new_err(format!(
                        "offsets must rise from 0 to the number of ids {}, these do not",
                        all.len()
                    )));
                }
            }
            _ => {
                for item in batch.try_iter()? {
                    all.append(&mut ids(&item?, size)?);
                    offsets.push(all.len());
                }
            }
        }
        let threads = threads(num_threads)?;
        let texts = py.detach(|| model.core.decode_batch(&all, &offsets, threads)).map_err(to_python)?;
        texts.iter().map(|bytes| text(py, bytes, errors)).collect()
    }

    /// The bytes of one id.
    fn decode_single_token_bytes<'py>(&self, id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let model = self.model();
        let token = model.core.token(one_id(id, model.core.size(), String::new)? as usize);
        Ok(PyBytes::new(id.py(), token))
    }

    /// How many bytes of text each id stands for, 0 for special tokens: numpy int32.
    fn token_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let model = self.model();
        let (size, first_special) = (model.core.size(), model.core.first_special());
        let length = |id| if id < first_special { model.core.token(id).len() as i32 } else { 0 };
        array(py, size, "int32", (0..size).map(|id| length(id).to_ne_bytes()))
    }

    /// The keyword arguments of tiktoken.Encoding for the same tokenizer.
    #[pyo3(signature = (name="rustbpe"))]
    fn to_tiktoken<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyDict>> {
        let model = self.model();
        let (ranks, specials, arguments) = (PyDict::new(py), PyDict::new(py), PyDict::new(py));
        for id in 0..model.core.first_special() {
            ranks.set_item(PyBytes::new(py, model.core.token(id)), id)?;
        }
        for (special, id) in model.core.specials().iter().zip(model.core.first_special()..) {
            specials.set_item(special, id)?;
        }
        arguments.set_item("name", name)?;
        arguments.set_item("pat_str", model.core.pattern().as_str())?;
        arguments.set_item("mergeable_ranks", ranks)?;
        arguments.set_item("special_tokens", specials)?;
        arguments.set_item("explicit_n_vocab", model.core.size())?;
        Ok(arguments)
    }

    /// The .tiktoken file: a line with bytes in base64 and id per ordinary token.
    fn to_tiktoken_file<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.model().core.to_tiktoken().as_bytes())
    }

    /// The tokenizer.json of the library tokenizers.
    fn to_huggingface(&self) -> PyResult<String> {
        self.model().core.to_huggingface().map_err(to_python)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        Ok((py.get_type::<Self>().getattr("from_bytes")?, (self.to_bytes(py),)))
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other
            .cast::<Self>()
            .is_ok_and(|other| self.model().fingerprint() == other.get().model().fingerprint())
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.model().fingerprint().hash(&mut hasher);
        hasher.finish()
    }

    fn __repr__(&self) -> String {
        format!("rustbpe.Tokenizer(vocab_size={})", self.vocab_size())
    }
}

impl Tokenizer {
    fn encode_all(&self, texts: &Bound<'_, PyAny>, num_threads: Option<Whole>) -> PyResult<core::Batch> {
        let (model, threads, sources) = (self.model(), threads(num_threads)?, sources(texts)?);
        let texts_of = strs(&sources, 0)?;
        Ticker::new(None).watch(texts.py(), "encode", 0, |go_on| {
            model.core.encode_batch(&texts_of, threads, &mut || go_on(0))
        })
    }

    fn bytes_of(&self, object: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
        let model = self.model();
        let ids = ids(object, model.core.size())?;
        Ok(object.py().detach(|| model.core.decode(&ids)))
    }
}

/// Train; everything that can be refused beforehand is.
fn learn(
    texts: &Bound<'_, PyAny>,
    vocab_size: Whole,
    specials: Vec<String>,
    pattern_text: &str,
    options: Options,
) -> PyResult<Arc<Model>> {
    let py = texts.py();
    let (Whole(size), least) = (vocab_size, 256 + specials.len() as i64);
    if !(least..=core::MAX_TOKENS as i64).contains(&size) {
        let sentence = format!("vocab_size must be {least} to {}, got {size}", core::MAX_TOKENS);
        return Err(PyValueError::new_err(sentence));
    }
    let pattern = pattern(pattern_text).map_err(to_python)?;
    // what is wrong with the special tokens or the pattern should be known before the training
    core::Tokenizer::new(vec![], specials.clone(), pattern.clone()).map_err(to_python)?;
    let (merges, report) = train(texts, (size - least) as usize, &pattern, options)?;
    let tokenizer = py.detach(|| core::Tokenizer::new(merges, specials, pattern)).map_err(to_python)?;
    warn(py, tokenizer.size(), size as usize)?;
    Ok(Model::new(tokenizer, Some(report)))
}
