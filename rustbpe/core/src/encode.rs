//! Text -> ids. Nine pieces of ten are one token and found whole; the others are merged, earliest merge first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::bytemap::pair_key;
use crate::split::pieces;
use crate::threads::{run_all, shares};
use crate::{check_length, Result, Tokenizer};

/// Up to this many bytes a scan of an array on the stack beats the heap.
const SHORT: usize = 64;
/// No merge, or a cell that is no token's first.
const NONE: u32 = u32::MAX;

/// The ids of consecutive texts, one after the other, and how many each text has.
#[derive(Default)]
pub struct Share {
    pub ids: Vec<u32>,
    pub lengths: Vec<usize>,
}

impl Tokenizer {
    /// Append the ids of `text`; the names of special tokens are ordinary text here.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        check_length(text)?;
        for piece in pieces(text) {
            match self.tokens.get(piece) {
                Some(id) => ids.push(id),
                None => self.merge_bytes(piece, ids),
            }
        }
        Ok(())
    }

    /// Encode many texts on up to `threads` threads; one starts no thread. The shares are in the texts' order.
    pub fn encode_batch(&self, texts: &[&str], threads: usize) -> Result<Vec<Share>> {
        let job = |range: Range<usize>| {
            move || {
                let mut share = Share::default();
                for text in texts[range].iter() {
                    let before = share.ids.len();
                    self.encode(text, &mut share.ids)?;
                    share.lengths.push(share.ids.len() - before);
                }
                Ok(share)
            }
        };
        run_all(shares(texts, threads).into_iter().map(job).collect())
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
        let mut ids = [NONE; SHORT];
        for (id, &byte) in ids.iter_mut().zip(piece) {
            *id = u32::from(byte);
        }
        // merges[i] is what ids[i] and ids[i + 1] make
        let mut merges = [NONE; SHORT];
        for at in 1..n {
            merges[at - 1] = self.merged(ids[at - 1], ids[at]);
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
        let mut heap = BinaryHeap::new();
        let offer = |heap: &mut BinaryHeap<_>, left, right, at: usize| {
            let merge = self.merged(left, right);
            if merge != NONE {
                heap.push(Reverse((merge, at as u32)));
            }
        };
        for at in 1..cells.len() {
            offer(&mut heap, cells[at - 1], cells[at], at - 1);
        }
        let width = |id: u32| self.tokens.key(id as usize).len();
        while let Some(Reverse((merge, at))) = heap.pop() {
            let at = at as usize;
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
