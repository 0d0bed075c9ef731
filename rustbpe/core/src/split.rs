//! Text -> pieces, as a regular expression cuts it. nanochat's pattern and its relatives are cut by hand, in one pass
//! and linear time: an engine takes four fifths of the training time and gives up on long runs. Any other pattern goes
//! to an `Engine` of the caller. Every byte of the text is in exactly one piece.

use std::sync::OnceLock;

use crate::unicode_tables::{LETTERS, NUMBERS, SPACES};
use crate::{check_length, Result};

/// cl100k's pattern but for the number of digits in a piece.
macro_rules! pattern {
    ($digits:literal) => {
        concat!(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{",
            $digits,
            r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        )
    };
}

/// nanochat's pattern: digits in ones and twos.
pub const PATTERN: &str = pattern!("1,2");
/// Digits in up to threes, as rustbpe 0.1.0 has it by default.
pub const GPT4_PATTERN: &str = pattern!("1,3");
/// The patterns cut by hand; index + 1 digits make a piece.
const BY_HAND: [&str; 3] = [pattern!("1"), PATTERN, GPT4_PATTERN];

/// Pieces handed over at a time: their ends stay in the first-level cache.
const BLOCK: usize = 1024;

/// Cuts text by a pattern that is not cut by hand.
pub trait Engine: Send + Sync {
    /// One of its own for another thread.
    fn copy(&self) -> Box<dyn Engine>;
    /// The ends of the pieces: ascending, the last one `text.len()`; after an error nothing more.
    fn ends<'a>(&'a self, text: &'a str) -> Box<dyn Iterator<Item = Result<usize>> + 'a>;
}

/// A pattern and what cuts by it.
pub struct Pattern {
    text: String,
    engine: Option<Box<dyn Engine>>,
    digits: usize,
}

impl Pattern {
    /// One of the patterns cut by hand; None for any other.
    pub fn by_hand(text: &str) -> Option<Self> {
        let index = BY_HAND.iter().position(|&known| known == text)?;
        Some(Self { text: text.into(), engine: None, digits: index + 1 })
    }

    pub fn with_engine(text: &str, engine: Box<dyn Engine>) -> Self {
        Self { text: text.into(), engine: Some(engine), digits: 0 }
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The pieces of `text`, block by block.
    pub fn pieces<'a>(&'a self, text: &'a str) -> Result<Pieces<'a>> {
        check_length(text)?;
        Ok(match &self.engine {
            None => Pieces::ByHand(Hand { text, at: 0, digits: self.digits, classes: classes() }),
            Some(engine) => Pieces::Engine(engine.ends(text)),
        })
    }

    /// The first place at or behind `near` where `text` falls into two parts that are cut alone as they are together:
    /// between a newline and a character that is no whitespace, when cut by hand. `text.len()` if there is none.
    pub fn seam(&self, text: &str, near: usize) -> usize {
        let bytes = text.as_bytes();
        let seam = |at: &usize| bytes[at - 1] == b'\n' && bytes[*at].is_ascii_graphic();
        match self.engine {
            None => (near.max(1)..bytes.len()).find(seam).unwrap_or(bytes.len()),
            Some(_) => bytes.len(),
        }
    }
}

impl Clone for Pattern {
    fn clone(&self) -> Self {
        let engine = self.engine.as_ref().map(|engine| engine.copy());
        Self { text: self.text.clone(), engine, digits: self.digits }
    }
}

/// What is left of a text to cut.
pub enum Pieces<'a> {
    ByHand(Hand<'a>),
    Engine(Box<dyn Iterator<Item = Result<usize>> + 'a>),
}

impl Pieces<'_> {
    /// Put the ends of the next pieces into `ends`, none when the text is over.
    pub fn next_block(&mut self, ends: &mut Vec<u32>) -> Result<()> {
        ends.clear();
        match self {
            Pieces::ByHand(hand) => ends.extend(hand.take(BLOCK)),
            Pieces::Engine(engine) => {
                for end in engine.take(BLOCK) {
                    ends.push(end? as u32);
                }
            }
        }
        Ok(())
    }
}

/// Classes of characters; `End` stands behind the last one.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Class {
    Other,
    Letter,
    Number,
    Space,
    Newline,
    End,
}
use Class::{End, Letter, Newline, Number, Other, Space};

/// The class of every byte; None for those of characters of several.
const BYTES: [Option<Class>; 256] = {
    let mut classes = [None; 256];
    let mut byte = 0;
    while byte < 128 {
        classes[byte] = Some(match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Letter,
            b'0'..=b'9' => Number,
            b'\r' | b'\n' => Newline,
            b' ' | b'\t' | 0x0B | 0x0C => Space,
            _ => Other,
        });
        byte += 1;
    }
    classes
};

/// The class of every code point, one byte each, filled on first use.
fn classes() -> &'static [Class] {
    static CLASSES: OnceLock<Vec<Class>> = OnceLock::new();
    CLASSES.get_or_init(|| {
        let mut classes = vec![Other; 0x11_0000];
        for (ranges, class) in [(LETTERS, Letter), (NUMBERS, Number), (SPACES, Space)] {
            for &(first, last) in ranges {
                classes[first as usize..=last as usize].fill(class);
            }
        }
        classes
    })
}

/// Iterator over the ends of the pieces of a text.
pub struct Hand<'a> {
    text: &'a str,
    at: usize,
    digits: usize,
    classes: &'static [Class],
}

impl Iterator for Hand<'_> {
    type Item = u32;

    #[inline]
    fn next(&mut self) -> Option<u32> {
        let start = self.at;
        let (class, width) = self.class_at(start);
        let after = start + width;
        self.at = match class {
            End => return None,
            Letter => self.letters(after),
            Number => self.number(after),
            Other => self.other(start, after),
            Space => self.space(start, after),
            Newline => self.whitespace(start),
        };
        Some(self.at as u32)
    }
}

impl Hand<'_> {
    /// The class and the width in bytes of the character at `at`.
    #[inline(always)]
    fn class_at(&self, at: usize) -> (Class, usize) {
        match self.text.as_bytes().get(at).map(|&byte| BYTES[byte as usize]) {
            None => (End, 0),
            Some(None) => self.wide(at),
            Some(Some(class)) => (class, 1),
        }
    }

    #[inline(never)]
    fn wide(&self, at: usize) -> (Class, usize) {
        match self.text[at..].chars().next() {
            None => (End, 0),
            Some(char) => (self.classes[char as usize], char.len_utf8()),
        }
    }

    /// The end of the run of letters that starts at `at`. Eight bytes at once: most words end within, and no branch
    /// has to guess where.
    #[inline(always)]
    fn letters(&self, mut at: usize) -> usize {
        const ONES: u64 = 0x0101_0101_0101_0101;
        const HIGH: u64 = 0x80 * ONES;
        while let Some(bytes) = self.text.as_bytes().get(at..at + 8) {
            let word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
            let lower = (word | (0x20 * ONES)) & !HIGH;
            let from_a = lower + (0x80 - b'a' as u64) * ONES;
            let past_z = lower + (0x7F - b'z' as u64) * ONES;
            let others = !(from_a & !past_z & !word) & HIGH;
            at += others.trailing_zeros() as usize / 8;
            if others != 0 {
                match BYTES[self.text.as_bytes()[at] as usize] {
                    None => break,
                    Some(_) => return at,
                }
            }
        }
        self.run(Letter, at)
    }

    /// The end of the run of `wanted` characters that starts at `at`.
    #[inline]
    fn run(&self, wanted: Class, mut at: usize) -> usize {
        loop {
            match self.class_at(at) {
                (class, width) if class == wanted => at += width,
                _ => return at,
            }
        }
    }

    /// At most `digits` of them, one is behind already.
    #[inline]
    fn number(&self, mut at: usize) -> usize {
        for _ in 1..self.digits {
            match self.class_at(at) {
                (Number, width) => at += width,
                _ => break,
            }
        }
        at
    }

    /// From a character of no other class: a contraction, one mark before a word, or a run of marks.
    #[inline]
    fn other(&self, start: usize, after: usize) -> usize {
        if let Some(end) = self.contraction(start) {
            return end;
        }
        match self.class_at(after) {
            (Letter, width) => self.letters(after + width),
            _ => self.marks(after),
        }
    }

    /// Marks take the newlines behind them along.
    #[inline]
    fn marks(&self, at: usize) -> usize {
        self.run(Newline, self.run(Other, at))
    }

    /// `'s 'd 'm 't 'll 've 're` in either case; U+017F, the long s, folds to s.
    #[inline]
    fn contraction(&self, start: usize) -> Option<usize> {
        let rest = self.text.as_bytes()[start..].strip_prefix(b"'")?;
        let lower = |at: usize| rest.get(at).map_or(0, u8::to_ascii_lowercase);
        match (lower(0), lower(1)) {
            (b's' | b'd' | b'm' | b't', _) => Some(start + 2),
            (b'l', b'l') | (b'v', b'e') | (b'r', b'e') | (0xC5, 0xBF) => Some(start + 3),
            _ => None,
        }
    }

    /// From whitespace that is no newline: it may lead a word, U+0020 also marks.
    #[inline]
    fn space(&self, start: usize, after: usize) -> usize {
        match self.class_at(after) {
            (Letter, width) => self.letters(after + width),
            (Other, width) if self.text.as_bytes()[start] == b' ' => self.marks(after + width),
            _ => self.whitespace(start),
        }
    }

    /// A run of whitespace: up to its last newline; without one all of it, but the last character is left to what
    /// follows. Linear: what is left behind a newline holds none, so nothing is scanned more than three times.
    fn whitespace(&self, start: usize) -> usize {
        let (mut end, mut last, mut newline) = (start, start, None);
        loop {
            match self.class_at(end) {
                (Space, width) => (last, end) = (end, end + width),
                (Newline, width) => {
                    (last, end) = (end, end + width);
                    newline = Some(end);
                }
                (End, _) => return newline.unwrap_or(end),
                _ => return newline.unwrap_or(if last > start { last } else { end }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<&str> {
        let pattern = Pattern::by_hand(PATTERN).unwrap();
        let (mut pieces, mut ends, mut at, mut out) =
            (pattern.pieces(text).unwrap(), Vec::new(), 0, Vec::new());
        while pieces.next_block(&mut ends).is_ok() && !ends.is_empty() {
            for &end in &ends {
                out.push(&text[at..end as usize]);
                at = end as usize;
            }
        }
        out
    }

    #[test]
    fn words_take_one_leading_mark_and_digits_come_in_twos() {
        assert_eq!(cut("Hello, world 2025!"), ["Hello", ",", " world", " ", "20", "25", "!"]);
        assert_eq!(cut("(foo)\r\n\nbar"), ["(foo", ")\r\n\n", "bar"]);
        assert_eq!(cut("x\u{300}y"), ["x", "\u{300}y"]);
    }

    #[test]
    fn contractions_fold_case() {
        assert_eq!(cut("it's I'LL 'sure '\u{17F}"), ["it", "'s", " I", "'LL", " '", "sure", " '", "\u{17F}"]);
        assert_eq!(cut("a'\u{17F}b"), ["a", "'\u{17F}", "b"]);
    }

    #[test]
    fn whitespace_ends_at_its_last_newline_or_leaves_one() {
        assert_eq!(cut("a  \n \n  b"), ["a", "  \n \n", " ", " b"]);
        assert_eq!(cut("a   1  "), ["a", "  ", " ", "1", "  "]);
        assert_eq!(cut("\u{85}\u{A0}x\u{1C}"), ["\u{85}", "\u{A0}x", "\u{1C}"]);
    }
}
