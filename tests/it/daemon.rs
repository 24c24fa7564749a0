//! The daemon with its real loop, threads, processes, socket and files, and a script in the place of `virt-replica
//! sync`. Needs no libvirt and no root.

use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use virt_replica::daemon::control::{Ask, ask_daemon};
use virt_replica::daemon::event::Event;
use virt_replica::daemon::notify::Notify;
use virt_replica::daemon::service::{self, Input, Options};
use virt_replica::daemon::worker::Program;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DomainName, DomainUuid};
use virt_replica::policy::select::SeenDomain;

/// The child: says what it was asked, then does what the file `behaviour` of its directory says.
const CHILD: &str = r#"#!/bin/sh
dir=$(dirname "$0")
echo "$*" >> "$dir/calls"
shift 2
case "$1" in doctor) exit 0;; esac
uuid=$2
read -r behaviour < "$dir/behaviour"
echo '{"message_type":"step","step":1,"what":"settle"}'
echo '{"message_type":"step","step":5,"what":"ship"}'
case "$behaviour" in
seal)
    now=$(date -u +%Y-%m-%dT%H:%M:%S.%NZ)
    printf '{"message_type":"report","domain":"x","uuid":"%s","target":"local:/t","run_id":"00000000000000aa","started_at":"%s",' "$uuid" "$now"
    printf '"outcome":"sealed","id":"000001-deadbeef","generation":1,"frozen_at":"%s","sealed_at":"%s","consistency":"crash",' "$now" "$now"
    printf '"run":"00000000000000aa","disks":[],"attachments":[],"freeze_ms":12.5,"pause_ms":3.5,"duration_ms":1.0,"skipped":[],"alarms":[],"warnings":[],"error":null}\n'
    ;;
fail)
    echo '{"message_type":"exit_error","code":1,"kind":"unavailable","message":"the target is away","hint":null}' >&2
    exit 1
    ;;
crash) kill -9 $$ ;;
hang)
    trap 'echo "{\"message_type\":\"step\",\"step\":7,\"what\":\"commit\"}"; echo settled >> "$dir/calls"; exit 130' TERM
    while :; do sleep 0.05; done
    ;;
deaf)
    trap '' TERM
    while :; do sleep 0.05; done
    ;;
esac
"#;

fn uuid(name: &str) -> DomainUuid {
    DomainUuid::new(format!("00000000-0000-0000-0000-{:012}", name.len())).unwrap()
}

struct Daemon {
    dir: TempDir,
    domains: Arc<Mutex<Result<Vec<String>, String>>>,
    inputs: Sender<Input>,
    thread: Option<JoinHandle<Result<u64>>>,
}

const POLICY: &str = "name: p\ndomains: [\"*\"]\ntargets: [t]\nevery: 1h\njitter: 0s\nretry: {first: 1s, max: 2s}\n";

impl Daemon {
    fn new(domains: &[&str], behaviour: &str, config: &str) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let child = dir.path().join("child");
        std::fs::write(&child, CHILD).unwrap();
        std::fs::set_permissions(&child, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir(dir.path().join("policies.d")).unwrap();
        let domains = Arc::new(Mutex::new(Ok(domains.iter().map(|d| (*d).to_owned()).collect())));
        let daemon = Daemon { dir, domains, inputs: mpsc::channel().0, thread: None };
        daemon.write("vr.yaml", &format!("targets: {{t: {{url: local:/t}}}}\n{config}"));
        daemon.write("policies.d/p.yaml", POLICY);
        daemon.write("behaviour", behaviour);
        daemon.write("calls", "");
        daemon
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn options(&self, once: bool) -> Options {
        let path = |name: &str| self.dir.path().join(name);
        let domains = self.domains.clone();
        let list = move || match &*domains.lock().unwrap() {
            Ok(names) => Ok(names
                .iter()
                .map(|n| SeenDomain { name: DomainName::new(n.as_str()).unwrap(), uuid: uuid(n), tags: Vec::new() })
                .collect()),
            Err(why) => Err(Error::new(Kind::Unavailable, why.clone())),
        };
        Options {
            config: path("vr.yaml"),
            config_named: true,
            state: path("state"),
            program: Program {
                path: path("child"),
                globals: vec!["--state-dir".to_owned(), path("state").display().to_string()],
                state: path("state"),
            },
            list: Arc::new(list),
            list_store: Arc::new(|_| Ok(Vec::new())),
            list_every: Duration::from_millis(100),
            once,
            control: (!once).then(|| path("control.sock")),
            http: None,
            notify: Notify::new(None, None),
            fields: false,
            random: || u64::MAX,
        }
    }

    fn begin(&mut self) {
        self.begin_with(|_| {});
    }

    fn begin_with(&mut self, change: impl FnOnce(&mut Options)) {
        let (inputs, inbox) = mpsc::channel();
        let mut options = self.options(false);
        change(&mut options);
        self.inputs = inputs.clone();
        self.thread = Some(std::thread::spawn(move || service::run(options, inbox, inputs)));
    }

    fn end(&mut self) -> u64 {
        self.inputs.send(Input::Event(Box::new(Event::Stop))).unwrap();
        self.thread.take().unwrap().join().unwrap().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    fn ask(&self, ask: &Ask) -> Result<Value> {
        ask_daemon(&self.socket(), ask)
    }

    fn status(&self) -> Value {
        self.ask(&Ask::Status {}).map_or(Value::Null, |answer| answer["status"].clone())
    }

    fn calls(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("calls")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until it is so; says what it was instead.
    #[track_caller]
    fn until(&self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let status = self.status();
            if is(&status) {
                return status;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{what}: {status:#}\n{:#?}", self.calls());
            std::thread::sleep(Duration::from_millis(30));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // A failed test must not leave its children behind.
        let _ = self.inputs.send(Input::Event(Box::new(Event::Stop)));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn every(status: &Value, is: impl Fn(&Value) -> bool) -> bool {
    status["domains"].as_array().is_some_and(|rows| !rows.is_empty() && rows.iter().all(is))
}

#[test]
fn what_is_due_is_run_reported_and_remembered() {
    let mut d = Daemon::new(&["a", "bb", "ccc"], "seal", "");
    d.begin();
    let status = d.until("three points", |s| {
        s["domains"].as_array().is_some_and(|r| r.len() == 3) && every(s, |r| r["totals"]["sealed"] == 1)
    });
    let row = &status["domains"][0];
    assert_eq!((row["domain"].as_str(), row["policy"].as_str()), (Some("a"), Some("p")));
    assert_eq!(row["last_run"]["point"], "000001-deadbeef");
    assert!(row["lag_s"].as_i64().is_some_and(|s| s < 20) && row["running"].is_null(), "{row}");
    let calls = d.calls();
    assert_eq!(calls.len(), 3, "{calls:#?}");
    // Two begin at once, and either may write first.
    let of_a = format!("sync {} --to t --json", uuid("a"));
    assert_eq!(calls.iter().filter(|c| c.contains(&of_a)).count(), 1, "{calls:#?}");
    assert_eq!(d.end(), 0);
    // The next daemon goes on where this one was.
    d.begin();
    d.until("what was known", |s| every(s, |r| r["totals"]["sealed"] == 1 && r["policy"] == "p"));
    assert_eq!(d.calls().len(), 3);
}

#[test]
fn a_failure_is_tried_again_and_a_crash_takes_nothing_with_it() {
    let mut d = Daemon::new(&["a"], "fail", "");
    d.begin();
    let status = d.until("two failures", |s| every(s, |r| r["failures"].as_u64() >= Some(2)));
    assert_eq!(status["domains"][0]["last_run"]["error_kind"], "unavailable");
    d.write("behaviour", "crash");
    d.until("a crash", |s| every(s, |r| r["last_run"]["error"].as_str().is_some_and(|e| e.contains("signal 9"))));
    d.write("behaviour", "seal");
    d.until("a point", |s| every(s, |r| r["totals"]["sealed"] == 1 && r["failures"] == 0));
}

#[test]
fn a_run_that_is_deaf_is_killed_and_its_domain_looked_after() {
    let mut d = Daemon::new(&["a"], "deaf", "daemon: {stall_timeout: 1s, stop_timeout: 1s}\n");
    // With no time to commit, silence in step 5 is all there is.
    d.begin();
    d.until("a run", |s| every(s, |r| r["running"]["step"] == 5));
    let began = Instant::now();
    d.until("it is asked to end", |s| every(s, |r| r["running"]["state"] == "ending"));
    assert!(began.elapsed() < Duration::from_secs(10));
    // It does not hear; the daemon stops all the same, within its deadline.
    let began = Instant::now();
    d.end();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn stopping_lets_runs_settle() {
    let mut d = Daemon::new(&["a", "bb"], "hang", "");
    d.begin();
    d.until("two runs", |s| s["runs"] == 2 && every(s, |r| r["running"]["step"] == 5));
    d.end();
    assert_eq!(d.calls().iter().filter(|c| *c == "settled").count(), 2, "{:#?}", d.calls());
    assert!(!d.socket().exists());
}

#[test]
fn a_reload_drops_no_run_and_a_broken_file_changes_nothing() {
    let mut d = Daemon::new(&["a"], "hang", "");
    d.begin();
    d.until("a run", |s| s["runs"] == 1);
    d.write("policies.d/p.yaml", "name: p\ndomians: [a]\n");
    d.inputs.send(Input::Reload).unwrap();
    let status = d.until("the mistake is said", |s| s["config_error"].is_string());
    assert!(status["config_error"].as_str().unwrap().contains("p.yaml:2:1: unknown key `domians`"), "{status:#}");
    assert_eq!((status["runs"].as_u64(), status["policies"].as_u64()), (Some(1), Some(1)));
    d.write("policies.d/p.yaml", POLICY);
    d.write("policies.d/q.yaml", "name: q\ndomains: [zzzz]\ntargets: [t]\nevery: 5m\n");
    d.inputs.send(Input::Reload).unwrap();
    d.until("two policies, one run", |s| s["policies"] == 2 && s["runs"] == 1 && s["config_error"].is_null());
}

#[test]
fn libvirt_may_go_and_come_and_domains_too() {
    let mut d = Daemon::new(&["a"], "seal", "");
    d.begin();
    d.until("a point", |s| every(s, |r| r["totals"]["sealed"] == 1));
    *d.domains.lock().unwrap() = Err("libvirtd was restarted".to_owned());
    d.until("it is said", |s| s["libvirt_error"].is_string());
    *d.domains.lock().unwrap() = Ok(vec!["a".to_owned(), "bb".to_owned()]);
    d.until("the new one has a point", |s| {
        s["libvirt_error"].is_null()
            && s["domains"].as_array().is_some_and(|r| r.len() == 2)
            && every(s, |r| r["totals"]["sealed"] == 1)
    });
}

#[test]
fn people_may_pause_resume_and_ask() {
    let mut d = Daemon::new(&["a"], "seal", "");
    d.begin();
    d.until("a point", |s| every(s, |r| r["totals"]["sealed"] == 1));
    let domain = || Some("a".to_owned());
    d.ask(&Ask::Pause { domain: domain() }).unwrap();
    d.until("paused", |s| every(s, |r| r["paused"] == true));
    d.ask(&Ask::Sync { domain: "a".to_owned() }).unwrap();
    d.until("a second point", |s| every(s, |r| r["totals"]["sealed"] == 2));
    let e = d.ask(&Ask::Sync { domain: "nobody".to_owned() }).unwrap_err();
    assert_eq!(e.kind(), Kind::NotFound);
    d.end();
    d.begin();
    d.until("still paused", |s| every(s, |r| r["paused"] == true));
    d.ask(&Ask::Resume { domain: None }).unwrap();
    d.until("not any more", |s| every(s, |r| r["paused"] == false));
}

#[test]
fn a_second_daemon_is_refused() {
    let mut d = Daemon::new(&["a"], "seal", "");
    d.begin();
    d.until("a point", |s| every(s, |r| r["totals"]["sealed"] == 1));
    let (inputs, inbox) = mpsc::channel();
    let e = service::run(d.options(true), inbox, inputs).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy);
}

#[test]
fn one_pass_does_what_is_due_tells_hooks_and_ends() {
    let d = Daemon::new(&["a", "bb"], "seal", "");
    let told = d.dir.path().join("told");
    let hook = d.dir.path().join("hook");
    std::fs::write(
        &hook,
        "#!/bin/sh\necho \"$VIRT_REPLICA_EVENT $VIRT_REPLICA_DOMAIN $VIRT_REPLICA_OUTCOME $2\" >> \"$1\"\n",
    )
    .unwrap();
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    let command = json!([hook, told, "a b"]);
    d.write("policies.d/p.yaml", &format!("{POLICY}hooks: {{after_run: {{command: {command}}}}}\n"));
    let pass = |d: &Daemon| {
        let (inputs, inbox) = mpsc::channel();
        service::run(d.options(true), inbox, inputs).unwrap()
    };
    assert_eq!(pass(&d), 0);
    let mut lines: Vec<String> = std::fs::read_to_string(&told).unwrap().lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["after_run a sealed a b", "after_run bb sealed a b"]);
    // Nothing is due any more.
    assert_eq!(pass(&d), 0);
    assert_eq!(d.calls().len(), 2);
    let broken = Daemon::new(&["a"], "fail", "");
    assert_eq!(pass(&broken), 1);
    broken.write("policies.d/p.yaml", "name: [\n");
    let (inputs, inbox) = mpsc::channel();
    assert_eq!(service::run(broken.options(true), inbox, inputs).unwrap_err().kind(), Kind::Config);
}

#[test]
fn systemd_hears_of_it_and_metrics_are_served() {
    let mut d = Daemon::new(&["a"], "seal", "");
    let path = d.dir.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    d.begin_with(|o| {
        o.notify = Notify::new(path.to_str(), Some("400000"));
        o.http = Some(port);
    });
    d.until("a point", |s| every(s, |r| r["totals"]["sealed"] == 1));
    let heard = |wanted: &str| {
        let mut buffer = [0; 256];
        (0..200)
            .any(|_| manager.recv(&mut buffer).is_ok_and(|n| String::from_utf8_lossy(&buffer[..n]).contains(wanted)))
    };
    assert!(heard("READY=1"));
    assert!(heard("WATCHDOG=1"));
    let page = get(port, "/metrics");
    assert!(page.contains("virt_replica_runs_total{domain=\"a\",target=\"local:/t\",result=\"sealed\"} 1\n"), "{page}");
    assert!(page.contains("virt_replica_freeze_seconds{domain=\"a\",target=\"local:/t\"} 0.0125\n"), "{page}");
    let people = get(port, "/");
    assert!(people.contains("Content-Type: text/html") && people.contains("<td>a<br>"), "{people}");
    d.inputs.send(Input::Reload).unwrap();
    assert!(heard("RELOADING=1") && heard("READY=1"));
    d.end();
    assert!(heard("STOPPING=1"));
}

fn get(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    text
}

/// What is kept is whole at every moment: a reader never meets half of it.
#[test]
fn the_state_is_never_half_written() {
    let mut d = Daemon::new(&["a"], "seal", "");
    d.begin();
    let path = d.dir.path().join("state/daemon.json");
    d.until("a point", |s| every(s, |r| r["totals"]["sealed"] == 1));
    let mut read = 0;
    for n in 0..40 {
        d.ask(&if n % 2 == 0 { Ask::Pause { domain: None } } else { Ask::Resume { domain: None } }).unwrap();
        let text = std::fs::read_to_string(Path::new(&path)).unwrap();
        read += usize::from(serde_json::from_str::<Value>(&text).is_ok());
    }
    assert_eq!(read, 40);
}
