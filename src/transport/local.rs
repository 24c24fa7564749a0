//! The agent as a child process of this one: stores on this host, and tests.

use super::pipe::{PipeReader, PipeWriter};
use super::stderr::Tail;
use super::{Channel, Closer, Service, Transport};
use crate::error::{Error, Kind, Result};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a child whose input has ended may take to end.
const END_WAIT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Runs `PROGRAM agent --root ROOT`, once per channel.
#[derive(Debug)]
pub struct LocalTransport {
    root: PathBuf,
    program: PathBuf,
    service: Service,
}

impl LocalTransport {
    /// `program`: what to run, by default this very program.
    pub fn new(root: &Path, program: Option<PathBuf>) -> Result<LocalTransport> {
        let program = match program {
            Some(program) => program,
            None => std::env::current_exe().map_err(|e| Error::from_io("cannot find this program's file", e))?,
        };
        Ok(LocalTransport { root: root.to_owned(), program, service: Service::Store })
    }

    /// The same, for another service.
    pub fn serving(self, service: Service) -> LocalTransport {
        LocalTransport { service, ..self }
    }
}

impl Transport for LocalTransport {
    fn host(&self) -> &str {
        "this host"
    }

    fn open(&self) -> Result<Channel> {
        self.open_as(self.service)
    }

    fn open_as(&self, service: Service) -> Result<Channel> {
        let mut child = Command::new(&self.program)
            .args(service.words_of_operator(&self.root))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Error::io("cannot start the agent", &self.program, e))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        // From here on dropping it ends the child.
        let mut closer = LocalCloser { child, tail: Arc::default(), drain: None };
        let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            return Err(Error::new(Kind::Io, "the agent was started without its pipes"));
        };
        closer.drain_stderr(stderr)?;
        let input = PipeWriter::new(OwnedFd::from(stdin))
            .map_err(|e| Error::from_io("cannot prepare the pipe to the agent", e))?;
        let output = PipeReader::new(OwnedFd::from(stdout));
        Ok(Channel { input: Box::new(input), output: Box::new(output), closer: Box::new(closer) })
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}

struct LocalCloser {
    child: Child,
    tail: Arc<Mutex<Tail>>,
    drain: Option<JoinHandle<()>>,
}

impl LocalCloser {
    fn drain_stderr(&mut self, mut stderr: ChildStderr) -> Result<()> {
        let tail = Arc::clone(&self.tail);
        let body = move || {
            let mut buf = [0u8; 4096];
            while let Ok(n @ 1..) = stderr.read(&mut buf) {
                tail.lock().expect("bytes are moved under this lock, nothing else").push(&buf[..n]);
            }
        };
        let thread = std::thread::Builder::new().name("agent-stderr".into()).spawn(body);
        self.drain = Some(thread.map_err(|e| Error::from_io("cannot start a thread", e))?);
        Ok(())
    }

    fn said(&mut self) -> String {
        // A grandchild may hold stderr open: no waiting without an end.
        let deadline = Instant::now() + Duration::from_millis(500);
        while self.drain.as_ref().is_some_and(|drain| !drain.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(POLL_INTERVAL);
        }
        self.tail.lock().expect("bytes are moved under this lock, nothing else").said()
    }
}

impl Closer for LocalCloser {
    fn close(mut self: Box<Self>) -> Result<()> {
        let deadline = Instant::now() + END_WAIT;
        let status = loop {
            let status = self.child.try_wait().map_err(|e| Error::from_io("cannot wait for the agent", e))?;
            if status.is_some() || Instant::now() >= deadline {
                break status;
            }
            std::thread::sleep(POLL_INTERVAL);
        };
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(Error::new(Kind::Unavailable, format!("the agent ended with {status}{}", self.said()))),
            None => {
                let what = format!("the agent did not end within {} s and was killed", END_WAIT.as_secs());
                Err(Error::new(Kind::Unavailable, what))
            }
        }
    }
}

impl Drop for LocalCloser {
    /// Never leaves a child or a zombie; a child that was waited for is not touched.
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    /// A program of these lines, in the place of the agent.
    fn transport(dir: &Path, script: &str) -> LocalTransport {
        let program = dir.join("agent.sh");
        // Written by a child, so that no writable descriptor of it can leak into another test's fork (ETXTBSY).
        let mut writer = Command::new("sh");
        writer.args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$1\" >\"$2\"", "sh", script]).arg(&program);
        assert!(writer.status().unwrap().success());
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        LocalTransport::new(dir, Some(program)).unwrap()
    }

    #[test]
    fn it_gets_its_root_and_its_pipes_and_ends_at_end_of_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut channel = transport(dir.path(), "echo \"$@\"; exec cat").open().unwrap();
        channel.input.write_all(b"hello").unwrap();
        drop(channel.input);
        let mut all = String::new();
        while let Err(e) = channel.output.read_to_string(&mut all) {
            assert_eq!(e.kind(), std::io::ErrorKind::TimedOut);
        }
        assert_eq!(all, format!("agent --operator --root {}\nhello", dir.path().display()));
        channel.closer.close().unwrap();
    }

    #[test]
    fn a_bad_end_is_explained_by_what_it_said() {
        let dir = tempfile::tempdir().unwrap();
        let channel = transport(dir.path(), "echo 'no such store' >&2; exit 3").open().unwrap();
        let error = channel.closer.close().unwrap_err();
        assert!(error.what().contains("exit status: 3; it said: no such store"), "{error}");
    }

    /// Nobody may fill the agent's stderr until the agent stands still.
    #[test]
    fn a_talkative_agent_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let channel = transport(dir.path(), "head -c 1000000 /dev/zero >&2; exit 0").open().unwrap();
        channel.closer.close().unwrap();
    }

    #[test]
    fn a_missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let transport = LocalTransport::new(dir.path(), Some(dir.path().join("nope"))).unwrap();
        let error = transport.open().err().unwrap();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.to_string().contains("/nope"), "{error}");
    }
}
