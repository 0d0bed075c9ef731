//! How often each piece occurs: one table per thread, and sorted runs on disk when the tables have no room.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::bytemap::{grown, ByteMap};
use crate::spill::{merge, Run, Writer};
use crate::split::Pattern;
use crate::threads::{parts, run_all, shares};
use crate::{Error, Result};

/// Runs of all threads together before a thread merges its own: each is an open file.
const MAX_RUNS: usize = 256;
/// Room kept for the next piece; only a longer one passes the limit.
const ROOM: usize = 4096;

/// Pieces and their counts in memory, runs of both on disk.
struct Table {
    pieces: ByteMap,
    counts: Vec<u64>,
    limit: usize,
    folder: PathBuf,
    runs: Vec<Run>,
    max_runs: usize,
    /// Runs written so far, those merged since included.
    spilled: usize,
}

impl Table {
    #[inline]
    fn add(&mut self, text: &[u8], start: usize, end: usize, count: u64) -> Result<()> {
        let index = self.pieces.insert(text, start, end)? as usize;
        if index < self.counts.len() {
            self.counts[index] += count;
            return Ok(());
        }
        self.counts.push(count);
        if self.footprint() > self.limit {
            self.spill()?;
        }
        Ok(())
    }

    /// Bytes this takes at the worst moment until the next piece is in, the order for sorting included.
    fn footprint(&self) -> usize {
        self.pieces.footprint(ROOM) + grown(&self.counts, 1) + self.counts.len() * size_of::<u32>()
    }

    fn spill(&mut self) -> Result<()> {
        let mut order: Vec<u32> = (0..self.counts.len() as u32).collect();
        order.sort_unstable_by_key(|&index| self.pieces.key(index as usize));
        let mut writer = Writer::new(&self.folder)?;
        for index in order {
            writer.push(self.pieces.key(index as usize), self.counts[index as usize])?;
        }
        self.runs.push(writer.finish()?);
        self.spilled += 1;
        if self.runs.len() == self.max_runs {
            self.runs = vec![merge(std::mem::take(&mut self.runs), &self.folder, &mut || true)?];
        }
        (self.pieces, self.counts) = (ByteMap::default(), Vec::new());
        Ok(())
    }
}

/// One thread's part of the work.
struct Worker {
    pattern: Pattern,
    table: Table,
    ends: Vec<u32>,
    split: Duration,
    count: Duration,
}

impl Worker {
    fn add(&mut self, text: &str, going_on: &mut dyn FnMut() -> bool) -> Result<()> {
        let (mut pieces, mut at) = (self.pattern.pieces(text)?, 0);
        let mut start = Instant::now();
        loop {
            pieces.next_block(&mut self.ends)?;
            let middle = Instant::now();
            self.split += middle - start;
            if self.ends.is_empty() {
                return Ok(());
            }
            if !going_on() {
                return Err(Error::Stopped);
            }
            for &end in &self.ends {
                self.table.add(text.as_bytes(), at, end as usize, 1)?;
                at = end as usize;
            }
            start = Instant::now();
            self.count += start - middle;
        }
    }
}

/// Counts the pieces of texts on a fixed number of threads.
pub struct Counter {
    workers: Vec<Worker>,
    limit: usize,
}

impl Counter {
    /// Tables of at most `limit` bytes together (usize::MAX for no limit), runs in `folder`.
    pub fn new(pattern: &Pattern, threads: usize, limit: usize, folder: &Path) -> Self {
        let worker = |_| Worker {
            pattern: pattern.clone(),
            table: Table {
                pieces: ByteMap::default(),
                counts: Vec::new(),
                limit: limit / threads,
                folder: folder.into(),
                runs: Vec::new(),
                max_runs: (MAX_RUNS / threads).max(2),
                spilled: 0,
            },
            ends: Vec::new(),
            split: Duration::ZERO,
            count: Duration::ZERO,
        };
        Self { workers: (0..threads).map(worker).collect(), limit }
    }

    /// Count the pieces of `texts`; `watch` is asked now and then whether to go on.
    pub fn add(&mut self, texts: &[&str], watch: &mut dyn FnMut() -> bool) -> Result<()> {
        let (texts, _) = match self.workers.first() {
            Some(worker) => parts(texts, &worker.pattern, self.workers.len()),
            None => return Ok(()),
        };
        let texts = &texts;
        let ranges = shares(texts, |text| text.len(), self.workers.len());
        let jobs = self.workers.iter_mut().zip(ranges).map(|(worker, range)| {
            move |going_on: &mut dyn FnMut() -> bool| {
                texts[range].iter().try_for_each(|text| worker.add(text, going_on))
            }
        });
        run_all(jobs.collect(), watch).map(|_| ())
    }

    /// Seconds of all threads together: (cutting texts, counting pieces).
    pub fn seconds(&self) -> (f64, f64) {
        let sum =
            |part: fn(&Worker) -> Duration| self.workers.iter().map(part).sum::<Duration>().as_secs_f64();
        (sum(|worker| worker.split), sum(|worker| worker.count))
    }

    /// The sum of the threads' tables and runs.
    pub fn finish(self, watch: &mut dyn FnMut() -> bool) -> Result<Counts> {
        let mut tables: Vec<Table> = self.workers.into_iter().map(|worker| worker.table).collect();
        let Some(mut sum) = tables.pop() else { return Ok(Counts { spilled: 0, source: Source::Nothing }) };
        while let Some(mut table) = tables.pop() {
            let others: usize = tables.iter().chain([&table]).map(Table::footprint).sum();
            sum.limit = self.limit.saturating_sub(others);
            for (index, &count) in table.counts.iter().enumerate() {
                let piece = table.pieces.key(index);
                sum.add(piece, 0, piece.len(), count)?;
            }
            sum.runs.append(&mut table.runs);
            sum.spilled += table.spilled;
        }
        if sum.runs.is_empty() {
            sum.pieces.freeze();
            return Ok(Counts { spilled: 0, source: Source::Table(sum.pieces, sum.counts) });
        }
        sum.max_runs = usize::MAX;
        sum.spill()?;
        let run = merge(sum.runs, &sum.folder, watch)?;
        Ok(Counts { spilled: sum.spilled, source: Source::Run(run) })
    }
}

/// Every different piece and how often it occurs, in memory or in one sorted run.
pub struct Counts {
    /// Runs that were written because the tables had no room.
    pub spilled: usize,
    source: Source,
}

enum Source {
    Nothing,
    Table(ByteMap, Vec<u64>),
    Run(Run),
}

impl Counts {
    /// How many different pieces.
    pub fn len(&self) -> usize {
        match &self.source {
            Source::Nothing => 0,
            Source::Table(_, counts) => counts.len(),
            Source::Run(run) => run.pieces,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the different pieces together.
    pub fn bytes(&self) -> usize {
        match &self.source {
            Source::Nothing => 0,
            Source::Table(pieces, _) => pieces.size(),
            Source::Run(run) => run.bytes,
        }
    }

    /// Hand over each piece and its count.
    pub fn for_each(self, take: &mut dyn FnMut(&[u8], u64)) -> Result<()> {
        match self.source {
            Source::Nothing => {}
            Source::Table(pieces, counts) => {
                counts.iter().enumerate().for_each(|(index, &count)| take(pieces.key(index), count));
            }
            Source::Run(run) => {
                let mut reader = run.read()?;
                while reader.advance()? {
                    take(&reader.piece, reader.count);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::env::temp_dir;

    use super::*;
    use crate::split::PATTERN;

    /// A different word of four letters for every number.
    fn word(number: usize) -> String {
        let letter = |place: u32| char::from(b'a' + (number / 26usize.pow(place) % 26) as u8);
        String::from_iter([' ', letter(3), letter(2), letter(1), letter(0)])
    }

    fn count(texts: &[&str], threads: usize, limit: usize) -> (BTreeMap<Vec<u8>, u64>, usize) {
        let pattern = Pattern::by_hand(PATTERN).unwrap();
        let mut counter = Counter::new(&pattern, threads, limit, &temp_dir());
        for texts in texts.chunks(3) {
            counter.add(texts, &mut || true).unwrap();
        }
        let before: usize = counter.workers.iter().map(|worker| worker.table.spilled).sum();
        let counts = counter.finish(&mut || true).unwrap();
        let (spilled, size, bytes) = (counts.spilled, counts.len(), counts.bytes());
        assert!(spilled >= before);
        let mut found = BTreeMap::new();
        counts.for_each(&mut |piece, count| assert!(found.insert(piece.to_vec(), count).is_none())).unwrap();
        assert_eq!((found.len(), found.keys().map(Vec::len).sum::<usize>()), (size, bytes));
        (found, spilled)
    }

    #[test]
    fn counts_are_the_same_with_any_threads_and_any_memory() {
        let text = |text: usize| (0..200).map(|index| word(index * text)).collect();
        let texts: Vec<String> = (0..60).map(text).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let (expected, spilled) = count(&texts, 1, usize::MAX);
        assert_eq!((expected[&b" aaaa"[..]], spilled), (259, 0));
        for (threads, limit) in [(3, usize::MAX), (1, 1 << 16), (3, 3 << 16)] {
            let (found, spilled) = count(&texts, threads, limit);
            assert_eq!(found, expected);
            assert_eq!(spilled > 0, limit < usize::MAX);
        }
    }

    #[test]
    fn nothing_is_counted_without_texts_and_a_stop_is_heeded() {
        assert_eq!(count(&[], 2, usize::MAX), (BTreeMap::new(), 0));
        let pattern = Pattern::by_hand(PATTERN).unwrap();
        for threads in [1, 2] {
            let mut counter = Counter::new(&pattern, threads, usize::MAX, &temp_dir());
            assert_eq!(counter.add(&["one text", "another text"], &mut || false), Err(Error::Stopped));
        }
    }

    #[test]
    fn the_limit_bounds_what_a_table_takes() {
        let words: String = (0..50_000).map(word).collect();
        let pattern = Pattern::by_hand(PATTERN).unwrap();
        let mut counter = Counter::new(&pattern, 1, 1 << 17, &temp_dir());
        for text in words.as_bytes().chunks(1000) {
            counter.add(&[std::str::from_utf8(text).unwrap()], &mut || true).unwrap();
            assert!(counter.workers[0].table.footprint() <= 1 << 17);
        }
    }
}
