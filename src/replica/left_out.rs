//! Disks of a domain that are in no point of it, and whose decision that is. Pure.
//!
//! A disk that we cannot replicate and a disk that its operator does not want look the same in a list of disks. They
//! are not: the first makes the domain *partly protected*, and every outlet says so until the operator names the disk.

use crate::error::printable;
use crate::name::DiskName;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use std::ops::Deref;

/// Most disks that are told of, as many as a point may have.
const SKIPPED_MAX: usize = 256;

/// Longest reason that is kept, in bytes.
const REASON_MAX: usize = 200;

/// Whose decision it is that a disk is in no point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Ours: it cannot be replicated. The domain is partly protected.
    Unprotected,
    /// The operator's, by `exclude_disks` or `--exclude-disk`.
    Excluded,
    /// Nobody's: a drive for a medium that comes and goes.
    Removable,
    /// A document of a program that did not say.
    #[default]
    #[serde(other)]
    NotSaid,
}

/// A disk that is in no point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Name of the disk as the domain has it, for example `vda`.
    pub name: DiskName,
    /// What it is, as a sentence part behind "it": "is encrypted by QEMU (luks)".
    #[serde(deserialize_with = "cleaned")]
    pub reason: String,
    /// Whose decision it is. `NotSaid` if the document comes from an older program.
    #[serde(default)]
    pub cause: Cause,
}

impl Skipped {
    /// What an operator reads, with the way out.
    pub fn told(&self) -> String {
        let Skipped { name, reason, .. } = self;
        format!(
            "disk '{name}' is NOT PROTECTED: it {reason}. Protect it by other means and exclude it (`exclude_disks` in its \
             policy), or make it a disk that can be replicated"
        )
    }
}

/// A peer's words: bounded and without control characters.
fn cleaned<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(printable(&String::deserialize(deserializer)?, REASON_MAX))
}

/// The disks that are in no point. Bounded where it is read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct LeftOut(Vec<Skipped>);

impl LeftOut {
    /// Those that make the domain partly protected.
    pub fn unprotected(&self) -> impl Iterator<Item = &Skipped> {
        self.0.iter().filter(|s| s.cause == Cause::Unprotected)
    }

    /// The same for a reader of a list: `unprotected` is empty, or the domain is partly protected.
    pub fn is_partly(&self) -> bool {
        self.unprotected().next().is_some()
    }

    /// Says whether every disk of the domain is in the point.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a disk. The limit of 256 disks applies only when a document is read.
    pub fn push(&mut self, skipped: Skipped) {
        self.0.push(skipped);
    }
}

impl Deref for LeftOut {
    type Target = [Skipped];

    fn deref(&self) -> &[Skipped] {
        &self.0
    }
}

impl<'de> Deserialize<'de> for LeftOut {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = Vec::<Skipped>::deserialize(deserializer)?;
        match all.len() {
            0..=SKIPPED_MAX => Ok(LeftOut(all)),
            n => Err(D::Error::custom(format!("{n} disks are left out; at most {SKIPPED_MAX} are read"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_we_cannot_do_makes_a_domain_partly_protected() {
        for (cause, partly) in
            [("unprotected", true), ("excluded", false), ("removable", false), ("of a later day", false)]
        {
            let json = format!(r#"[{{"name":"vdb","reason":"is x","cause":"{cause}"}}]"#);
            let left: LeftOut = serde_json::from_str(&json).unwrap();
            assert_eq!(left.is_partly(), partly, "{cause}");
        }
        // Documents of before did not say.
        let old: LeftOut = serde_json::from_str(r#"[{"name":"vdb","reason":"is a cdrom"}]"#).unwrap();
        assert_eq!((old[0].cause, old.is_partly()), (Cause::NotSaid, false));
        let told = Skipped { cause: Cause::Unprotected, ..old[0].clone() }.told();
        assert!(told.contains("vdb") && told.contains("is a cdrom") && told.contains("exclude_disks"), "{told}");
    }

    #[test]
    fn a_peers_list_is_bounded_and_its_words_are_clean() {
        let one = |reason: &str| serde_json::json!({ "name": "vdb", "reason": reason, "cause": "unprotected" });
        let many = serde_json::Value::Array(vec![one("x"); SKIPPED_MAX + 1]);
        assert!(serde_json::from_value::<LeftOut>(many).is_err());
        let left: LeftOut = serde_json::from_value(serde_json::json!([one(&"\u{1b}[2J".repeat(1000))])).unwrap();
        assert!(left[0].reason.len() <= REASON_MAX && !left[0].reason.contains('\u{1b}'), "{left:?}");
    }
}
