//! One `qemu-nbd` child that serves a chain read-only, or one image of a format of others for writing, on a private
//! unix socket.
//!
//! The chain is described to it whole (see `blockdev`): it opens nothing a header names. It dies with us (see
//! `program`), and whoever holds it ends it: [`QemuNbd::stop`] waits, dropping does as well but has nobody to tell.

use super::blockdev::{self, Access};
use super::program::{self, Listener};
use super::{Chain, Layer};
use crate::error::{Error, Kind, Result};
use crate::image::foreign::format::Foreign;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long it may take to open the images and serve them. Large L1 tables on cold, slow storage take seconds.
const START_MAX: Duration = Duration::from_secs(60);

/// Bytes of a unix socket's path that the kernel takes.
const SOCKET_PATH_MAX: usize = 107;

/// What to serve, and how.
#[derive(Debug, Clone)]
pub struct Serve<'a> {
    /// Images to serve, uppermost first.
    pub chain: &'a Chain,
    /// Directory for the socket, with a short path; made if it is missing.
    pub runtime_dir: &'a Path,
    /// Take no locks: somebody may start to write to the images meanwhile.
    pub force_share: bool,
    /// Connections at once.
    pub connections: usize,
    /// Name of a persistent bitmap of the uppermost layer to offer as a metadata context.
    pub bitmap: Option<&'a str>,
}

/// What is served of [`Serve::chain`].
#[derive(Debug, Clone, Copy)]
enum What {
    Chain,
    /// Its one layer, in a format of others.
    Read(Foreign),
    Write(Foreign),
}

/// A running child.
pub struct QemuNbd {
    child: Child,
    dir: Option<TempDir>,
    socket: PathBuf,
    complaints: Option<Listener>,
}

impl QemuNbd {
    /// Starts the child and waits until it serves. [`Kind::Refused`], with its words, if it cannot open the chain.
    pub fn start(serve: &Serve<'_>) -> Result<Self> {
        Self::start_private(serve, What::Chain)
    }

    /// As [`QemuNbd::start`], of a chain that is one layer, in a format of others.
    pub(super) fn start_foreign(serve: &Serve<'_>, format: Foreign) -> Result<Self> {
        Self::start_private(serve, What::Read(format))
    }

    /// As [`QemuNbd::start_foreign`], to be written: one connection, under QEMU's locks. To be ended by
    /// [`QemuNbd::close_image`].
    pub(super) fn start_foreign_write(serve: &Serve<'_>, format: Foreign) -> Result<Self> {
        Self::start_private(serve, What::Write(format))
    }

    fn start_private(serve: &Serve<'_>, what: What) -> Result<Self> {
        let dir = private_dir(serve.runtime_dir)?;
        let socket = dir.path().join("s");
        if socket.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(Error::new(Kind::Config, "the path of the runtime directory is too long for a socket")
                .path(serve.runtime_dir));
        }
        Self::spawn(serve, what, socket, Some(dir))
    }

    /// As [`QemuNbd::start`], on a socket where the operator wants it, in a directory that exists. Whoever may connect
    /// to it reads the disk. [`Kind::Conflict`] if something is there already.
    pub fn start_at(chain: &Chain, socket: &Path) -> Result<Self> {
        if socket.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(Error::new(Kind::Usage, "the path is too long for a socket").path(socket));
        }
        match std::fs::symlink_metadata(socket) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io("cannot look at the place of the socket", socket, e)),
            Ok(_) => return Err(Error::new(Kind::Conflict, "something is there already").path(socket)),
        }
        let serve = Serve { chain, runtime_dir: Path::new(""), force_share: false, connections: 16, bitmap: None };
        Self::spawn(&serve, What::Chain, socket.to_owned(), None)
    }

    fn spawn(serve: &Serve<'_>, what: What, socket: PathBuf, dir: Option<TempDir>) -> Result<Self> {
        let access = if serve.force_share { Access::ReadUnlocked } else { Access::Read };
        let image = match what {
            What::Chain => blockdev::describe(&serve.chain.0, access)?,
            What::Read(format) => blockdev::describe_foreign(serve.chain.top(), format, access)?,
            What::Write(format) => blockdev::describe_foreign(serve.chain.top(), format, Access::Write)?,
        };
        let mut command = program::command("QEMU_NBD", "qemu-nbd");
        if !matches!(what, What::Write(_)) {
            command.arg("--read-only");
        }
        command.arg("--persistent").arg("--socket").arg(&socket);
        // One more, for the connection that asks whether it serves.
        command.arg(format!("--shared={}", serve.connections.max(1) + 1));
        if let Some(bitmap) = serve.bitmap {
            command.arg(format!("--bitmap={bitmap}"));
        }
        command.arg("--").arg(image);
        let mut child = program::spawn(command)?;
        // Nobody reads what it says on its output, and it says nothing there.
        drop(child.stdout.take());
        let complaints = match Listener::stderr(&mut child) {
            Ok(listener) => Some(listener),
            Err(e) => {
                let _ = program::end(&mut child);
                return Err(e);
            }
        };
        let mut server = Self { child, dir, socket, complaints };
        server.wait_until_it_serves(serve.chain.top())?;
        Ok(server)
    }

    /// Path of the unix socket on which the child serves. The socket is removed with this value.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Process id of the child.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the child still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        let ended = self.child.try_wait().map_err(|e| Error::from_io("cannot wait for qemu-nbd", e))?;
        Ok(ended.is_none())
    }

    /// Removes the socket and its directory. Connections that exist go on, new ones are impossible, and nothing is left
    /// on the disk should we be killed.
    pub fn close_the_door(&mut self) {
        // Gone already where qemu-nbd could tidy up itself.
        let _ = std::fs::remove_file(&self.socket);
        if let Some(dir) = self.dir.take() {
            let path = dir.path().to_owned();
            if let Err(e) = dir.close() {
                tracing::warn!(path = %path.display(), error = %e, "cannot remove the socket of qemu-nbd");
            }
        }
    }

    /// Ends the child and waits until it is gone; then nothing of ours has the images open. At most 15 seconds.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    /// As [`QemuNbd::stop`], of a child that served for writing: it closes the image first, at most 2 minutes. `Io` if
    /// it may not have done so.
    pub(super) fn close_image(mut self) -> Result<()> {
        let ended = program::end_well(&mut self.child);
        self.close_the_door();
        let status = ended?;
        if status.success() {
            return Ok(());
        }
        let words = self.complaints.take().map(Listener::text).unwrap_or_default();
        let why = if words.is_empty() { status.to_string() } else { words };
        Err(Error::new(Kind::Io, "qemu-nbd did not end well, and may not have closed the image").source(why))
    }

    fn end(&mut self) -> Result<()> {
        let ended = program::end(&mut self.child);
        self.close_the_door();
        ended
    }

    /// Waits for the greeting. A connection alone means nothing: qemu-nbd listens before it has opened the image.
    fn wait_until_it_serves(&mut self, top: &Layer) -> Result<()> {
        let deadline = Instant::now() + START_MAX;
        let mut pause = Duration::from_millis(1);
        let mut door: Option<UnixStream> = None;
        while Instant::now() < deadline {
            match &mut door {
                None => door = UnixStream::connect(&self.socket).ok(),
                Some(stream) => match greeting(stream) {
                    Ok(true) => return Ok(()),
                    // Silence: it still opens the image.
                    Ok(false) => {}
                    // It hung up, which is how its end begins.
                    Err(_) => door = None,
                },
            }
            let ended = self.child.try_wait().map_err(|e| Error::from_io("cannot wait for qemu-nbd", e))?;
            if let Some(status) = ended {
                let words = self.complaints.take().map(Listener::text).unwrap_or_default();
                let why = if words.is_empty() { status.to_string() } else { words };
                return Err(Error::new(Kind::Refused, "qemu-nbd cannot open the image").path(&top.path).source(why));
            }
            if door.is_none() {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(20));
            }
        }
        let what = format!("qemu-nbd does not serve the image within {} seconds", START_MAX.as_secs());
        Err(Error::new(Kind::Interrupted, what).path(&top.path))
    }
}

/// Whether the server has begun to speak; waits for it a little. An error: it hung up.
fn greeting(stream: &mut UnixStream) -> std::io::Result<bool> {
    use std::io::ErrorKind::{Interrupted, UnexpectedEof, WouldBlock};
    stream.set_read_timeout(Some(Duration::from_millis(50)))?;
    match stream.read(&mut [0]) {
        Ok(0) => Err(UnexpectedEof.into()),
        Ok(_) => Ok(true),
        Err(e) if matches!(e.kind(), WouldBlock | Interrupted) => Ok(false),
        Err(e) => Err(e),
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        // After `stop` this finds the child reaped and does nothing.
        if let Err(e) = self.end() {
            tracing::error!(pid = self.child.id(), error = %e.chain(), "cannot end qemu-nbd");
        }
    }
}

/// A fresh directory that only we may enter.
fn private_dir(runtime_dir: &Path) -> Result<TempDir> {
    let failed = |e| Error::io("cannot make a directory for the socket of qemu-nbd", runtime_dir, e);
    std::fs::create_dir_all(runtime_dir).map_err(failed)?;
    let only_us = std::fs::Permissions::from_mode(0o700);
    tempfile::Builder::new().prefix("nbd").rand_bytes(8).permissions(only_us).tempdir_in(runtime_dir).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Format;

    #[test]
    fn a_runtime_directory_too_long_for_a_socket_is_a_matter_of_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(100));
        let chain =
            Chain(vec![Layer { path: "/none".into(), format: Format::Raw, block_device: false, data_file: None }]);
        let serve = Serve { chain: &chain, runtime_dir: &long, force_share: false, connections: 1, bitmap: None };
        assert_eq!(QemuNbd::start(&serve).err().unwrap().kind(), Kind::Config);
        assert_eq!(std::fs::read_dir(&long).unwrap().count(), 0, "the private directory is gone");
    }
}
