//! Programs that an operator has run at certain moments. No shell; a program and its arguments.

use crate::error::{Error, Kind, Result};
use crate::trust;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A program that is told of something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// The program and its arguments; never empty.
    pub command: Vec<String>,
    /// After this long it is killed, with all it started.
    pub timeout: Duration,
}

/// What a hook is told, beside the environment of whoever runs it.
pub type Env = Vec<(String, String)>;

impl Hook {
    /// [`Kind::Config`] if others than root and this user may change the program. Of its arguments nothing is known.
    pub fn check(&self) -> Result<()> {
        trust::check_program(&self.command[0])
    }

    /// Runs it and waits for its end. What it prints on stderr goes where ours goes. [`Kind::Interrupted`]: it took
    /// longer than its timeout. Blocks for no longer than that.
    pub fn run(&self, env: &Env) -> Result<ExitStatus> {
        self.check()?;
        let program = &self.command[0];
        let fail = |e| Error::io("the hook cannot be run", program, e);
        let mut command = Command::new(program);
        command.args(&self.command[1..]).envs(env.iter().map(|(k, v)| (k, v))).process_group(0);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(fail)?;
        let until = Instant::now() + self.timeout;
        loop {
            if let Some(status) = child.try_wait().map_err(fail)? {
                return Ok(status);
            }
            if Instant::now() >= until {
                kill_group(&mut child);
                let what = format!("the hook was killed after {} s", self.timeout.as_secs());
                return Err(Error::new(Kind::Interrupted, what).path(program));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn kill_group(child: &mut Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    }
    // It was killed: this does not wait long.
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(words: &[&str], timeout: Duration) -> Hook {
        Hook { command: words.iter().map(|w| (*w).to_owned()).collect(), timeout }
    }

    #[test]
    fn it_is_told_and_its_end_is_heard() {
        let ten = Duration::from_secs(10);
        let env = vec![("VIRT_REPLICA_EVENT".to_owned(), "a b".to_owned())];
        let told = hook(&["/bin/sh", "-c", "test \"$VIRT_REPLICA_EVENT\" = 'a b'"], ten);
        assert!(told.run(&env).unwrap().success());
        assert!(!told.run(&Env::new()).unwrap().success());
        let e = hook(&["/nonexistent/hook"], ten).run(&env).unwrap_err();
        assert!(e.to_string().contains("/nonexistent/hook"), "{e}");
    }

    #[test]
    fn one_that_others_may_change_is_not_run() {
        use std::os::unix::fs::PermissionsExt;
        let temp = tempfile::tempdir().unwrap();
        let (script, ran) = (temp.path().join("hook"), temp.path().join("ran"));
        std::fs::write(&script, format!("#!/bin/sh\ntouch {}\n", ran.display())).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o777)).unwrap();
        let e = hook(&[script.to_str().unwrap()], Duration::from_secs(10)).run(&Env::new()).unwrap_err();
        assert_eq!(e.kind(), Kind::Config);
        assert!(e.hint_text().unwrap().starts_with("run `chmod go-w "), "{e}");
        assert!(!ran.exists());
    }

    /// Also what it started must not go on: a script that waits for its child would hold the run.
    #[test]
    fn one_that_does_not_end_is_killed_with_its_children() {
        let began = Instant::now();
        let e = hook(&["/bin/sh", "-c", "sleep 60 & wait"], Duration::from_millis(200)).run(&Env::new()).unwrap_err();
        assert_eq!(e.kind(), Kind::Interrupted);
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}
