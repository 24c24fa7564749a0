//! How hard payloads are compressed, as an operator says it.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// zstd's level of a payload, or none; or the first level for as long as whoever sends finds that it pays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compression(Way);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Way {
    #[default]
    Auto,
    Level(u8),
    Stored,
}

/// The fastest level, whose ratio is still near the best for disk contents (0.474 against 0.465 for level 3).
const FAST: u8 = 1;

impl Compression {
    /// The highest of zstd's levels that are not "ultra": payloads are no longer than a block, and higher ones gain
    /// nothing.
    pub const LEVEL_MAX: u8 = 19;

    /// No compression: every payload is stored as it is.
    pub const NONE: Compression = Compression(Way::Stored);

    /// The fastest level, always: for what is kept, where nobody waits for a link.
    pub const FAST: Compression = Compression(Way::Level(FAST));

    /// zstd's own scale; `None`: payloads are stored.
    pub fn level(self) -> Option<i32> {
        match self.0 {
            Way::Auto => Some(FAST.into()),
            Way::Level(level) => Some(level.into()),
            Way::Stored => None,
        }
    }

    /// Whether it may be done without where the link is quicker than the compression.
    pub fn is_auto(self) -> bool {
        self.0 == Way::Auto
    }
}

impl FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self::default()),
            ("no", _) => Ok(Self::NONE),
            (_, Ok(level @ 1..=Self::LEVEL_MAX)) => Ok(Compression(Way::Level(level))),
            _ => Err(format!(
                "'{text}' is neither `auto`, nor `no`, nor a level of zstd, 1 (fast) to {} (small)",
                Self::LEVEL_MAX
            )),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Way::Auto => f.write_str("auto"),
            Way::Level(level) => level.fmt(f),
            Way::Stored => f.write_str("no"),
        }
    }
}

impl<'de> Deserialize<'de> for Compression {
    fn deserialize<D: Deserializer<'de>>(de: D) -> Result<Self, D::Error> {
        String::deserialize(de)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Compression {
    fn serialize<S: Serializer>(&self, ser: S) -> Result<S::Ok, S::Error> {
        ser.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_level_or_a_word() {
        for (text, level) in [("auto", Some(1)), ("no", None), ("1", Some(1)), ("19", Some(19))] {
            let c: Compression = text.parse().unwrap();
            assert_eq!((c.level(), c.to_string().as_str(), c.is_auto()), (level, text, text == "auto"));
        }
        for text in ["0", "20", "-1", "yes", "", "1.5"] {
            assert!(text.parse::<Compression>().is_err(), "{text}");
        }
    }
}
