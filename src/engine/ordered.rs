//! Work shared by threads, its results in the order of the work.

use crate::error::Result;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Items between being taken and being consumed, per worker: what bounds the memory.
const IN_FLIGHT: usize = 4;

/// Does `work` on every item, on so many threads, each with a scratch of its own, and hands the results to `consume` in
/// the order of the items. What `consume` leaves is not worked on.
pub(crate) fn in_order<T: Send, S, R: Send, O>(
    workers: usize,
    items: impl Iterator<Item = Result<T>> + Send,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) -> Result<R> + Sync,
    consume: impl FnOnce(&mut dyn Iterator<Item = Result<R>>) -> Result<O>,
) -> Result<O> {
    let workers = workers.max(1);
    let queue = Mutex::new(items.enumerate());
    let (token, tokens) = sync_channel(workers * IN_FLIGHT);
    for _ in 0..workers * IN_FLIGHT {
        token.send(()).expect("the channel is as long as that");
    }
    let tokens = Mutex::new(tokens);
    let (done, results) = sync_channel(workers * IN_FLIGHT);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let (queue, tokens, scratch, work, done) = (&queue, &tokens, &scratch, &work, done.clone());
            scope.spawn(move || {
                let mut scratch = scratch();
                loop {
                    // Whoever consumes has gone once nobody gives tokens any more.
                    if tokens.lock().expect("nothing panics under this lock").recv().is_err() {
                        return;
                    }
                    let next = queue.lock().expect("a panic of the items ends everything").next();
                    let Some((at, item)) = next else { return };
                    if done.send((at, item.and_then(|item| work(&mut scratch, item)))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(done);
        let mut results = InOrder { results, waiting: BTreeMap::new(), next: 0, token };
        consume(&mut results)
    })
}

struct InOrder<R> {
    results: Receiver<(usize, Result<R>)>,
    waiting: BTreeMap<usize, Result<R>>,
    next: usize,
    token: SyncSender<()>,
}

impl<R> Iterator for InOrder<R> {
    type Item = Result<R>;

    fn next(&mut self) -> Option<Result<R>> {
        loop {
            if let Some(result) = self.waiting.remove(&self.next) {
                self.next += 1;
                // There is always room: no more tokens are about than there were.
                let _ = self.token.try_send(());
                return Some(result);
            }
            match self.results.recv() {
                Ok((at, result)) => drop(self.waiting.insert(at, result)),
                Err(_) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};

    #[test]
    fn results_come_in_the_order_of_the_items_whoever_is_slow() {
        for workers in [1, 2, 7] {
            let items = (0..200u64).map(Ok);
            let slow = |_: &mut (), n: u64| {
                std::thread::sleep(std::time::Duration::from_micros(n % 7 * 100));
                Ok(n * 2)
            };
            let all = in_order(workers, items, || (), slow, |results| results.collect::<Result<Vec<_>>>()).unwrap();
            assert_eq!(all, (0..200).map(|n| n * 2).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_comes_in_its_place_and_ends_the_work() {
        let bad = |_: &mut (), n: u64| if n == 50 { Err(Error::new(Kind::Io, "bad sector")) } else { Ok(n) };
        let mut before = 0;
        let failed = in_order(
            3,
            (0..1_000_000u64).map(Ok),
            || (),
            bad,
            |results| {
                for result in results {
                    result?;
                    before += 1;
                }
                Ok(())
            },
        );
        assert_eq!((failed.unwrap_err().what(), before), ("bad sector", 50));
        let cut = [Ok(1), Err(Error::new(Kind::Io, "no extents"))];
        let failed = in_order(2, cut.into_iter(), || (), |_, n: u64| Ok(n), |r| r.collect::<Result<Vec<_>>>());
        assert_eq!(failed.unwrap_err().what(), "no extents");
    }

    #[test]
    fn what_is_not_consumed_is_not_worked_on() {
        let worked = std::sync::atomic::AtomicU64::new(0);
        let count = |_: &mut (), _: u64| {
            worked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Ok(())
        };
        in_order(2, (0..1_000_000u64).map(Ok), || (), count, |results| Ok(results.take(10).count())).unwrap();
        assert!(worked.into_inner() <= 10 + 2 * IN_FLIGHT as u64);
    }
}
