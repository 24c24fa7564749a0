//! Who bounds a pause of the guest: the port between those who hold it and the hand that ends that.

use crate::error::Result;
use std::time::Duration;

/// Bounds every pause of the guest from outside this process; see [`deadman`](super::deadman).
pub trait PauseGuard {
    /// From now on, if this process ends or `within` passes before [`PauseGuard::disarm`], somebody else lets the
    /// guest go. Returns when that somebody has confirmed.
    fn arm(&mut self, within: Duration) -> Result<()>;

    /// `Interrupted` if it was too late and the other hand has acted: observe again.
    fn disarm(&mut self) -> Result<()>;
}

/// For the dead-man itself, which is nobody's charge.
#[derive(Debug, Default)]
pub struct Unguarded;

impl PauseGuard for Unguarded {
    fn arm(&mut self, _: Duration) -> Result<()> {
        Ok(())
    }

    fn disarm(&mut self) -> Result<()> {
        Ok(())
    }
}
