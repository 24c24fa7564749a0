//! How long the way home may take, and how long its pauses.

use std::time::Duration;

/// Time limits of the settle loop. Defaults: 1 h for the commit, 5 s for a pause, 250 ms for a pause's share.
#[derive(Debug, Clone)]
pub struct SettleOptions {
    /// How long a commit may take to become ready before the run leaves it running and says "commit pending".
    pub ready_within: Duration,
    /// Hard bound of a pause; the dead-man acts when it has passed.
    pub pause_within: Duration,
    /// How long a pause goes on to further disks. Then the guest runs for as long again, before the next pause takes on
    /// the rest.
    pub pause_share: Duration,
}

impl Default for SettleOptions {
    fn default() -> Self {
        Self {
            ready_within: Duration::from_secs(3600),
            pause_within: Duration::from_secs(5),
            pause_share: Duration::from_millis(250),
        }
    }
}
