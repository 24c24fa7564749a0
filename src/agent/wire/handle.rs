//! The number of an opened replica or image within one session.

use crate::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};

/// One opened replica within one session. Never reused within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Handle(pub u32);

impl Handle {
    /// The handle as it travels: four bytes, little-endian.
    pub fn to_bytes(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }

    /// Reads a handle from exactly four bytes, little-endian. Any other length is a protocol error.
    pub fn from_bytes(bytes: &[u8]) -> Result<Handle> {
        let bytes = bytes.try_into().map_err(|_| Error::new(Kind::Protocol, "a replica handle has four bytes"))?;
        Ok(Handle(u32::from_le_bytes(bytes)))
    }
}
