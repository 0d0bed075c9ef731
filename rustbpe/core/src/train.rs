//! Exact byte-pair training: merge the most frequent adjacent pair, again and again.
//!
//! All different pieces lie in one array with a cell per byte. A token of n bytes owns n cells; its id stands in its
//! first and in its last cell, so both neighbours are found without links: the right one n cells on, the left one
//! through the cell before. The first cell also knows the pair that the token makes with its left neighbour, so counts
//! are kept without looking pairs up. All positions of a pair arise in the step that makes its newer half and are laid
//! down together; a merge visits only those, checks which still hold, and costs as much as it changes.

use std::collections::BinaryHeap;
use std::time::Instant;

use crate::tokenizer::MAX_VOCABULARY_BYTES;
use crate::{invalid, Counts, Error, Result};

/// The pair of a cell that is no token's first, or of a piece's first token.
const NONE: u32 = u32::MAX;
/// Positions between two looks at the progress callback inside one merge: some milliseconds.
const POSITIONS_PER_TICK: u32 = 1 << 16;

#[derive(Clone, Copy)]
struct Cell {
    id: u32,
    pair: u32,
    piece: u32,
}

/// Where a pair stands, or stood: the first cells of its right tokens, positions[start..start + length].
#[derive(Clone, Copy, Default)]
struct Pair {
    count: u64,
    start: u32,
    length: u32,
}

#[derive(Default)]
struct Trainer {
    cells: Vec<Cell>,
    counts: Vec<u64>,
    lengths: Vec<u32>,
    pairs: Vec<Pair>,
    positions: Vec<u32>,
    /// Of this step: the pair at each place, where a place is 2 id for a left neighbour of the new token, 2 id + 1 for
    /// a right one; at first, before any merge, 256 left + right.
    places: Vec<u32>,
    /// Of this step: (place, left, right) of each new pair, and (pair, position) wherever one arose.
    fresh: Vec<(usize, u32, u32)>,
    arisen: Vec<(u32, u32)>,
    /// (count, !ids, pair): the greatest has the highest count, ties the smallest left, then right id. A pair gains
    /// only in the step that makes its newer half, so an entry is never too low; it is corrected when popped.
    queue: BinaryHeap<(u64, u64, u32)>,
    /// Pairs with a count below `least` wait here: most never come to the top, and the queue stays in the cache.
    later: Vec<(u64, u64, u32)>,
    least: u64,
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
        let Some((left, right, pair)) = trainer.pop() else { break };
        let length = u64::from(trainer.lengths[left as usize]) + u64::from(trainer.lengths[right as usize]);
        bytes += length;
        if bytes > MAX_VOCABULARY_BYTES {
            return invalid(format!(
                "all tokens together must hold at most {MAX_VOCABULARY_BYTES} bytes, merge {} passes that",
                merges.len() + 1
            ));
        }
        trainer.lengths.push(length as u32);
        trainer.merge(left, right, pair, &mut || tick(merges.len()))?;
        merges.push((left, right));
    }
    Ok(Training { merges, init, merge: start.elapsed().as_secs_f64() - init })
}

impl Trainer {
    fn new(found: Counts) -> Result<Self> {
        let size = found.bytes();
        if size >= NONE as usize {
            return invalid(format!("different pieces must hold fewer than {NONE} bytes, got {size}"));
        }
        let mut trainer =
            Self { lengths: vec![1; 256], places: vec![NONE; 1 << 16], least: u64::MAX, ..Self::default() };
        trainer.cells.reserve_exact(size);
        trainer.counts.reserve_exact(found.len());
        trainer.arisen.reserve_exact(size - found.len());
        found.for_each(&mut |piece, count| {
            let (index, first) = (trainer.counts.len() as u32, trainer.cells.len());
            let cells = piece.iter().map(|&byte| Cell { id: u32::from(byte), pair: NONE, piece: index });
            trainer.cells.extend(cells);
            for at in 1..piece.len() {
                let place = usize::from(piece[at - 1]) << 8 | usize::from(piece[at]);
                trainer.gain(place, u32::from(piece[at - 1]), u32::from(piece[at]), first + at, count);
            }
            trainer.counts.push(count);
        })?;
        trainer.settle()?;
        trainer.arisen = Vec::new();
        Ok(trainer)
    }

    /// The pair to merge next.
    fn pop(&mut self) -> Option<(u32, u32, u32)> {
        loop {
            let Some((count, key, pair)) = self.queue.pop() else {
                self.refill()?;
                continue;
            };
            let live = self.pairs[pair as usize].count;
            if live == count {
                return Some(((!key >> 32) as u32, !key as u32, pair));
            }
            self.push((live, key, pair));
        }
    }

    fn push(&mut self, entry: (u64, u64, u32)) {
        match entry.0 {
            0 => {}
            count if count < self.least => self.later.push(entry),
            _ => self.queue.push(entry),
        }
    }

    /// Queue the pairs within a factor of eight of the most frequent one that waits; None if none does.
    fn refill(&mut self) -> Option<()> {
        let mut waiting = std::mem::take(&mut self.later);
        waiting.iter_mut().for_each(|entry| entry.0 = self.pairs[entry.2 as usize].count);
        let most = waiting.iter().map(|entry| entry.0).max().filter(|&most| most > 0)?;
        self.least = (most / 8).max(1);
        waiting.into_iter().for_each(|entry| self.push(entry));
        Some(())
    }

    /// Replace the pair by the newest token wherever it stands. Positions ascend within a piece, so "aaa" becomes
    /// (aa)a.
    fn merge(&mut self, left: u32, right: u32, pair: u32, tick: &mut dyn FnMut() -> bool) -> Result<()> {
        let new = self.lengths.len() as u32 - 1;
        let [left_length, right_length] = [left, right].map(|id| self.lengths[id as usize] as usize);
        self.places.resize(self.places.len().max(2 * new as usize + 2), NONE);
        let Pair { start, length, .. } = self.pairs[pair as usize];
        for index in start..start + length {
            if (index - start) % POSITIONS_PER_TICK == 0 && !tick() {
                return Err(Error::Stopped);
            }
            let middle = self.positions[index as usize] as usize;
            let Cell { pair: found, piece, .. } = self.cells[middle];
            if found != pair {
                continue;
            }
            let (at, end) = (middle - left_length, middle + right_length);
            let count = self.counts[piece as usize];
            let lost = self.cells[at].pair;
            if lost != NONE {
                let before = self.cells[at - 1].id;
                self.pairs[lost as usize].count -= count;
                self.gain(2 * before as usize, before, new, at, count);
            }
            if let Some(&Cell { id: behind, pair: lost, .. }) =
                self.cells.get(end).filter(|cell| cell.pair != NONE)
            {
                self.pairs[lost as usize].count -= count;
                self.gain(2 * behind as usize + 1, new, behind, end, count);
            }
            self.cells[middle].pair = NONE;
            self.cells[at].id = new;
            self.cells[end - 1].id = new;
        }
        self.pairs[pair as usize].count = 0;
        self.settle()
    }

    /// The pair of this step at `place` stands with its right token at `at`, `count` times.
    #[inline]
    fn gain(&mut self, place: usize, left: u32, right: u32, at: usize, count: u64) {
        if self.places[place] == NONE {
            self.places[place] = self.pairs.len() as u32;
            self.pairs.push(Pair::default());
            self.fresh.push((place, left, right));
        }
        let index = self.places[place];
        let pair = &mut self.pairs[index as usize];
        pair.count += count;
        pair.length += 1;
        self.cells[at].pair = index;
        self.arisen.push((index, at as u32));
    }

    /// End a step: lay down the positions of its pairs, each pair's together, and queue the pairs.
    fn settle(&mut self) -> Result<()> {
        let first = self.pairs.len() - self.fresh.len();
        let mut end = self.positions.len();
        if end + self.arisen.len() >= NONE as usize {
            return invalid(format!("pairs must arise at fewer than {NONE} places, the texts have more"));
        }
        for pair in &mut self.pairs[first..] {
            pair.start = end as u32;
            end += pair.length as usize;
            pair.length = 0;
        }
        self.positions.resize(end, 0);
        for (pair, at) in self.arisen.drain(..) {
            let pair = &mut self.pairs[pair as usize];
            self.positions[(pair.start + pair.length) as usize] = at;
            pair.length += 1;
        }
        let mut fresh = std::mem::take(&mut self.fresh);
        for ((place, left, right), index) in fresh.drain(..).zip(first as u32..) {
            self.places[place] = NONE;
            let key = u64::from(left) << 32 | u64::from(right);
            self.push((self.pairs[index as usize].count, !key, index));
        }
        self.fresh = fresh;
        Ok(())
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
