//! Names and ids, checked on entry: whoever holds one may put it into a file name or a message.
//!
//! Everything here may come from a stranger (a domain's XML, the wire, a manifest); the constructors are the gate.

use crate::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Declares a checked string newtype. A doc comment is demanded: it says what the name names.
macro_rules! checked_name {
    ($(#[doc = $doc:literal])+ $name:ident, $check:path) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks the text and takes it as it is. `Usage` says which rule the text breaks.
            pub fn new(text: impl Into<String>) -> Result<Self> {
                let text = text.into();
                match $check(&text) {
                    Ok(()) => Ok(Self(text)),
                    Err(why) => Err(Error::new(
                        Kind::Usage,
                        format!("{:?} is not a {}: {why}", clip(&text), stringify!($name)),
                    )),
                }
            }

            /// The text, which was checked when the value was made.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self> {
                Self::new(s)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(s: String) -> Result<Self> {
                Self::new(s)
            }
        }

        impl From<$name> for String {
            fn from(n: $name) -> String {
                n.0
            }
        }
    };
}

checked_name! {
    /// A libvirt domain's name. Anything libvirt accepts that is not a control character; never used as a path.
    DomainName, check_domain_name
}
checked_name! {
    /// A libvirt domain's UUID, lower case with hyphens. Names the directory of a replica.
    DomainUuid, check_uuid
}
checked_name! {
    /// A disk of a domain as the guest's bus names it (`vda`, `sdb`, `hdc`). Safe inside a file name.
    DiskName, check_disk_name
}
checked_name! {
    /// One execution of the eight steps: 16 lower-case hex digits.
    RunId, check_run_id
}
checked_name! {
    /// A recovery point: six or more digits of sequence, a hyphen, the run that made it. Names a directory.
    PointId, check_point_id
}

checked_name! {
    /// One store: 32 lower-case hex digits, drawn when the store is created. It is the same by whatever path or URL the
    /// store is reached.
    StoreId, check_long_id
}

checked_name! {
    /// Tells one machine, or one state directory, from all others: 32 lower-case hex digits.
    Fingerprint, check_long_id
}
checked_name! {
    /// A host's name as people say it: 1 to 253 letters, digits and . _ -
    HostLabel, check_host_label
}

impl Fingerprint {
    /// Made of these random bits; the caller owns the randomness.
    pub fn from_bits(bits: u128) -> Self {
        Self(format!("{bits:032x}"))
    }
}

impl StoreId {
    /// The id made of these random bits; the caller owns the randomness.
    pub fn from_bits(bits: u128) -> Self {
        Self(format!("{bits:032x}"))
    }
}

impl RunId {
    /// The id made of these random bits; the caller owns the randomness.
    pub fn from_bits(bits: u64) -> Self {
        Self(format!("{bits:016x}"))
    }
}

impl PointId {
    /// Id of a point: its number in the replica's history, and the first eight digits of its run's id.
    pub fn from_parts(seq: u64, run: &RunId) -> Self {
        Self(format!("{seq:06}-{}", &run.as_str()[..8]))
    }

    /// Position in the replica's history. Order is by this, never by time.
    pub fn seq(&self) -> u64 {
        self.0.split('-').next().and_then(|s| s.parse().ok()).expect("checked on entry")
    }
}

/// Who may write to a replica: rises with each change of direction, never falls. Starts at 1, ends at
/// [`Generation::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64")]
pub struct Generation(pub u64);

impl Generation {
    /// A domain that changes sides every second gets there in 31 years.
    pub const MAX: Generation = Generation(1_000_000_000);

    /// By how much a peer may raise it at once. A side that was away for more changes than this is not known here.
    pub const STEP_MAX: u64 = 1000;

    /// The one after this. `None` at the end.
    pub fn next(self) -> Option<Generation> {
        (self < Self::MAX).then(|| Generation(self.0 + 1))
    }

    /// Whether a peer may go from here to `to`, or back.
    pub fn may_step_to(self, to: Generation) -> bool {
        to <= Self::MAX && to.0 <= self.0.saturating_add(Self::STEP_MAX)
    }
}

impl TryFrom<u64> for Generation {
    type Error = String;
    fn try_from(number: u64) -> Result<Self, String> {
        match number <= Self::MAX.0 {
            true => Ok(Generation(number)),
            false => Err(format!("{number} is no generation: the last one is {}", Self::MAX)),
        }
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn clip(text: &str) -> String {
    if text.chars().count() > 80 { text.chars().take(77).collect::<String>() + "..." } else { text.to_owned() }
}

impl DomainUuid {
    /// All zero: what stands where there is no domain. libvirt gives it to none.
    pub fn nil() -> DomainUuid {
        DomainUuid::new("00000000-0000-0000-0000-000000000000").expect("the constant is a UUID")
    }

    /// True for the UUID that is all zero and stands for no domain.
    pub fn is_nil(&self) -> bool {
        self.as_str().bytes().all(|b| matches!(b, b'0' | b'-'))
    }
}

fn check_domain_name(s: &str) -> Result<(), &'static str> {
    match () {
        _ if s.is_empty() => Err("it is empty"),
        _ if s.len() > 255 => Err("it is longer than 255 bytes"),
        _ if s.chars().any(char::is_control) => Err("it has a control character"),
        _ if s.contains('/') => Err("it has a slash"),
        _ => Ok(()),
    }
}

fn check_uuid(s: &str) -> Result<(), &'static str> {
    let groups: Vec<&str> = s.split('-').collect();
    let shape_ok = groups.iter().map(|g| g.len()).eq([8, 4, 4, 4, 12]);
    if shape_ok && groups.iter().all(|g| g.bytes().all(is_lower_hex)) {
        Ok(())
    } else {
        Err("a UUID has 32 lower-case hex digits in groups of 8-4-4-4-12")
    }
}

fn check_disk_name(s: &str) -> Result<(), &'static str> {
    if (1..=32).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) {
        Ok(())
    } else {
        Err("a disk name has 1 to 32 lower-case letters and digits")
    }
}

fn check_run_id(s: &str) -> Result<(), &'static str> {
    if s.len() == 16 && s.bytes().all(is_lower_hex) { Ok(()) } else { Err("a run id has 16 lower-case hex digits") }
}

fn check_long_id(s: &str) -> Result<(), &'static str> {
    if s.len() == 32 && s.bytes().all(is_lower_hex) { Ok(()) } else { Err("such an id has 32 lower-case hex digits") }
}

fn check_host_label(s: &str) -> Result<(), &'static str> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if (1..=253).contains(&s.len()) && s.bytes().all(good) {
        Ok(())
    } else {
        Err("it has 1 to 253 letters, digits and . _ -")
    }
}

fn check_point_id(s: &str) -> Result<(), &'static str> {
    const WHY: &str = "a point id has 6 to 18 digits, a hyphen and 8 lower-case hex digits";
    let (seq, run) = s.split_once('-').ok_or(WHY)?;
    let ok = (6..=18).contains(&seq.len())
        && seq.bytes().all(|b| b.is_ascii_digit())
        && run.len() == 8
        && run.bytes().all(is_lower_hex);
    if ok { Ok(()) } else { Err(WHY) }
}

fn is_lower_hex(b: u8) -> bool {
    b.is_ascii_digit() || (b'a'..=b'f').contains(&b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_could_leave_a_directory_is_a_name() {
        for bad in ["", ".", "..", "a/b", "../vda", "vda\0", "VDA", "-x", "vd a", &"a".repeat(33)] {
            assert!(DiskName::new(bad).is_err(), "{bad:?}");
            assert!(PointId::new(bad).is_err(), "{bad:?}");
            assert!(DomainUuid::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn point_ids_carry_their_sequence() {
        let run = RunId::from_bits(0xdead_beef_0000_0001);
        let id = PointId::from_parts(42, &run);
        assert_eq!(id.as_str(), "000042-deadbeef");
        assert_eq!(id.seq(), 42);
        assert_eq!(PointId::new("1000000-deadbeef").unwrap().seq(), 1_000_000);
    }

    #[test]
    fn a_generation_has_an_end_and_a_step() {
        assert_eq!(serde_json::from_str::<Generation>("1000000000").unwrap(), Generation::MAX);
        for bad in ["1000000001", "18446744073709551615", "-1", "1.5", "\"1\""] {
            assert!(serde_json::from_str::<Generation>(bad).is_err(), "{bad}");
        }
        assert_eq!(serde_json::to_string(&Generation(7)).unwrap(), "7");
        assert_eq!((Generation(1).next(), Generation::MAX.next()), (Some(Generation(2)), None));
        let from = Generation(5);
        assert!(from.may_step_to(Generation(1)) && from.may_step_to(Generation(1005)));
        assert!(!from.may_step_to(Generation(1006)) && !Generation::MAX.may_step_to(Generation(u64::MAX)));
    }

    #[test]
    fn deserialising_passes_the_same_gate() {
        assert!(serde_json::from_str::<DiskName>("\"../x\"").is_err());
        assert_eq!(serde_json::from_str::<DiskName>("\"vda\"").unwrap().as_str(), "vda");
    }
}
