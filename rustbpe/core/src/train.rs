//! Exact byte-pair training: merge the most frequent adjacent pair, again and again.
//!
//! All distinct pieces lie in one array with a cell per byte. A token of n bytes owns n cells; its id stands in its
//! first and in its last cell, so both neighbours are found without links: the right one n cells on, the left one
//! through the cell before. Each pair has a list of the positions where it arose. A merge visits only those, checks
//! which still hold, and so costs as much as it changes, however long a piece is.

use std::collections::BinaryHeap;
use std::time::Instant;

use crate::bytemap::{pair_key, PairMap};
use crate::tokenizer::MAX_VOCABULARY_BYTES;
use crate::{invalid, Counts, Error, Result};

/// In a first cell that belongs to no token any more.
const DEAD: u32 = u32::MAX;
/// Positions between two looks at the progress callback inside one merge: some milliseconds.
const POSITIONS_PER_TICK: usize = 1 << 16;

#[derive(Clone, Copy)]
struct Cell {
    id: u32,
    piece: u32,
}

#[derive(Default)]
struct Pair {
    count: u64,
    positions: Vec<u32>,
}

struct Trainer {
    cells: Vec<Cell>,
    counts: Vec<u64>,
    lengths: Vec<u32>,
    pairs: Vec<Pair>,
    slots: PairMap,
    /// Pairs that arose since the last `enqueue`.
    fresh: Vec<(u64, u32)>,
    /// (count, !pair, slot): the greatest has the highest count, ties the smallest left, then right id. A pair gains
    /// only in the step that makes its newer half, so an entry is never too low; it is corrected when popped.
    queue: BinaryHeap<(u64, u64, u32)>,
}

/// What was learned, and how long it took.
pub struct Training {
    pub merges: Vec<(u32, u32)>,
    /// Seconds to lay out the pieces and count their pairs.
    pub init: f64,
    /// Seconds to merge.
    pub merge: f64,
}

/// Learn up to `n_merges` merges: fewer when no pair is left. `tick(merges done)` returns false to stop.
///
/// Ties: count descending, then left id ascending, then right id ascending.
pub fn train(counts: Counts, n_merges: usize, tick: &mut dyn FnMut(usize) -> bool) -> Result<Training> {
    let start = Instant::now();
    let mut trainer = Trainer::new(counts)?;
    let init = start.elapsed().as_secs_f64();
    let mut merges = Vec::new();
    let mut bytes = 256u64;
    while merges.len() < n_merges {
        let Some((left, right, slot)) = trainer.pop() else { break };
        let length = u64::from(trainer.lengths[left as usize]) + u64::from(trainer.lengths[right as usize]);
        bytes += length;
        if bytes > MAX_VOCABULARY_BYTES {
            return invalid(format!(
                "all tokens together must hold at most {MAX_VOCABULARY_BYTES} bytes, merge {} passes that",
                merges.len() + 1
            ));
        }
        trainer.lengths.push(length as u32);
        trainer.merge(left, right, slot, &mut || tick(merges.len()))?;
        merges.push((left, right));
    }
    Ok(Training { merges, init, merge: start.elapsed().as_secs_f64() - init })
}

impl Trainer {
    fn new(found: Counts) -> Result<Self> {
        let size = found.bytes();
        if size >= u32::MAX as usize {
            return invalid(format!("different pieces must hold fewer than {} bytes, got {size}", u32::MAX));
        }
        let mut cells = Vec::with_capacity(size);
        let mut counts = Vec::with_capacity(found.len());
        found.for_each(&mut |piece, count| {
            let index = counts.len() as u32;
            cells.extend(piece.iter().map(|&byte| Cell { id: u32::from(byte), piece: index }));
            counts.push(count);
        })?;
        let mut trainer = Self {
            cells,
            counts,
            lengths: vec![1; 256],
            pairs: Vec::new(),
            slots: PairMap::default(),
            fresh: Vec::new(),
            queue: BinaryHeap::new(),
        };
        for at in 1..trainer.cells.len() {
            let (left, right) = (trainer.cells[at - 1], trainer.cells[at]);
            if left.piece == right.piece {
                trainer.gain(left.id, right.id, at - 1, trainer.counts[left.piece as usize]);
            }
        }
        trainer.enqueue();
        Ok(trainer)
    }

    /// The pair to merge next.
    fn pop(&mut self) -> Option<(u32, u32, u32)> {
        loop {
            let (count, key, slot) = self.queue.pop()?;
            let live = self.pairs[slot as usize].count;
            if live == count && count > 0 {
                return Some(((!key >> 32) as u32, !key as u32, slot));
            }
            if live > 0 {
                self.queue.push((live, key, slot));
            }
        }
    }

    /// Replace the pair by the newest token wherever it stands. Positions ascend within a piece, so "aaa" becomes
    /// (aa)a.
    fn merge(&mut self, left: u32, right: u32, slot: u32, tick: &mut dyn FnMut() -> bool) -> Result<()> {
        let new = self.lengths.len() as u32 - 1;
        let (width, length) = (self.lengths[left as usize] as usize, self.lengths[new as usize] as usize);
        let positions = std::mem::take(&mut self.pairs[slot as usize].positions);
        for (index, &at) in positions.iter().enumerate() {
            if index % POSITIONS_PER_TICK == 0 && !tick() {
                return Err(Error::Stopped);
            }
            let at = at as usize;
            let (middle, end) = (at + width, at + length);
            let piece = self.cells[at].piece;
            if self.cells[at].id != left || self.id_in(piece, middle) != Some(right) {
                continue;
            }
            let count = self.counts[piece as usize];
            if let Some(before) = at.checked_sub(1).and_then(|last| self.id_in(piece, last)) {
                self.lose(before, left, count);
                self.gain(before, new, at - self.lengths[before as usize] as usize, count);
            }
            if let Some(behind) = self.id_in(piece, end) {
                self.lose(right, behind, count);
                self.gain(new, behind, at, count);
            }
            self.cells[middle].id = DEAD;
            self.cells[at].id = new;
            self.cells[end - 1].id = new;
        }
        self.pairs[slot as usize].count = 0;
        self.enqueue();
        Ok(())
    }

    /// The id in the cell at `at` if that cell exists and is part of `piece`.
    #[inline]
    fn id_in(&self, piece: u32, at: usize) -> Option<u32> {
        self.cells.get(at).filter(|cell| cell.piece == piece).map(|cell| cell.id)
    }

    #[inline]
    fn gain(&mut self, left: u32, right: u32, at: usize, count: u64) {
        let key = pair_key(left, right);
        let slot = *self.slots.entry(key).or_insert(self.pairs.len() as u32) as usize;
        if slot == self.pairs.len() {
            self.pairs.push(Pair::default());
            self.fresh.push((key, slot as u32));
        }
        self.pairs[slot].count += count;
        self.pairs[slot].positions.push(at as u32);
    }

    #[inline]
    fn lose(&mut self, left: u32, right: u32, count: u64) {
        if let Some(&slot) = self.slots.get(&pair_key(left, right)) {
            self.pairs[slot as usize].count -= count;
        }
    }

    fn enqueue(&mut self) {
        for (key, slot) in self.fresh.drain(..) {
            self.queue.push((self.pairs[slot as usize].count, !key, slot));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Counter, Pattern, PATTERN};

    fn counts(text: &str) -> Counts {
        let pattern = Pattern::by_hand(PATTERN).unwrap();
        let mut counter = Counter::new(&pattern, 1, usize::MAX, Path::new(""));
        counter.add(&[text], &mut || true).unwrap();
        counter.finish(&mut || true).unwrap()
    }

    fn learn(text: &str, n_merges: usize) -> Vec<(u32, u32)> {
        train(counts(text), n_merges, &mut |_| true).unwrap().merges
    }

    #[test]
    fn the_textbook_example() {
        let (a, b, d) = (97, 98, 100);
        assert_eq!(learn("aaabdaaabac", 3), [(a, a), (a, b), (256, 257)]);
        assert_eq!(learn("abab d", 9), [(a, b), (32, d), (256, 256)]);
    }

    #[test]
    fn runs_overlap_when_counted_and_not_when_merged() {
        assert_eq!(learn("aaaaa", 9), [(97, 97), (256, 97), (256, 257)]);
        assert_eq!(learn("aaaaaaa", 2), [(97, 97), (256, 256)]);
    }

    #[test]
    fn stops_when_asked() {
        let stopped = train(counts("some words to merge"), 9, &mut |done| done < 2);
        assert_eq!(stopped.err(), Some(Error::Stopped));
    }
}
