//! One daemon, thirty domains, two targets, mixed schedules; libvirtd restarts, a target is cut off and returns,
//! policies are read anew. At the end every domain is within its RPO, and nothing is left behind.
//!
//! It lasts `VR_SOAK_SECONDS` seconds of replication; without that, as long as every test run can bear. `make soak`: a
//! quarter of an hour, and the spans of the policies grow with it.

use crate::daemon::Daemon;
use crate::domain::{Disk, Domain};
use crate::support::{Host, Lab, TARGET, Undo};
use serde_json::Value;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const DOMAINS: usize = 30;

/// The second target: a store on host a itself, which no cut reaches.
const VAULT: &str = "local:/srv/soak-vault";

/// How long it lasts, and spans as parts of that.
struct Time {
    all: Duration,
    began: Instant,
}

impl Time {
    fn new() -> Time {
        let seconds = std::env::var("VR_SOAK_SECONDS").ok().map(|s| s.parse().expect("VR_SOAK_SECONDS is a number"));
        Time { all: Duration::from_secs(seconds.unwrap_or(90)), began: Instant::now() }
    }

    /// A part in hundredths, in whole seconds, as policies want them.
    fn part(&self, percent: u64) -> String {
        format!("{}s", (self.all.as_secs() * percent / 100).max(1))
    }

    /// Waits until so many hundredths are over.
    fn wait(&self, percent: u32) {
        std::thread::sleep((self.all * percent / 100).saturating_sub(self.began.elapsed()));
    }
}

/// Three of ten go to both targets often, the others to one of them, by a grid and by the clock.
fn policies(daemon: &Daemon, time: &Time, bulk_every: &str) {
    let jitter = |every: &str| format!("every: {every}\njitter: {every}\n");
    let both = jitter(&time.part(30));
    let gold = format!(
        "name: gold\ndomains: [\"soak-gold*\"]\ntargets: [b, vault]\n{both}rpo: {}\nkeep: {{last: 3}}\nretry: {{first: 1s, max: 5s}}\nverify: {{every: {}}}\n",
        time.part(110),
        time.part(60)
    );
    let bulk = format!(
        "name: bulk\ndomains: [\"soak-bulk*\"]\ntargets: [b]\n{}rpo: {}\nkeep: {{last: 2}}\ncapture: backup\nretry: {{first: 1s, max: 5s}}\n",
        jitter(bulk_every),
        time.part(150)
    );
    let clock = format!(
        "name: clock\ndomains: [\"soak-clock*\"]\ntargets: [vault]\ncron: \"* * * * *\"\njitter: 30s\nrpo: {}s\nkeep: {{last: 2}}\n",
        time.all.as_secs().max(180) * 2
    );
    for (name, text) in [("gold", gold), ("bulk", bulk), ("clock", clock)] {
        daemon.write(&format!("policies.d/{name}.yaml"), &text);
    }
}

fn rows(status: &Value) -> Vec<&Value> {
    status["domains"].as_array().map_or(Vec::new(), |rows| rows.iter().collect())
}

/// Points made so far, by all.
fn sealed(status: &Value) -> u64 {
    rows(status).iter().filter_map(|r| r["totals"]["sealed"].as_u64()).sum()
}

fn thirty(lab: &Lab) -> Vec<Domain> {
    let name = |n: usize| match n % 10 {
        0..3 => format!("soak-gold{n}"),
        3..7 => format!("soak-bulk{n}"),
        _ => format!("soak-clock{n}"),
    };
    (0..DOMAINS).map(|n| lab.domain(&name(n)).disk(Disk::qcow2("16M").then("write -P 0x11 0 1M")).paused()).collect()
}

#[test]
fn thirty_domains_two_targets_and_what_happens_in_a_year() {
    let lab = Lab::alone();
    let others = processes();
    let domains = thirty(&lab);
    let daemon = Daemon::new("soak");
    let dir = daemon.dir.clone();
    let _gone = Undo(|| {
        Daemon::remove(&dir);
        Host::A.run(&["rm", "-rf", "--one-file-system", "/srv/soak-vault"]);
        Host::B.run(&["rm", "-rf", "--one-file-system", "/srv/soak"]);
    });
    let _healed = Undo(|| drop(lab.tool(&["heal"])));
    let time = Time::new();
    let to_b = format!("{TARGET}/srv/soak");
    daemon.write(
        "vr.yaml",
        &format!(
            "targets: {{b: {{url: {to_b}, link: wire}}, vault: {{url: {VAULT}}}}}\nlinks: {{wire: {{runs_max: 2}}}}\n\
             daemon: {{runs_max: 3, stop_timeout: 60s}}\n"
        ),
    );
    policies(&daemon, &time, &time.part(60));
    daemon.start("");

    time.wait(25);
    lab.tool(&["libvirtd", "a", "restart"]);
    domains.iter().step_by(4).for_each(|d| d.write(0, "-P 0x22 2M 256K"));

    time.wait(40);
    lab.tool(&["cut"]);
    let before = daemon.status().expect("it answers, whatever is away");
    time.wait(60);
    let during = daemon.status().expect("it answers, whatever is away");
    // What does not need the wire went on.
    assert!(sealed(&during) > sealed(&before), "nothing was replicated while one target was away");
    lab.tool(&["heal"]);

    time.wait(65);
    policies(&daemon, &time, &time.part(40));
    daemon.signal("HUP");
    domains.iter().step_by(3).for_each(|d| d.write(0, "-P 0x33 4M 256K"));
    time.wait(100);

    let pairs = DOMAINS + DOMAINS / 10 * 3;
    let rest = time.all.max(Duration::from_secs(120));
    let last = daemon.until("every domain is within its RPO, and none fails", pairs, rest, |r| {
        r["breach_since"].is_null()
            && r["slack_s"].as_i64() > Some(0)
            && r["failures"] == 0
            && !r["frozen_at"].is_null()
    });
    let checked = rows(&last).iter().filter_map(|r| r["checks"]["verify"]["passed"].as_u64()).sum::<u64>();
    assert!(checked > 0, "nothing was read again");
    println!("{} points of {pairs} pairs, {checked} checks", sealed(&last));
    let done = daemon.stop();
    assert!(done.stderr.contains("policies read: 3"), "the reload is not in the log");
    nothing_is_left(&daemon, &domains, &others);
    every_point_is_whole(&daemon, &domains, &to_b);
}

/// Our programs on host a, with their numbers.
fn processes() -> BTreeSet<String> {
    let found = Host::A.run(&["pgrep", "-af", "^(/.*/)?(virt-replica|ssh) "]).stdout;
    found.lines().map(str::to_owned).collect()
}

/// `others`: what ran before. A test that kills a run leaves its ssh master, which ends by itself after ten minutes.
fn nothing_is_left(daemon: &Daemon, domains: &[Domain], others: &BTreeSet<String>) {
    let doctor = daemon.virt_replica(&["doctor", "--json"]).success();
    let doctor: Value = serde_json::from_str(&doctor.stdout).expect("one document");
    let found = doctor["domains"].as_array().expect("it lists domains");
    for domain in domains {
        let of = found.iter().find(|f| f["domain"] == domain.name.as_str()).expect("doctor knows it");
        assert_eq!(of["health"], "sound", "{of:#}");
        domain.assert_home();
    }
    let left = Host::A.output(&["find", "/var/lib/libvirt/images", "-name", "*.vr-*"]);
    assert_eq!(left, "", "overlays are left");
    let mut left = BTreeSet::new();
    for _ in 0..50 {
        left = processes().difference(others).cloned().collect();
        if left.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("processes are left: {left:#?}");
}

/// The newest point of each pair is read again, and what the guest has is in it.
fn every_point_is_whole(daemon: &Daemon, domains: &[Domain], to_b: &str) {
    for domain in domains {
        let targets: &[&str] = match () {
            () if domain.name.starts_with("soak-gold") => &[to_b, VAULT],
            () if domain.name.starts_with("soak-bulk") => &[to_b],
            () => &[VAULT],
        };
        for to in targets {
            daemon.virt_replica(&["verify", &domain.name, "--to", to]).success();
        }
    }
    let of = |kind: &str| domains.iter().find(|d| d.name.starts_with(kind)).expect("there are all kinds");
    for (domain, to) in [(of("soak-gold"), to_b), (of("soak-bulk"), to_b), (of("soak-clock"), VAULT)] {
        daemon.virt_replica(&["sync", &domain.name, "--to", to, "--compare"]).success();
        daemon.virt_replica(&["verify", &domain.name, "--to", to, "--against-source"]).success();
    }
}
