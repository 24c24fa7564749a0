//! A drill against a host that does as it is told, one that does not, and one that dies: with real overlays.

use super::*;
use crate::hypervisor::Power;
use crate::hypervisor::machine::{Capabilities, HostView, Machine};
use crate::hypervisor::swtpm::TpmVersion;
use crate::image::Format;
use crate::image::qemu_img;
use crate::recovery::point_tests::Point;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;

const XML: &str = "<domain type='qemu'><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='pc'>hvm</type></os>\
    <devices><disk type='file' device='disk'><target dev='vda' bus='virtio'/></disk>\
    <interface type='network'><source network='production'/></interface>\
    <serial type='pty'/><tpm model='tpm-tis'><backend type='emulator'/></tpm></devices></domain>";

/// A host of the test's making. It knows what runs on it, and fails at the verb it is told to.
#[derive(Default)]
struct Host {
    running: Mutex<Vec<String>>,
    networks: Mutex<Vec<String>>,
    /// States of TPMs, by the domain's UUID.
    tpms: Mutex<Vec<(String, Vec<u8>)>>,
    done: Mutex<Vec<String>>,
    fails_at: Mutex<Option<&'static str>>,
    /// The guest says this when it is started.
    says: &'static str,
    /// The guest ends at once.
    ends: bool,
    /// It writes into the file below its overlay, as no QEMU would.
    writes_below: Option<PathBuf>,
}

impl Host {
    fn does(&self, what: &str) -> Result<()> {
        self.done.lock().unwrap().push(what.to_owned());
        match *self.fails_at.lock().unwrap() {
            Some(verb) if what.starts_with(verb) => Err(Error::new(Kind::Refused, format!("no {verb} today"))),
            _ => Ok(()),
        }
    }

    fn is_clean(&self) -> bool {
        self.running.lock().unwrap().is_empty()
            && self.networks.lock().unwrap().is_empty()
            && self.tpms.lock().unwrap().is_empty()
    }
}

impl Machines for Host {
    fn host(&self, _: &Machine) -> Result<HostView> {
        self.does("host")?;
        Ok(HostView {
            machine: Ok(Capabilities { tpm_emulator: true, ..Capabilities::default() }),
            networks: Vec::new(),
            bridges: Vec::new(),
            domains: Vec::new(),
            free_memory_bytes: 1 << 30,
            qemu_uid: Some(64055),
            tpm_states: Vec::new(),
            tpm_secrets: Vec::new(),
            tpm_programs: None,
            cpus: 2,
            libvirt: Some((9, 0, 0)),
            qemu: Some((7, 2, 0)),
            machines: Vec::new(),
        })
    }

    fn accepts(&self, _: &str) -> Result<Result<(), String>> {
        self.does("accepts").map(Ok)
    }
    fn firmware_for(&self, _: &str) -> Result<Option<PathBuf>> {
        unreachable!("a drill is tried with any build")
    }
    fn start_transient(&self, xml: &str) -> Result<()> {
        self.does("start")?;
        assert!(!xml.contains("production"), "{xml}");
        let text = |start: &str, end: char| xml.split(start).nth(1).unwrap().split(end).next().unwrap().to_owned();
        std::fs::write(text("<source path='", '\''), self.says).unwrap();
        let overlay = text("<source file='", '\'');
        let below = qemu_img::info(Path::new(&overlay), Format::Qcow2, false).unwrap().backing.unwrap();
        for dir in Path::new(&below).ancestors().skip(1).take(5) {
            let mode = std::fs::metadata(dir).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o701, "QEMU's user comes through {}, and sees nothing else", dir.display());
        }
        assert!(self.networks.lock().unwrap().contains(&text("<source network='", '\'')), "its network comes first");
        if let Some(image) = &self.writes_below {
            std::fs::write(image, "x").unwrap();
        }
        if !self.ends {
            self.running.lock().unwrap().push(text("<uuid>", '<'));
        }
        Ok(())
    }

    fn define(&self, _: &str) -> Result<()> {
        unreachable!("a drill leaves no definition behind")
    }

    fn start(&self, _: &DomainUuid) -> Result<()> {
        unreachable!("a drill leaves no definition behind")
    }

    fn destroy(&self, uuid: &DomainUuid) -> Result<()> {
        self.does("destroy")?;
        self.running.lock().unwrap().retain(|u| u != uuid.as_str());
        Ok(())
    }

    fn undefine(&self, _: &DomainUuid) -> Result<()> {
        unreachable!("a drill leaves no definition behind")
    }

    fn put_tpm(&self, uuid: &DomainUuid, _: TpmVersion, state: &[u8]) -> Result<()> {
        self.does("put_tpm")?;
        self.tpms.lock().unwrap().push((uuid.as_str().to_owned(), state.to_vec()));
        Ok(())
    }

    fn forget_tpm(&self, uuid: &DomainUuid) -> Result<()> {
        self.does("forget_tpm")?;
        self.tpms.lock().unwrap().retain(|(u, _)| u != uuid.as_str());
        Ok(())
    }

    fn power(&self, uuid: &DomainUuid) -> Result<Option<Power>> {
        Ok(self.running.lock().unwrap().iter().any(|u| u == uuid.as_str()).then_some(Power::Running))
    }

    fn start_network(&self, name: &str, bridge: &str) -> Result<()> {
        self.does("network")?;
        assert!(bridge.len() <= 15, "{bridge}");
        self.networks.lock().unwrap().push(name.to_owned());
        Ok(())
    }

    fn stop_network(&self, name: &str) -> Result<()> {
        self.does("stop_network")?;
        self.networks.lock().unwrap().retain(|n| n != name);
        Ok(())
    }

    fn join_network(&self, name: &str, _: &str, (guest, prefix): (Ipv4Addr, u8)) -> Result<()> {
        self.does("join")?;
        assert!(self.networks.lock().unwrap().iter().any(|n| n == name), "it is made first");
        assert_eq!((guest.to_string().as_str(), prefix), ("192.0.2.10", 24));
        Ok(())
    }

    fn connects(&self, _: &str, to: SocketAddr, _: Duration) -> Result<bool> {
        Ok(to.port() == 22)
    }

    fn leave_network(&self, _: &str) -> Result<()> {
        self.does("leave")
    }

    fn ping_guest_agent(&self, _: &DomainUuid, _: Duration) -> Result<()> {
        Err(Error::new(Kind::Unavailable, "nobody is there"))
    }

    fn screenshot(&self, _: &DomainUuid) -> Result<Vec<u8>> {
        self.does("screenshot")?;
        Ok(b"P6".to_vec())
    }
}

/// A store, a place for overlays and a place for state.
struct Bench {
    temp: tempfile::TempDir,
    mapping: Mapping,
}

impl Bench {
    fn new() -> Bench {
        let temp = tempfile::tempdir().unwrap();
        let images = temp.path().join("images");
        std::fs::create_dir(&images).unwrap();
        let mapping = Mapping { images: Some(images), ..Mapping::default() };
        Bench { temp, mapping }
    }

    fn point(&self) -> Point {
        let dir = self.temp.path().join("store/replicas/uuid/points/one");
        std::fs::create_dir_all(&dir).unwrap();
        let closed = std::fs::Permissions::from_mode(0o700);
        dir.ancestors().take(5).for_each(|d| std::fs::set_permissions(d, closed.clone()).unwrap());
        Point::in_dir(&dir, 1, Some(XML)).with_tpm(b"sealed")
    }

    fn drill(&self, host: &Host, id: u64, probe: &str, stop: bool) -> Result<Report> {
        let request = Request {
            id: RunId::from_bits(id),
            drill_uuid: DomainUuid::new(format!("00000000-0000-4000-8000-{id:012x}")).unwrap(),
            domain: DomainName::new("web01").unwrap(),
            uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
            probes: vec![probe.parse().unwrap()],
            within: Duration::from_millis(20),
            state: self.temp.path(),
            mapping: &self.mapping,
            bits: 1,
        };
        let ports = Ports {
            machines: host,
            clock: &|| Timestamp::UNIX_EPOCH,
            room: &|dir| dir.exists().then_some(1 << 40),
            say: &|_| {},
        };
        let mut point = self.point();
        run(&ports, &request, &mut point, &AtomicBool::new(stop))
    }

    /// Nothing is left of any drill but reports.
    fn is_clean(&self) -> bool {
        let left = std::fs::read_dir(self.mapping.images_dir()).unwrap().count();
        left == 0 && drills::abandoned(self.temp.path()).unwrap().is_empty()
    }
}

#[test]
fn a_guest_that_shows_what_is_waited_for_passes_and_nothing_is_left_but_the_proof() {
    let (bench, host) = (Bench::new(), Host { says: "boot\x1b[0m\nlogin: ", ..Host::default() });
    let report = bench.drill(&host, 1, "serial:login:", false).unwrap();
    assert_eq!((report.outcome, report.error.as_deref()), (Outcome::Passed, None));
    assert!(report.rto_ms.is_some() && report.point_untouched && report.cleaned && report.picture);
    assert_eq!(report.console_tail, "boot [0m\nlogin:");
    assert_eq!(report.evidence[0].after_ms, report.rto_ms);
    assert!(bench.is_clean() && host.is_clean());
    assert_eq!(std::fs::read(report.kept.join("screen")).unwrap(), b"P6");
    let kept: serde_json::Value =
        serde_json::from_slice(&std::fs::read(report.kept.join(drills::REPORT)).unwrap()).unwrap();
    assert_eq!((&kept["outcome"], &kept["point"]), (&"passed".into(), &report.point.as_str().into()));
    let done = host.done.lock().unwrap().join(" ");
    assert_eq!(done, "host accepts put_tpm network start screenshot destroy leave stop_network forget_tpm");
}

#[test]
fn a_guest_that_accepts_a_connection_is_reached_from_inside_its_network() {
    let (bench, host) = (Bench::new(), Host::default());
    let report = bench.drill(&host, 1, "tcp:192.0.2.10/24:22", false).unwrap();
    assert_eq!((report.outcome, report.error.as_deref()), (Outcome::Passed, None));
    let done = host.done.lock().unwrap().join(" ");
    assert_eq!(done, "host accepts put_tpm network join start screenshot destroy leave stop_network forget_tpm");
    let closed = bench.drill(&host, 2, "tcp:192.0.2.10/24:23", false).unwrap();
    assert!(closed.outcome == Outcome::Failed && closed.cleaned && host.is_clean());
}

#[test]
fn what_is_not_seen_in_time_fails_and_is_cleaned_up_all_the_same() {
    let bench = Bench::new();
    let silent = Host::default();
    let report = bench.drill(&silent, 1, "serial:login:", false).unwrap();
    assert!(report.error.unwrap().contains("this was not seen: serial:login:"));
    assert_eq!((report.outcome, report.rto_ms, report.evidence[0].after_ms), (Outcome::Failed, None, None));
    let ends = Host { ends: true, ..Host::default() };
    assert!(bench.drill(&ends, 2, "serial:x", false).unwrap().error.unwrap().contains("the guest ended before"));
    let stopped = bench.drill(&silent, 3, "serial:x", true).unwrap();
    assert_eq!((stopped.outcome, stopped.error_kind), (Outcome::Failed, Some(Kind::Interrupted)));
    assert!(bench.is_clean() && silent.is_clean());
}

#[test]
fn whatever_the_host_refuses_nothing_is_left_or_the_next_drill_removes_it() {
    let bench = Bench::new();
    let verbs = [
        ("put_tpm", true),
        ("network", true),
        ("start", true),
        ("destroy", false),
        ("leave", false),
        ("stop_network", false),
        ("forget_tpm", false),
    ];
    for (id, (verb, cleaned)) in verbs.into_iter().enumerate() {
        let host = Host { says: "ok", ..Host::default() };
        *host.fails_at.lock().unwrap() = Some(verb);
        let report = bench.drill(&host, id as u64, "serial:ok", false).unwrap();
        assert_eq!((report.outcome, report.cleaned), (Outcome::Failed, cleaned), "{verb}: {:?}", report.error);
        assert!(report.error.unwrap().contains(&format!("no {verb} today")), "{verb}");
        *host.fails_at.lock().unwrap() = None;
        let settled = settle(&host, bench.temp.path(), None).unwrap();
        assert_eq!(settled.len(), usize::from(!cleaned), "{verb}");
        assert!(bench.is_clean() && host.is_clean(), "{verb}");
    }
}

#[test]
fn a_point_that_was_written_to_is_no_success() {
    let bench = Bench::new();
    let host = Host {
        says: "ok",
        writes_below: Some(bench.temp.path().join("store/replicas/uuid/points/one/vda.qcow2")),
        ..Host::default()
    };
    let report = bench.drill(&host, 1, "serial:ok", false).unwrap();
    assert_eq!((report.outcome, report.error_kind), (Outcome::Failed, Some(Kind::Corrupt)));
    assert!(!report.point_untouched && report.cleaned);
}

#[test]
fn what_cannot_succeed_is_refused_before_anything_is_made() {
    let bench = Bench::new();
    let host = Host::default();
    let e = bench.drill(&host, 1, "agent", false).unwrap_err();
    assert!(e.kind() == Kind::Usage && e.chain().contains("no channel for the guest agent"), "{}", e.chain());
    std::fs::remove_dir(bench.mapping.images_dir()).unwrap();
    let e = bench.drill(&host, 1, "serial:x", false).unwrap_err();
    assert!(e.kind() == Kind::Conflict && e.hint_text().is_some(), "{}", e.chain());
    assert!(!bench.temp.path().join("recovery").exists(), "there is no state of a drill that never was");
}
