//! Byte-pair encoding: exact training, encoding and decoding, standard library only.
//!
//! Text is cut into pieces (`split`), pieces are counted (`count`), the most frequent adjacent pair is merged until
//! the vocabulary is full (`train`); a `Tokenizer` then encodes and decodes and is saved as data (`file`).
//! Ids are 0..=255 for the bytes, then the merges in the order learned, then the special tokens.

#![forbid(unsafe_code)]

mod bytemap;
mod count;
mod encode;
mod export;
mod file;
mod sha256;
mod spill;
mod split;
mod threads;
mod tokenizer;
mod train;
mod unicode_tables;

pub use count::{Counter, Counts};
pub use encode::{first_of, Batch};
pub use file::MAX_FILE_BYTES;
pub use split::{Engine, Pattern, Pieces, GPT4_PATTERN, PATTERN};
pub use tokenizer::{Tokenizer, MAX_SPECIALS, MAX_TOKENS, MAX_VOCABULARY_BYTES};
pub use train::{train, Training};
pub use unicode_tables::UNICODE;

/// Why something did not happen.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    /// A sentence: the thing, the rule, the value.
    Invalid(String),
    /// The same, about a file.
    Io(String),
    /// The caller's progress callback asked to stop.
    Stopped,
}

pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::Invalid(message.into()))
}

/// Positions inside one text are u32: half the memory of the training arena.
pub fn check_length(text: &str) -> Result<()> {
    if text.len() >= u32::MAX as usize {
        return invalid(format!("a text must be shorter than {} bytes, got {}", u32::MAX, text.len()));
    }
    Ok(())
}
