//! What this host gives every part: its runtime directory, its threads, random ids.

use crate::error::{Error, Result};
use crate::image::open::OpenOptions;
use crate::name::RunId;
use std::path::PathBuf;

/// Directory for sockets of this process; short, private, gone with a reboot.
pub fn runtime_dir() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !rustix::process::geteuid().is_root() => PathBuf::from(dir).join("virt-replica"),
        _ => PathBuf::from("/run/virt-replica"),
    }
}

/// How chains are opened for reading on this host.
pub fn open_options(readers: usize) -> OpenOptions {
    OpenOptions { runtime_dir: runtime_dir(), force_share: false, readers }
}

/// Threads that read, hash and compress: one a core, up to eight; beyond, one ssh stream is narrower than they are.
pub fn workers() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get()).clamp(1, 8)
}

/// The name of a new run: 64 random bits.
pub fn new_run() -> Result<RunId> {
    Ok(RunId::from_bits(u64::from_le_bytes(random_bytes()?)))
}

/// 128 random bits: what an id is made of that nobody else may have.
pub(super) fn long_id() -> Result<u128> {
    Ok(u128::from_le_bytes(random_bytes()?))
}

/// Random bytes of the kernel, at most 256 at once. Blocks until its pool is ready, shortly after boot.
pub fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bits = [0u8; N];
    let got = rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::from_io("cannot draw random bits", e.into()))?;
    // The kernel never cuts a request this short once its pool is ready, and waits until it is.
    assert_eq!(got, bits.len(), "getrandom gives up to 256 bytes whole");
    Ok(bits)
}
