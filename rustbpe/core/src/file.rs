//! The file of a tokenizer: lines of text, its own checksum last.
//!
//! ```text
//! rustbpe tokenizer 1
//! unicode 16.0.0
//! pattern <the split pattern>
//! specials 9
//! <|bos|>            ... one name a line
//! merges 65271
//! 32 116             ... left and right id, one merge a line
//! sha256 <of everything above>
//! ```
//!
//! There is one spelling per tokenizer, so the checksum is the fingerprint of vocabulary, pattern and special tokens.

use std::fmt::Write;

use crate::split::Pattern;
use crate::tokenizer::{MAX_SPECIALS, MAX_TOKENS};
use crate::{invalid, sha256, Result, Tokenizer, UNICODE};

/// Far above any real file (65,536 tokens take 0.7 MB).
pub const MAX_FILE_BYTES: usize = 1 << 26;
const MAGIC: &str = "rustbpe tokenizer ";
const VERSION: &str = "1";
const CHECKSUM_BYTES: usize = "sha256 ".len() + 64 + "\n".len();

impl Tokenizer {
    /// The sha256 of vocabulary, pattern and special tokens, in hexadecimal.
    pub fn fingerprint(&self) -> String {
        sha256::hex(self.body().as_bytes())
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut text = self.body();
        let checksum = sha256::hex(text.as_bytes());
        text.push_str(&format!("sha256 {checksum}\n"));
        text.into_bytes()
    }

    fn body(&self) -> String {
        let (specials, merges) = (&self.specials, &self.merges);
        let mut text = format!("{MAGIC}{VERSION}\nunicode {UNICODE}\npattern {}\n", self.pattern.as_str());
        text.push_str(&format!("specials {}\n", specials.len()));
        specials.iter().for_each(|name| text.extend([name, "\n"]));
        text.push_str(&format!("merges {}\n", merges.len()));
        for (left, right) in merges {
            let _ = writeln!(text, "{left} {right}"); // writing to a String cannot fail
        }
        text
    }

    /// Read what `to_bytes` wrote; anything else is refused with a sentence. `pattern` makes the file's pattern.
    pub fn from_bytes(data: &[u8], pattern: &dyn Fn(&str) -> Result<Pattern>) -> Result<Self> {
        if data.len() > MAX_FILE_BYTES {
            return invalid(format!(
                "a tokenizer file must have at most {MAX_FILE_BYTES} bytes, got {}",
                data.len()
            ));
        }
        if !data.starts_with(MAGIC.as_bytes()) {
            return invalid(format!(
                "a tokenizer file must start with {:?}, this one does not",
                MAGIC.trim_end()
            ));
        }
        let (body, checksum) = data.split_at(data.len().saturating_sub(CHECKSUM_BYTES));
        let text = std::str::from_utf8(body).unwrap_or_default();
        let mut lines = text.lines();
        let version = lines.next().and_then(|line| line.strip_prefix(MAGIC)).unwrap_or_default();
        if !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit()) && version != VERSION {
            return invalid(format!(
                "a tokenizer file must have format version {VERSION}, this one has {version}"
            ));
        }
        if checksum != format!("sha256 {}\n", sha256::hex(body)).as_bytes() {
            return invalid("a tokenizer file must match its checksum, this one is damaged or cut short");
        }
        expect(lines.next(), "unicode", UNICODE)?;
        let pattern = pattern(field(lines.next(), "pattern"))?;
        let n_specials = number(lines.next(), "specials", MAX_SPECIALS)?;
        let specials: Vec<String> = lines.by_ref().take(n_specials).map(str::to_owned).collect();
        let n_merges = number(lines.next(), "merges", MAX_TOKENS)?;
        let merges: Option<Vec<(u32, u32)>> = lines.by_ref().take(n_merges).map(pair).collect();
        let Some(merges) = merges else {
            return invalid("a merge must be two ids on one line, got another line");
        };
        let tokenizer = Self::new(merges, specials, pattern)?;
        if tokenizer.body().as_bytes() != body {
            return invalid("a tokenizer file must be exactly as it was written, this one has other lines");
        }
        Ok(tokenizer)
    }
}

fn field<'a>(line: Option<&'a str>, name: &str) -> &'a str {
    line.and_then(|line| line.strip_prefix(name)).and_then(|rest| rest.strip_prefix(' ')).unwrap_or_default()
}

fn expect(line: Option<&str>, name: &str, wanted: &str) -> Result<()> {
    match field(line, name) {
        value if value == wanted => Ok(()),
        value => invalid(format!(
            "the tokenizer's {name} must be {wanted}, the file has {value:?}: train it again"
        )),
    }
}

fn number(line: Option<&str>, name: &str, limit: usize) -> Result<usize> {
    let value = field(line, name);
    match value.parse() {
        Ok(number) if number <= limit => Ok(number),
        _ => invalid(format!("the number of {name} must be 0 to {limit}, the file has {value:?}")),
    }
}

fn pair(line: &str) -> Option<(u32, u32)> {
    let (left, right) = line.split_once(' ')?;
    Some((left.parse().ok()?, right.parse().ok()?))
}
