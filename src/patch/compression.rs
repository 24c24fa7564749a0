//! How hard payloads are compressed, as an operator says it.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// zstd's level of a payload, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compression(Option<u8>);

impl Compression {
    /// The highest of zstd's levels that are not "ultra": payloads are no longer than a block, and higher ones gain nothing.
    pub const LEVEL_MAX: u8 = 19;

    pub const NONE: Compression = Compression(None);

    /// zstd's own scale; `None`: payloads are stored.
    pub fn level(self) -> Option<i32> {
        self.0.map(i32::from)
    }
}

impl Default for Compression {
    /// Level 1: the fastest whose ratio is still near the best for disk contents (0.474 against 0.465 for level 3).
    fn default() -> Self {
        Compression(Some(1))
    }
}

impl FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("no", _) => Ok(Self::NONE),
            (_, Ok(level @ 1..=Self::LEVEL_MAX)) => Ok(Compression(Some(level))),
            _ => Err(format!("'{text}' is neither `no` nor a level of zstd, 1 (fast) to {} (small)", Self::LEVEL_MAX)),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(level) => level.fmt(f),
            None => f.write_str("no"),
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
    fn it_is_a_level_or_no() {
        for (text, level) in [("no", None), ("1", Some(1)), ("19", Some(19))] {
            let c: Compression = text.parse().unwrap();
            assert_eq!((c.level(), c.to_string().as_str()), (level, text));
        }
        for text in ["0", "20", "-1", "yes", "", "1.5"] {
            assert!(text.parse::<Compression>().is_err(), "{text}");
        }
    }
}
