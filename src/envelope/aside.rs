//! A second look at a stream, on a thread of its own: the libraries for signatures want to read it themselves.

use crate::error::{Error, Kind, Result};
use std::io::{self, PipeReader, PipeWriter, Write};
use std::thread::{self, JoinHandle};

pub(super) struct Aside<T> {
    to: PipeWriter,
    thread: JoinHandle<Result<T>>,
}

impl<T: Send + 'static> Aside<T> {
    /// `work` reads all that is shown, to its end.
    pub(super) fn start(work: impl FnOnce(PipeReader) -> Result<T> + Send + 'static) -> Result<Self> {
        let (from, to) = io::pipe().map_err(|e| Error::from_io("cannot make a pipe", e))?;
        let thread = thread::Builder::new().name("signature".to_owned()).spawn(move || work(from));
        let thread = thread.map_err(|e| Error::from_io("cannot start a thread", e))?;
        Ok(Aside { to, thread })
    }

    pub(super) fn show(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)
    }

    /// There is no more to come.
    pub(super) fn end(self) -> Result<T> {
        drop(self.to);
        self.thread.join().unwrap_or_else(|_| Err(Error::new(Kind::Io, "the work on the signature broke off")))
    }
}
