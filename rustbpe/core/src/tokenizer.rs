//! The vocabulary: bytes, merges and special tokens, checked once so that every method can rely on it.

use std::collections::HashSet;
use std::ops::Range;

use crate::bytemap::{pair_key, ByteMap, PairMap};
use crate::split::Pattern;
use crate::threads::{run_all, shares};
use crate::{invalid, Result};

/// Bounds that keep a damaged or hostile file from costing more than moments and megabytes.
pub const MAX_TOKENS: usize = 1 << 20;
pub const MAX_SPECIALS: usize = 1 << 10;
pub const MAX_VOCABULARY_BYTES: u64 = 1 << 24;

/// Where a merge is looked for and there is none.
pub(crate) const NONE: u32 = u32::MAX;

/// Ids 0..=255 are the bytes, then come the merges in the order learned, then the special tokens.
pub struct Tokenizer {
    pub(crate) merges: Vec<(u32, u32)>,
    pub(crate) specials: Vec<String>,
    pub(crate) pattern: Pattern,
    /// The bytes of every ordinary token; index == id.
    pub(crate) tokens: ByteMap,
    /// (left, right) -> merged id; the smaller id was learned earlier and goes first.
    pub(crate) pairs: PairMap,
    /// The same for two bytes, whose merges are half of all that are looked for: index left * 256 + right.
    pub(crate) byte_pairs: Vec<u32>,
}

impl Tokenizer {
    /// Build from merges and special tokens; refuses what training cannot have produced.
    pub fn new(merges: Vec<(u32, u32)>, specials: Vec<String>, pattern: Pattern) -> Result<Self> {
        check_specials(&specials)?;
        if pattern.as_str().contains(['\r', '\n']) {
            return invalid(format!("a pattern must be one line, got {:?}", pattern.as_str()));
        }
        let size = 256 + merges.len() + specials.len();
        if size > MAX_TOKENS {
            return invalid(format!("a vocabulary must have at most {MAX_TOKENS} tokens, got {size}"));
        }
        let mut tokens = ByteMap::default();
        for byte in 0..=255 {
            tokens.insert(&[byte], 0, 1)?;
        }
        let (mut pairs, mut byte_pairs) = (PairMap::default(), vec![NONE; 1 << 16]);
        let (mut token, mut bytes) = (Vec::new(), 256);
        for (&(left, right), new) in merges.iter().zip(256u32..) {
            if left.max(right) >= new {
                return invalid(format!(
                    "a merge must join earlier tokens, token {new} joins {left} and {right}"
                ));
            }
            token.clear();
            token.extend_from_slice(tokens.key(left as usize));
            token.extend_from_slice(tokens.key(right as usize));
            bytes += token.len() as u64;
            if bytes > MAX_VOCABULARY_BYTES {
                return invalid(format!(
                    "all tokens together must hold at most {MAX_VOCABULARY_BYTES} bytes, token {new} passes that"
                ));
            }
            if tokens.insert(&token, 0, token.len())? != new {
                return invalid(format!("every token must have its own bytes, token {new} repeats another"));
            }
            pairs.insert(pair_key(left, right), new);
            if left.max(right) < 256 {
                byte_pairs[(left << 8 | right) as usize] = new;
            }
        }
        let tokenizer = Self { merges, specials, pattern, tokens, pairs, byte_pairs };
        tokenizer.check_reachable()?;
        Ok(tokenizer)
    }

    /// Encoding looks a whole piece up before it merges; that is exact only if every token's own bytes merge to it.
    fn check_reachable(&self) -> Result<()> {
        let mut ids = Vec::new();
        for id in 256..self.tokens.len() {
            ids.clear();
            self.merge_bytes(self.tokens.key(id), &mut ids);
            if ids != [id as u32] {
                return invalid(format!("a token's bytes must encode to that token, those of {id} do not"));
            }
        }
        Ok(())
    }

    /// All ids, the special ones included.
    pub fn size(&self) -> usize {
        self.tokens.len() + self.specials.len()
    }

    /// The first special id: ordinary ids are below.
    pub fn first_special(&self) -> usize {
        self.tokens.len()
    }

    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    pub fn specials(&self) -> &[String] {
        &self.specials
    }

    pub fn merges(&self) -> &[(u32, u32)] {
        &self.merges
    }

    /// The bytes of one token, for a special one those of its name; nothing for an id that is none.
    #[inline]
    pub fn token(&self, id: usize) -> &[u8] {
        match id.checked_sub(self.tokens.len()) {
            None => self.tokens.key(id),
            Some(special) => self.specials.get(special).map_or(b"", |name| name.as_bytes()),
        }
    }

    /// The bytes of all `ids`.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ids.len() * 5);
        for id in ids.iter().map(|&id| id as usize) {
            match id < self.tokens.len() {
                true => self.tokens.append(id, &mut bytes),
                false => bytes.extend_from_slice(self.token(id)),
            }
        }
        bytes
    }

    /// The bytes of ids[offsets[i]..offsets[i + 1]] for every i, on up to `threads` threads.
    pub fn decode_batch(&self, ids: &[u32], offsets: &[usize], threads: usize) -> Result<Vec<Vec<u8>>> {
        let texts: Vec<&[u32]> = offsets.windows(2).map(|ends| &ids[ends[0]..ends[1]]).collect();
        let texts = &texts;
        let job = |range: Range<usize>| {
            move |_: &mut dyn FnMut() -> bool| {
                Ok(texts[range].iter().map(|ids| self.decode(ids)).collect::<Vec<_>>())
            }
        };
        let jobs = shares(texts, |ids| ids.len(), threads).into_iter().map(job).collect();
        Ok(run_all(jobs, &mut || true)?.into_iter().flatten().collect())
    }
}

fn check_specials(specials: &[String]) -> Result<()> {
    if specials.len() > MAX_SPECIALS {
        return invalid(format!("special tokens must be at most {MAX_SPECIALS}, got {}", specials.len()));
    }
    let mut seen = HashSet::new();
    for name in specials {
        if name.is_empty() || name.contains(['\r', '\n']) {
            return invalid(format!("a special token must be one line of text, got {name:?}"));
        }
        if !seen.insert(name) {
            return invalid(format!("special tokens must differ, {name:?} comes twice"));
        }
    }
    Ok(())
}
