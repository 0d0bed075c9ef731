//! Work shared out by bytes over scoped threads. There is no pool: nothing survives a call, so forking is safe.

use std::ops::Range;
use std::thread;

use crate::{invalid, Result};

/// Consecutive ranges of texts, about equal in bytes, at most `parts` of them and none empty.
pub fn shares(texts: &[&str], parts: usize) -> Vec<Range<usize>> {
    let total: usize = texts.iter().map(|text| text.len() + 1).sum();
    let goal = total.div_ceil(parts.max(1));
    let (mut ranges, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (index, text) in texts.iter().enumerate() {
        bytes += text.len() + 1;
        if bytes >= goal {
            ranges.push(start..index + 1);
            (start, bytes) = (index + 1, 0);
        }
    }
    if start < texts.len() {
        ranges.push(start..texts.len());
    }
    ranges
}

/// Run every job, the last one on the calling thread; the results come in the jobs' order.
pub fn run_all<T: Send, F: FnOnce() -> Result<T> + Send>(mut jobs: Vec<F>) -> Result<Vec<T>> {
    let Some(own) = jobs.pop() else { return Ok(Vec::new()) };
    thread::scope(|scope| {
        let mut running = Vec::with_capacity(jobs.len());
        for job in jobs {
            match thread::Builder::new().spawn_scoped(scope, job) {
                Ok(handle) => running.push(handle),
                Err(error) => return invalid(format!("a worker thread must start, it did not ({error})")),
            }
        }
        let own = own();
        let mut results = Vec::with_capacity(running.len() + 1);
        for handle in running {
            match handle.join() {
                Ok(result) => results.push(result?),
                Err(_) => return invalid("a worker thread must finish, it panicked"),
            }
        }
        results.push(own?);
        Ok(results)
    })
}
