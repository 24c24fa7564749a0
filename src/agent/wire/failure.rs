//! A request's failure on its way: bounded where it is made, harmless where it is read.

use crate::error::advice::Advice;
use crate::error::{Error, Kind, Words, printable};
use serde::{Deserialize, Deserializer, Serialize};
use std::borrow::Cow;

/// Longest text of one, in bytes.
const TEXT_MAX: usize = 4 << 10;

/// Advice for every kind of not understanding each other.
pub const SAME_VERSION: &str = "install the same virt-replica on both hosts";

/// The other side said something that its protocol does not allow.
pub fn protocol(what: impl Into<Cow<'static, str>>) -> Error {
    Error::new(Kind::Protocol, what).hint(SAME_VERSION)
}

/// An [`Error`] on its way: what the caller must do, a sentence, the place, the cause in words.
///
/// What to do next travels twice: as facts, and in the words of the program that sends it. Who knows the facts words
/// them anew; an older peer, or one that does not know this advice, shows the words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireError {
    /// A kind this side does not know reads as [`Kind::Refused`].
    #[serde(deserialize_with = "known_kind")]
    pub kind: Kind,
    /// Sentence that says what failed; at most 4 KiB, without control characters.
    pub what: String,
    /// Place of the failure. Empty if the error names none.
    #[serde(default)]
    pub context: WireContext,
    /// Advice for the operator. `None`: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What to do, as facts. `None`: the sender has no advice, or is older than this field.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "Advice::known")]
    pub advice: Option<Advice>,
    /// Causes of the error, joined by colons, the nearest first and at most eight. `None`: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
}

/// Place of a failure: the parts that the error names, the rest absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WireContext {
    /// Domain that the error is about. `None`: the error names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Disk that the error is about. `None`: the error names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Recovery point that the error is about. `None`: the error names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// File or directory on the agent's host. `None`: the error names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Offset of the failure in the file or disk, in bytes. `None`: the error names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset_bytes: Option<u64>,
}

fn known_kind<'de, D: Deserializer<'de>>(input: D) -> Result<Kind, D::Error> {
    let word = String::deserialize(input)?;
    Ok(serde_json::from_value(serde_json::Value::String(word)).unwrap_or(Kind::Refused))
}

impl From<&Error> for WireError {
    fn from(error: &Error) -> Self {
        let short = |text: &str| printable(text, TEXT_MAX);
        let context = error.context();
        let mut causes = Vec::new();
        let mut cause = std::error::Error::source(error);
        while let (Some(c), true) = (cause, causes.len() < 8) {
            causes.push(c.to_string());
            cause = c.source();
        }
        WireError {
            kind: error.kind(),
            what: short(error.what()),
            context: WireContext {
                domain: context.domain.as_deref().map(short),
                disk: context.disk.as_deref().map(short),
                point: context.point.as_deref().map(short),
                path: context.path.as_ref().map(|p| short(&p.to_string_lossy())),
                offset_bytes: context.offset_bytes,
            },
            hint: error.hint_text().map(short),
            advice: error.advice().filter(|advice| advice.text().is_none()).cloned(),
            cause: (!causes.is_empty()).then(|| short(&causes.join(": "))),
        }
    }
}

impl WireError {
    /// As it goes to a peer: with the words of this program beside the facts. `words`: `None` for a program without
    /// any.
    pub fn spoken(self, words: Option<Words>) -> WireError {
        let (Some(words), Some(_), None) = (words, &self.advice, &self.hint) else { return self };
        let hint = self.clone().into_error(None).next_step(words).map(|text| printable(&text, TEXT_MAX));
        WireError { hint, ..self }
    }

    /// The error as this side reports it. `host`: where it happened, if not here. The words of the other side are
    /// made fit for a terminal.
    pub fn into_error(self, host: Option<&str>) -> Error {
        let what = printable(&self.what, TEXT_MAX);
        let mut error = Error::new(self.kind, host.map_or_else(|| what.clone(), |host| format!("on {host}: {what}")));
        let context = self.context;
        if let Some(domain) = context.domain {
            error = error.domain(printable(&domain, TEXT_MAX));
        }
        if let Some(disk) = context.disk {
            error = error.disk(printable(&disk, TEXT_MAX));
        }
        if let Some(point) = context.point {
            error = error.point(printable(&point, TEXT_MAX));
        }
        if let Some(path) = context.path {
            error = error.path(printable(&path, TEXT_MAX));
        }
        if let Some(offset) = context.offset_bytes {
            error = error.offset(offset);
        }
        error = match (self.advice, self.hint) {
            (Some(advice), _) => error.advise(advice),
            (None, Some(hint)) => error.hint(printable(&hint, TEXT_MAX)),
            (None, None) => error,
        };
        if let Some(cause) = self.cause {
            error = error.source(printable(&cause, TEXT_MAX));
        }
        error
    }
}
