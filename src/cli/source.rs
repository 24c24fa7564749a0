//! The source side of this host, as the commands need it.

use super::Globals;
use virt_replica::error::{Error, Result};
use virt_replica::name::{Generation, RunId};
use virt_replica::site::{Site, SiteOptions};

/// Connects to libvirt.
pub fn connect(globals: &Globals) -> Result<Site> {
    Site::connect(SiteOptions { uri: globals.uri(), state: globals.state_dir.clone() })
}

/// The generation this host replicates as: the first, until a replica changes hands.
pub fn generation() -> Generation {
    Generation(1)
}

/// The name of a new run: 64 random bits.
pub fn new_run() -> Result<RunId> {
    let mut bits = [0u8; 8];
    let got = rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::from_io("cannot draw random bits", e.into()))?;
    // The kernel never cuts a request this short once its pool is ready, and waits until it is.
    assert_eq!(got, bits.len(), "getrandom gives up to 256 bytes whole");
    Ok(RunId::from_bits(u64::from_le_bytes(bits)))
}
