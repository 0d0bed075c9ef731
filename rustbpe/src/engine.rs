//! Any pattern: those known to the core are cut by hand, others by fancy-regex.

use std::ops::Range;

use pyo3::prelude::*;
use rustbpe_core as core;

use crate::args::to_python;

/// More is no pattern but an attack on whoever compiles it.
const MAX_PATTERN_BYTES: usize = 1 << 13;

struct Fancy(fancy_regex::Regex);

impl core::Engine for Fancy {
    fn copy(&self) -> Box<dyn core::Engine> {
        Box::new(Self(self.0.clone()))
    }

    fn ends<'a>(&'a self, text: &'a str) -> Box<dyn Iterator<Item = core::Result<usize>> + 'a> {
        Box::new(Ends { matches: self.0.find_iter(text), size: text.len(), at: 0, pending: None })
    }
}

/// Ends of the matches and of what lies between them; matches of nothing (or, by \K, of less) are passed over.
struct Ends<'a> {
    matches: fancy_regex::Matches<'a, 'a, str>,
    size: usize,
    at: usize,
    pending: Option<usize>,
}

impl Ends<'_> {
    fn next_match(&mut self) -> Option<fancy_regex::Result<Range<usize>>> {
        let at = self.at;
        self.matches
            .by_ref()
            .map(|found| found.map(|found| found.start()..found.end()))
            .find(|found| !matches!(found, Ok(range) if range.is_empty() || range.start < at))
    }
}

impl Iterator for Ends<'_> {
    type Item = core::Result<usize>;

    fn next(&mut self) -> Option<core::Result<usize>> {
        let end = match self.pending.take() {
            Some(end) => end,
            None => match self.next_match() {
                None if self.at == self.size => return None,
                None => self.size,
                Some(Ok(found)) if found.start == self.at => found.end,
                Some(Ok(found)) => {
                    self.pending = Some(found.end);
                    found.start
                }
                Some(Err(error)) => {
                    let at = self.at;
                    self.at = self.size;
                    return Some(Err(core::Error::Invalid(format!(
                        "the pattern must split every text, its engine gives up behind byte {at} ({error})"
                    ))));
                }
            },
        };
        self.at = end;
        Some(Ok(end))
    }
}

pub fn pattern(text: &str) -> core::Result<core::Pattern> {
    if let Some(pattern) = core::Pattern::by_hand(text) {
        return Ok(pattern);
    }
    if text.len() > MAX_PATTERN_BYTES {
        return Err(core::Error::Invalid(format!(
            "a pattern must have at most {MAX_PATTERN_BYTES} bytes, got {}",
            text.len()
        )));
    }
    match fancy_regex::Regex::new(text) {
        Ok(regex) => Ok(core::Pattern::with_engine(text, Box::new(Fancy(regex)))),
        Err(error) => {
            let error = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            let start: String = text.chars().take(100).collect();
            Err(core::Error::Invalid(format!(
                "a pattern must be a regular expression, {start:?} is not ({error})"
            )))
        }
    }
}

/// The pieces that `pattern` cuts `text` into.
pub fn split(text: &str, pattern_text: &str) -> PyResult<Vec<String>> {
    let pattern = pattern(pattern_text).map_err(to_python)?;
    let (mut pieces, mut ends) = (pattern.pieces(text).map_err(to_python)?, Vec::new());
    let (mut out, mut at) = (Vec::new(), 0);
    loop {
        pieces.next_block(&mut ends).map_err(to_python)?;
        if ends.is_empty() {
            return Ok(out);
        }
        for &end in &ends {
            out.push(text[at..end as usize].to_owned());
            at = end as usize;
        }
    }
}
