//! [`GuestAgent`] on libvirt: the guest agent's own commands, passed through, each with a time of its own.
//!
//! Not `virDomainFSFreeze`: it waits for an answer for ever unless the domain was told otherwise, for everybody who
//! asks it.

use crate::error::{Error, Kind, Result, printable};
use crate::hypervisor::guest::GuestAgent;
use crate::hypervisor::libvirt::LibvirtHypervisor;
use crate::name::DomainUuid;
use serde::Deserialize;
use std::time::Duration;

const HOLD: &str = r#"{"execute":"guest-fsfreeze-freeze"}"#;
const STATUS: &str = r#"{"execute":"guest-fsfreeze-status"}"#;
const THAW: &str = r#"{"execute":"guest-fsfreeze-thaw"}"#;

/// What libvirt says in front of a no of the guest agent's.
const AGENT_SAID_NO: &str = "unable to execute QEMU agent command";

impl GuestAgent for LibvirtHypervisor {
    fn hold_file_systems(&self, uuid: &DomainUuid, within: Duration) -> Result<u64> {
        answer(&self.ask_guest("hold the guest's file systems", uuid, HOLD, within).map_err(as_refusal)?)
    }

    fn are_file_systems_held(&self, uuid: &DomainUuid, within: Duration) -> Result<bool> {
        held(&self.ask_guest("ask for the guest's file systems", uuid, STATUS, within).map_err(as_refusal)?)
    }

    fn thaw_file_systems(&self, uuid: &DomainUuid, within: Duration) -> Result<u64> {
        answer(&self.ask_guest("let the guest's file systems go", uuid, THAW, within).map_err(as_refusal)?)
    }
}

/// The answer's value.
fn answer<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    #[derive(Deserialize)]
    struct Answer<T> {
        #[serde(rename = "return")]
        value: T,
    }
    let odd = |e| Error::new(Kind::Protocol, "the guest agent's answer cannot be understood").source(e);
    serde_json::from_str::<Answer<T>>(text).map(|a| a.value).map_err(odd)
}

/// Whether the file systems are held, in the words of `guest-fsfreeze-status`.
fn held(text: &str) -> Result<bool> {
    match answer::<String>(text)?.as_str() {
        "frozen" => Ok(true),
        "thawed" => Ok(false),
        other => Err(Error::new(
            Kind::Protocol,
            format!("the guest agent calls its file systems '{}'", printable(other, 60)),
        )),
    }
}

/// A no of the guest agent's itself is [`Kind::Refused`]; all else leaves open what happened.
fn as_refusal(e: Error) -> Error {
    let said = e.chain();
    match said.find(AGENT_SAID_NO) {
        Some(at) => {
            let no = said[at + AGENT_SAID_NO.len()..].split_once(": ").map_or("", |(_, why)| why);
            Error::new(Kind::Refused, format!("the guest agent refused: {}", crate::error::printable(no, 200)))
        }
        None if e.kind() == Kind::Refused => Error::new(Kind::Unavailable, "the guest agent did not answer").source(e),
        None => e,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_and_nothing_is_guessed() {
        assert_eq!(answer::<u64>(r#"{"return":3}"#).unwrap(), 3);
        assert!(held(r#"{"return":"frozen"}"#).unwrap());
        assert!(!held(r#"{"return":"thawed"}"#).unwrap());
        for odd in [r#"{"return":"melting"}"#, r#"{"return":1}"#, "{}", ""] {
            assert_eq!(held(odd).unwrap_err().kind(), Kind::Protocol, "{odd:?}");
        }
    }

    #[test]
    fn only_the_agents_own_no_is_a_no() {
        let no = "internal error: unable to execute QEMU agent command 'guest-fsfreeze-freeze': failed to freeze /data: Busy";
        let e = as_refusal(Error::new(Kind::Refused, "cannot hold").source(Error::new(Kind::Refused, no)));
        assert_eq!((e.kind(), e.what()), (Kind::Refused, "the guest agent refused: failed to freeze /data: Busy"));
        // Said by libvirt: the command may be lying in the channel.
        for silence in ["Guest agent is not responding", "Guest agent command timed out"] {
            assert_eq!(as_refusal(Error::new(Kind::Refused, silence)).kind(), Kind::Unavailable, "{silence}");
        }
    }
}
