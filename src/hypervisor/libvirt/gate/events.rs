//! libvirt's events: the thread that they come on, and who is woken by them.

use super::lock;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::libvirt::sys::Event;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
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
    pub(super) fn subscribe(self: &Arc<Self>, uuid: &str, disk: &str) -> Wake {
        let (sender, receiver) = mpsc::sync_channel(1);
        let mut subscribers = lock(&self.0);
        subscribers.next += 1;
        let number = subscribers.next;
        subscribers.list.push(Subscriber { number, uuid: uuid.to_owned(), disk: disk.to_owned(), sender });
        Wake { number, receiver, hub: Arc::clone(self) }
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
}

/// A subscription; ends when it is dropped.
pub struct Wake {
    number: u64,
    receiver: Receiver<()>,
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

/// Events and keepalives of all connections are handled on one plain thread, which must exist before the first
/// connection is opened and serves the process to its end.
pub(super) fn start_event_loop() -> Result<()> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        // libvirt prints every error to stderr otherwise.
        virt::error::clear_error_callback();
        virt::event::event_register_default_impl().map_err(|e| e.message().to_owned())?;
        thread::Builder::new().name("libvirt-events".into()).spawn(run_events).map(drop).map_err(|e| e.to_string())
    });
    started.clone().map_err(|e| Error::new(Kind::Io, format!("cannot start libvirt's event loop: {e}")))
}

fn run_events() {
    loop {
        if let Err(e) = virt::event::event_run_default_impl() {
            tracing::warn!(error = e.message(), "libvirt's event loop failed once; it goes on");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Call, Gate, Line, Repeat};
    use super::*;
    use std::time::Instant;

    fn call(repeat: Repeat) -> Call<'static> {
        Call { what: "try", domain: Some("test"), deadline: Duration::from_secs(5), repeat }
    }

    #[test]
    fn events_wake_those_they_concern() {
        let gate = Gate::new(Some("test:///default")).unwrap();
        let uuid = gate.call(call(Repeat::Harmless), |c| Ok(c.lookup_domain_by_name("test")?.uuid_string()?)).unwrap();
        let (mine, other) = (gate.subscribe(&uuid, "vda"), gate.subscribe("another", "vda"));
        let toggle = |c: &Line<'_>| {
            let domain = c.lookup_domain_by_name("test")?;
            domain.suspend()?;
            Ok(domain.resume()?)
        };
        gate.call(call(Repeat::Never), toggle).unwrap();
        let start = Instant::now();
        mine.wait(Duration::from_secs(20));
        assert!(start.elapsed() < Duration::from_secs(10), "not woken");
        assert!(other.receiver.try_recv().is_err(), "woken by a stranger's event");
        drop((mine, other));
        assert!(lock(&gate.0.hub.0).list.is_empty());
    }
}
