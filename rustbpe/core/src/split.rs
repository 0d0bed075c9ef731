//! Text -> pieces, as the regular expression `PATTERN` cuts it, in one pass and linear time.
//!
//! Written by hand because a regular-expression engine takes four fifths of the training time and can fail on long
//! runs. Every byte of the text is in exactly one piece.

use std::sync::OnceLock;

use crate::unicode_tables::{LETTERS, NUMBERS, SPACES};

/// cl100k's pattern with digits in ones and twos instead of up to threes.
pub const PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);

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
        classes['\r' as usize] = Newline;
        classes['\n' as usize] = Newline;
        classes
    })
}

/// Iterator over the pieces of a text, as byte slices that are valid UTF-8.
pub struct Pieces<'a> {
    text: &'a str,
    at: usize,
    classes: &'static [Class],
}

pub fn pieces(text: &str) -> Pieces<'_> {
    Pieces { text, at: 0, classes: classes() }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        let start = self.at;
        let (class, width) = self.class_at(start);
        let after = start + width;
        self.at = match class {
            End => return None,
            Letter => self.run(Letter, after),
            Number => match self.class_at(after) {
                (Number, width) => after + width,
                _ => after,
            },
            Other => self.other(start, after),
            Space => self.space(start, after),
            Newline => self.whitespace(start),
        };
        Some(&self.text.as_bytes()[start..self.at])
    }
}

impl Pieces<'_> {
    /// The class and the width in bytes of the character at `at`.
    #[inline]
    fn class_at(&self, at: usize) -> (Class, usize) {
        match self.text.as_bytes().get(at) {
            None => (End, 0),
            Some(&byte) if byte < 0x80 => (self.classes[byte as usize], 1),
            Some(_) => match self.text[at..].chars().next() {
                None => (End, 0),
                Some(char) => (self.classes[char as usize], char.len_utf8()),
            },
        }
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

    /// From a character of no other class: a contraction, one mark before a word, or a run of marks.
    #[inline]
    fn other(&self, start: usize, after: usize) -> usize {
        if let Some(end) = self.contraction(start) {
            return end;
        }
        match self.class_at(after) {
            (Letter, width) => self.run(Letter, after + width),
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
            (Letter, width) => self.run(Letter, after + width),
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
        pieces(text).map(|piece| std::str::from_utf8(piece).unwrap()).collect()
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
