//! The daemon on real libvirt: several domains, libvirtd restarted under it, policies changed, and an end in order.

use crate::domain::Disk;
use crate::support::{Done, Host, Job, Lab, PATIENCE, TARGET, Undo, eventually, shared_file};
use serde_json::Value;
use std::cell::RefCell;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

/// A daemon with a directory of its own.
pub struct Daemon {
    host: Host,
    pub dir: String,
    job: RefCell<Option<Job>>,
}

impl Daemon {
    /// On host a.
    pub fn new(name: &str) -> Daemon {
        Daemon::on(Host::A, name)
    }

    pub fn on(host: Host, name: &str) -> Daemon {
        Daemon { host, dir: format!("/var/lib/virt-replica-{name}"), job: RefCell::default() }
    }

    /// Writes a file of its directory.
    pub fn write(&self, name: &str, text: &str) {
        let path = format!("{}/{name}", self.dir);
        self.host.script("mkdir -p \"$(dirname \"$1\")\"; printf %s \"$2\" > \"$1\"", &[&path, text]);
    }

    fn globals(&self) -> [String; 4] {
        let of = |name: &str| format!("{}/{name}", self.dir);
        ["--config".into(), of("vr.yaml"), "--state-dir".into(), of("state")]
    }

    /// Runs a command with its configuration and its state.
    pub fn virt_replica(&self, args: &[&str]) -> Done {
        let globals = self.globals();
        self.host.virt_replica(&[&globals.each_ref().map(String::as_str)[..], args].concat())
    }

    /// `before`: what the shell does first (an environment).
    pub fn start(&self, before: &str) {
        let script = format!(
            "echo $$ > {0}/pid; {before} exec virt-replica {1} daemon --control {0}/control.sock",
            self.dir,
            self.globals().join(" ")
        );
        *self.job.borrow_mut() = Some(Job::start(self.host.command(&["bash", "-c", &script])));
    }

    pub fn signal(&self, name: &str) {
        self.host.script("kill -\"$1\" \"$(cat \"$2\")\"", &[name, &format!("{}/pid", self.dir)]);
    }

    pub fn status(&self) -> Option<Value> {
        let control = format!("{}/control.sock", self.dir);
        let done = self.host.virt_replica(&["policy", "status", "--json", "--control", &control]);
        (done.code == 0).then(|| serde_json::from_str(&done.stdout).expect("a status"))
    }

    /// Waits until this is so of every row, and there are so many.
    #[track_caller]
    pub fn until(&self, what: &str, rows: usize, within: Duration, is: impl Fn(&Value) -> bool) -> Value {
        eventually(what, within, || {
            let status = self.status()?;
            let found = status["domains"].as_array()?;
            (found.len() == rows && found.iter().all(&is)).then(|| status.clone())
        })
    }

    /// SIGTERM, and what it said all along.
    #[track_caller]
    pub fn stop(&self) -> Done {
        self.signal("TERM");
        self.job.take().expect("it was started").wait_from_now(PATIENCE).success()
    }

    /// However it is, it is gone.
    pub fn remove(dir: &str) {
        Daemon::remove_from(Host::A, dir);
    }

    pub fn remove_from(host: Host, dir: &str) {
        host.run(&["bash", "-c", "kill -9 \"$(cat \"$1/pid\")\"; rm -rf \"$1\"", "x", dir]);
    }
}

/// Domains are replicated over and over, libvirtd comes and goes, a broken file changes nothing, a good one does; at
/// the end every domain is on its own image and the head is there.
#[test]
fn a_daemon_replicates_several_domains_unattended() {
    let lab = Lab::alone();
    let domains: Vec<_> =
        ["dma", "dmb", "dmc"].iter().map(|n| lab.domain(n).disk(Disk::qcow2("16M")).paused()).collect();
    let names: Vec<&str> = domains.iter().map(|d| d.name.as_str()).collect();
    let daemon = Daemon::new("daemon");
    let dir = daemon.dir.clone();
    let _gone = Undo(|| Daemon::remove(&dir));
    let config = format!("targets: {{b: {{url: {TARGET}, runs_max: 2}}}}\ndaemon: {{stop_timeout: 30s}}\n");
    daemon.write("vr.yaml", &config);
    let policy = |every: &str| {
        format!("name: p\ndomains: [{}]\ntargets: [b]\nevery: {every}\nrpo: 2h\nkeep: {{last: 2}}\n", names.join(", "))
    };
    daemon.write("policies.d/p.yaml", &policy("4s"));
    daemon.start("");
    daemon.until("a point of each", 3, PATIENCE, |r| {
        r["totals"]["sealed"].as_u64() >= Some(1) && r["last_run"]["error"].is_null()
    });

    domains.iter().for_each(|d| d.write(0, "-P 0x5a 0 1M"));
    lab.tool(&["libvirtd", "a", "restart"]);
    let sealed =
        |s: &Value| s["domains"].as_array().into_iter().flatten().filter_map(|r| r["totals"]["sealed"].as_u64()).min();
    let before = sealed(&daemon.status().expect("it answers")).unwrap_or_default();
    daemon.until("more points after the restart of libvirtd", 3, PATIENCE, |r| {
        r["totals"]["sealed"].as_u64() >= Some(before + 2)
    });

    daemon.write("policies.d/p.yaml", "name: p\ndomians: [x]\n");
    daemon.signal("HUP");
    eventually("the mistake is said", PATIENCE, || {
        daemon.status()?["config_error"].as_str()?.contains("domians").then_some(())
    });
    daemon.write("policies.d/p.yaml", &policy("1h"));
    daemon.signal("HUP");
    eventually("the new policy is in force", PATIENCE, || daemon.status()?["config_error"].is_null().then_some(()));
    let done = daemon.stop();
    assert!(done.stderr.contains("unknown key `domians`"), "the log says nothing of the mistake");

    for domain in &domains {
        let doctor = daemon.virt_replica(&["doctor", &domain.name, "--json"]).success();
        let doctor: Value = serde_json::from_str(&doctor.stdout).expect("one document");
        assert_eq!(doctor["domains"][0]["health"], "sound", "{doctor}");
        let points = Host::A.json(&["points", &domain.name, "--to", TARGET, "--json"]);
        let kept = points["points"].as_array().map_or(0, Vec::len);
        assert_eq!(kept, 2, "keep is obeyed: {points}");
    }
}

/// The target's own daemon boots the replica when its policy says so, and tells when it shows nothing.
#[test]
fn a_target_drills_by_policy() {
    let lab = Lab::get();
    let mut vm = lab.domain("drilled").guest().disk(Disk::ext4("64M", "qcow2")).running();
    let store = vm.own_store();
    vm.wait_acked(3);
    vm.sync().sealed();
    let daemon = Daemon::on(Host::B, &format!("drills-{}", std::process::id()));
    let dir = daemon.dir.clone();
    let _gone = Undo(|| Daemon::remove_from(Host::B, &dir));
    daemon.write("vr.yaml", "{}\n");
    daemon.write("recovery.yaml", "paths: {/lab/guest: /lab/guest}\nnetworks: {user: none}\n");
    let policy = |probe: &str, every: &str| {
        format!(
            "name: t\nreplicas: [{}]\nroot: {store}\nrpo: 1h\nverify: {{every: 1h}}\ndrill: {{every: {every}, probes: [\"serial:{probe}\"], within: 20s}}\n",
            vm.name
        )
    };
    daemon.write("policies.d/t.yaml", &policy("ack ", "1h"));
    daemon.start("");
    let status = daemon.until("it was booted and read again", 1, PATIENCE, |r| {
        r["checks"]["drill"]["passed"] == 1 && r["checks"]["verify"]["passed"] == 1
    });
    let row = &status["domains"][0];
    assert_eq!((&row["target"], &row["rpo_s"]), (&format!("local:{store}").into(), &3600.into()), "{row:#}");
    assert!(row["lag_s"].as_i64().is_some() && row["next_at"].is_null(), "{row:#}");

    daemon.write("policies.d/t.yaml", &policy("never", "2s").replace("within: 20s", "within: 3s"));
    daemon.signal("HUP");
    daemon.until("a copy that shows nothing is told of", 1, PATIENCE, |r| {
        r["checks"]["drill"]["error"].as_str().is_some_and(|e| e.contains("the drill failed"))
    });

    // It lives here now: no younger point can come, and that is nothing to be told of.
    daemon.write("policies.d/t.yaml", &format!("name: t\nreplicas: [{}]\nroot: {store}\nrpo: 1s\n", vm.name));
    daemon.signal("HUP");
    daemon.until("the RPO is broken", 1, PATIENCE, |r| r["breach_since"].is_string());
    let there = super::crash_failover::OnB(&vm);
    daemon.virt_replica(&["failover", &vm.name, "--unplanned", "--source-is-dead", "--root", &store]).success();
    let status = daemon.until("its age is not counted", 1, PATIENCE, |r| r["promoted_since"].is_string());
    let row = &status["domains"][0];
    assert!(row["rpo_s"].is_null() && row["lag_s"].is_null() && row["breach_since"].is_null(), "{row:#}");
    let plugin = |to: &str, code: i32| {
        let asked = ["status", &vm.name, "--to", to, "--nagios", "--critical", "1s"];
        daemon.virt_replica(&asked).exit(code)
    };
    assert!(!plugin(&store, 0).stdout.contains("'lag"), "its age is no performance either");
    daemon.virt_replica(&["failover", &vm.name, "--undo", "--lose-its-writes", "--root", &store]).success();
    drop(there);
    plugin(&store, 2);
    let done = daemon.stop();
    assert!(done.stderr.contains("the domain was brought up here, and lives here now"), "{}", done.stderr);
    assert!(done.stderr.contains("ALARM: found no proof that it works"), "{}", done.stderr);
    assert_eq!(
        Host::B.output(&["virsh", "-q", "list", "--all", "--name"]).matches(&vm.name).count(),
        0,
        "a copy is left"
    );
}

/// A run that hangs while the domain is on its overlay, and does not hear SIGTERM, is killed, and its domain is put
/// back onto its own image.
#[test]
fn a_run_that_hangs_is_killed_and_its_domain_put_right() {
    let lab = Lab::get();
    let vm = lab.domain("hangs").disk(Disk::qcow2("16M").then("write -P 0x11 0 1M")).running();
    let daemon = Daemon::new(&format!("hangs-{}", std::process::id()));
    let dir = daemon.dir.clone();
    let _gone = Undo(|| Daemon::remove(&dir));
    daemon.write("vr.yaml", &format!("targets: {{b: {{url: {TARGET}}}}}\ndaemon: {{stall_timeout: 4s}}\n"));
    let name = &vm.name;
    daemon.write(
        "policies.d/p.yaml",
        &format!("name: p\ndomains: [{name}]\ntargets: [b]\nevery: 1h\nretry: {{first: 1h, max: 1h}}\n"),
    );
    daemon.start("export VIRT_REPLICA_FAILPOINT=5a=sleep:600000;");
    eventually("the domain is on its overlay", PATIENCE, || vm.live_images()[0].contains(".vr-").then_some(()));
    daemon.until("the run was killed", 1, PATIENCE, |r| r["totals"]["failed"] == 1 && r["running"].is_null());
    let doctor = daemon.virt_replica(&["doctor", name, "--json"]).success();
    assert!(doctor.stdout.contains("\"sound\""), "{}", doctor.stdout);
    vm.assert_home();
    let done = daemon.stop();
    for words in ["no sign of life for", "it does not end and is killed", "looked after what the killed run left"] {
        assert!(done.stderr.contains(words), "the log does not say {words:?}\n{}", done.stderr);
    }
}

/// Whether an entry of the journal's native protocol has this field, in the form with a length.
fn has_field(entry: &[u8], name: &str, value: &str) -> bool {
    let len = (value.len() as u64).to_le_bytes();
    let field = [name.as_bytes(), b"\n", &len, value.as_bytes(), b"\n"].concat();
    entry.windows(field.len()).any(|part| part == field)
}

/// What a domain's owner has written into its metadata decides; the head is read again on the target; the log goes to
/// the journal with fields; monitoring is answered.
#[test]
fn tags_checks_the_journal_and_monitoring() {
    const TAGS: &str = "https://virt-replica.org/xmlns/tags/1";
    let lab = Lab::get();
    let tagged = lab.domain("tagged").disk(Disk::qcow2("16M").then("write -P 0x11 0 1M")).paused();
    let other = lab.domain("untagged").disk(Disk::qcow2("16M")).off();
    // The word is this test's own: others run beside it.
    let word = format!("w{}", std::process::id());
    let tags = format!("<tags>other, {word}</tags>");
    Host::A.ok(&["virsh", "metadata", &tagged.name, TAGS, "--key", "vr", "--set", &tags, "--config", "--live"]);
    let daemon = Daemon::new(&format!("tags-{word}"));
    let dir = daemon.dir.clone();
    let _gone = Undo(|| Daemon::remove(&dir));
    daemon.write("vr.yaml", &format!("targets: {{b: {{url: {TARGET}}}}}\n"));
    let policy =
        format!("name: p\ndomains: [\"tag:{word}\"]\ntargets: [b]\nevery: 1h\nrpo: 2h\nverify: {{every: 1h}}\n");
    daemon.write("policies.d/p.yaml", &policy);
    let nagios = |args: &[&str]| daemon.virt_replica(&[&["status", "--nagios", &tagged.name][..], args].concat());
    nagios(&[]).exit(1).says(&["VIRT-REPLICA WARNING", "not replicated yet"]);

    // A journal of our own in the place of the host's.
    let journal = UnixDatagram::bind(shared_file(&format!("{}/journal", tagged.name))).expect("be the journal");
    let place = "mkdir -p /run/systemd/journal; ln -sfn \"$1\" /run/systemd/journal/socket";
    Host::A.script(place, &[&format!("{}/journal", tagged.shared())]);
    let _quiet = Undo(|| drop(Host::A.run(&["rm", "-f", "/run/systemd/journal/socket"])));
    journal.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    daemon.start("export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2);");

    let status = daemon
        .until("a point, and it was read again", 1, PATIENCE, |r| r["checks"]["verify"]["passed"].as_u64() == Some(1));
    let row = &status["domains"][0];
    assert_eq!(row["domain"], tagged.name.as_str(), "{row:#}");
    assert_eq!(row["last_seen"]["points"], 1, "{row:#}");
    assert!(row["last_seen"]["free_bytes"].as_u64() > Some(1 << 20), "{row:#}");
    let mut entry = vec![0; 64 << 10];
    let entries = std::iter::repeat_with(|| {
        let len = journal.recv(&mut entry).expect("the entry comes before the patience ends");
        entry[..len].to_vec()
    });
    let entry = entries.take(50).find(|e| has_field(e, "VIRT_REPLICA_DOMAIN", &tagged.name));
    let entry = entry.expect("an entry about the domain");
    assert!(has_field(&entry, "VIRT_REPLICA_TARGET", "b") && has_field(&entry, "PRIORITY", "5"));

    nagios(&[]).exit(0).says(&["VIRT-REPLICA OK", "'lag tagged", ";5760;7200;0"]);
    let late = eventually("the lag is critical", PATIENCE, || {
        let answer = nagios(&["--critical", "1s"]);
        (answer.code != 0).then_some(answer)
    });
    late.exit(2).says(&["VIRT-REPLICA CRITICAL", "over 1s"]);
    let words = ["--connect", "qemu+unix:///system?socket=/nonexistent", "status", "--nagios", &tagged.name];
    daemon.virt_replica(&words).exit(3).says(&["VIRT-REPLICA UNKNOWN"]);

    // Damage on the target is found without anybody asking.
    let head =
        Host::A.json(&["points", &tagged.name, "--to", TARGET, "--json"])["points"][0]["disks"][0]["image"].clone();
    let image = head.as_str().expect("it has an image").to_owned();
    Host::B.script("chmod u+w \"$1\"; printf rot | dd of=\"$1\" bs=1 seek=$(($(stat -c %s \"$1\") - 70000)) conv=notrunc status=none", &[&image]);
    daemon.write("policies.d/p.yaml", &policy.replace("every: 1h}", "every: 2s}"));
    daemon.signal("HUP");
    let status = daemon.until("the damage is found", 1, PATIENCE, |r| !r["checks"]["verify"]["error"].is_null());
    let error = status["domains"][0]["checks"]["verify"]["error"].to_string();
    assert!(error.contains("is not what was sealed"), "{error}");
    daemon.stop();
    // The tag bears our name too, and is not what a run leaves.
    Host::A.ok(&["virsh", "metadata", &tagged.name, TAGS, "--remove", "--config", "--live"]);
    tagged.assert_home();
    drop(other);
}
