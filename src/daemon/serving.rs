//! Serving a socket: each conversation on a thread of its own, in one deadline, and only so many at a time.
//!
//! Invariants
//! - A conversation ends by its deadline, however its bytes trickle in or out.
//! - A slow peer holds up nobody: when there are too many, the oldest conversation gives way to the newest.
//! - At most twice [`Conversations::max`] threads, whatever peers do.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What is served.
pub(super) trait Socket: Read + Write + Send + Sized + 'static {
    fn twin(&self) -> io::Result<Self>;
    /// Bounds the next read or write.
    fn limit(&self, time: Duration) -> io::Result<()>;
    /// Ends reads and writes, also those of a twin that waits in one.
    fn cut(&self);
}

macro_rules! socket {
    ($kind:ty) => {
        impl Socket for $kind {
            fn twin(&self) -> io::Result<Self> {
                self.try_clone()
            }

            fn limit(&self, time: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(time)).and_then(|()| self.set_write_timeout(Some(time)))
            }

            fn cut(&self) {
                // A peer that has gone already is what is wanted.
                let _ = self.shutdown(Shutdown::Both);
            }
        }
    };
}

socket!(TcpStream);
socket!(UnixStream);

/// A socket whose reads and writes all end by one moment.
pub(super) struct Timed<S> {
    socket: S,
    until: Instant,
}

impl<S: Socket> Timed<S> {
    pub fn new(socket: S, time: Duration) -> Self {
        Self { socket, until: Instant::now() + time }
    }

    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    fn limit(&self) -> io::Result<()> {
        match self.left() {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => self.socket.limit(left),
        }
    }
}

impl<S: Socket> Read for Timed<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.limit()?;
        self.socket.read(buf)
    }
}

impl<S: Socket> Write for Timed<S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.limit()?;
        self.socket.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// The conversations of one listener.
pub(super) struct Conversations<S> {
    max: usize,
    time: Duration,
    threads: AtomicUsize,
    /// Oldest first; the number is that of the next one.
    open: Mutex<(u64, VecDeque<(u64, S)>)>,
}

impl<S: Socket> Conversations<S> {
    pub fn new(max: usize, time: Duration) -> Arc<Self> {
        Arc::new(Self { max, time, threads: AtomicUsize::new(0), open: Mutex::default() })
    }

    /// Talks with a peer on a thread of its own. Drops the peer if a flood of them has left no thread.
    pub fn begin(self: &Arc<Self>, socket: S, talk: impl FnOnce(Timed<S>) + Send + 'static) {
        if self.threads.fetch_add(1, Ordering::AcqRel) >= 2 * self.max {
            self.threads.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let ours = Thread(Arc::clone(self));
        let Ok(twin) = socket.twin() else { return };
        let number = self.enter(twin);
        // Without a thread the closure is dropped, and what it holds with it.
        let place = Place(Arc::clone(self), number);
        let _ = std::thread::Builder::new().name("serve".into()).spawn(move || {
            let _held = (place, ours);
            talk(Timed::new(socket, _held.0.0.time));
        });
    }

    fn enter(&self, socket: S) -> u64 {
        let mut open = self.lock();
        while open.1.len() >= self.max {
            let oldest = open.1.pop_front();
            oldest.iter().for_each(|(_, socket)| socket.cut());
        }
        open.0 += 1;
        let number = open.0;
        open.1.push_back((number, socket));
        number
    }

    fn lock(&self) -> MutexGuard<'_, (u64, VecDeque<(u64, S)>)> {
        self.open.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// One thread of those that may be.
struct Thread<S: Socket>(Arc<Conversations<S>>);

impl<S: Socket> Drop for Thread<S> {
    fn drop(&mut self) {
        self.0.threads.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A conversation's place among the open ones.
struct Place<S: Socket>(Arc<Conversations<S>>, u64);

impl<S: Socket> Drop for Place<S> {
    fn drop(&mut self) {
        self.0.lock().1.retain(|(number, _)| *number != self.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_byte_now_and_then_does_not_lengthen_a_conversation() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut timed = Timed::new(ours, Duration::from_millis(300));
        let trickle = std::thread::spawn(move || {
            while theirs.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let began = Instant::now();
        let mut byte = [0];
        while timed.read_exact(&mut byte).is_ok() {}
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        drop(timed);
        trickle.join().unwrap();
    }

    #[test]
    fn the_oldest_gives_way_to_the_newest() {
        let all = Conversations::new(2, Duration::from_secs(60));
        let (ended, end) = mpsc::channel();
        let mut peers = Vec::new();
        for n in 0..3 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            peers.push(theirs);
            let ended = ended.clone();
            all.begin(ours, move |mut timed| {
                let _ = timed.read(&mut [0]);
                let _ = ended.send(n);
            });
        }
        assert_eq!(end.recv_timeout(Duration::from_secs(10)), Ok(0), "the first was cut");
        assert!(end.recv_timeout(Duration::from_millis(100)).is_err(), "and no other");
        drop(peers);
        let mut rest = [end.recv().unwrap(), end.recv().unwrap()];
        rest.sort_unstable();
        assert_eq!(rest, [1, 2]);
    }

    #[test]
    fn a_flood_does_not_make_threads_without_end() {
        let all = Conversations::new(2, Duration::from_secs(60));
        let (go, gone) = mpsc::channel::<()>();
        let gone = Arc::new(Mutex::new(gone));
        let mut peers = Vec::new();
        for _ in 0..50 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            peers.push(theirs);
            let gone = Arc::clone(&gone);
            // As one that waits for the daemon's loop: a cut does not end it.
            all.begin(ours, move |_| gone.lock().unwrap().recv().unwrap_or_default());
        }
        assert_eq!(all.threads.load(Ordering::SeqCst), 4);
        drop(go);
        let until = Instant::now() + Duration::from_secs(10);
        while all.threads.load(Ordering::SeqCst) > 0 {
            assert!(Instant::now() < until, "a thread is counted for ever");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(all.lock().1.is_empty());
    }
}
