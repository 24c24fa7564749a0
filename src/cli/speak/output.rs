//! What leaves the program besides progress: results on stdout, the last error on stderr, the exit code.
//!
//! Writing never panics: a reader that went away (`| head`) must not end a run in the middle.

use super::{advice, progress};
use serde::Serialize;
use serde_json::json;
use std::io::Write;
use std::process::ExitCode;
use virt_replica::error::{Error, Kind, Result};

/// Code for "a new point exists, but a disk is still on an overlay".
#[cfg(feature = "libvirt")]
pub const COMMIT_PENDING: u8 = 3;

/// Code for "a new point exists, and a dirty bitmap was caught lying on the way to it".
#[cfg(feature = "libvirt")]
pub const AUDIT_ALARM: u8 = 14;
/// Exit code of `sync` for "a point, and an I/O error has stopped the guest".
#[cfg(feature = "libvirt")]
pub const GUEST_STOPPED: u8 = 16;

/// Code for "done, and a disk of the domain is in no point although nobody excluded it".
#[cfg(feature = "libvirt")]
pub const PARTLY_PROTECTED: u8 = 15;

/// How a command ended, short of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Done,
    /// The result was printed, and it is not good.
    Code(u8),
}

/// How this process talks.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    pub json: bool,
    pub quiet: bool,
    pub colors: bool,
}

impl Output {
    /// Tells what is done now.
    #[cfg(feature = "libvirt")]
    pub fn step(self, what: &str) {
        match (self.json, self.quiet) {
            // A reader that has gone away must not end in the middle what it was told of.
            (true, _) => drop(Message { message_type: "step", body: serde_json::json!({ "what": what }) }.print()),
            (false, true) => {}
            (false, false) => super::progress::say(what),
        }
    }

    /// Ends the program: prints the error, if it is one, and gives the exit code.
    pub fn end(self, result: Result<Exit>) -> ExitCode {
        match result {
            Ok(Exit::Done) => ExitCode::SUCCESS,
            Ok(Exit::Code(code)) => ExitCode::from(code),
            Err(e) => {
                self.error(&e);
                ExitCode::from(e.kind().exit_code())
            }
        }
    }

    /// Prints an error with its hint; for scripts also as a line of JSON.
    pub fn error(self, e: &Error) {
        let label = |text: &str, color: u8| match self.colors {
            true => format!("\x1b[1;{color}m{text}:\x1b[0m"),
            false => format!("{text}:"),
        };
        progress::say(&format!("{} {}", label("error", 31), e.chain()));
        let hint = advice::of(e);
        if let Some(hint) = &hint {
            progress::say(&format!("{} {hint}", label("hint", 36)));
        }
        if self.json {
            progress::say(&exit_error(e.kind(), e.kind().exit_code(), &e.chain(), hint.as_deref()));
        }
    }
}

fn exit_error(kind: Kind, code: u8, message: &str, hint: Option<&str>) -> String {
    json!({ "message_type": "exit_error", "code": code, "kind": kind, "message": message, "hint": hint }).to_string()
}

/// Ends a program whose command line was not understood, or that was asked for help.
pub fn usage(e: &clap::Error) -> ExitCode {
    // Nobody is left to tell if this cannot be printed.
    let _ = e.print();
    if e.use_stderr() && std::env::args_os().any(|a| a == "--json") {
        let text = e.to_string();
        let line = text.lines().next().unwrap_or_default();
        let message = line.strip_prefix("error: ").unwrap_or(line);
        progress::say(&exit_error(Kind::Usage, Kind::Usage.exit_code(), message, None));
    }
    ExitCode::from(if e.use_stderr() { Kind::Usage.exit_code() } else { 0 })
}

/// Prints a result to stdout, with a line's end. A reader that has gone away is no error: it has read enough.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::from_io("cannot write the output", e)),
        _ => Ok(()),
    }
}

/// Prints a result as JSON: one line, so that it may stand at the end of a stream of lines.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    print(&to_json(value))
}

pub fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("what is printed is plain data with text keys")
}

/// A message of the stream that `--json` prints while a command works.
#[derive(Serialize)]
pub struct Message<'a, T: Serialize> {
    pub message_type: &'a str,
    #[serde(flatten)]
    pub body: T,
}

impl<T: Serialize> Message<'_, T> {
    pub fn print(&self) -> Result<()> {
        print_json(self)
    }
}
