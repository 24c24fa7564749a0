//! What single releases of libvirt, QEMU and libtpms do that others do not: facts, each with where it is known from
//! and what we do about it. Everything that goes by a release asks this file; docs/recovery.md has the same table
//! for people. Pure.

/// Major, minor, release.
pub type Version = (u32, u32, u32);

/// libvirt's way of writing a version as one number.
pub fn version_of(number: u32) -> Version {
    (number / 1_000_000, number / 1000 % 1000, number % 1000)
}

/// A version as programs print it, `0.7.1`, with whatever stands behind the numbers; `None`: it begins with none.
pub fn parse_version(text: &str) -> Option<Version> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit()).take(3).map(|n| n.parse::<u32>().ok());
    let major = parts.next().flatten()?;
    let mut next = || parts.next().flatten().unwrap_or(0);
    Some((major, next(), next()))
}

/// One fact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fact {
    /// Program that the fact is about.
    pub of: &'static str,
    /// The first release that has it, and the first that has it no more.
    pub from: Version,
    /// First release that has it no more. `None`: every later release has it.
    pub to: Option<Version>,
    /// Behaviour of those releases, as a sentence without its subject.
    pub what: &'static str,
    /// Where it is known from.
    pub source: &'static str,
    /// Reaction of this program to it, as a sentence without its subject.
    pub we: &'static str,
}

impl Fact {
    fn holds(&self, version: Version) -> bool {
        version >= self.from && self.to.is_none_or(|to| version < to)
    }
}

/// libvirt writes the chipset's watchdog into every q35 machine from here on.
pub const ITCO_SINCE: Version = (9, 1, 0);
/// QEMU has the network card `igb` from here on.
pub const IGB_SINCE: Version = (8, 0, 0);
/// libtpms writes a state that older ones cannot read from here on.
const TPM_STATE_SINCE: Version = (0, 10, 0);

const DEEP_CHAINS: Fact = Fact {
    of: "libvirt",
    from: (10, 8, 0),
    to: Some((12, 0, 0)),
    what: "cannot start a disk of more than 25 images: \"failed to parse JSON: nesting too deep\"",
    source: "seen with 11.3 (Debian 13); its JSON parser was another one until 10.8, its depth was raised in 12.0",
    we: "keep the newest point below it, and copy the uppermost images into the overlay where a chain is longer",
};

/// Images of a disk that such a libvirt starts, and those that one is trusted with whose version nobody knows.
const DEEP_CHAIN_IMAGES: u64 = 25;
const UNKNOWN_IMAGES: u64 = 20;

/// All facts about releases of libvirt, QEMU and libtpms that this program acts on.
pub const FACTS: &[Fact] = &[
    DEEP_CHAINS,
    Fact {
        of: "libvirt",
        from: ITCO_SINCE,
        to: None,
        what: "writes <watchdog model='itco'/> into every q35 machine by itself; older ones do not know the word",
        source: "seen between 9.0 (Debian 12) and later ones",
        we: "leave it out: the chipset has it, with or without a word",
    },
    Fact {
        of: "QEMU",
        from: IGB_SINCE,
        to: None,
        what: "has the network card igb",
        source: "QEMU's list of devices",
        we: "give the guest e1000e where it is older",
    },
    Fact {
        of: "libtpms",
        from: TPM_STATE_SINCE,
        to: None,
        what: "writes a state that older ones refuse: TPM result for CMD_INIT: 0x101",
        source: "seen with swtpm 0.10 at the source and 0.7 at the target",
        we: "say in `ready` that it cannot be brought up",
    },
];

/// How many images a disk may consist of where this libvirt starts it, that of the guest's own writes included.
/// `None`: as many as there are.
pub fn images_max(libvirt: Option<Version>) -> Option<u64> {
    match libvirt {
        None => Some(UNKNOWN_IMAGES),
        Some(version) => DEEP_CHAINS.holds(version).then_some(DEEP_CHAIN_IMAGES),
    }
}

/// Whether the state of a TPM of this libtpms can be read by that one.
pub fn reads_state(source: Version, here: Version) -> bool {
    source < TPM_STATE_SINCE || here >= TPM_STATE_SINCE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_depth_of_a_chain_goes_by_the_release() {
        for (libvirt, images) in [
            ((9, 0, 0), None),
            ((10, 7, 0), None),
            ((10, 8, 0), Some(25)),
            ((11, 3, 0), Some(25)),
            ((11, 10, 0), Some(25)),
            ((12, 0, 0), None),
        ] {
            assert_eq!(images_max(Some(libvirt)), images, "{libvirt:?}");
        }
        assert_eq!(images_max(None), Some(20));
    }

    #[test]
    fn versions_are_read_as_programs_write_them() {
        assert_eq!(version_of(11_003_000), (11, 3, 0));
        for (text, version) in [
            ("0.7.1", Some((0, 7, 1))),
            ("0.10", Some((0, 10, 0))),
            ("9-dev", Some((9, 0, 0))),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(parse_version(text), version, "{text}");
        }
    }

    #[test]
    fn a_newer_state_is_not_for_an_older_library() {
        assert!(
            reads_state((0, 9, 2), (0, 9, 6))
                && reads_state((0, 9, 2), (0, 10, 0))
                && reads_state((0, 10, 0), (0, 10, 1))
        );
        assert!(!reads_state((0, 10, 0), (0, 9, 2)));
    }
}
