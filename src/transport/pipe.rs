//! The two ends of a pipe that never block for long: each call gives up with `TimedOut` after [`TICK`] without
//! movement, having moved nothing, and may be repeated.
//!
//! A blocking `read` from a frozen peer cannot be cancelled from outside; this is the way around it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longest time one call waits.
pub const TICK: Duration = Duration::from_millis(200);

/// The reading end of a pipe or socket.
#[derive(Debug)]
pub struct PipeReader(File);

/// The writing end of a pipe or socket; it is switched to non-blocking, for everybody who shares the description.
#[derive(Debug)]
pub struct PipeWriter(File);

impl PipeReader {
    /// Takes the reading end over. A read waits at most `TICK`.
    pub fn new(fd: OwnedFd) -> Self {
        Self(File::from(fd))
    }
}

impl Read for PipeReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let deadline = Instant::now() + TICK;
        loop {
            wait_for(self.0.as_fd(), PollFlags::IN, deadline)?;
            match self.0.read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }
}

impl PipeWriter {
    /// Takes the writing end over and makes it non-blocking. A write waits at most `TICK`.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // A blocking write of more than the free room waits for ever, whatever poll said before it.
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self(File::from(fd)))
    }

    fn attempt(&mut self, mut write: impl FnMut(&mut File) -> io::Result<usize>) -> io::Result<usize> {
        let deadline = Instant::now() + TICK;
        loop {
            match write(&mut self.0) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait_for(self.0.as_fd(), PollFlags::OUT, deadline)?;
                }
                done => return done,
            }
        }
    }
}

impl Write for PipeWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.attempt(|file| file.write(buf))
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.attempt(|file| file.write_vectored(bufs))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns when the descriptor is ready or broken (the next call tells which), fails with `TimedOut` at the deadline.
fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).expect("a tick fits a timespec");
        match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (PipeReader, PipeWriter) {
        let (reader, writer) = io::pipe().unwrap();
        (PipeReader::new(reader.into()), PipeWriter::new(writer.into()).unwrap())
    }

    #[test]
    fn an_empty_pipe_times_out_and_then_still_works() {
        let (mut reader, mut writer) = pair();
        let began = Instant::now();
        assert_eq!(reader.read(&mut [0; 4]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= TICK && began.elapsed() < TICK * 10);
        writer.write_all(b"ab").unwrap();
        assert_eq!(reader.read(&mut [0; 4]).unwrap(), 2);
        drop(writer);
        assert_eq!(reader.read(&mut [0; 4]).unwrap(), 0);
    }

    #[test]
    fn a_full_pipe_times_out_and_loses_nothing() {
        let (mut reader, mut writer) = pair();
        let mut sent = 0;
        let error = loop {
            match writer.write(&[7; 100_000]) {
                Ok(n) => sent += n,
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(writer);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), sent);
    }

    #[test]
    fn a_pipe_nobody_reads_is_broken_not_full() {
        let (reader, mut writer) = pair();
        drop(reader);
        assert_eq!(writer.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
