//! What a crash test stands on: a lab of its own, and our programs at work in it.
//!
//! Crash tests kill libvirtd, put other programs into the agent's place and leave corpses behind: each has a lab to
//! itself. `crash_machine` is what is replicated.

use super::support::{asked_again, rest_after};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The hard bound of every freeze and pause (I2).
pub const HELD_MAX: Duration = Duration::from_secs(10);
/// Patience of the tests: far beyond what anything may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks until there is an answer; the question is named in the failure.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    wait_within(what, PATIENCE, &mut ask)
}

pub fn wait_within<T>(what: &str, patience: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let give_up_at = Instant::now() + patience;
    loop {
        let asked = Instant::now();
        if let Some(answer) = ask() {
            return answer;
        }
        let left = give_up_at.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "waited {patience:?} in vain: {what}");
        sleep(rest_after(asked.elapsed()).min(left));
    }
}

/// A lab of two hosts; ends with the value.
pub struct Lab {
    pub dir: PathBuf,
}

impl Lab {
    pub fn up() -> Lab {
        // Short: QEMU's monitor socket below it has to fit into a socket's address.
        let dir = tempfile::Builder::new().prefix("vrc").tempdir_in("/var/tmp").unwrap().keep();
        let lab = Lab { dir };
        let program = Path::new(env!("CARGO_BIN_EXE_virt-replica"));
        let done = lab.command(&["up", "--bin", program.to_str().unwrap()]).output().unwrap();
        assert!(done.status.success(), "lab up: {}", text(&done));
        lab
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/lab"));
        command.args(args).env("VR_LAB_DIR", &self.dir).stdin(Stdio::null());
        command
    }

    /// A verb of the lab itself; fails the test if it fails.
    pub fn lab(&self, args: &[&str]) -> String {
        let done = self.command(args).output().unwrap();
        assert!(done.status.success(), "lab {args:?}: {}", text(&done));
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    /// However it ends. A `virsh` that lost its libvirtd to a crash (see tests/lab/lib/keep-libvirtd.sh) asks again;
    /// one that finds it killed by the test does not.
    pub fn try_exec(&self, host: &str, args: &[&str]) -> Output {
        let crashes = self.path(host, "/var/log/libvirt/crashes");
        let run = || self.command(&[&["exec", host], args].concat()).output().unwrap();
        asked_again(args, &crashes, run, |done| {
            (!done.status.success()).then(|| String::from_utf8_lossy(&done.stderr).into_owned())
        })
    }

    pub fn exec(&self, host: &str, args: &[&str]) -> String {
        let done = self.try_exec(host, args);
        assert!(done.status.success(), "{host}: {args:?}: {}", text(&done));
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    pub fn sh(&self, host: &str, script: &str) -> String {
        self.exec(host, &["bash", "-c", script])
    }

    /// A file of a host, as this test sees it.
    pub fn path(&self, host: &str, inside: &str) -> PathBuf {
        self.dir.join("host").join(host).join(inside.trim_start_matches('/'))
    }

    /// Puts a program in front of host b's agent that arms a failpoint in it; `None` takes it away.
    pub fn arm_agent(&self, failpoint: Option<&str>) {
        let program = env!("CARGO_BIN_EXE_virt-replica");
        let Some(failpoint) = failpoint else {
            self.lab(&["bin", "b", program]);
            return;
        };
        let real = self.path("b", "/lab/bin/virt-replica.real");
        if !real.exists() {
            fs::copy(program, &real).unwrap();
        }
        let _ = fs::remove_file(self.path("b", "/tmp/agent.err"));
        let wrapper = self.dir.join("wrapper");
        let script = format!(
            "#!/bin/sh\nVIRT_REPLICA_FAILPOINT={failpoint} exec /usr/local/bin/virt-replica.real \"$@\" 2>>/tmp/agent.err\n"
        );
        fs::write(&wrapper, script).unwrap();
        fs::set_permissions(&wrapper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        self.lab(&["bin", "b", wrapper.to_str().unwrap()]);
    }

    /// What an armed agent said.
    pub fn agent_said(&self) -> String {
        fs::read_to_string(self.path("b", "/tmp/agent.err")).unwrap_or_default()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("VR_LAB_KEEP").is_some_and(|v| !v.is_empty()) {
            eprintln!("the lab was left running: VR_LAB_DIR={} tests/lab/lab down", self.dir.display());
            return;
        }
        let _ = self.command(&["down"]).output();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

pub fn text(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A program of ours at work in host a. Its output goes to files: a pipe would be held open by the dead-man.
pub struct Driver {
    pub child: Child,
    pub out: PathBuf,
    pub err: PathBuf,
}

/// How it ended, and what it had said.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
    pub at: Instant,
}

impl Ended {
    pub fn killed(&self) -> bool {
        self.status.signal() == Some(9) || self.status.code() == Some(137)
    }

    /// Whether these words are in what it printed, however the lines were broken.
    pub fn says(&self, words: &str) -> bool {
        let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        flat(&self.out).contains(words) || flat(&self.err).contains(words)
    }

    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    #[track_caller]
    pub fn ok(self, why: &str) -> Ended {
        assert_eq!(self.code(), Some(0), "{why}: {self:#?}");
        self
    }
}

impl Driver {
    pub fn output(&self) -> String {
        fs::read_to_string(&self.out).unwrap_or_default()
    }

    /// Ends it from outside; a second time is no error.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// Waits until it stands at a failpoint that is armed with a sleep.
    #[track_caller]
    pub fn stands_at(&mut self, point: &str) {
        let mark = format!("failpoint {point}:");
        wait_for(&format!("the driver at {point}"), || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("ended ({status}) before it came to {point}: {}", self.said());
            }
            self.said().contains(&mark).then_some(())
        });
    }

    /// Its process id inside host a.
    pub fn pid(&self) -> String {
        wait_for("the driver's process id", || {
            let id = fs::read_to_string(self.out.with_extension("pid")).ok()?;
            id.ends_with('\n').then(|| id.trim().to_owned())
        })
    }

    /// As [`Driver::wait`], for one that was stopped: what the lab put in front of it has stopped with it, and is only
    /// told to go on when the driver is dead.
    #[track_caller]
    pub fn wait_stopped(self, lab: &Lab) -> Ended {
        let dead = format!("cut -d' ' -f3 /proc/{}/stat 2>/dev/null || echo Z", self.pid());
        wait_for("the stopped driver's end", || (lab.sh("a", &dead).trim() == "Z").then_some(()));
        let front = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(front, rustix::process::Signal::CONT).unwrap();
        self.wait()
    }

    #[track_caller]
    pub fn wait(mut self) -> Ended {
        let end = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                // What it said last tells where it hangs.
                None if Instant::now() > end => panic!("the driver does not end:\n{}\n{}", self.output(), self.said()),
                None => sleep(Duration::from_millis(10)),
            }
        };
        let at = Instant::now();
        let out = fs::read_to_string(&self.out).unwrap();
        Ended { status, out, err: self.said(), at }
    }
}

/// A script beside the test.
pub struct Script(pub Child);

impl Script {
    pub fn wait_end(&mut self) {
        wait_for("the script's end", || self.0.try_wait().unwrap());
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
