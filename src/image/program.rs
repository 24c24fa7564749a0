//! Running QEMU's tools: found, started, bounded in what they say and how long they take, and ended.
//!
//! Invariants
//! - A child dies with us, even when we are killed: the kernel is asked for it (`PR_SET_PDEATHSIG`).
//! - Only processes started here are signalled, by pid, before they are reaped.
//! - Nothing passes through a shell; the environment's language does not reach what we parse (`LC_ALL=C`).

use crate::error::{Error, Kind, Result};
use rustix::process::{Pid, Signal};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes kept of a program's standard output; more is an error. A check of a broken image lists each fault.
const STDOUT_MAX: usize = 16 << 20;
/// Bytes kept of a program's complaints: the first ones, which name the cause.
const STDERR_MAX: usize = 16 << 10;

/// How long a child may take to follow SIGTERM, and then SIGKILL.
const GRACE: Duration = Duration::from_secs(5);
const GRACE_KILLED: Duration = Duration::from_secs(10);
/// How long it may take where it has something to write down first.
const GRACE_WRITING: Duration = Duration::from_secs(120);

/// The program `name`, or what the environment variable `variable` says instead, in a process group of its own (an
/// interrupt typed at the terminal is ours to handle), without input.
pub(super) fn command(variable: &str, name: &str) -> Command {
    let program = std::env::var_os(variable).filter(|v| !v.is_empty()).unwrap_or_else(|| name.into());
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").stdin(Stdio::null()).process_group(0);
    command
}

/// Starts the child with its output piped. It is killed when this process dies, whatever kills it.
pub(super) fn spawn(mut command: Command) -> Result<Child> {
    let us = rustix::process::getpid();
    let die_with_us = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // We may have died before the request was made; then nobody would ever be told.
        match rustix::process::getppid() {
            Some(parent) if parent == us => Ok(()),
            _ => Err(std::io::Error::from(rustix::io::Errno::SRCH)),
        }
    };
    // SAFETY: the closure runs between fork and exec. It makes two system calls and builds an error from a number: no
    // allocation, no locks, nothing that another thread of the parent could have left half done.
    unsafe { command.pre_exec(die_with_us) };
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let program = command.get_program().to_os_string();
    from_lasting_thread(command).map_err(|e| {
        let missing = e.kind() == std::io::ErrorKind::NotFound;
        let error = Error::io("cannot start the program", &program, e);
        if missing { error.hint("install QEMU's tools (Debian: qemu-utils, Fedora: qemu-img)") } else { error }
    })
}

type Order = (Command, SyncSender<std::io::Result<Child>>);

/// Starts the child from a thread that lives as long as the process: the kernel's promise to kill a child with its
/// parent is kept when the *thread* that forked ends, and callers may be on a thread of a pool that ends when idle.
fn from_lasting_thread(command: Command) -> std::io::Result<Child> {
    static SPAWNER: Mutex<Option<Sender<Order>>> = Mutex::new(None);
    let (answer, answered) = sync_channel(1);
    {
        let mut spawner = SPAWNER.lock().unwrap_or_else(|e| e.into_inner());
        if spawner.is_none() {
            let (orders, inbox) = channel();
            std::thread::Builder::new().name("spawner".to_owned()).spawn(move || serve(inbox))?;
            *spawner = Some(orders);
        }
        let orders = spawner.as_ref().expect("set just above");
        orders.send((command, answer)).map_err(|_| std::io::Error::other("the spawner thread ended"))?;
    }
    answered.recv().map_err(|_| std::io::Error::other("the spawner thread ended"))?
}

fn serve(inbox: Receiver<Order>) {
    for (mut command, answer) in inbox {
        // An asker that went away drops the child's handle; it has asked for nothing else, so the child is ended.
        if let Err(unheard) = answer.send(command.spawn())
            && let Ok(mut child) = unheard.0
        {
            let _ = end(&mut child);
        }
    }
}

/// Collects what a stream says, up to a bound, on a thread; reads on to the end so that the writer never blocks.
pub(super) struct Listener(JoinHandle<(Vec<u8>, bool)>);

impl Listener {
    pub(super) fn stderr(child: &mut Child) -> Result<Self> {
        Self::to(child.stderr.take(), STDERR_MAX)
    }

    fn to(stream: Option<impl Read + Send + 'static>, keep: usize) -> Result<Self> {
        let listen = move || {
            let mut kept = Vec::new();
            let mut overflow = false;
            let mut stream = stream;
            let mut piece = [0u8; 8192];
            while let Some(Ok(n @ 1..)) = stream.as_mut().map(|s| s.read(&mut piece)) {
                let room = keep - kept.len();
                overflow |= n > room;
                kept.extend_from_slice(&piece[..n.min(room)]);
            }
            (kept, overflow)
        };
        let thread = std::thread::Builder::new().name("listener".to_owned()).spawn(listen);
        thread.map(Self).map_err(|e| Error::from_io("cannot start a thread", e))
    }

    /// What was said. Waits for the end of the stream, which comes with the end of the child.
    pub(super) fn heard(self) -> (Vec<u8>, bool) {
        self.0.join().unwrap_or_default()
    }

    pub(super) fn text(self) -> String {
        String::from_utf8_lossy(&self.heard().0).trim().to_owned()
    }
}

/// A program that ended.
pub(super) struct Finished {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Finished {
    /// An error of `kind` that carries what the program complained of.
    pub(super) fn error(&self, kind: Kind, what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
        let why = if self.stderr.is_empty() { self.status.to_string() } else { self.stderr.clone() };
        Error::new(kind, what).source(why)
    }
}

/// Runs the program to its end, or kills it at the deadline ([`Kind::Interrupted`]). Blocks.
pub(super) fn run(command: Command, deadline: Option<Duration>) -> Result<Finished> {
    let mut child = spawn(command)?;
    let started = Instant::now();
    let listeners = Listener::to(child.stdout.take(), STDOUT_MAX)
        .and_then(|stdout| Listener::stderr(&mut child).map(|stderr| (stdout, stderr)));
    let status = match &listeners {
        Ok(_) => wait(&mut child, deadline.map(|d| d.saturating_sub(started.elapsed()))),
        Err(_) => Ok(None),
    };
    let Ok(Some(status)) = status else {
        end(&mut child)?;
        listeners?;
        status.map_err(|e| Error::from_io("cannot wait for the program", e))?;
        return Err(Error::new(Kind::Interrupted, "the program did not end in time and was killed"));
    };
    let (stdout, stderr) = listeners?;
    let (stdout, overflow) = stdout.heard();
    if overflow {
        return Err(Error::new(Kind::Protocol, "the program says more than is believable"));
    }
    Ok(Finished { status, stdout, stderr: stderr.text() })
}

/// Waits for the child, at most so long.
pub(super) fn wait(child: &mut Child, at_most: Option<Duration>) -> std::io::Result<Option<ExitStatus>> {
    let Some(at_most) = at_most else { return child.wait().map(Some) };
    let deadline = Instant::now() + at_most;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// As [`end`], of a child that writes something down before it goes. An error means that it may not have done so: it
/// did not end in time, or not by itself.
pub(super) fn end_well(child: &mut Child) -> Result<ExitStatus> {
    let lost = |e| Error::from_io("cannot wait for the program", e);
    if child.try_wait().map_err(lost)?.is_none() {
        // Not reaped, so the pid is still its own.
        let _ = rustix::process::kill_process(Pid::from_child(child), Signal::TERM);
    }
    match wait(child, Some(GRACE_WRITING)).map_err(lost)? {
        Some(status) => Ok(status),
        None => {
            end(child)?;
            Err(Error::new(Kind::Io, "the program did not end in time and was killed"))
        }
    }
}

/// Ends the child: SIGTERM, a grace period, SIGKILL; waits until it is gone. An error means that it may not be.
pub(super) fn end(child: &mut Child) -> Result<()> {
    end_within(child, GRACE)
}

fn end_within(child: &mut Child, grace: Duration) -> Result<()> {
    for (signal, grace) in [(Signal::TERM, grace), (Signal::KILL, GRACE_KILLED)] {
        let lost = |e| Error::from_io("cannot wait for the program", e);
        if child.try_wait().map_err(lost)?.is_some() {
            return Ok(());
        }
        // Not reaped, so the pid is still its own.
        let _ = rustix::process::kill_process(Pid::from_child(child), signal);
        if wait(child, Some(grace)).map_err(lost)?.is_some() {
            return Ok(());
        }
    }
    Err(Error::new(Kind::Busy, format!("process {} does not end, not even killed", child.id()))
        .hint("its storage probably hangs; look at the process with 'ps' and at the kernel's log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut c = command("VIRT_REPLICA_NO_SUCH_VARIABLE", "sh");
        c.args(["-c", script]);
        c
    }

    #[test]
    fn output_status_and_complaints_come_back() {
        let done = run(shell("echo out; echo err >&2; exit 3"), None).unwrap();
        assert_eq!((done.status.code(), done.stdout.as_slice()), (Some(3), &b"out\n"[..]));
        assert!(done.error(Kind::Refused, "no").chain().contains("err"));
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed_and_reaped() {
        let started = Instant::now();
        let error = run(shell("exec sleep 1000"), Some(Duration::from_millis(50))).err().unwrap();
        assert_eq!(error.kind(), Kind::Interrupted);
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_program_that_ignores_the_term_signal_is_killed() {
        let mut child = spawn(shell("trap '' TERM; echo ready; while :; do sleep 1; done")).unwrap();
        let mut ready = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        end_within(&mut child, Duration::from_millis(200)).unwrap();
        assert!(child.try_wait().unwrap().is_some());
    }

    #[test]
    fn complaints_without_end_neither_block_the_program_nor_fill_memory() {
        let done = run(shell("head -c 1000000 /dev/zero | tr '\\0' x >&2"), Some(Duration::from_secs(30))).unwrap();
        assert!(done.status.success());
        assert_eq!(done.stderr.len(), STDERR_MAX);
    }

    #[test]
    fn a_missing_program_says_what_to_install() {
        let error = run(command("VIRT_REPLICA_NO_SUCH_VARIABLE", "no-such-program-here"), None).err().unwrap();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.hint_text().unwrap().contains("qemu-utils"));
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let mut child = std::thread::spawn(|| spawn(shell("exec sleep 1000")).unwrap()).join().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert!(child.try_wait().unwrap().is_none(), "killed with the thread that asked");
        end(&mut child).unwrap();
    }
}
