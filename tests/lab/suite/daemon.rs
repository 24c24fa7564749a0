//! The daemon on real libvirt: several domains, libvirtd restarted under it, policies changed, and an end in order.

use crate::domain::Disk;
use crate::support::{Host, Job, Lab, PATIENCE, TARGET, Undo, eventually};
use serde_json::Value;
use std::time::Duration;

const DIR: &str = "/var/lib/virt-replica-daemon";

fn status() -> Option<Value> {
    let done = Host::A.virt_replica(&["policy", "status", "--json", "--control", &format!("{DIR}/control.sock")]);
    (done.code == 0).then(|| serde_json::from_str(&done.stdout).expect("a status"))
}

/// Writes a file of the daemon's directory on host a.
fn write(name: &str, text: &str) {
    Host::A.script("mkdir -p \"$(dirname \"$1\")\"; printf %s \"$2\" > \"$1\"", &[&format!("{DIR}/{name}"), text]);
}

fn signal(name: &str) {
    Host::A.script("kill -\"$1\" \"$(cat \"$2\")\"", &[name, &format!("{DIR}/pid")]);
}

/// Waits until this is so of every domain's row.
#[track_caller]
fn until(what: &str, domains: usize, is: impl Fn(&Value) -> bool) -> Value {
    eventually(what, PATIENCE, || {
        let status = status()?;
        let rows = status["domains"].as_array()?;
        (rows.len() == domains && rows.iter().all(&is)).then(|| status.clone())
    })
}

/// Domains are replicated over and over, libvirtd comes and goes, a broken file changes nothing, a good one does; at the end
/// every domain is on its own image and the head is there.
#[test]
fn a_daemon_replicates_several_domains_unattended() {
    let lab = Lab::alone();
    let domains: Vec<_> =
        ["dma", "dmb", "dmc"].iter().map(|n| lab.domain(n).disk(Disk::qcow2("16M")).paused()).collect();
    let names: Vec<&str> = domains.iter().map(|d| d.name.as_str()).collect();
    let _gone = Undo(|| drop(Host::A.run(&["bash", "-c", "kill -9 \"$(cat \"$1/pid\")\"; rm -rf \"$1\"", "x", DIR])));
    write("vr.yaml", &format!("targets: {{b: {{url: {TARGET}, runs_max: 2}}}}\ndaemon: {{stop_timeout: 30s}}\n"));
    let policy = |every: &str| {
        format!("name: p\ndomains: [{}]\ntargets: [b]\nevery: {every}\nrpo: 2h\nkeep: {{last: 2}}\n", names.join(", "))
    };
    write("policies.d/p.yaml", &policy("4s"));
    let words = format!(
        "echo $$ > {DIR}/pid; exec virt-replica --config {DIR}/vr.yaml --state-dir {DIR}/state daemon --control {DIR}/control.sock"
    );
    let daemon = Job::start(Host::A.command(&["bash", "-c", &words]));
    until("a point of each", 3, |r| r["totals"]["sealed"].as_u64() >= Some(1) && r["last_run"]["error"].is_null());

    domains.iter().for_each(|d| d.write(0, "-P 0x5a 0 1M"));
    lab.tool(&["libvirtd", "a", "restart"]);
    let sealed =
        |s: &Value| s["domains"].as_array().into_iter().flatten().filter_map(|r| r["totals"]["sealed"].as_u64()).min();
    let before = sealed(&status().expect("it answers")).unwrap_or_default();
    until("more points after the restart of libvirtd", 3, |r| r["totals"]["sealed"].as_u64() >= Some(before + 2));

    write("policies.d/p.yaml", "name: p\ndomians: [x]\n");
    signal("HUP");
    eventually("the mistake is said", PATIENCE, || {
        status()?["config_error"].as_str()?.contains("domians").then_some(())
    });
    write("policies.d/p.yaml", &policy("1h"));
    signal("HUP");
    eventually("the new policy is in force", PATIENCE, || status()?["config_error"].is_null().then_some(()));
    signal("TERM");
    let done = daemon.wait(Duration::from_secs(40)).success();
    assert!(done.stderr.contains("unknown key `domians`"), "the log says nothing of the mistake");

    for domain in &domains {
        let doctor = Host::A.json(&["--state-dir", &format!("{DIR}/state"), "doctor", &domain.name, "--json"]);
        assert_eq!(doctor["domains"][0]["health"], "sound", "{doctor}");
        let points = Host::A.json(&["points", &domain.name, "--to", TARGET, "--json"]);
        let kept = points["points"].as_array().map_or(0, Vec::len);
        assert_eq!(kept, 2, "keep is obeyed: {points}");
    }
}
