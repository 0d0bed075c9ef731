//! How often each piece occurs.

use crate::bytemap::ByteMap;
use crate::split::pieces;
use crate::threads::{run_all, shares};
use crate::{check_length, Result};

/// Distinct pieces and their counts.
#[derive(Default)]
pub struct Counter {
    pub(crate) pieces: ByteMap,
    pub(crate) counts: Vec<u64>,
}

impl Counter {
    pub fn add(&mut self, text: &str) -> Result<()> {
        check_length(text)?;
        pieces(text).try_for_each(|piece| self.add_piece(piece, 1))
    }

    #[inline]
    fn add_piece(&mut self, piece: &[u8], count: u64) -> Result<()> {
        let index = self.pieces.insert(piece)? as usize;
        if index == self.counts.len() {
            self.counts.push(0);
        }
        self.counts[index] += count;
        Ok(())
    }
}

/// Count a batch of texts, one thread per counter; one counter starts no thread.
pub fn count_batch(counters: &mut [Counter], texts: &[&str]) -> Result<()> {
    let ranges = shares(texts, counters.len());
    let jobs = counters.iter_mut().zip(ranges);
    let jobs =
        jobs.map(|(counter, range)| move || texts[range].iter().try_for_each(|text| counter.add(text)));
    run_all(jobs.collect()).map(|_| ())
}

/// The sum of the threads' counters.
pub fn total(counters: Vec<Counter>) -> Result<Counter> {
    let mut counters = counters.into_iter();
    let mut sum = counters.next().unwrap_or_default();
    for counter in counters {
        for (index, &count) in counter.counts.iter().enumerate() {
            sum.add_piece(counter.pieces.key(index), count)?;
        }
    }
    Ok(sum)
}
