//! How long an agent that answers pings may owe an answer.
//!
//! A time for each request cannot be the slowest disk's slowest fsync (docs/decisions/0009-silence-is-death.md); so
//! these are not deadlines of requests. They run from the last movement of the session: a frame that came or went,
//! pings not counted. An answer that is long on its way, or a request behind megabytes on a thin link, keeps them
//! from running out.

use crate::agent::wire::{Request, bringup, upkeep};
use crate::error::{Error, Kind};
use std::time::Duration;

/// What is looked up and told: reads of small files.
pub(super) const QUESTION: Duration = Duration::from_secs(90);

/// What reads, writes or syncs images, or brings a domain up. Most of it says how far it is.
pub(super) const WORK: Duration = Duration::from_secs(30 * 60);

/// The agent puts in order what it holds open before it says goodbye.
pub(super) const GOODBYE: Duration = Duration::from_secs(30);

/// A seed is read whole before a point begins, and nothing is said meanwhile: at least as fast as this, in bytes
/// per second.
const SEED_RATE: u64 = 4 << 20;

/// An answer that is owed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owed {
    /// In the infinitive.
    pub what: &'static str,
    pub within: Duration,
}

impl Owed {
    pub fn late(&self, host: &str) -> Error {
        let (what, seconds) = (self.what, self.within.as_secs_f64());
        let text = format!("the agent on {host} is alive, but did not {what} within {seconds:.0} s");
        Error::new(Kind::Unavailable, text).hint(format!(
            "its storage may hang: look on {host} for an agent in state D (`ps`), a mount that is gone, and at `dmesg`; end that agent, then try again"
        ))
    }
}

/// What is owed for a request.
pub(super) fn of(request: &Request, options: &ClientOptions) -> Owed {
    let question = |what| Owed { what, within: options.question };
    let work = |what| Owed { what, within: options.work };
    match request {
        Request::Open { .. } => question("open the replica"),
        Request::Claim { .. } => question("say whose the replica is"),
        Request::Store { .. } => question("say which store it serves"),
        Request::Find { .. } => question("list its replicas"),
        Request::Describe { .. } => question("tell what points there are"),
        Request::Upkeep { ask: upkeep::UpkeepRequest::Holds {}, .. } => question("tell which points it keeps"),
        Request::Upkeep { ask: upkeep::UpkeepRequest::Chunk { .. }, .. } => question("send more of what was asked for"),
        Request::BringUp { ask: bringup::BringUpRequest::State {}, .. } => {
            question("tell whether the domain was brought up")
        }
        Request::Begin { request, .. } => {
            let seeds: u64 = request.disks.iter().filter(|d| d.resume).map(|d| d.size.0).sum();
            Owed { what: "begin a point", within: options.work + Duration::from_secs(seeds / SEED_RATE) }
        }
        Request::Nodes { .. } => work("tell its digests"),
        Request::Pieces { .. } => work("tell the digests of pieces"),
        Request::FinishDisk { .. } => work("finish a disk"),
        Request::Attach { .. } => work("take an attachment"),
        Request::Seal { .. } => work("seal the point"),
        Request::Abandon { .. } => work("give up the open point"),
        Request::Verify { .. } => work("go on with the verification"),
        Request::Upkeep { .. } => work("go on with its points"),
        Request::Plain { .. } => work("go on with the image"),
        Request::BringUp { .. } => work("go on with bringing the domain up"),
    }
}

/// Deadlines of one session with an agent, as the client applies them.
#[derive(Debug, Clone, Copy)]
pub struct ClientOptions {
    /// An agent that says nothing for this long is dead. Agents say something every few seconds.
    pub silence: Duration,
    /// How often the client says that it is alive. Well below the agent's patience.
    pub ping_interval: Duration,
    /// How long an agent that is alive may take for the answer to a question, and for work. Counted from the last
    /// movement.
    pub question: Duration,
    /// How long an agent that is alive may take for long work. The time counts from the last movement.
    pub work: Duration,
    /// How long it may take for its goodbye.
    pub goodbye: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(30),
            ping_interval: Duration::from_secs(5),
            question: QUESTION,
            work: WORK,
            goodbye: GOODBYE,
        }
    }
}
