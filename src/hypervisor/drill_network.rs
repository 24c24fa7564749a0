//! A foot in an isolated network: a network namespace with one end of a pair of devices, the other end on the network's
//! bridge. The host itself stays outside: no address, no route and no rule of its own changes, whatever addresses the
//! guests in there have.
//!
//! Made and removed by iproute2's `ip`. With the namespace goes everything.

use crate::error::{Error, Kind, Result, printable};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Where iproute2 keeps namespaces with names.
const NAMESPACES: &str = "/run/netns";

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).env("LC_ALL", "C").stdin(Stdio::null()).output();
    let output = output.map_err(|e| Error::io("cannot start the program", "ip", e).hint("install iproute2"))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = printable(&String::from_utf8_lossy(&output.stderr), 200);
            Err(Error::new(Kind::Refused, format!("`ip {}` failed: {said}", args.join(" "))))
        }
    }
}

/// Joins the network on `bridge`, with `address` and the length of its prefix. `name` names the namespace, `device` the
/// end on the bridge (at most 15 bytes).
pub fn join(name: &str, bridge: &str, device: &str, (address, prefix): (Ipv4Addr, u8)) -> Result<()> {
    ip(&["netns", "add", name])?;
    ip(&["link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", name])?;
    ip(&["link", "set", device, "master", bridge, "up"])?;
    ip(&["-n", name, "address", "add", &format!("{address}/{prefix}"), "dev", "eth0"])?;
    ip(&["-n", name, "link", "set", "eth0", "up"])
}

/// Leaves it; no error if nobody has joined.
pub fn leave(name: &str) -> Result<()> {
    match std::path::Path::new(NAMESPACES).join(name).exists() {
        true => ip(&["netns", "delete", name]),
        false => Ok(()),
    }
}

/// Whether somebody in there accepts a connection, within this time.
pub fn connects(name: &str, to: SocketAddr, within: Duration) -> Result<bool> {
    let path = std::path::Path::new(NAMESPACES).join(name);
    let namespace = File::open(&path).map_err(|e| Error::io("cannot enter the isolated network", &path, e))?;
    // A thread of its own: it alone is inside, and it ends there.
    let inside = std::thread::spawn(move || {
        // SAFETY: a system call on a file that is open; it changes the network of this thread and of nothing else.
        let entered = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
        match entered {
            0 => Ok(TcpStream::connect_timeout(&to, within).is_ok()),
            _ => Err(std::io::Error::last_os_error()),
        }
    });
    let answer = inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    answer.map_err(|e| Error::io("cannot enter the isolated network", &path, e))
}

/// An address beside `guest` in its network, for whoever wants to reach it; `None` where there is no room for two.
pub fn beside(guest: Ipv4Addr, prefix: u8) -> Option<Ipv4Addr> {
    if !(1..=30).contains(&prefix) {
        return None;
    }
    let network = u32::from(guest) & (u32::MAX << (32 - prefix));
    (1..3).map(|n| Ipv4Addr::from(network + n)).find(|a| *a != guest)
}

/// The guest's end of a probe.
pub fn socket(guest: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(guest), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_beside_is_in_the_same_network_and_another_one() {
        let beside = |a: &str, prefix| beside(a.parse().unwrap(), prefix).map(|b| b.to_string());
        assert_eq!(beside("192.0.2.10", 24).as_deref(), Some("192.0.2.1"));
        assert_eq!(beside("192.0.2.1", 24).as_deref(), Some("192.0.2.2"));
        assert_eq!(beside("10.1.2.3", 8).as_deref(), Some("10.0.0.1"));
        assert_eq!(beside("10.1.2.5", 30).as_deref(), Some("10.1.2.6"));
        assert_eq!((beside("10.1.2.3", 31), beside("10.1.2.3", 0), beside("10.1.2.3", 33)), (None, None, None));
    }
}
