//! What comes to the daemon's loop, as plain data: events, signals, and questions over the control socket.

use crate::daemon::event::Event;
use crate::daemon::status::Status;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::mpsc::Sender;

/// What comes to the loop.
#[derive(Debug)]
pub enum Input {
    Event(Box<Event>),
    /// SIGHUP: read the configuration again.
    Reload,
    Question(Question),
    Status(Sender<Box<Status>>),
}

/// What may be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    Status {},
    /// Without a domain: all of them.
    Pause {
        domain: Option<String>,
    },
    Resume {
        domain: Option<String>,
    },
    /// A run now, to all targets of the domain.
    Sync {
        domain: String,
    },
}

/// A question on its way to the daemon's loop, and where the answer is awaited.
#[derive(Debug)]
pub struct Question {
    pub ask: Ask,
    pub answer: Sender<Value>,
}
