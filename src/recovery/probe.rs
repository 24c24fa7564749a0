//! Evidence that a guest works, looked for from outside: its agent answers, its serial line says something, it accepts
//! a connection, a program of the operator's is content.

use crate::error::{Error, Kind, Result};
use crate::hypervisor::drill_network;
use crate::trust;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// How much of a console's end is looked at, in bytes.
const CONSOLE_MAX: u64 = 4 << 20;

/// What to look for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// The guest agent answers.
    Agent,
    /// Somebody at this address of the guest's accepts a connection; the prefix says what its network is.
    Tcp {
        /// IPv4 address of the guest on the drill's network.
        guest: Ipv4Addr,
        /// Length of the network prefix of that address, for example 24.
        prefix: u8,
        /// TCP port that must accept a connection.
        port: u16,
    },
    /// The first serial line has said this.
    Serial(String),
    /// This program ends with 0. It is run again until it does.
    Script(PathBuf),
}

impl Probe {
    /// The address and prefix that it is to be reached at.
    pub fn guest(&self) -> Option<(Ipv4Addr, u8)> {
        match self {
            Probe::Tcp { guest, prefix, .. } => Some((*guest, *prefix)),
            _ => None,
        }
    }
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Probe::Agent => f.write_str("agent"),
            Probe::Tcp { guest, prefix, port } => write!(f, "tcp:{guest}/{prefix}:{port}"),
            Probe::Serial(text) => write!(f, "serial:{text}"),
            Probe::Script(path) => write!(f, "script:{}", path.display()),
        }
    }
}

impl FromStr for Probe {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            None if text == "agent" => Ok(Probe::Agent),
            Some(("tcp", to)) => tcp(to).ok_or_else(|| {
                Error::new(Kind::Usage, format!("'{text}' is no probe"))
                    .hint("write the guest's address, its prefix and the port: tcp:192.0.2.10/24:22")
            }),
            Some(("serial", said)) if !said.is_empty() => Ok(Probe::Serial(said.to_owned())),
            Some(("script", path)) if path.starts_with('/') => Ok(Probe::Script(path.into())),
            _ => Err(Error::new(Kind::Usage, format!("'{text}' is no probe"))
                .hint("write agent, serial:TEXT, tcp:ADDRESS/PREFIX:PORT, or script:/PATH")),
        }
    }
}

/// `192.0.2.10/24:22`
fn tcp(text: &str) -> Option<Probe> {
    let (address, port) = text.rsplit_once(':')?;
    let (guest, prefix) = address.split_once('/')?;
    let (guest, prefix, port) = (guest.parse().ok()?, prefix.parse().ok()?, port.parse().ok()?);
    drill_network::beside(guest, prefix)?;
    Some(Probe::Tcp { guest, prefix, port })
}

/// Whether the end of the console's file holds `text`. A file that is not there has said nothing.
pub fn console_says(console: &Path, text: &str) -> Result<bool> {
    let tail = console_tail(console, CONSOLE_MAX)?;
    Ok(tail.windows(text.len()).any(|w| w == text.as_bytes()))
}

/// At most so many bytes of the end of the console's file.
pub fn console_tail(console: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(console)?;
        let start = file.metadata()?.len().saturating_sub(bytes_max);
        file.seek(SeekFrom::Start(start))?;
        let mut tail = Vec::new();
        file.take(bytes_max).read_to_end(&mut tail)?;
        Ok(tail)
    };
    match read() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|e| Error::io("cannot read what the guest said", console, e)),
    }
}

/// Runs a program of the operator's, with `environment` beside our own, for at most `within`; what it says goes to the
/// end of `log`. Whether it was content: it ended with 0, in time.
pub fn run_script(path: &Path, environment: &[(&str, &str)], log: &Path, within: Duration) -> Result<bool> {
    let open = || OpenOptions::new().append(true).create(true).open(log);
    let (out, err) = open()
        .and_then(|out| Ok((out.try_clone()?, out)))
        .map_err(|e| Error::io("cannot keep what a script says", log, e))?;
    trust::check(path)?;
    let mut command = Command::new(path);
    command.envs(environment.iter().copied()).stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
    let mut child = command.spawn().map_err(|e| {
        Error::io("cannot start the script", path, e)
            .hint("it has to be executable, with `#!` and its interpreter in the first line")
    })?;
    let until = Instant::now() + within;
    loop {
        match child.try_wait().map_err(|e| Error::io("cannot wait for the script", path, e))? {
            Some(status) => return Ok(status.success()),
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
            None => {
                // It leads a group of its own: what it has started goes with it. Not reaped, so the id is still its
                // own.
                let group = rustix::process::Pid::from_child(&child);
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
                let _ = child.wait();
                return Ok(false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_probe_is_read_and_written_alike() {
        for text in ["agent", "serial:login: ", "tcp:192.0.2.10/24:22", "script:/usr/local/bin/check"] {
            assert_eq!(text.parse::<Probe>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "agents",
            "serial:",
            "script:check",
            "tcp:22",
            "tcp:192.0.2.10:22",
            "tcp:192.0.2.10/32:22",
            "tcp:x/24:22",
            "tcp:192.0.2.10/24:70000",
            "script",
        ] {
            assert_eq!(bad.parse::<Probe>().unwrap_err().kind(), Kind::Usage, "{bad}");
        }
    }

    #[test]
    fn the_end_of_the_console_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let console = dir.path().join("console.log");
        assert!(!console_says(&console, "x").unwrap());
        std::fs::write(&console, b"boot\nlogin: \xff\n").unwrap();
        assert!(console_says(&console, "login:").unwrap() && !console_says(&console, "Login").unwrap());
        assert_eq!(console_tail(&console, 3).unwrap(), b" \xff\n");
    }

    #[test]
    fn a_script_is_believed_by_its_exit_code_and_does_not_outlive_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let (script, log) = (dir.path().join("s"), dir.path().join("log"));
        let run = |text: &str, within| {
            std::fs::write(&script, format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700)).unwrap();
            run_script(&script, &[("VR_WORD", "hello")], &log, within)
        };
        let long = Duration::from_secs(30);
        assert!(run("echo $VR_WORD", long).unwrap());
        assert!(!run("echo no >&2; exit 3", long).unwrap());
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "hello\nno\n");
        let since = Instant::now();
        assert!(!run("sleep 1000 & sleep 1000", Duration::from_millis(100)).unwrap());
        assert!(since.elapsed() < Duration::from_secs(10));
        assert_eq!(run_script(Path::new("/no/such/script"), &[], &log, long).unwrap_err().kind(), Kind::NotFound);
    }
}
