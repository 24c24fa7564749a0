//! What comes to the daemon's loop, as plain data: events, signals, and questions over the control socket.

use crate::daemon::event::Event;
use crate::daemon::status::Status;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::mpsc::Sender;

/// What comes to the loop.
#[derive(Debug)]
pub enum Input {
    /// An event for the engine.
    Event(Box<Event>),
    /// SIGHUP: read the configuration again.
    Reload,
    /// A question from the control socket.
    Question(Question),
    /// A request for the state of everything, and the channel for the answer. The HTTP server sends it.
    Status(Sender<Box<Status>>),
}

/// What may be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    /// Asks for the state of the daemon and of every domain on every target.
    Status {},
    /// Without a domain: all of them.
    Pause {
        /// Name or UUID of the domain. `None`: all domains.
        domain: Option<String>,
    },
    /// Lets runs begin again.
    Resume {
        /// Name or UUID of the domain. `None`: all domains, also those that were paused one by one.
        domain: Option<String>,
    },
    /// A run now, to all targets of the domain.
    Sync {
        /// Name or UUID of the domain.
        domain: String,
    },
}

/// A question on its way to the daemon's loop, and where the answer is awaited.
#[derive(Debug)]
pub struct Question {
    /// Question that the client sent.
    pub ask: Ask,
    /// Channel for the answer, as JSON. The receiver may be gone already.
    pub answer: Sender<Value>,
}
