//! Deadlines over a channel that gives up every moment: goes on until the owner says stop.
//!
//! Sits below every buffer, so that whoever reads frames sees either bytes or the final error, and half a frame is
//! never lost to a timeout. See [`crate::transport::Channel`] for what the inner ends promise.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

/// Repeats calls that time out while `go_on(quiet)` allows it; `quiet` is how long this call has moved nothing.
pub(super) struct Patient<T, F> {
    inner: T,
    go_on: F,
}

impl<T, F: FnMut(Duration) -> io::Result<()>> Patient<T, F> {
    pub(super) fn new(inner: T, go_on: F) -> Self {
        Self { inner, go_on }
    }

    fn repeat(&mut self, mut call: impl FnMut(&mut T) -> io::Result<usize>) -> io::Result<usize> {
        let began = Instant::now();
        loop {
            match call(&mut self.inner) {
                Err(e) if e.kind() == io::ErrorKind::TimedOut => (self.go_on)(began.elapsed())?,
                done => return done,
            }
        }
    }
}

impl<T: Read, F: FnMut(Duration) -> io::Result<()>> Read for Patient<T, F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.repeat(|inner| inner.read(buf))
    }
}

impl<T: Write, F: FnMut(Duration) -> io::Result<()>> Write for Patient<T, F> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.repeat(|inner| inner.write(buf))
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.repeat(|inner| inner.write_vectored(bufs))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The simplest patience: up to a limit.
pub(super) fn up_to(limit: Duration) -> impl FnMut(Duration) -> io::Result<()> + Clone {
    move |quiet| if quiet < limit { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times out before each byte it gives.
    struct Hesitant(Vec<u8>, bool);

    impl Read for Hesitant {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            buf[0] = self.0.pop().unwrap();
            Ok(1)
        }
    }

    #[test]
    fn a_timeout_within_a_frame_loses_nothing() {
        let mut out = [0; 3];
        let mut reader = Patient::new(Hesitant(vec![3, 2, 1], false), up_to(Duration::MAX));
        reader.read_exact(&mut out).unwrap();
        assert_eq!(out, [1, 2, 3]);
    }

    #[test]
    fn the_limit_ends_it() {
        let mut reader = Patient::new(Hesitant(vec![1], false), up_to(Duration::ZERO));
        assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
