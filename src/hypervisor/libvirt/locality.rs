//! Whether libvirt's host is this host: what it says of a domain's images are paths of its own, and we open them here.
//!
//! The spelling of the URI is not enough: it may come from `LIBVIRT_DEFAULT_URI`, from `uri_default` or an alias, and a
//! socket of this host may lead to another one. So the URI that libvirt really opened has to be local, and both sides
//! have to see the same kernel count its CPU time.

use super::gate::{Call, Failure, Repeat};
use super::sys;
use crate::error::{Error, Kind, Result, advice};
use crate::hypervisor::libvirt::LibvirtHypervisor;

/// CPU time of a host since it was started, in ticks: another host has other figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ticks {
    user: u64,
    kernel: u64,
}

/// What was found out about libvirt's host.
struct Facts {
    uri: String,
    /// Its figures, between two looks at ours; `None`: it cannot tell them.
    seen: Option<(Ticks, Ticks, Ticks)>,
}

/// What the facts say.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Here,
    /// Only the hosts' names can tell.
    ByName,
    Elsewhere,
}

impl LibvirtHypervisor {
    /// [`Kind::Refused`] unless libvirt runs on this host. Asks, and touches nothing.
    pub fn must_be_here(&self) -> Result<()> {
        let deadline = self.deadlines.query;
        let call = Call { what: "ask which host it runs on", domain: None, deadline, repeat: Repeat::Harmless };
        let facts = self.gate.call(call, |conn| -> Result<Facts, Failure> {
            let before = ticks_here();
            let there = sys::cpu_times_ns(conn).ok().and_then(|times| ticks_of(&times));
            let after = ticks_here();
            let seen = before.zip(there).zip(after).map(|((before, there), after)| (before, there, after));
            Ok(Facts { uri: conn.uri()?, seen })
        })?;
        let verdict = judge(&facts);
        if verdict == Verdict::Here {
            return Ok(());
        }
        // Not asked before it is needed: libvirt asks the resolver, which may be what is broken today.
        let there = self.gate.call(call, |conn| -> Result<String, Failure> { Ok(conn.hostname()?) });
        let there = there.unwrap_or_else(|_| "another host".to_owned());
        let here = read("/proc/sys/kernel/hostname");
        match verdict == Verdict::ByName && is_same_host(&there, &here) {
            true => Ok(()),
            false => Err(refusal(&facts.uri, &there, &here)),
        }
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

fn ticks_here() -> Option<Ticks> {
    let all = read("/proc/stat");
    let fields: Vec<u64> = all.lines().next()?.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    // user nice system idle iowait irq softirq
    Some(Ticks { user: fields.first()? + fields.get(1)?, kernel: fields.get(2)? + fields.get(5)? + fields.get(6)? })
}

fn ticks_of(times_ns: &[(String, u64)]) -> Option<Ticks> {
    let of = |name: &str| {
        times_ns.iter().find(|(n, _)| n == name).map(|(_, ns)| ns / (1_000_000_000 / sys::ticks_per_second()))
    };
    Some(Ticks { user: of("user")?, kernel: of("kernel")? })
}

/// Pure.
fn judge(facts: &Facts) -> Verdict {
    // libvirt's own test driver lives in this process.
    if facts.uri.starts_with("test:") {
        return Verdict::Here;
    }
    match facts.seen {
        _ if !is_local(&facts.uri) => Verdict::Elsewhere,
        Some((before, there, after)) if is_between(before, there, after) => Verdict::Here,
        Some(_) => Verdict::Elsewhere,
        None => Verdict::ByName,
    }
}

fn refusal(uri: &str, there: &str, here: &str) -> Error {
    let what =
        format!("libvirt ({uri}) runs on {there}, and this is {here}: the paths of its images mean nothing here");
    Error::new(Kind::Refused, what).advise(advice::Host::RunOn { host: there.to_owned() })
}

/// Whether a URI leads through a socket of this host.
fn is_local(uri: &str) -> bool {
    let Some((scheme, rest)) = uri.split_once("://") else { return false };
    let transport = scheme.split_once('+').map_or("", |(_, transport)| transport);
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    host.is_empty() && matches!(transport, "" | "unix")
}

fn is_between(before: Ticks, there: Ticks, after: Ticks) -> bool {
    // Each side rounds for itself, and sums up over processors that go on counting.
    let within = |before: u64, there: u64, after: u64| before <= there + 2 && there <= after + 2;
    within(before.user, there.user, after.user) && within(before.kernel, there.kernel, after.kernel)
}

/// libvirt gives the name that the resolver makes of the host's own.
fn is_same_host(there: &str, here: &str) -> bool {
    let label = |name: &str| name.split('.').next().unwrap_or_default().to_ascii_lowercase();
    !here.is_empty() && label(there) == label(here)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(user: u64, kernel: u64) -> Ticks {
        Ticks { user, kernel }
    }

    /// Case B1: with libvirt of another host, images of that host's paths were opened on this one.
    #[test]
    fn only_a_libvirt_of_this_host_will_do() {
        use Verdict::{ByName, Elsewhere, Here};
        let same = Some((t(100, 50), t(100, 51), t(101, 51)));
        let other = Some((t(100, 50), t(7_000, 51), t(101, 51)));
        for (uri, seen, verdict) in [
            ("qemu:///system", same, Here),
            ("qemu:///session", same, Here),
            ("qemu+unix:///system?socket=/run/x", same, Here),
            ("test:///default", None, Here),
            ("qemu:///system", None, ByName),
            // Another host behind a socket of this one.
            ("qemu+unix:///system?socket=/tmp/forwarded", other, Elsewhere),
            ("qemu:///system", other, Elsewhere),
            ("qemu+ssh://root@b/system", other, Elsewhere),
            ("qemu+ssh://root@b/system", None, Elsewhere),
            // The lab's hosts share one kernel, and so do containers.
            ("qemu+ssh://root@b/system", same, Elsewhere),
            ("qemu+ssh:///system", same, Elsewhere),
            ("qemu+tcp://localhost/system", same, Elsewhere),
            ("qemu://b/system", same, Elsewhere),
            ("qemu+ext:///system?command=/x", same, Elsewhere),
        ] {
            assert_eq!(judge(&Facts { uri: uri.into(), seen }), verdict, "{uri} {seen:?}");
        }
        assert!(is_same_host("A.example", "a") && !is_same_host("b", "a") && !is_same_host("", ""));
        let e = refusal("qemu+ssh://b/system", "b", "a");
        assert_eq!(e.kind(), Kind::Refused);
        assert!(e.what().contains("runs on b, and this is a"), "both sides: {e}");
        assert!(e.advice() == Some(&advice::Host::RunOn { host: "b".to_owned() }.into()), "the way out");
    }

    #[test]
    fn the_figures_of_this_kernel_are_read() {
        let ticks = ticks_here().unwrap();
        assert!(ticks.user > 0 && ticks.kernel > 0 && sys::ticks_per_second() >= 100);
        let ns = 1_000_000_000 / sys::ticks_per_second();
        let told = [("kernel".to_owned(), ticks.kernel * ns), ("user".to_owned(), ticks.user * ns)];
        assert_eq!(ticks_of(&told), Some(ticks));
        assert_eq!(ticks_of(&told[..1]), None);
    }
}
