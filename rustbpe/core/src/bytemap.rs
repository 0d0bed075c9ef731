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
fn mix(value: u64) -> u64 {
    let product = u128::from(value) * u128::from(MULTIPLIER);
    (product as u64) ^ ((product >> 64) as u64)
}

#[inline]
fn hash(bytes: &[u8], seed: u64) -> u64 {
    let mut state = seed ^ bytes.len() as u64;
    let mut words = bytes.chunks_exact(8);
    for word in &mut words {
        state = mix(state ^ u64::from_le_bytes(word.try_into().unwrap_or_default()));
    }
    let rest = words.remainder().iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    mix(state ^ rest)
}

#[derive(Clone, Copy)]
struct Slot {
    tag: u32,
    index: u32,
}

/// A set of byte strings; the index of a string is its rank of insertion.
pub struct ByteMap {
    blob: Vec<u8>,
    ends: Vec<usize>,
    slots: Vec<Slot>,
    seed: u64,
}

impl Default for ByteMap {
    fn default() -> Self {
        let seed = RandomState::new().hash_one(0u64);
        Self { blob: Vec::new(), ends: Vec::new(), slots: vec![Slot { tag: 0, index: EMPTY }; 1024], seed }
    }
}

impl ByteMap {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of the string at `index`, which must be below `len()`.
    #[inline]
    pub fn key(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.blob[start..self.ends[index]]
    }

    #[inline]
    pub fn get(&self, key: &[u8]) -> Option<u32> {
        let slot = self.slots[self.find(key, hash(key, self.seed))];
        (slot.index != EMPTY).then_some(slot.index)
    }

    /// The index of `key`, which is added when it is new.
    #[inline]
    pub fn insert(&mut self, key: &[u8]) -> Result<u32> {
        let hashed = hash(key, self.seed);
        let place = self.find(key, hashed);
        let slot = self.slots[place];
        if slot.index != EMPTY {
            return Ok(slot.index);
        }
        if self.ends.len() >= EMPTY as usize {
            return invalid(format!("different pieces must be fewer than {EMPTY}, the text has more"));
        }
        let index = self.ends.len() as u32;
        self.slots[place] = Slot { tag: (hashed >> 32) as u32, index };
        self.blob.extend_from_slice(key);
        self.ends.push(self.blob.len());
        if self.ends.len() * 2 > self.slots.len() {
            self.grow();
        }
        Ok(index)
    }

    /// The slot that holds `key`, or the empty one where it belongs. At most half of the slots are taken.
    #[inline]
    fn find(&self, key: &[u8], hashed: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut place = hashed as usize & mask;
        loop {
            let slot = self.slots[place];
            if slot.index == EMPTY
                || slot.tag == (hashed >> 32) as u32 && self.key(slot.index as usize) == key
            {
                return place;
            }
            place = (place + 1) & mask;
        }
    }

    fn grow(&mut self) {
        let mut slots = vec![Slot { tag: 0, index: EMPTY }; self.slots.len() * 2];
        let mask = slots.len() - 1;
        for index in 0..self.ends.len() {
            let hashed = hash(self.key(index), self.seed);
            let mut place = hashed as usize & mask;
            while slots[place].index != EMPTY {
                place = (place + 1) & mask;
            }
            slots[place] = Slot { tag: (hashed >> 32) as u32, index: index as u32 };
        }
        self.slots = slots;
    }
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
        self.0 = hash(bytes, self.0);
    }

    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0 ^ value);
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}
