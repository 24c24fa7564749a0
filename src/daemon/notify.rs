//! Tells systemd how the service stands, by its protocol: lines in a datagram to `$NOTIFY_SOCKET`. Without one,
//! nothing.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The way to the service manager.
pub struct Notify {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// How often it wants to hear that we live.
    pub watchdog: Option<Duration>,
}

impl Notify {
    /// From the values of `NOTIFY_SOCKET` and `WATCHDOG_USEC`.
    pub fn new(socket: Option<&str>, watchdog_usec: Option<&str>) -> Notify {
        let address = socket.and_then(|path| match path.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name).ok(),
            None => SocketAddr::from_pathname(path).ok(),
        });
        let socket = address.and_then(|a| Some((UnixDatagram::unbound().ok()?, a)));
        // Half of it, as sd_watchdog_enabled(3) advises.
        let usec = watchdog_usec.and_then(|u| u.parse().ok()).filter(|u: &u64| *u > 0);
        let watchdog = usec.map(|u| Duration::from_micros(u / 2)).filter(|_| socket.is_some());
        Notify { socket, watchdog }
    }

    /// Takes `NOTIFY_SOCKET` and `WATCHDOG_USEC` from the environment of this process.
    pub fn from_env() -> Notify {
        let var = |name| std::env::var(name).ok();
        Notify::new(var("NOTIFY_SOCKET").as_deref(), var("WATCHDOG_USEC").as_deref())
    }

    /// `READY=1`, `RELOADING=1`, `STOPPING=1`, `WATCHDOG=1`, `STATUS=...`. Losing one is no reason to stop.
    pub fn say(&self, text: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(e) = socket.send_to_addr(text.as_bytes(), address)
        {
            tracing::debug!("systemd could not be told '{text}': {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_arrives_and_nothing_is_said_to_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let notify = Notify::new(path.to_str(), Some("30000000"));
        assert_eq!(notify.watchdog, Some(Duration::from_secs(15)));
        notify.say("READY=1");
        let mut buffer = [0; 64];
        let got = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..got], b"READY=1");
        let nobody = Notify::new(None, Some("30000000"));
        assert_eq!(nobody.watchdog, None);
        nobody.say("READY=1");
    }
}
