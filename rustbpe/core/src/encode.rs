//! Text -> ids. Nine pieces of ten are one token and found whole; the others are merged, earliest merge first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::bytemap::pair_key;
use crate::split::Pattern;
use crate::threads::{parts, run_all, shares};
use crate::tokenizer::NONE;
use crate::{Error, Result, Tokenizer};

/// Up to this many bytes a scan of an array on the stack beats the heap.
const SHORT: usize = 64;

/// The ids of many texts: each range of texts in an array of its own, and the number of ids of every text.
pub struct Batch {
    pub shares: Vec<Vec<u32>>,
    pub lengths: Vec<usize>,
}

impl Batch {
    pub fn len(&self) -> usize {
        self.shares.iter().map(Vec::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Tokenizer {
    /// Append the ids of `text`; the names of special tokens are ordinary text here.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        self.encode_block_by_block(text, ids, &self.pattern, &mut Vec::new(), &mut |_| true)
    }

    /// How many ids `text` has.
    pub fn count(&self, text: &str) -> Result<usize> {
        let (mut ids, mut count) = (Vec::new(), 0);
        let count_block = &mut |ids: &mut Vec<u32>| {
            count += ids.len();
            ids.clear();
            true
        };
        self.encode_block_by_block(text, &mut ids, &self.pattern, &mut Vec::new(), count_block)?;
        Ok(count)
    }

    /// Append the ids of `text`, in which each of `allowed`, (name, id), becomes its id; where several of them begin
    /// at one place, the longest does.
    pub fn encode_with_specials(
        &self,
        text: &str,
        allowed: &[(&str, u32)],
        ids: &mut Vec<u32>,
    ) -> Result<()> {
        let names: Vec<&str> = allowed.iter().map(|(name, _)| *name).collect();
        let mut rest = text;
        while let Some((at, index)) = first_of(&names, rest) {
            self.encode(&rest[..at], ids)?;
            ids.push(allowed[index].1);
            rest = &rest[at + names[index].len()..];
        }
        self.encode(rest, ids)
    }

    /// Append the ids of any bytes: valid UTF-8 is cut as text, each invalid sequence is a piece of its own.
    pub fn encode_bytes(&self, bytes: &[u8], ids: &mut Vec<u32>) -> Result<()> {
        for chunk in bytes.utf8_chunks() {
            self.encode(chunk.valid(), ids)?;
            self.encode_piece(chunk.invalid(), 0, chunk.invalid().len(), ids);
        }
        Ok(())
    }

    /// Encode many texts on up to `threads` threads; one starts no thread. `watch` is asked now and then whether to go
    /// on.
    pub fn encode_batch(
        &self,
        texts: &[&str],
        threads: usize,
        watch: &mut dyn FnMut() -> bool,
    ) -> Result<Batch> {
        let (parts, owners) = parts(texts, &self.pattern, threads);
        let (parts, size) = (&parts, texts.iter().map(|text| text.len()).sum::<usize>());
        let job = |range: Range<usize>| {
            let pattern = self.pattern.clone();
            move |going_on: &mut dyn FnMut() -> bool| {
                let mut ids = Vec::with_capacity(size / threads / 4);
                let (mut lengths, mut ends) = (Vec::with_capacity(range.len()), Vec::new());
                for text in &parts[range] {
                    let before = ids.len();
                    self.encode_block_by_block(text, &mut ids, &pattern, &mut ends, &mut |_| going_on())?;
                    lengths.push(ids.len() - before);
                }
                Ok((ids, lengths))
            }
        };
        let results =
            run_all(shares(parts, |text| text.len(), threads).into_iter().map(job).collect(), watch)?;
        let mut lengths = vec![0; texts.len()];
        let found = results.iter().flat_map(|(_, lengths)| lengths);
        owners.iter().zip(found).for_each(|(&owner, length)| lengths[owner] += length);
        Ok(Batch { shares: results.into_iter().map(|(ids, _)| ids).collect(), lengths })
    }

    /// Append ids; after each block `block` may look at them, take them away, and say whether to go on.
    #[inline]
    fn encode_block_by_block(
        &self,
        text: &str,
        ids: &mut Vec<u32>,
        pattern: &Pattern,
        ends: &mut Vec<u32>,
        block: &mut dyn FnMut(&mut Vec<u32>) -> bool,
    ) -> Result<()> {
        let (mut pieces, mut at) = (pattern.pieces(text)?, 0);
        loop {
            pieces.next_block(ends)?;
            if ends.is_empty() {
                return Ok(());
            }
            for &end in &*ends {
                self.encode_piece(text.as_bytes(), at, end as usize, ids);
                at = end as usize;
            }
            if !block(ids) {
                return Err(Error::Stopped);
            }
        }
    }

    #[inline]
    fn encode_piece(&self, text: &[u8], start: usize, end: usize, ids: &mut Vec<u32>) {
        match self.tokens.get(text, start, end) {
            Some(id) => ids.push(id),
            None => self.merge_bytes(&text[start..end], ids),
        }
    }

    /// Append the ids of one piece by merging alone.
    pub(crate) fn merge_bytes(&self, piece: &[u8], ids: &mut Vec<u32>) {
        if piece.len() <= SHORT {
            self.merge_short(piece, ids);
        } else {
            self.merge_long(piece, ids);
        }
    }
    #[inline]
    fn merged(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(&pair_key(left, right)).copied().unwrap_or(NONE)
    }

    /// At most SHORT bytes: find the earliest merge, apply it, close the gap.
    fn merge_short(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut n = piece.len();
        // merges[i] is what ids[i] and ids[i + 1] make
        let (mut ids, mut merges) = ([0; SHORT], [NONE; SHORT]);
        for (at, &byte) in piece.iter().enumerate() {
            ids[at] = u32::from(byte);
            let pair = usize::from(byte) << 8 | usize::from(*piece.get(at + 1).unwrap_or(&0));
            merges[at] = self.byte_pairs[pair];
        }
        while n > 1 {
            let (mut at, mut best) = (0, NONE);
            for (index, &merge) in merges[..n - 1].iter().enumerate() {
                if merge < best {
                    (at, best) = (index, merge);
                }
            }
            if best == NONE {
                break;
            }
            ids[at] = best;
            ids.copy_within(at + 2..n, at + 1);
            merges.copy_within(at + 1..n, at);
            n -= 1;
            if at + 1 < n {
                merges[at] = self.merged(best, ids[at + 1]);
            }
            if at > 0 {
                merges[at - 1] = self.merged(ids[at - 1], best);
            }
        }
        out.extend_from_slice(&ids[..n]);
    }

    /// Any length in n log n: a heap of (merge, position) over one cell per byte. As in training a token's id stands
    /// in its first and last cell, and an entry whose tokens have changed is skipped.
    fn merge_long(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut cells: Vec<u32> = piece.iter().map(|&byte| u32::from(byte)).collect();
        // the entry (merge, position) as one number, as fast to compare
        let entry = |merge: u32, at: usize| Reverse(u64::from(merge) << 32 | at as u64);
        let bytes =
            piece.windows(2).map(|two| self.byte_pairs[usize::from(two[0]) << 8 | usize::from(two[1])]);
        let offers =
            bytes.enumerate().filter(|(_, merge)| *merge != NONE).map(|(at, merge)| entry(merge, at));
        let mut heap = BinaryHeap::from(offers.collect::<Vec<_>>());
        let offer = |heap: &mut BinaryHeap<_>, left, right, at: usize| {
            let merge = self.merged(left, right);
            if merge != NONE {
                heap.push(entry(merge, at));
            }
        };
        let width = |id: u32| self.tokens.key(id as usize).len();
        while let Some(Reverse(entry)) = heap.pop() {
            let (merge, at) = ((entry >> 32) as u32, entry as u32 as usize);
            let (left, right) = self.merges[merge as usize - 256];
            let (middle, end) = (at + width(left), at + width(merge));
            if cells[at] != left || cells.get(middle) != Some(&right) {
                continue;
            }
            cells[middle] = NONE;
            cells[at] = merge;
            cells[end - 1] = merge;
            if at > 0 {
                let before = cells[at - 1];
                offer(&mut heap, before, merge, at - width(before));
            }
            if let Some(&behind) = cells.get(end) {
                offer(&mut heap, merge, behind, at);
            }
        }
        let mut at = 0;
        while at < cells.len() {
            out.push(cells[at]);
            at += width(cells[at]);
        }
    }
}

/// The leftmost place where one of `names` stands in `text`, and the index of the longest that stands there.
pub fn first_of(names: &[&str], text: &str) -> Option<(usize, usize)> {
    let mut first = [false; 256];
    names.iter().for_each(|name| name.bytes().take(1).for_each(|byte| first[byte as usize] = true));
    let bytes = text.as_bytes();
    (0..bytes.len()).filter(|&at| first[bytes[at] as usize]).find_map(|at| {
        let here = |&index: &usize| bytes[at..].starts_with(names[index].as_bytes());
        let longest = (0..names.len()).filter(here).max_by_key(|&index| names[index].len())?;
        Some((at, longest))
    })
}
