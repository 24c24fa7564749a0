//! What is to be said about an element of a definition that does not come through as it was.

use serde::Serialize;

/// One element of the source's definition, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Remark {
    /// Where it stands: `devices/hostdev`, `os/kernel`, `cpu/@mode`.
    pub what: String,
    /// How much the change matters to the guest.
    pub verdict: Verdict,
    /// A sentence part: "passes a device of the source's host through".
    pub why: String,
}

/// Consequence of leaving out or changing an element. The order is from harmless to serious.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The guest will not notice, or hardly.
    LeftOut,
    /// The guest has less than it had at the source.
    Missing,
    /// Without a decision of the operator's nothing is started.
    Refused,
}
