//! Channels to the agent on another host through the user's own `ssh`: one master connection per target, shared by all
//! channels (crate `openssh`, native multiplexing). The user's configuration, ssh agent and ProxyJump apply; where it
//! names no cipher, one that the processor is good at is preferred (`config`).
//!
//! The crate is asynchronous; its two threads live here, and what leaves this file are plain blocking pipes.
//!
//! Rules learned (each was tried)
//! - stderr is always drained: 64 KiB of it would stop the agent.
//! - The path of the control directory has at most 61 bytes: a socket below it must fit `sun_path`.
//! - Neither end of file nor an exit code ends a session: the protocol says its own last word, since ssh cannot tell a
//!   killed program from a lost connection.
//! - A master outlives a SIGKILL of this process; it ends after [`SshOptions::idle_persist`] without a channel, and the
//!   channels end at once, because the kernel closes our pipes. On every other way out it is ended ([`end_masters`]).

mod config;
mod explain;
mod masters;

use super::pipe::{PipeReader, PipeWriter};
use super::stderr::Tail;
use super::target::SshTarget;
use super::{Channel, Closer, Service, Transport};
use crate::error::{Error, Kind, Result};
use openssh::{Child, ControlPersist, KnownHosts, Session, SessionBuilder, Stdio};
use std::fmt;
use std::future::Future;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How to reach a target, where the user's ssh configuration is not enough.
#[derive(Debug, Clone)]
pub struct SshOptions {
    /// Only this key is offered (`-i` with IdentitiesOnly).
    pub identity_file: Option<PathBuf>,
    /// Read instead of the user's and the system's configuration (`-F`).
    pub config_file: Option<PathBuf>,
    /// File with the host keys to trust. `None`: the files that ssh's configuration names.
    pub known_hosts_file: Option<PathBuf>,
    /// Where the master's socket lives: private to this user, at most 61 bytes long. `None`: below the user's runtime
    /// directory, or `/run/virt-replica/ssh` for root, or a new directory in `/tmp`.
    pub control_directory: Option<PathBuf>,
    /// Accept and remember the key of a host never seen. A changed key is refused all the same.
    pub accept_new_host_key: bool,
    /// The agent's program on the host and leading arguments, each passed as one word; `agent --root ROOT` follows.
    pub agent_command: Vec<String>,
    /// What the agent is asked to serve; a forced command on the host may decide otherwise.
    pub service: Service,
    /// For each address of the host.
    pub connect_timeout: Duration,
    /// A connection that answers none of three questions at this interval is dead.
    pub alive_interval: Duration,
    /// The master ends after this long without a channel; the next `open` starts a new one.
    pub idle_persist: Duration,
}

impl Default for SshOptions {
    fn default() -> Self {
        Self {
            identity_file: None,
            config_file: None,
            known_hosts_file: None,
            control_directory: None,
            accept_new_host_key: false,
            agent_command: vec!["virt-replica".to_owned()],
            service: Service::Store,
            connect_timeout: Duration::from_secs(15),
            alive_interval: Duration::from_secs(5),
            idle_persist: Duration::from_secs(600),
        }
    }
}

/// Longest path of a control directory, in bytes; one more and ssh fails with "unix_listener: path too long".
const CONTROL_DIRECTORY_MAX: usize = 61;
/// How long an agent whose input has ended may take to end.
const END_WAIT: Duration = Duration::from_secs(5);
/// How long the last words on stderr may take after that.
const LAST_WORDS_WAIT: Duration = Duration::from_millis(500);

/// One target over ssh. Connects when the first channel is opened, and again when the master has gone.
pub struct SshTransport {
    target: SshTarget,
    options: SshOptions,
    control: ControlDirectory,
    edge: Arc<Edge>,
    session: Mutex<Option<Arc<Session>>>,
}

impl SshTransport {
    /// Checks what can be checked here (files, the control directory); nothing is sent yet.
    pub fn connect(target: &SshTarget, options: SshOptions) -> Result<SshTransport> {
        // ssh only says "permission denied" when the key file does not exist.
        for (what, path) in
            [("cannot use the ssh key", &options.identity_file), ("cannot use it", &options.config_file)]
        {
            if let Some(path) = path {
                std::fs::metadata(path).map_err(|e| Error::io(what, path, e))?;
            }
        }
        if options.agent_command.is_empty() {
            return Err(Error::new(Kind::Config, "the agent's command is empty"));
        }
        let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let control = ControlDirectory::choose(options.control_directory.as_deref(), runtime_dir.as_deref())?;
        Ok(SshTransport {
            target: target.clone(),
            options,
            control,
            edge: Arc::new(Edge::new()?),
            session: Mutex::default(),
        })
    }

    fn builder(&self) -> Result<SessionBuilder> {
        let options = &self.options;
        let mut builder = SessionBuilder::default();
        builder
            .known_hosts_check(if options.accept_new_host_key { KnownHosts::Add } else { KnownHosts::Strict })
            .connect_timeout(options.connect_timeout)
            .server_alive_interval(options.alive_interval)
            .control_directory(self.control.path());
        let idle_s = usize::try_from(options.idle_persist.as_secs()).ok().and_then(NonZeroUsize::new);
        builder.control_persist(idle_s.map_or(ControlPersist::ClosedAfterInitialConnection, ControlPersist::IdleFor));
        if let Some(user) = &self.target.user {
            builder.user(user.clone());
        }
        if let Some(port) = self.target.port {
            builder.port(port);
        }
        if let Some(path) = &options.identity_file {
            builder.keyfile(path);
        }
        let prepared = config::prepare(self.control.path(), options.config_file.as_deref())?;
        if let Some(path) = prepared.as_ref().or(options.config_file.as_ref()) {
            builder.config_file(path);
        }
        if let Some(path) = &options.known_hosts_file {
            builder.user_known_hosts_file(path);
        }
        Ok(builder)
    }

    fn held(&self) -> MutexGuard<'_, Option<Arc<Session>>> {
        self.session.lock().expect("nothing panics while it connects")
    }

    /// The living master, a new one if need be.
    fn session(&self) -> Result<Arc<Session>> {
        let mut held = self.held();
        let limit = self.options.connect_timeout;
        if let Some(session) = held.as_ref() {
            let asked = Arc::clone(session);
            match self.edge.run(limit, async move { asked.check().await }) {
                Some(Ok(())) => return Ok(Arc::clone(session)),
                _ => tracing::info!(host = %self.target.host, "the ssh connection has gone; connecting again"),
            }
            *held = None;
        }
        let (builder, host) = (self.builder()?, self.target.host.clone());
        // A host may have several addresses, each with its own timeout.
        let limit = limit * 2 + Duration::from_secs(5);
        masters::begin_below(self.control.path());
        let connected = self.edge.run(limit, async move { builder.connect_mux(host).await });
        let session = match connected {
            Some(Ok(session)) => Arc::new(session),
            Some(Err(error)) => return Err(explain::connect(&self.target, &error)),
            None => {
                masters::end_connecting(self.control.path());
                let what = format!("{} did not answer within {} s", self.target.host, limit.as_secs());
                return Err(Error::new(Kind::Unavailable, what));
            }
        };
        masters::remember(session.control_socket());
        *held = Some(Arc::clone(&session));
        Ok(session)
    }
}

/// Ends every master that this process started and that is still there. For the end of the process: a thread may be
/// waiting for an answer that never comes, and its channel would keep the master. Blocks for at most two seconds.
pub fn end_masters() {
    masters::end_all();
}

impl fmt::Debug for SshTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SshTransport({})", self.target)
    }
}

impl Transport for SshTransport {
    fn host(&self) -> &str {
        &self.target.host
    }

    fn open(&self) -> Result<Channel> {
        self.open_as(self.options.service)
    }

    fn open_as(&self, service: Service) -> Result<Channel> {
        let mut words = self.options.agent_command.clone();
        words.extend(service.words(&self.target.root));
        let launch = |session: &Arc<Session>| {
            self.edge.run(self.options.connect_timeout, start(Arc::clone(session), words.clone()))
        };
        let mut session = self.session()?;
        let mut started = launch(&session);
        if matches!(started, Some(Err(openssh::Error::Disconnected))) {
            // It ended between the question and the call, as an idle master may at any moment.
            session = self.session()?;
            started = launch(&session);
        }
        let (child, pipes) = match started {
            Some(Ok(started)) => started,
            Some(Err(error)) => return Err(explain::spawn(&self.target.host, &error)),
            None => {
                let what = format!("{} started no agent in time", self.target.host);
                return Err(Error::new(Kind::Unavailable, what));
            }
        };
        let pipes = pipes.map_err(|e| Error::from_io("cannot use the pipes of ssh", e))?;
        let tail = Arc::new(Mutex::new(Tail::default()));
        let drain = self.edge.spawn(drain(pipes.stderr, Arc::clone(&tail)));
        let closer =
            SshCloser { host: self.target.host.clone(), edge: Arc::clone(&self.edge), session, child, tail, drain };
        let input = PipeWriter::new(pipes.stdin).map_err(|e| Error::from_io("cannot use the pipes of ssh", e))?;
        let output = PipeReader::new(pipes.stdout);
        Ok(Channel { input: Box::new(input), output: Box::new(output), closer: Box::new(closer) })
    }

    /// Ends the master. If channels are still open it ends with the last of them.
    fn close(&self) -> Result<()> {
        let Some(session) = self.held().take() else { return Ok(()) };
        let Ok(session) = Arc::try_unwrap(session) else { return Ok(()) };
        match self.edge.run(END_WAIT, async move { session.close().await }) {
            // It had gone by itself.
            Some(Ok(()) | Err(openssh::Error::Disconnected)) => Ok(()),
            Some(Err(error)) => {
                Err(Error::new(Kind::Io, format!("cannot end the ssh connection to {}", self.target.host))
                    .source(error))
            }
            None => {
                let what = format!("the ssh connection to {} did not end in time", self.target.host);
                Err(Error::new(Kind::Unavailable, what))
            }
        }
    }
}

/// A started program's ends, out of the asynchronous world.
struct Pipes {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: openssh::ChildStderr,
}

type Started = (Child<Arc<Session>>, std::io::Result<Pipes>);

async fn start(session: Arc<Session>, words: Vec<String>) -> Result<Started, openssh::Error> {
    // Each word is quoted for the login shell that sshd runs it with.
    let mut command = session.arc_command(words[0].clone());
    command.args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().await?;
    let (stdin, stdout, stderr) = (child.stdin().take(), child.stdout().take(), child.stderr().take());
    let pipes = match (stdin, stdout, stderr) {
        // `into_owned_fd` also takes O_NONBLOCK away, which tokio had set.
        (Some(stdin), Some(stdout), Some(stderr)) => {
            stdin.into_owned_fd().and_then(|stdin| stdout.into_owned_fd().map(|stdout| Pipes { stdin, stdout, stderr }))
        }
        _ => Err(std::io::ErrorKind::BrokenPipe.into()),
    };
    Ok((child, pipes))
}

async fn drain(mut stderr: openssh::ChildStderr, tail: Arc<Mutex<Tail>>) {
    let mut buf = [0u8; 4096];
    while let Ok(n @ 1..) = stderr.read(&mut buf).await {
        tail.lock().expect("bytes are moved under this lock, nothing else").push(&buf[..n]);
    }
}

struct SshCloser {
    host: String,
    edge: Arc<Edge>,
    session: Arc<Session>,
    child: Child<Arc<Session>>,
    tail: Arc<Mutex<Tail>>,
    drain: JoinHandle<()>,
}

impl Closer for SshCloser {
    /// On a timeout the channel is cut: whoever still writes into it gets a broken pipe.
    fn close(self: Box<Self>) -> Result<()> {
        let SshCloser { host, edge, session, child, tail, drain } = *self;
        let watched = Arc::clone(&session);
        let ended = edge.run(END_WAIT * 2 + LAST_WORDS_WAIT, async move {
            let ended = timeout(END_WAIT, child.wait()).await.ok();
            let abort = drain.abort_handle();
            if timeout(LAST_WORDS_WAIT, drain).await.is_err() {
                abort.abort();
            }
            let connected = matches!(timeout(END_WAIT, watched.check()).await, Ok(Ok(())));
            (ended, connected)
        });
        let said = tail.lock().expect("bytes are moved under this lock, nothing else").said();
        match ended {
            Some((Some(ended), connected)) => {
                explain::end(&host, ended, &said, (!connected).then(|| master_log(&session)))
            }
            Some((None, _)) | None => {
                let what = format!("the agent on {host} did not end within {} s", END_WAIT.as_secs());
                Err(Error::new(Kind::Unavailable, what))
            }
        }
    }
}

/// What the master wrote before it died, which native multiplexing does not tell.
fn master_log(session: &Session) -> String {
    std::fs::read_to_string(session.control_socket().with_file_name("log")).unwrap_or_default()
}

/// The asynchronous world: two threads, entered only from plain ones.
struct Edge(Option<Runtime>);

impl Edge {
    fn new() -> Result<Edge> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("ssh")
            .enable_all()
            .build()
            .map_err(|e| Error::from_io("cannot start the threads for ssh", e))?;
        Ok(Edge(Some(runtime)))
    }

    fn spawn<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.0.as_ref().expect("taken in drop only").spawn(future)
    }

    /// Waits for the future, at most `limit`: then `None`, and the future is dropped. Unlike `block_on` it may be
    /// called on a thread of another runtime.
    fn run<T: Send + 'static>(&self, limit: Duration, future: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let (sender, receiver) = mpsc::channel();
        self.spawn(async move {
            let _ = sender.send(timeout(limit, future).await.ok());
        });
        receiver.recv().ok().flatten()
    }
}

impl Drop for Edge {
    /// Without waiting: a plain drop of a runtime waits, and panics on a thread of another one.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

enum ControlDirectory {
    Kept(PathBuf),
    /// Removed with the transport.
    Temporary(tempfile::TempDir),
}

impl ControlDirectory {
    fn path(&self) -> &Path {
        match self {
            ControlDirectory::Kept(path) => path,
            ControlDirectory::Temporary(dir) => dir.path(),
        }
    }

    fn choose(given: Option<&Path>, runtime_dir: Option<&Path>) -> Result<ControlDirectory> {
        if let Some(given) = given {
            return private_directory(given).map(ControlDirectory::Kept);
        }
        let system = rustix::process::geteuid().is_root().then(|| PathBuf::from("/run/virt-replica/ssh"));
        let candidates = runtime_dir.filter(|dir| dir.is_absolute()).map(|dir| dir.join("virt-replica/ssh"));
        for candidate in candidates.into_iter().chain(system) {
            if let Ok(path) = private_directory(&candidate) {
                return Ok(ControlDirectory::Kept(path));
            }
        }
        // Not $TMPDIR: it may be anywhere, and the path must be short.
        tempfile::Builder::new()
            .prefix("vr-ssh-")
            .tempdir_in("/tmp")
            .map(ControlDirectory::Temporary)
            .map_err(|e| Error::io("cannot make a directory for the ssh control socket", "/tmp", e))
    }
}

/// Makes the directory if it is missing. Whoever may write into it could put a master of his own there.
fn private_directory(path: &Path) -> Result<PathBuf> {
    let what = "cannot use the ssh control directory";
    if path.as_os_str().len() > CONTROL_DIRECTORY_MAX {
        let why = format!("its path is longer than {CONTROL_DIRECTORY_MAX} bytes: {what}");
        return Err(Error::new(Kind::Config, why).path(path));
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| Error::io(what, path, e))?;
    let metadata = std::fs::symlink_metadata(path).map_err(|e| Error::io(what, path, e))?;
    if !metadata.is_dir() || metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        let hint = "it must be a directory of this user that nobody else may write into";
        return Err(Error::new(Kind::Config, what).path(path).hint(hint));
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_control_directory_is_short_and_private() {
        let dir = tempfile::Builder::new().prefix("vr").tempdir_in("/tmp").unwrap();
        let kept = ControlDirectory::choose(None, Some(dir.path())).unwrap();
        assert_eq!(kept.path(), dir.path().join("virt-replica/ssh"));

        let long = dir.path().join("x".repeat(CONTROL_DIRECTORY_MAX));
        assert_eq!(private_directory(&long).unwrap_err().kind(), Kind::Config);

        std::fs::set_permissions(kept.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = private_directory(kept.path()).unwrap_err();
        assert!(error.hint_text().unwrap().contains("nobody else"), "{error}");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(private_directory(&link).is_err());
    }

    #[test]
    fn a_missing_key_file_is_named_before_anything_is_sent() {
        let target = SshTarget { user: None, host: "b".into(), port: None, root: "/srv".into() };
        let options = SshOptions { identity_file: Some("/nonexistent/key".into()), ..SshOptions::default() };
        let error = SshTransport::connect(&target, options).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.to_string().contains("/nonexistent/key"), "{error}");
    }

    /// `recv` instead of `block_on`: a caller on a thread of another runtime must not panic.
    #[test]
    fn the_edge_may_be_entered_from_another_runtime() {
        let outer = tokio::runtime::Builder::new_current_thread().build().unwrap();
        outer.block_on(async {
            let edge = Edge::new().unwrap();
            assert_eq!(edge.run(Duration::from_secs(5), async { 7 }), Some(7));
            assert_eq!(edge.run(Duration::from_millis(1), std::future::pending::<()>()), None);
        });
    }
}
