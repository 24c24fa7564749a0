//! The store at the other end of a session, as seen from here.

use crate::agent::client::AgentClient;
use crate::agent::wire::{Reply, Request};
use crate::error::{Kind, Result};
use crate::replica::root::{StoreSeen, StoreWish};

impl AgentClient {
    /// The store that the agent serves; `None` if the agent is of a version that cannot tell.
    pub fn store(&self, wish: &StoreWish) -> Result<Option<StoreSeen>> {
        match self.shared.call(&Request::Store { wish: wish.clone() }) {
            Ok(Reply::Store { store }) => Ok(Some(store)),
            Ok(other) => Err(self.shared.other_reply("store", &other)),
            // It does not know the request, and the session goes on.
            Err(e) if e.kind() == Kind::Protocol && self.is_open() => Ok(None),
            Err(e) => Err(e),
        }
    }
}
