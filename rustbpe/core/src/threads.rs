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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::PATTERN;

    #[test]
    fn shares_cover_everything_once_and_are_about_even() {
        for parts in 1..9 {
            let sizes = [5, 0, 1, 900, 3, 3, 3, 80, 80, 80, 0];
            let shares = shares(&sizes, |&size| size, parts);
            assert!(shares.len() <= parts && shares.iter().all(|range| !range.is_empty()));
            assert!(shares.iter().cloned().flatten().eq(0..sizes.len()));
        }
        assert!(shares(&[] as &[usize], |&size| size, 3).is_empty());
        assert_eq!(shares(&[7; 10], |&size| size, 2), [0..5, 5..10]);
    }

    #[test]
    fn long_texts_are_cut_at_seams_only() {
        let pattern = Pattern::by_hand(PATTERN).unwrap();
        let text = "some words\n and more\n\nof them\n".repeat(100_000);
        let (cut, owners) = parts(&["", &text, "x"], &pattern, 2);
        assert!(cut.len() > 4 && cut[1].len() <= LONG && cut.concat() == text.clone() + "x");
        assert!(cut[2..].iter().all(|part| part.starts_with("of")
            || *part == "some words"
            || part.starts_with('s')
            || *part == "x"));
        assert_eq!((owners[0], owners[1], owners[cut.len() - 1]), (0, 1, 2));
        assert_eq!(parts(&[&text], &pattern, 1).0.len(), 1);
        let spaces = " \n".repeat(1 << 20);
        assert_eq!(parts(&[&spaces], &pattern, 2).0, [&spaces]);
    }

    #[test]
    fn one_job_runs_on_the_calling_thread_and_results_keep_their_order() {
        let caller = thread::current().id();
        let job = |_: &mut dyn FnMut() -> bool| Ok(thread::current().id());
        assert_eq!(run_all(vec![job], &mut || true), Ok(vec![caller]));
        let jobs = (0..20).map(|index| move |_: &mut dyn FnMut() -> bool| Ok(index)).collect();
        assert_eq!(run_all(jobs, &mut || true), Ok((0..20).collect()));
    }

    #[test]
    fn a_job_that_fails_or_a_watch_that_says_no_stops_the_others() {
        let endless = |going_on: &mut dyn FnMut() -> bool| -> Result<()> {
            while going_on() {
                thread::yield_now();
            }
            Err(Error::Stopped)
        };
        assert_eq!(run_all(vec![endless; 3], &mut || false), Err(Error::Stopped));
        for failing in 0..3 {
            let job = |index| {
                move |going_on: &mut dyn FnMut() -> bool| match index == failing {
                    true => invalid("this one"),
                    false => endless(going_on),
                }
            };
            let failed = run_all((0..3).map(job).collect(), &mut || true);
            assert_eq!(failed, Err(Error::Invalid("this one".into())));
        }
        let panics = |index| {
            move |_: &mut dyn FnMut() -> bool| -> Result<()> {
                assert!(index == 1);
                Ok(())
            }
        };
        let panicked = run_all((0..2).map(panics).collect(), &mut || true);
        assert_eq!(panicked, Err(Error::Invalid("a worker thread must finish, it panicked".into())));
    }
}
