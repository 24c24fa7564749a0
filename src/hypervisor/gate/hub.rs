//! Events of libvirt, handed to whoever waits for them.

use super::lock;
use crate::hypervisor::sys::Event;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Who waits for what. Events only wake; what happened is then asked, as an event can be lost with its connection.
#[derive(Default)]
pub(super) struct Hub(Mutex<Subscribers>);

#[derive(Default)]
struct Subscribers {
    next: u64,
    list: Vec<Subscriber>,
}

struct Subscriber {
    number: u64,
    uuid: String,
    disk: String,
    sender: SyncSender<()>,
}

impl Hub {
    pub(super) fn subscribe(hub: &Arc<Hub>, uuid: &str, disk: &str) -> Wake {
        let (sender, receiver) = mpsc::sync_channel(1);
        let mut subscribers = lock(&hub.0);
        subscribers.next += 1;
        let number = subscribers.next;
        subscribers.list.push(Subscriber { number, uuid: uuid.to_owned(), disk: disk.to_owned(), sender });
        Wake { number, receiver, hub: Arc::clone(hub) }
    }

    pub(super) fn tell(&self, event: Event<'_>) {
        for s in &lock(&self.0).list {
            let concerned = match event {
                Event::Lifecycle { uuid } => s.uuid == uuid,
                Event::BlockJob { uuid, disk } => s.uuid == uuid && s.disk == disk,
                Event::Closed => true,
            };
            if concerned {
                // Full: it has a wake-up waiting already.
                let _ = s.sender.try_send(());
            }
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        lock(&self.0).list.is_empty()
    }
}

/// A subscription; ends when it is dropped.
pub struct Wake {
    number: u64,
    pub(super) receiver: Receiver<()>,
    hub: Arc<Hub>,
}

impl Wake {
    /// Waits for the next event, or one since the last wait; at most `timeout`.
    pub fn wait(&self, timeout: Duration) {
        let _ = self.receiver.recv_timeout(timeout);
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        lock(&self.hub.0).list.retain(|s| s.number != self.number);
    }
}
