//! Whose points a replica has: a domain's UUID alone is no identity, because a clone by copied XML has the same one.
//!
//! Pure. A source says who it is ([`Claim`]) before it writes; the manifest remembers the source of its newest point
//! ([`Owner`]). Another source is refused, unless its generation is higher (the domain was handed over for good), or
//! its operator says that it takes over.
//!
//! Format: docs/formats/replica.md, docs/formats/wire.md.

use crate::error::{Error, Kind, Result, advice};
use crate::name::{Fingerprint, Generation, HostLabel};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A source: a host, and the state directory of the program there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceId {
    /// The host's name, for people; it decides nothing.
    pub host: HostLabel,
    /// Made from the host's machine id.
    pub machine: Fingerprint,
    /// Drawn when the state directory was first used.
    pub state: Fingerprint,
}

impl SourceId {
    fn is(&self, other: &SourceId) -> bool {
        self.machine == other.machine && self.state == other.state
    }
}

impl fmt::Display for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (machine, state) = (&self.machine.as_str()[..8], &self.state.as_str()[..8]);
        write!(f, "{} (machine {machine}, state {state})", self.host)
    }
}

/// What a source says of itself before it writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The source that wants to write.
    pub source: SourceId,
    /// Generation that the source has. Higher than the replica's: the domain was handed over to it.
    pub generation: Generation,
    /// The operator says that this source is the right one from now on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub take_over: bool,
}

/// The source of a replica's newest point, and how it came to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The host and state directory that made the newest point.
    pub source: SourceId,
    /// When the replica began to follow this source, by the target's clock.
    pub since: Timestamp,
    /// Why the replica accepted this source.
    pub how: How,
    /// The one before, if it was another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<SourceId>,
}

/// How a source came to be the one that a replica follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// It made the first point.
    First,
    /// The newest point did not say whose it is: it was made by version 0.1, came in a file, or is of a host that gave
    /// way.
    Adopted,
    /// It is the same as before.
    Same,
    /// Its generation is higher: the domain was handed over for good.
    Generation,
    /// Its operator said so.
    TakenOver,
}

/// What became of a claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claimed {
    /// Why the replica accepts the source.
    pub how: How,
    /// The source before, if it was another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<SourceId>,
}

impl Claimed {
    /// The words for an operator, if there is anything to say.
    pub fn words(&self, generation: Generation) -> Option<String> {
        match (self.how, &self.before) {
            (How::First | How::Same, _) => None,
            (How::Adopted, _) => Some(
                "the newest point does not say which host it is from; from now on the replica follows this host".into(),
            ),
            (How::Generation, before) => Some(format!(
                "the replica followed {} and follows this host from now on: the domain was handed over (generation {generation})",
                name(before.as_ref())
            )),
            (How::TakenOver, before) => Some(format!(
                "the replica followed {} and follows this host from now on, as its operator decided",
                name(before.as_ref())
            )),
        }
    }
}

fn name(source: Option<&SourceId>) -> String {
    source.map_or_else(|| "an unknown host".to_owned(), SourceId::to_string)
}

/// What a replica knows of itself when a claim is made.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'a> {
    /// Source of the newest point, as the manifest has it. `None`: no point, or the point does not say.
    pub owner: Option<&'a Owner>,
    /// Generation of the replica.
    pub generation: Generation,
    /// The replica has at least one point.
    pub has_points: bool,
}

/// Whether the source may write, and why. [`Kind::Conflict`] names both sides and the way out.
pub fn judge(replica: Standing, claim: &Claim) -> Result<Claimed> {
    let claimed = |how, before: Option<&Owner>| Ok(Claimed { how, before: before.map(|o| o.source.clone()) });
    match replica.owner {
        None if claim.take_over && replica.generation > claim.generation => claimed(How::TakenOver, None),
        None if replica.has_points => claimed(How::Adopted, None),
        None => claimed(How::First, None),
        Some(owner) if owner.source.is(&claim.source) => claimed(How::Same, None),
        Some(owner) if claim.take_over => claimed(How::TakenOver, Some(owner)),
        Some(owner) if claim.generation > replica.generation => claimed(How::Generation, Some(owner)),
        Some(owner) => Err(refusal(owner, claim)),
    }
}

fn refusal(owner: &Owner, claim: &Claim) -> Error {
    let (theirs, ours) = (&owner.source, &claim.source);
    let what = format!("the replica follows {theirs} since {:.0}, and this source is {ours}", owner.since);
    let same_host = theirs.machine == ours.machine;
    Error::new(Kind::Conflict, what).advise(match same_host {
        true => advice::TakeOver::IfStateWasLost,
        false => advice::TakeOver::IfNoClone,
    })
}

/// The owner that a manifest records with the point that was begun under this claim.
pub fn owner(before: Option<&Owner>, claim: &Claim, claimed: &Claimed, now: Timestamp) -> Owner {
    match (claimed.how, before) {
        // A host that was renamed is the same one.
        (How::Same, Some(owner)) => Owner { source: claim.source.clone(), ..owner.clone() },
        (how, _) => Owner { source: claim.source.clone(), since: now, how, before: claimed.before.clone() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `a1`: machine a, state directory 1.
    fn source(text: &str) -> SourceId {
        let of = |part: &str| Fingerprint::new(part.repeat(32)).unwrap();
        SourceId {
            host: HostLabel::new(format!("host-{text}")).unwrap(),
            machine: of(&text[..1]),
            state: of(&text[1..]),
        }
    }

    fn now() -> Timestamp {
        "2026-11-30T12:00:00Z".parse().unwrap()
    }

    /// `owner, generation of the replica; source, its generation`, a `!` takes over.
    fn judged(text: &str) -> Result<Claimed> {
        let (replica, claim) = text.split_once("; ").unwrap();
        let (owner, generation) = replica.split_once(' ').unwrap();
        let owner =
            (owner.len() == 2).then(|| Owner { source: source(owner), since: now(), how: How::First, before: None });
        let words: Vec<&str> = claim.split(' ').collect();
        let claim = Claim {
            source: source(words[0]),
            generation: Generation(words[1].parse().unwrap()),
            take_over: words.get(2) == Some(&"!"),
        };
        let has_points = replica != "- 0";
        judge(
            Standing { owner: owner.as_ref(), generation: Generation(generation.parse().unwrap()), has_points },
            &claim,
        )
    }

    /// Case B2: two hosts with a domain of one UUID took turns at one replica.
    #[test]
    fn another_source_is_refused_unless_the_domain_was_handed_over_or_somebody_says_so() {
        for (text, how) in [
            ("- 0; a1 1", How::First),
            ("- 1; a1 1", How::Adopted),
            ("a1 1; a1 1", How::Same),
            ("a1 2; a1 1", How::Same),
            ("a1 1; b1 2", How::Generation),
            ("a1 1; b1 1 !", How::TakenOver),
            ("a1 2; b1 1 !", How::TakenOver),
            ("a1 1; a1 1 !", How::Same),
            ("- 2; b1 1 !", How::TakenOver),
        ] {
            assert_eq!(judged(text).unwrap().how, how, "{text}");
        }
        for text in ["a1 1; b1 1", "a1 1; a2 1", "a1 1; b2 1", "a1 2; b1 2", "a1 2; b1 1"] {
            let e = judged(text).unwrap_err();
            assert_eq!(e.kind(), Kind::Conflict, "{text}");
            let ours = &text[text.len() - 4..text.len() - 2];
            assert!(e.what().contains("host-a1") && e.what().contains(&format!("host-{ours}")), "both sides: {e}");
            assert!(matches!(e.advice(), Some(advice::Advice::TakeOver(_))), "the way out");
        }
        assert_eq!(judged("a1 1; a2 1").unwrap_err().advice(), Some(&advice::TakeOver::IfStateWasLost.into()));
    }

    #[test]
    fn taking_over_is_recorded_with_the_one_before() {
        let first = Claim { source: source("a1"), generation: Generation(1), take_over: false };
        let one = owner(None, &first, &Claimed { how: How::First, before: None }, now());
        let second = Claim { source: source("b1"), generation: Generation(1), take_over: true };
        let claimed =
            judge(Standing { owner: Some(&one), generation: Generation(1), has_points: true }, &second).unwrap();
        let words = claimed.words(Generation(1)).unwrap();
        assert!(words.contains("host-a1") && words.contains("as its operator decided"), "{words}");
        let two = owner(Some(&one), &second, &claimed, now());
        assert_eq!((two.how, two.before), (How::TakenOver, Some(source("a1"))));
        // The next run of the same source changes nothing of that.
        let again = Claim { take_over: false, ..second };
        let standing = Standing { owner: Some(&two_again(&two.source)), generation: Generation(1), has_points: true };
        assert_eq!(judge(standing, &again).unwrap(), Claimed { how: How::Same, before: None });
    }

    fn two_again(source: &SourceId) -> Owner {
        Owner { source: source.clone(), since: now(), how: How::TakenOver, before: None }
    }
}
