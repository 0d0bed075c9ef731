//! Byte strings numbered in the order they first came, and the hash of pairs of ids.
//!
//! One blob and one open-addressing table: no allocation per string. Hashes are seeded per process, so crafted text
//! cannot make strings collide; no result depends on a hash.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use crate::{invalid, Result};

const EMPTY: u32 = u32::MAX;
const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15; // 2^64 / golden ratio, odd

/// Both halves of the 128-bit product: every input bit reaches the low bits, which index the table.
#[inline]
fn multiply(left: u64, right: u64) -> u64 {
    let product = u128::from(left) * u128::from(right);
    (product as u64) ^ ((product >> 64) as u64)
}

#[inline]
fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

/// Masks that keep the first n bytes of two words, for n up to INLINE.
const INLINE: usize = 15;
const MASKS: [(u64, u64); INLINE + 1] = {
    let mut masks = [(0, 0); INLINE + 1];
    let mut n = 1;
    while n <= INLINE {
        let low = if n < 8 { (1 << (8 * n)) - 1 } else { u64::MAX };
        let high = if n > 8 { (1 << (8 * (n - 8))) - 1 } else { 0 };
        masks[n] = (low, high);
        n += 1;
    }
    masks
};

/// A string as two words: up to INLINE bytes the string itself and, in the last byte, its length; longer ones their
/// hash, marked by LONG. Never (_, 0), unless empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    low: u64,
    high: u64,
}

/// In a key's last byte.
const LONG: u64 = 0xFF << 56;

#[derive(Clone, Copy)]
struct Slot {
    key: Key,
    index: u32,
}

const FREE: Slot = Slot { key: Key { low: 0, high: 0 }, index: EMPTY };

/// A set of byte strings; the index of a string is its rank of insertion.
pub struct ByteMap {
    blob: Vec<u8>,
    ends: Vec<u32>,
    slots: Vec<Slot>,
    seed: Key,
}

impl Default for ByteMap {
    fn default() -> Self {
        let state = RandomState::new();
        let seed = Key { low: state.hash_one(0u64), high: state.hash_one(1u64) };
        Self { blob: Vec::new(), ends: Vec::new(), slots: vec![FREE; 1024], seed }
    }
}

impl ByteMap {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of all strings together.
    pub fn size(&self) -> usize {
        self.blob.len()
    }

    /// The bytes of the string at `index`, which must be below `len()`.
    #[inline]
    pub fn key(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        &self.blob[start..self.ends[index] as usize]
    }

    /// Append the string at `index` to `out`: where possible 16 bytes at once and the rest taken off again, since a
    /// copy of known size is no call.
    #[inline]
    pub fn append(&self, index: usize, out: &mut Vec<u8>) {
        let string = self.key(index);
        let start = self.ends[index] as usize - string.len();
        match self.blob.get(start..start + 16) {
            Some(bytes) if string.len() <= 16 => {
                out.extend_from_slice(bytes);
                out.truncate(out.len() - 16 + string.len());
            }
            _ => out.extend_from_slice(string),
        }
    }

    /// Give the table back; only `len`, `size` and `key` may be called afterwards.
    pub fn freeze(&mut self) {
        self.slots = Vec::new();
    }

    /// The index of the string text[start..end].
    #[inline]
    pub fn get(&self, text: &[u8], start: usize, end: usize) -> Option<u32> {
        let key = self.words(text, start, end);
        let slot = self.slots[self.find(key, &text[start..end])];
        (slot.index != EMPTY).then_some(slot.index)
    }

    /// The index of text[start..end], which is added when it is new.
    #[inline]
    pub fn insert(&mut self, text: &[u8], start: usize, end: usize) -> Result<u32> {
        let key = self.words(text, start, end);
        let place = self.find(key, &text[start..end]);
        match self.slots[place].index {
            EMPTY => self.add(place, key, &text[start..end]),
            index => Ok(index),
        }
    }

    #[cold]
    fn add(&mut self, place: usize, key: Key, string: &[u8]) -> Result<u32> {
        if self.blob.len() + string.len() >= EMPTY as usize {
            return invalid(format!(
                "different pieces must hold fewer than {EMPTY} bytes, the text has more"
            ));
        }
        let index = self.ends.len() as u32;
        self.slots[place] = Slot { key, index };
        self.blob.extend_from_slice(string);
        self.ends.push(self.blob.len() as u32);
        if self.ends.len() * 2 > self.slots.len() {
            self.grow();
        }
        Ok(index)
    }

    /// Two loads and two masks where 16 bytes are there to read: no branch depends on the length.
    #[inline]
    fn words(&self, text: &[u8], start: usize, end: usize) -> Key {
        let length = end - start;
        if length > INLINE {
            return self.long(&text[start..end]);
        }
        let (low, high) = MASKS[length];
        let tag = (length as u64) << 56;
        match text.get(start..start + 16) {
            Some(bytes) => Key { low: word(&bytes[..8]) & low, high: word(&bytes[8..]) & high | tag },
            None => {
                let mut bytes = [0; 16];
                bytes[..length].copy_from_slice(&text[start..end]);
                Key { low: word(&bytes[..8]), high: word(&bytes[8..]) | tag }
            }
        }
    }

    fn long(&self, string: &[u8]) -> Key {
        let mut state = self.seed.low ^ string.len() as u64;
        let mut words = string.chunks_exact(8);
        for bytes in &mut words {
            state = multiply(state ^ word(bytes), MULTIPLIER);
        }
        let rest = words.remainder().iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        let low = multiply(state ^ rest, MULTIPLIER);
        Key { low, high: multiply(low, self.seed.high) | LONG }
    }

    #[inline]
    fn home(&self, key: Key) -> usize {
        multiply(key.low ^ self.seed.low, key.high ^ self.seed.high) as usize & (self.slots.len() - 1)
    }

    /// The slot that holds the string, or the empty one where it belongs. At most half of the slots are taken.
    #[inline]
    fn find(&self, key: Key, string: &[u8]) -> usize {
        let mut place = self.home(key);
        loop {
            let slot = &self.slots[place];
            if slot.key == key && (key.high < LONG || self.key(slot.index as usize) == string)
                || slot.index == EMPTY
            {
                return place;
            }
            place = (place + 1) & (self.slots.len() - 1);
        }
    }

    /// Twice the slots. Strings go in by index: those that came early are mostly the frequent ones, and get the slots
    /// they are looked for first.
    fn grow(&mut self) {
        let size = self.slots.len() * 2;
        self.slots = vec![FREE; size];
        let mut start = 0;
        for index in 0..self.ends.len() {
            let end = self.ends[index] as usize;
            let key = self.words(&self.blob, start, end);
            let mut place = self.home(key);
            while self.slots[place].index != EMPTY {
                place = (place + 1) & (size - 1);
            }
            self.slots[place] = Slot { key, index: index as u32 };
            start = end;
        }
    }

    /// Bytes allocated, at the worst moment, once a string of `length` bytes more is in.
    pub fn footprint(&self, length: usize) -> usize {
        let slots = self.slots.len() * if self.ends.len() * 2 + 2 > self.slots.len() { 2 } else { 1 };
        grown(&self.blob, length) + grown(&self.ends, 1) + slots * size_of::<Slot>()
    }
}

/// Bytes a vector takes when `more` elements are pushed: the old and, where it must move, the new allocation.
pub fn grown<T>(vector: &Vec<T>, more: usize) -> usize {
    let (capacity, needed) = (vector.capacity(), vector.len() + more);
    let new = if needed > capacity { needed.max(capacity * 2) } else { 0 };
    (capacity + new) * size_of::<T>()
}

/// Two ids -> u32.
pub type PairMap = HashMap<u64, u32, PairHash>;

#[inline]
pub fn pair_key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

#[derive(Clone)]
pub struct PairHash(u64);

impl Default for PairHash {
    fn default() -> Self {
        Self(RandomState::new().hash_one(0u64))
    }
}

impl BuildHasher for PairHash {
    type Hasher = PairHasher;

    #[inline]
    fn build_hasher(&self) -> PairHasher {
        PairHasher(self.0)
    }
}

pub struct PairHasher(u64);

impl Hasher for PairHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(u64::from(byte)));
    }

    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = multiply(self.0 ^ value, MULTIPLIER);
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_told_apart_whatever_stands_around_them() {
        // lengths 0 to 39 pass both the 15 bytes of a key and the 16 that are read at once; NULs must count
        let strings: Vec<Vec<u8>> = (1..40).flat_map(|length| [vec![0; length], vec![7; length]]).collect();
        let mut map = ByteMap::default();
        for (index, string) in strings.iter().enumerate() {
            assert_eq!(map.insert(string, 0, string.len()), Ok(index as u32));
        }
        for (index, string) in strings.iter().enumerate() {
            for around in [vec![], vec![9; 20]] {
                let text = [&around[..], string, &around].concat();
                let (start, end) = (around.len(), around.len() + string.len());
                assert_eq!(map.get(&text, start, end), Some(index as u32));
                assert_eq!(map.insert(&text, start, end), Ok(index as u32));
            }
            assert_eq!(map.key(index), string);
        }
        assert_eq!((map.get(b"", 0, 0), map.get(b"other", 0, 5)), (None, None));
    }

    #[test]
    fn growing_keeps_every_string_at_its_index_and_maps_have_their_own_seeds() {
        let (mut map, mut other) = (ByteMap::default(), ByteMap::default());
        for number in 0..5000u32 {
            let string = format!("{number} and a tail of {number}");
            let string = &string.as_bytes()[..if number % 2 == 0 { string.len() } else { 8 }];
            assert_eq!(map.insert(string, 0, string.len()), Ok(number));
            assert_eq!(other.insert(string, 0, string.len()), Ok(number));
        }
        assert_eq!((map.len(), map.get(b"4998 and a tail of 4998", 0, 23)), (5000, Some(4998)));
        assert_ne!(map.seed, other.seed);
    }
}
