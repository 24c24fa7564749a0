//! The ssh masters that this process started. Each ends with the process, on every way out but SIGKILL; one that goes
//! to the background in the very moment of that end is missed, and ends by itself.
//!
//! A master is a process of its own: `ssh` leaves it behind, in the background, as soon as it has connected. Dropping
//! its session ends it. But a thread that is still waiting for an answer when the process ends never drops anything,
//! and an `ssh` that still connects becomes a master later. Both would stay for [`idle_persist`](super::SshOptions).

use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long the end of all of them may take.
const END_WITHIN: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Control sockets; those of masters that have ended are no longer there.
static SOCKETS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Directories of the control sockets of every master that was ever begun.
static DIRECTORIES: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Remembers that masters are begun with their sockets below `directory`. Called before the first `ssh` starts.
pub(super) fn begin_below(directory: &Path) {
    DIRECTORIES.lock().unwrap_or_else(|e| e.into_inner()).insert(directory.to_owned());
}

/// Remembers a master by its control socket.
pub(super) fn remember(socket: &Path) {
    let mut sockets = SOCKETS.lock().unwrap_or_else(|e| e.into_inner());
    sockets.retain(|known| known.exists());
    sockets.push(socket.to_owned());
}

/// Ends every `ssh` that still connects, and every master that is left. Blocks for at most two seconds.
/// Called when the process is about to end.
pub(super) fn end_all() {
    let until = Instant::now() + END_WITHIN;
    let directories = std::mem::take(&mut *DIRECTORIES.lock().unwrap_or_else(|e| e.into_inner()));
    directories.iter().for_each(|directory| end_connecting(directory));
    let sockets = std::mem::take(&mut *SOCKETS.lock().unwrap_or_else(|e| e.into_inner()));
    let ended = sockets.iter().filter(|socket| socket.exists()).filter_map(|socket| {
        // No host is asked and no configuration read: the socket says it all.
        let mut exit = Command::new("ssh");
        exit.args(["-F", "/dev/null", "-O", "exit", "-S"]).arg(socket).arg("-");
        exit.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()
    });
    for mut asked in ended.collect::<Vec<_>>() {
        while matches!(asked.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(POLL_INTERVAL);
        }
        // It has ended, or its master does not answer: then it is not worth a longer wait.
        let _ = asked.kill();
        let _ = asked.wait();
    }
}

/// Ends children of this process that are an `ssh` on its way to be a master with its socket below `directory`. An
/// attempt was given up; without this it would connect later, and nobody would know of it.
pub(super) fn end_connecting(directory: &Path) {
    for child in children() {
        let Ok(words) = std::fs::read(format!("/proc/{child}/cmdline")) else { continue };
        if is_master(&words, directory) {
            tracing::debug!(pid = child, "an ssh that still connects is ended");
            if let Some(pid) = i32::try_from(child).ok().and_then(Pid::from_raw) {
                // Our child, and not yet waited for: the number is still its own.
                let _ = kill_process(pid, Signal::TERM);
            }
        }
    }
}

/// Children of all threads of this process. None where the kernel does not list them.
fn children() -> Vec<u32> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// Whether this command line, words ended by zeros, is that of a master with its socket below `directory`.
fn is_master(words: &[u8], directory: &Path) -> bool {
    let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
    let socket = words.windows(2).find(|pair| pair[0] == b"-S").map(|pair| pair[1]);
    let is_below = socket.is_some_and(|socket| Path::new(std::ffi::OsStr::from_bytes(socket)).starts_with(directory));
    is_below && words.contains(&b"-M".as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_master_is_known_by_its_words() {
        let of = |words: &str| is_master(&words.replace(' ', "\0").into_bytes(), Path::new("/run/vr/ssh"));
        assert!(of("ssh -E /run/vr/ssh/x/log -S /run/vr/ssh/x/master -M -f -N b"));
        for other in [
            "ssh -E /run/vr/ssh/x/log -S /run/vr/ssh/x/master b",
            "ssh -S /run/vr/sshd/x/master -M b",
            "ssh -M b",
            "ssh -M -S",
            "",
        ] {
            assert!(!of(other), "{other}");
        }
    }

    /// A child that looks like one is found and ended, its neighbour is not.
    #[test]
    fn a_child_that_still_connects_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let start = |socket: &Path| {
            let words = ["-c", "read line; :", "ssh", "-M", "-S"];
            let mut command = Command::new("/bin/sh");
            command.args(words).arg(socket).stdin(Stdio::piped()).spawn().unwrap()
        };
        let (mut ours, mut other) = (start(&dir.path().join("x/master")), start(Path::new("/elsewhere/master")));
        begin_below(dir.path());
        // As the process does when it ends.
        end_all();
        let by_signal = std::os::unix::process::ExitStatusExt::signal(&ours.wait().unwrap());
        assert_eq!(by_signal, Some(libc::SIGTERM));
        assert!(other.try_wait().unwrap().is_none(), "it was left alone");
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
