//! Migrations under load with two real hypervisors: forecast and measured downtime, nothing that was acknowledged lost;
//! and whatever ends one before its cutover leaves the guest writing as before.

use super::domain::{Disk, Domain};
use super::handover::{LONG, Traveller, message};
use super::runbooks::lines;
use super::support::{Host, Job, Lab};
use std::time::Duration;

/// A guest that writes lines as fast as it can.
fn writer(lab: &Lab, name: &str) -> Domain {
    lab.domain(name).disk(Disk::ext4("128M", "qcow2")).guest().delay("0.01").running()
}

/// Writes to the third disk, which the guest leaves alone, over and over, for as long as its domain runs.
fn load(vm: &Domain) -> Job {
    let script = r#"for ((i = 0; ; i++)); do
          io="qemu-io -d /machine/peripheral/virtio-disk2/virtio-backend \"write -P $((i % 250 + 1)) $((i % 48))M 1M\""
          virsh -q qemu-monitor-command "$1" --hmp "$io" >/dev/null || exit 0
        done"#;
    Job::start(Host::A.command(&["bash", "-c", script, "load", &vm.name]))
}

/// Sends a signal to the program that migrates this domain, in host a.
fn signal(vm: &Domain, signal: &str) {
    let script = r#"for p in /proc/[0-9]*; do
          words=$(tr '\0' ' ' <"$p/cmdline" 2>/dev/null) || continue
          [[ $words == *"virt-replica migrate $1 "* && $words != *bash* ]] && kill -"$2" "${p#/proc/}"
        done; true"#;
    Host::A.script(script, &[&vm.name, signal]);
}

fn wait_round(job: &mut Job, n: u64) {
    let wanted = format!("\"round\":{n},");
    job.wait_line(Duration::from_secs(90), &format!("round {n}"), |line| line.contains(&wanted));
}

#[test]
fn a_writing_guest_migrates_and_its_downtime_is_foretold_and_measured() {
    let lab = Lab::get();
    let (lines_to, load_to) = (|| Disk::ext4("64M", "qcow2"), Disk::qcow2("64M"));
    let vm = lab.domain("migrate").disk(lines_to()).disk(lines_to()).disk(load_to).guest().delay("0.01").running();
    let t = Traveller::of(&vm);
    vm.wait_acked(20);
    let mut load = load(&vm);
    let done = t.start("", "migrate", &["--max-downtime", "2m"]).wait(LONG).success();
    let acked = vm.acked();
    let report = message(&done, "migrate");
    let (forecast, measured) = (report["forecast_ms"].as_f64().unwrap(), report["measured_ms"].as_f64().unwrap());
    println!("foretold {forecast} ms, measured {measured} ms, of which down {} ms", report["downtime_ms"]);
    assert!(measured > 0.0 && forecast > 0.0 && forecast <= 120_000.0);
    let rounds = report["rounds"].as_array().unwrap();
    assert_eq!(rounds.last().unwrap()["decision"]["cut_over"], "forecast");
    assert_eq!(report["generation"], 2);
    assert!(rounds.last().unwrap()["forecast"]["dirty_rate_bytes"].as_u64().unwrap() > 0, "it is under load");
    assert!(t.there.runs() && vm.state() == "shut off");
    // What was written to the other disk until the very end is there too.
    assert!(!load.running(), "its domain is off");
    vm.compare_with_frozen(&vm.head(), 2, &vm.copy(2));
    t.writes_there();
    Host::B.ok(&["virsh", "-q", "destroy", &vm.name]);
    let moved = lines(Host::B, &t.image());
    assert!(moved > acked, "line {acked} was acknowledged here, and {moved} are there");
    // The same command tells the same again.
    let again = message(&t.start("", "migrate", &[]).wait(LONG).success(), "migrate");
    assert_eq!((&again["point"], &again["generation"]), (&report["point"], &report["generation"]));
    t.failover("", &["--abort", "--lose-its-writes"]).exit(1).says(&["committed"]);
}

#[test]
fn a_migrated_domain_starts_with_its_host_as_before_and_its_raw_disk_becomes_raw_again() {
    let lab = Lab::get();
    let (lines_to, other) = (Disk::ext4("64M", "raw"), Disk::ext4("64M", "qcow2"));
    let vm = lab.domain("migrate-raw").disk(lines_to).disk(other).guest().running();
    let t = Traveller::of(&vm);
    vm.virsh(&["autostart"]);
    vm.wait_acked(5);
    t.start("", "migrate", &["--now", "--disk-format", "same"]).wait(LONG).success();
    let acked = vm.acked();
    assert!(t.autostart(Host::B) && !t.autostart(Host::A));
    t.writes_there();
    let done = Host::B.virt_replica(&["detach", &vm.name, "--json"]).success();
    assert_eq!(message(&done, "detach")["raw"], serde_json::json!(["vda"]));
    let images = Host::B.output(&["virsh", "-q", "domblklist", "--inactive", &vm.name]);
    assert!(images.contains("/vda.raw") && images.contains("/vdb.qcow2"), "{images}");
    assert!(t.there.runs() && t.autostart(Host::B));
    Host::B.ok(&["virsh", "-q", "destroy", &vm.name]);
    let raw = format!("{}/vda.raw", t.there.overlays());
    let moved = Host::B.output(&["/lab/tools/guest", "lines", &raw, "raw"]).lines().count() as u64;
    assert!(moved > acked, "line {acked} was acknowledged here, and {moved} are there");
}

/// A round reads a few blocks in about a second. At that rate the last run would read the disk for two minutes, and no
/// number of rounds would change that.
#[test]
fn a_raw_disk_that_is_hardly_written_converges_by_what_is_assumed_of_its_storage() {
    const DATA: u64 = 64 << 20;
    let lab = Lab::get();
    let vm = lab.domain("migrate-quiet").disk(Disk::raw("256M").then("write -P 0x11 0 64M")).paused();
    let t = Traveller::of(&vm);
    vm.virsh(&["resume"]);
    vm.sync().sealed();
    // About 3 KiB a second.
    let script = r#"for ((i = 0; ; i++)); do
          io="qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend \"write -P $((i % 250 + 1)) $((i % 64 * 4))k 4k\""
          virsh -q qemu-monitor-command "$1" --hmp "$io" >/dev/null || exit 0
          sleep 1.3
        done"#;
    let _load = Job::start(Host::A.command(&["bash", "-c", script, "load", &vm.name]));
    // It has no operating system that would hear its power button.
    let limits = ["--max-downtime", "45s", "--timeout", "1s", "--force-off"];
    let done = t.start("", "migrate", &limits).wait(LONG).success();
    let report = message(&done, "migrate");
    let last = report["rounds"].as_array().unwrap().last().unwrap();
    let forecast = &last["forecast"];
    println!("measured {} ms, foretold {forecast}", report["measured_ms"]);
    // A round in which nothing happened to be written tells no rate, and another one follows: it lasts a quarter of the
    // time between two writes. By the rate of its tiny samples it would use up all its rounds.
    assert_eq!(last["decision"]["cut_over"], "forecast", "{report:#}");
    assert!(last["round"].as_u64().is_some_and(|round| round <= 3), "{report:#}");
    // The rate of a tiny sample is no rate: each term is an assumption, and says so.
    for assumed in ["read_rate_assumed", "shutdown_assumed", "start_assumed"] {
        assert_eq!(forecast[assumed], true, "{assumed}: {last}");
    }
    let of = |what: &str| forecast[what].as_f64().unwrap_or_else(|| panic!("no {what} in {last}"));
    assert!(of("read_bytes") >= DATA as f64, "{last}");
    assert!(of("read_ms") < 5000.0 && of("left_bytes") < DATA as f64 / 4.0, "{last}");
    assert!(t.there.runs() && vm.state() == "shut off");
}

/// Given up by what the guest writes and what the link carries, long before its rounds are used up.
#[test]
fn a_guest_that_writes_faster_than_the_link_carries_is_found_out_and_left_to_work() {
    let lab = Lab::get();
    let vm = lab.domain("migrate-fast").disk(Disk::qcow2("512M").then("write -P 0x11 1M 8M")).paused();
    let t = Traveller::of(&vm);
    vm.virsh(&["resume"]);
    // Always somewhere else, so that the more is written the longer a round takes: 2 MiB in less than a second.
    let script = r#"for ((i = 16; i < 510; i += 2)); do
          io="qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend \"write -P 0x33 ${i}M 2M\""
          virsh -q qemu-monitor-command "$1" --hmp "$io" >/dev/null || exit 0
          sleep 0.3
        done"#;
    let mut load = Job::start(Host::A.command(&["bash", "-c", script, "load", &vm.name]));
    // Nothing but its own figures may end it.
    let limits = ["--max-downtime", "0s", "--rounds-max", "1000", "--rate", "2M", "--compress", "no"];
    let done = t.start("", "migrate", &limits).wait(Duration::from_secs(240)).exit(1);
    assert!(load.running(), "it has written all the while");
    let done =
        done.says(&["does not converge", "KiB/s of a link that carries", "runs here as before", "--max-downtime"]);
    let last = message(&done, "round");
    assert_eq!(last["decision"], "diverges", "{last}");
    let forecast = &last["forecast"];
    let of = |what: &str| forecast[what].as_u64().unwrap_or_else(|| panic!("no {what} in {last}"));
    println!("given up after round {}: {forecast}", last["round"]);
    assert!(of("dirty_rate_bytes") >= of("link_rate_bytes"), "{last}");
    // A second more or less: what the link was seen to carry is what it was let.
    assert!((1 << 20..4 << 20).contains(&of("link_rate_bytes")), "{last}");
    assert!(vm.state() == "running" && !t.there.runs());
    vm.sync().sealed();
    assert_eq!(t.status()["state"], "ok");
}

#[test]
fn a_migration_that_ends_before_its_cutover_leaves_the_guest_as_before() {
    let lab = Lab::get();
    let vm = writer(&lab, "migrate-stop");
    let t = Traveller::of(&vm);
    vm.wait_acked(5);
    let never = ["--max-downtime", "0s", "--rounds-max"];
    let as_before = || {
        assert!(vm.state() == "running" && !t.there.runs());
        vm.still_writes();
        vm.assert_home();
        assert_eq!(t.status()["state"], "ok");
    };
    let done = t.start("", "migrate", &[&never[..], &["2"]].concat()).wait(LONG).exit(1);
    done.says(&["does not converge after 2 rounds", "runs here as before", "--max-downtime"]);
    as_before();
    let mut job = t.start("", "migrate", &[&never[..], &["1000"]].concat());
    wait_round(&mut job, 2);
    signal(&vm, "INT");
    job.wait_from_now(LONG).exit(130);
    as_before();

    // A key cuts over, whatever the forecast; the undo is kept on request.
    let mut job = t.start("", "migrate", &[&never[..], &["1000", "--keep-undo"]].concat());
    wait_round(&mut job, 1);
    signal(&vm, "USR1");
    let report = message(&job.wait_from_now(LONG).success(), "migrate");
    let last = report["rounds"].as_array().unwrap().last().unwrap();
    assert_eq!((&last["decision"]["cut_over"], &report["generation"]), (&"asked".into(), &serde_json::Value::Null));
    t.failover("", &["--abort", "--lose-its-writes"]).success();
    assert!(vm.state() == "running" && !t.there.runs());
}
