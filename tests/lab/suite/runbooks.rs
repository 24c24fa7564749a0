//! The runbooks do what they say: their commands are read from the pages and run as they stand, with the names of the
//! lab in the place of those of the page, in the order of the page.

use super::crash_failover::OnB;
use super::domain::{Disk, Domain};
use super::support::{Done, Host, Job, Lab};
use std::path::Path;
use std::time::Duration;

/// What a command may take: a guest boots, or shuts down.
const PATIENCE: Duration = Duration::from_secs(90);

/// What is done on host a and b beside the domain's own: it goes with the test, however that ends.
struct Cleared<'a>(&'a Domain);

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        let script = r#"virsh -q destroy "$1" || true; virsh -q undefine --nvram "$1" || true
            rm -rf "/var/lib/libvirt/images/vr-failover-$2" "/var/lib/virt-replica/replicas/$2" "/root/$1.before-failback.xml"
            rm -rf "/var/lib/virt-replica/source/recovery/failovers/$2" "/var/lib/virt-replica/source/recovery/handovers/$2" "/var/lib/virt-replica/source/domains/$2""#;
        for host in [Host::A, Host::B] {
            host.run(&["bash", "-c", script, "clear", &self.0.name, &self.0.uuid]);
        }
    }
}

/// The commands of a page: the host, and the line.
fn commands(page: &str) -> Vec<(Host, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/runbooks").join(page);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let of_line = |line: &str| {
        let (host, command) = line.trim().split_once("# ")?;
        let host = match host {
            "source" => Host::A,
            "target" => Host::B,
            _ => return None,
        };
        Some((host, command.to_owned()))
    };
    text.lines().filter_map(of_line).collect()
}

/// Runs a page, with this probe in the place of the page's; gives the number of commands.
fn play(vm: &Domain, page: &str, probe: &str) -> Vec<Done> {
    let run = |(host, line): (Host, String)| {
        let line = line
            .replace("web01", &vm.name)
            .replace("ssh://source/system", "ssh://root@192.0.2.1/system")
            .replace("ssh://target/system", "ssh://root@192.0.2.2/system")
            .replace("--to ssh://target", "--to ssh://root@192.0.2.2")
            .replace("--to ssh://source", "--to ssh://root@192.0.2.1")
            .replace("--probe agent", probe);
        Job::start(host.command(&["bash", "-euo", "pipefail", "-c", &line])).wait(PATIENCE).success()
    };
    commands(page).into_iter().map(run).collect()
}

/// Kernel and initrd of the test guest are at the same place on both hosts.
pub fn map_paths() {
    for host in [Host::A, Host::B] {
        let text = "paths: {/lab/guest: /lab/guest}";
        host.script("mkdir -p /etc/virt-replica; printf '%s\\n' \"$1\" >/etc/virt-replica/recovery.yaml", &[text]);
    }
}

/// How many lines the guest has on disk, whole and in order.
pub fn lines(host: Host, image: &str) -> u64 {
    let lines = host.output(&["/lab/tools/guest", "lines", image, "qcow2"]);
    for (at, line) in lines.lines().enumerate() {
        assert_eq!(line, (at + 1).to_string(), "line {} of {image}", at + 1);
    }
    lines.lines().count() as u64
}

#[test]
fn a_domain_is_drilled_moved_and_brought_home_as_the_runbooks_say_and_nothing_is_lost() {
    let lab = Lab::get();
    let vm = lab.domain("runbook").disk(Disk::ext4("64M", "qcow2")).guest().running();
    let (_there, _cleared) = (OnB(&vm), Cleared(&vm));
    map_paths();
    vm.wait_acked(5);
    vm.sync().sealed();
    assert_eq!(play(&vm, "drill.md", "--probe 'serial:ack '").len(), 4);

    // Moved: every line that was acknowledged to the very end is on b.
    let done = play(&vm, "planned-move.md", "");
    assert_eq!(done.len(), 4);
    assert!(done[1].stdout.contains("down for"), "{}", done[1].stdout);
    assert!(done[2].stdout.contains("demoted") && done[3].stdout.contains("lives on"), "{done:?}");
    let acked = vm.acked();
    let moved = format!("/var/lib/libvirt/images/vr-failover-{}/vda.qcow2", vm.uuid);
    std::thread::sleep(Duration::from_secs(6));

    // Brought home: what the guest wrote on b too.
    let done = play(&vm, "failback.md", "");
    assert_eq!(done.len(), 5);
    assert!(done[2].stdout.contains("down for") && done[2].stdout.contains("pinned"), "{}", done[2].stdout);
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(vm.state(), "running");
    vm.virsh(&["destroy"]);
    let home = lines(Host::A, &moved);
    assert!(home > acked + 1, "line {acked} was the last one before the move, and home has {home}");
    // The source's old image is what it was.
    assert!(lines(Host::A, &vm.images[0]) >= acked);
}

#[test]
fn a_running_domain_migrates_as_the_runbook_says() {
    let lab = Lab::get();
    let vm = lab.domain("runbook-migrate").disk(Disk::ext4("64M", "qcow2")).guest().running();
    let (there, _cleared) = (OnB(&vm), Cleared(&vm));
    map_paths();
    vm.sync().sealed();
    let done = play(&vm, "migrate.md", "");
    assert_eq!(done.len(), 3);
    assert!(done[1].stderr.contains("round 1: ") && done[1].stdout.contains("down for"), "{:?}", done[1]);
    assert!(there.runs() && vm.state() == "shut off");
}

#[test]
fn a_domain_whose_source_is_gone_is_brought_up_and_undone_as_the_runbook_says() {
    let lab = Lab::get();
    let vm = lab.domain("runbook-gone").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).paused();
    let (there, _cleared) = (OnB(&vm), Cleared(&vm));
    map_paths();
    vm.sync().sealed();
    // It is not gone at all: the domain is there.
    let uri = "qemu+ssh://root@192.0.2.1/system";
    let up = ["failover", &vm.name, "--unplanned", "--source-is-dead", "--ask", uri];
    Host::B.virt_replica(&up).exit(1).says(&["the source answers", "two of them would write"]);
    assert!(!there.runs());
    vm.virsh(&["destroy"]);
    assert_eq!(play(&vm, "unplanned-failover.md", "").len(), 4);
    assert!(!there.runs(), "the page ends with the undo");
    vm.sync().sealed();
}
