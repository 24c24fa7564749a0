//! The part of some runs that other runs do not name.

use super::Run;
use crate::error::Result;
use std::iter::Peekable;

/// The runs of `runs`, without the blocks that `others` name, whatever these say of them. Both ascend. An iterator that
/// reads each of the two once; `others` only as far as `runs` go.
pub struct Without<A: Iterator<Item = Result<Run>>, B: Iterator<Item = Result<Run>>> {
    runs: A,
    others: Peekable<B>,
    /// What is left of the run taken last, from this block on.
    rest: Option<(Run, u64)>,
    done: bool,
}

impl<A: Iterator<Item = Result<Run>>, B: Iterator<Item = Result<Run>>> Without<A, B> {
    /// Takes the two sources of runs. Nothing is read before the first call of `next`.
    pub fn new(runs: A, others: B) -> Self {
        Self { runs, others: others.peekable(), rest: None, done: false }
    }

    fn next_run(&mut self) -> Result<Option<Run>> {
        loop {
            let (run, at) = match self.rest.take() {
                Some(rest) => rest,
                None => match self.runs.next().transpose()? {
                    Some(run) => {
                        let first = run.first().0;
                        (run, first)
                    }
                    None => return Ok(None),
                },
            };
            while self.others.next_if(|other| matches!(other, Ok(other) if other.end() <= at)).is_some() {}
            let (hidden_from, hidden_to) = match self.others.peek() {
                None => (u64::MAX, u64::MAX),
                Some(Ok(other)) => (other.first().0, other.end()),
                Some(Err(_)) => return Err(self.others.next().expect("peeked").expect_err("peeked")),
            };
            let end = run.end().min(hidden_from.max(at));
            let part = (at < end).then(|| run.part(at, end));
            // Where the next visible block of this run may begin.
            let next = if end < run.end() { hidden_to.max(end) } else { end };
            if next < run.end() {
                self.rest = Some((run, next));
            }
            if part.is_some() {
                return Ok(part);
            }
        }
    }
}

impl<A: Iterator<Item = Result<Run>>, B: Iterator<Item = Result<Run>>> Iterator for Without<A, B> {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Result<Run>> {
        if self.done {
            return None;
        }
        let next = self.next_run().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}
