//! The port to the other host: a byte channel to a program there. It never knows what a message is.

use crate::error::Result;
use std::fmt;
use std::io::{Read, Write};
use std::path::Path;

pub mod local;
pub mod pipe;
pub mod ssh;
mod stderr;
pub mod target;

/// What an agent is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Service {
    /// The store at its root.
    #[default]
    Store,
    /// Images below its root.
    Images,
    /// The store at its root, and bringing up what is in it.
    Failover,
}

impl Service {
    /// What follows the program's name.
    pub fn words(self, root: &Path) -> Vec<String> {
        std::iter::once("agent".to_owned()).chain(self.flags(root)).collect()
    }

    /// The same, for the operator of the host of the store.
    pub fn words_of_operator(self, root: &Path) -> Vec<String> {
        let operator = (self != Service::Images).then(|| "--operator".to_owned());
        std::iter::once("agent".to_owned()).chain(operator).chain(self.flags(root)).collect()
    }

    fn flags(self, root: &Path) -> impl Iterator<Item = String> {
        let more = match self {
            Service::Store => None,
            Service::Images => Some("--images".to_owned()),
            Service::Failover => Some("--failover".to_owned()),
        };
        let root = ["--root".to_owned(), root.to_string_lossy().into_owned()];
        more.into_iter().chain(root)
    }
}

/// Opens channels to the agent on one target. One session (one ssh master) is shared by all channels of all runs.
pub trait Transport: Send + Sync + fmt::Debug {
    /// The target's host as messages name it.
    fn host(&self) -> &str;

    /// Starts the agent for the store at the target's root and hands out its stdin and stdout.
    /// Blocks until the remote program was started or refused, at most about the connect timeout.
    fn open(&self) -> Result<Channel>;

    /// The same, but the agent is started for this service, over what the channels share. A transport that knows one
    /// service starts that one.
    fn open_as(&self, _service: Service) -> Result<Channel> {
        self.open()
    }

    /// Ends what the channels share, after the last of them was closed. Idempotent; `open` may follow and starts anew.
    fn close(&self) -> Result<()>;
}

/// One running agent. Dropping `input` is the agent's end of file, and its end.
///
/// `read` and `write` fail with `TimedOut` whenever nothing moved for a moment ([`pipe::TICK`]); nothing is lost by it,
/// the call may be repeated. How long to go on is the caller's decision: only he knows whether the other side is alive.
pub struct Channel {
    /// Standard input of the agent.
    pub input: Box<dyn Write + Send>,
    /// Standard output of the agent.
    pub output: Box<dyn Read + Send>,
    /// Ends the channel: waits for the remote program, at most a few seconds, and explains a bad end
    /// (its exit code, what it wrote to stderr, "command not found").
    pub closer: Box<dyn Closer>,
}

/// The end of a channel.
pub trait Closer: Send {
    /// Waits for the agent's end. Fails with the agent's exit code and last words if it ended badly or too late.
    fn close(self: Box<Self>) -> Result<()>;
}
