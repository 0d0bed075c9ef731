//! Work shared out by bytes over scoped threads. There is no pool: nothing survives a call, so forking is safe.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::split::Pattern;
use crate::{invalid, Error, Result};

/// A text this long is worth cutting for the sake of even shares.
const LONG: usize = 1 << 20;
/// How often a thread that waits for the others looks at its caller.
const LOOK: Duration = Duration::from_millis(50);

/// Texts as parts that may be encoded alone: nearly always whole, but long ones cut at seams when there are threads to
/// share them. Returns the parts and, for each, the index of its text.
pub fn parts<'a>(texts: &[&'a str], pattern: &Pattern, threads: usize) -> (Vec<&'a str>, Vec<usize>) {
    let (mut parts, mut owners) = (Vec::with_capacity(texts.len()), Vec::with_capacity(texts.len()));
    for (index, &text) in texts.iter().enumerate() {
        let mut rest = text;
        while threads > 1 && rest.len() > LONG {
            let (part, behind) = rest.split_at(pattern.seam(rest, LONG / 2));
            parts.push(part);
            owners.push(index);
            rest = behind;
        }
        if !rest.is_empty() || text.is_empty() {
            parts.push(rest);
            owners.push(index);
        }
    }
    (parts, owners)
}

/// Consecutive ranges of items, about equal in size, at most `parts` of them and none empty.
pub fn shares<T>(items: &[T], size: impl Fn(&T) -> usize, parts: usize) -> Vec<Range<usize>> {
    let total: usize = items.iter().map(|item| size(item) + 1).sum();
    let goal = total.div_ceil(parts.max(1));
    let (mut ranges, mut start, mut sum) = (Vec::new(), 0, 0);
    for (index, item) in items.iter().enumerate() {
        sum += size(item) + 1;
        if sum >= goal {
            ranges.push(start..index + 1);
            (start, sum) = (index + 1, 0);
        }
    }
    if start < items.len() {
        ranges.push(start..items.len());
    }
    ranges
}

/// Run every job, the last one on the calling thread; the results come in the jobs' order. A job asks its argument now
/// and then whether to go on: no longer once `watch`, which only the calling thread calls, has said no, or a job failed.
pub fn run_all<T: Send, F: FnOnce(&mut dyn FnMut() -> bool) -> Result<T> + Send>(
    mut jobs: Vec<F>,
    watch: &mut dyn FnMut() -> bool,
) -> Result<Vec<T>> {
    let Some(own) = jobs.pop() else { return Ok(Vec::new()) };
    let stop = AtomicBool::new(false);
    let stop = &stop;
    let (done, finished) = mpsc::channel();
    let mut going_on = || {
        if !stop.load(Relaxed) && !watch() {
            stop.store(true, Relaxed);
        }
        !stop.load(Relaxed)
    };
    thread::scope(|scope| {
        let mut running = Vec::with_capacity(jobs.len());
        for job in jobs {
            let done = done.clone();
            let work = move || {
                let result = job(&mut || !stop.load(Relaxed));
                stop.fetch_or(result.is_err(), Relaxed);
                let _ = done.send(()); // the receiver is gone only when the caller panics
                result
            };
            match thread::Builder::new().spawn_scoped(scope, work) {
                Ok(handle) => running.push(handle),
                Err(error) => {
                    stop.store(true, Relaxed);
                    return invalid(format!("a worker thread must start, it did not ({error})"));
                }
            }
        }
        drop(done);
        let own = own(&mut going_on);
        stop.fetch_or(own.is_err(), Relaxed);
        let mut left = running.len();
        while left > 0 {
            match finished.recv_timeout(LOOK) {
                Ok(()) => left -= 1,
                Err(mpsc::RecvTimeoutError::Timeout) => drop(going_on()),
                Err(mpsc::RecvTimeoutError::Disconnected) => break, // a worker panicked
            }
        }
        let mut results = Vec::with_capacity(running.len() + 1);
        for handle in running {
            match handle.join() {
                Ok(result) => results.push(result),
                Err(_) => return invalid("a worker thread must finish, it panicked"),
            }
        }
        results.push(own);
        // the job that failed speaks, not those that stopped because of it
        match results.iter().position(|result| matches!(result, Err(error) if *error != Error::Stopped)) {
            Some(failed) => Err(results.swap_remove(failed).err().unwrap_or(Error::Stopped)),
            None => results.into_iter().collect(),
        }
    })
}
