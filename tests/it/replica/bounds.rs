//! A source that lies, and what it cannot spend: the replica's generation, its manifest, the target's memory, its time.

use super::support::*;
use serde_json::{Value, json};
use std::cell::Cell;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use virt_replica::agent::wire::{self, FrameKind, Head, Request, Role};
use virt_replica::block::DiskSize;
use virt_replica::error::advice;
use virt_replica::error::{Kind, Result};
use virt_replica::name::{DomainName, Generation, PointId};
use virt_replica::replica::age::BootTime;
use virt_replica::replica::manifest::{MANIFEST_MAX, SOURCE_MAX};
use virt_replica::replica::store::{Limits, Store};
use virt_replica::replica::upkeep::{Promoting, Upkeep};
use virt_replica::replica::{Replica, generation};

fn begin_as(store: &Store, generation: u64) -> Result<()> {
    let head = store.describe()?.head().map(|p| p.id.clone());
    let mut request = begin(50, head, &[("vda", 2 << 16, false)]);
    request.generation = Generation(generation);
    store.begin(&request).and_then(|_| store.abandon())
}

fn manifest_path(store: &Store) -> PathBuf {
    store.path().join("manifest.json")
}

/// Changes the manifest as something else than this program would.
fn rewrite(store: &Store, change: impl FnOnce(&mut Value)) {
    let mut document: Value = serde_json::from_slice(&std::fs::read(manifest_path(store)).unwrap()).unwrap();
    change(&mut document);
    std::fs::write(manifest_path(store), serde_json::to_vec_pretty(&document).unwrap()).unwrap();
}

#[test]
fn a_source_cannot_drive_the_generation_away_from_the_honest_one() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let huge = [u64::MAX, u64::MAX - 1, Generation::MAX.0 + 1, Generation::MAX.0, 1002];
    for generation in huge {
        assert_eq!(begin_as(&store, generation).unwrap_err().kind(), Kind::Conflict, "{generation}, of nothing");
    }
    blocks(&store, "aa b. .c");
    for generation in huge {
        let e = begin_as(&store, generation).unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict, "{generation}");
        assert!(e.to_string().contains("a step from generation 1 to generation"), "{e}");
        assert_eq!(e.advice(), Some(&advice::Store::SetGeneration.into()));
        assert_eq!(store.conclude(Generation(generation)).unwrap_err().kind(), Kind::Conflict, "{generation}");
    }
    for generation in [1, 2, 1001] {
        begin_as(&store, generation).unwrap();
    }
    // The last one there is has none after it, and nothing is written that could not be read.
    store.set_generation(Generation::MAX).unwrap();
    let point = store.describe().unwrap().head().unwrap().id.clone();
    store.promote(&point).unwrap();
    assert_eq!(store.commit().unwrap_err().kind(), Kind::Refused);
    assert_eq!(store.describe().unwrap().generation, Generation::MAX);
}

/// What 0.1 wrote after a seal of generation 2^64 - 1 and a commit: its own reader refused it.
#[test]
fn a_replica_that_an_earlier_version_made_unreadable_is_set_right() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let history = blocks(&store, "aa b. .c");
    rewrite(&store, |m| {
        m["points"][2]["generation"] = u64::MAX.into();
        m["generation"] = 0.into();
    });
    let e = store.describe().unwrap_err();
    assert_eq!(e.kind(), Kind::Corrupt);
    assert_eq!(e.advice(), Some(&advice::Store::SetGenerationHere.into()), "{e}");
    for wanted in ["db01", UUID] {
        let found = generation::find(lab.root(), wanted).unwrap();
        assert_eq!((found.len(), found[0].name.as_str(), found[0].generation.as_str()), (1, "db01", "0"));
    }
    assert!(generation::find(lab.root(), "other").unwrap().is_empty());
    for bad in [0, Generation::MAX.0 + 1] {
        assert_eq!(store.set_generation(Generation(bad)).unwrap_err().kind(), Kind::Usage);
    }
    store.set_generation(Generation(4)).unwrap();
    let view = store.describe().unwrap();
    assert_eq!(view.generation, Generation(4));
    assert_eq!(view.points.iter().map(|p| p.generation.0).collect::<Vec<_>>(), [1, 1, 4]);
    assert_eq!(begin_as(&store, 3).unwrap_err().kind(), Kind::Conflict);
    begin_as(&store, 4).unwrap();
    assert_history(&store, &history, "no byte of a disk has changed");
    // Any other damage stays damage.
    rewrite(&store, |m| m["points"][1]["disks"][0]["backing"] = json!("000009-00000000"));
    let e = store.set_generation(Generation(4)).unwrap_err();
    assert_eq!(e.kind(), Kind::Corrupt);
    assert!(store.describe().unwrap_err().advice().is_none());
}

#[test]
fn a_generation_is_not_set_while_a_session_writes() {
    let lab = Lab::in_memory();
    let (store, other) = (lab.store(), lab.store());
    blocks(&store, "aa");
    let head = store.describe().unwrap().head().map(|p| p.id.clone());
    other.begin(&begin(50, head, &[("vda", 2 << 16, false)])).unwrap();
    assert_eq!(store.set_generation(Generation(2)).unwrap_err().kind(), Kind::Busy);
    other.abandon().unwrap();
    store.set_generation(Generation(2)).unwrap();
    assert_eq!(lab.store().describe().unwrap().generation, Generation(2));
}

/// Words of hundreds of kilobytes, of a source that an earlier version listened to, do not keep a host from recovery.
#[test]
fn a_manifest_full_of_words_is_read_and_shrinks() {
    let lab = Lab::in_memory();
    let store = lab.store();
    blocks(&store, "aa");
    let room = MANIFEST_MAX - 1000 - std::fs::read(manifest_path(&store)).unwrap().len();
    rewrite(&store, |m| {
        m["points"][0]["disks"][0]["reason"] = "x\u{1b}[2J".repeat(room / 10).into();
        m["points"][0]["consistency_reason"] = "\u{7}".repeat(30).into();
    });
    let view = store.describe().unwrap();
    let point = view.head().unwrap();
    let reason = &point.disks[0].stats.reason;
    assert!(reason.len() <= 400 && !reason.contains('\u{1b}'), "{reason}");
    store.promote(&point.id).unwrap();
    assert!(std::fs::metadata(manifest_path(&store)).unwrap().len() < 4096);
}

/// However full a source has made it.
#[test]
fn records_of_recovery_have_room_that_no_source_can_fill() {
    let lab = Lab::in_memory();
    let store = lab.store();
    blocks(&store, "aa");
    let mut head = None;
    rewrite(&store, |m| {
        let first = m["points"][0].clone();
        let length = serde_json::to_vec_pretty(&json!([[first]])).unwrap().len() - 10;
        let many = (SOURCE_MAX + (SOURCE_MAX >> 8)) / length;
        let points = (1..=many).map(|n| {
            let id = format!("{n:06}-00000001");
            head = Some(PointId::new(id.as_str()).unwrap());
            let mut point = first.clone();
            point["id"] = json!(id);
            point
        });
        m["points"] = points.collect();
    });
    let length = std::fs::metadata(manifest_path(&store)).unwrap().len() as usize;
    let head = head.unwrap();
    assert!((SOURCE_MAX + 1..MANIFEST_MAX).contains(&length), "{length}");
    let e = store.begin(&begin(50, Some(head.clone()), &[("vda", 2 << 16, false)])).unwrap_err();
    assert!(e.kind() == Kind::Refused && e.to_string().contains("no room for another point"), "{e}");
    let e = lab.store().for_source().pin(&head, Some("mine")).unwrap_err();
    assert!(e.to_string().contains("no room"), "{e}");
    store.promote(&head).unwrap();
}

#[test]
fn a_point_is_no_larger_than_the_memory_it_takes() {
    let lab = Lab::in_memory();
    let of = |disks: u64, size: u64| {
        let mut request = begin(1, None, &[]);
        let disk = begin(1, None, &[("vda", 0, true)]).disks.remove(0);
        request.disks = (0..disks)
            .map(|n| {
                let mut disk = disk.clone();
                (disk.name, disk.size) = (format!("d{n}").parse().unwrap(), DiskSize(size));
                disk
            })
            .collect();
        lab.store().begin(&request)
    };
    for (disks, size) in [(256, 1 << 50), (5, 1 << 50), (1, u64::MAX), (256, u64::MAX)] {
        assert_eq!(of(disks, size).unwrap_err().kind(), Kind::Usage, "{disks} of {size}");
    }
    of(4, 1 << 50).unwrap();
}

/// Eight days forward made points of this minute old enough to be removed.
#[test]
fn no_wall_clock_ages_a_point() {
    let lab = Lab::in_memory();
    let (wall, up) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(1000)));
    let boot = Cell::new("first");
    let store = || {
        let (wall, up, boot) = (wall.clone(), up.clone(), boot.get());
        let at = move || now() + Duration::from_secs(wall.load(Ordering::Relaxed));
        let limits = Limits { min_age: Duration::from_secs(7 * 86_400), ..Limits::default() };
        let boot_time = move || BootTime { boot: boot.to_owned(), up_s: up.load(Ordering::Relaxed) };
        Store::open(lab.root(), &uuid(), at).unwrap().with_limits(limits).with_boot_clock(boot_time)
    };
    let history = blocks(&store(), "aa b. .c");
    let first = &history[0].0;
    let refused = |what: &str| {
        let e = store().prune(std::slice::from_ref(first), &mut |_, _| {}).unwrap_err();
        assert_eq!(e.kind(), Kind::Refused, "{what}: {e}");
        let young = store().holds().unwrap().young;
        assert_eq!(young.len(), 3, "{what}");
        young[0].1
    };
    wall.store(8 * 86_400, Ordering::Relaxed);
    assert_eq!(refused("eight days forward"), 7 * 86_400);
    up.store(1000 + 86_400, Ordering::Relaxed);
    assert_eq!(refused("one day later"), 6 * 86_400);
    boot.set("second");
    up.store(3 * 86_400, Ordering::Relaxed);
    assert_eq!(refused("three days after a boot"), 3 * 86_400);
    up.store(6 * 86_400 - 1, Ordering::Relaxed);
    assert_eq!(refused("one second before its time"), 1);
    up.store(6 * 86_400, Ordering::Relaxed);
    wall.store(0, Ordering::Relaxed);
    assert!(store().holds().unwrap().young.is_empty(), "whatever the wall clock says by now");
    assert_eq!(store().prune(std::slice::from_ref(first), &mut |_, _| {}).unwrap().removed.len(), 1);
}

/// Points of 0.1 have the age that the wall clock gives them when the clock is set up, and no later jump adds to it.
#[test]
fn points_of_an_earlier_version_are_adopted_once() {
    let lab = Lab::in_memory();
    blocks(&lab.store(), "aa b.");
    let store = |day: u64, up_s: u64| {
        let limits = Limits { min_age: Duration::from_secs(7 * 86_400), ..Limits::default() };
        let at = move || now() + Duration::from_secs(day * 86_400);
        let boot = move || BootTime { boot: "one".to_owned(), up_s };
        Store::open(lab.root(), &uuid(), at).unwrap().with_limits(limits).with_boot_clock(boot)
    };
    rewrite(&store(0, 0), |m| {
        for point in m["points"].as_array_mut().unwrap() {
            point.as_object_mut().unwrap().remove("sealed_clock_s").expect("each seal says so");
        }
    });
    std::fs::remove_file(store(0, 0).path().join("clock.json")).unwrap();
    let first = store(0, 0).describe().unwrap().points[0].id.clone();
    let refused = |day, up_s| store(day, up_s).prune(std::slice::from_ref(&first), &mut |_, _| {}).is_err();
    assert!(refused(5, 0), "five days old, when it is adopted");
    assert!(refused(500, 86_400), "one day later");
    assert!(!refused(5, 2 * 86_400));
}

#[test]
fn a_pin_of_the_target_is_the_targets() {
    let lab = Lab::in_memory();
    let (operator, source) = (lab.store(), lab.store().for_source());
    let history = blocks(&operator, "aa b. .c");
    let (first, second) = (&history[0].0, &history[1].0);
    operator.pin(first, Some("the auditor's")).unwrap();
    source.pin(first, Some("mine")).unwrap();
    let e = source.pin(first, None).unwrap_err();
    assert_eq!(e.kind(), Kind::Refused);
    assert_eq!(e.advice(), Some(&advice::Store::UnpinThere.into()));
    assert_eq!(operator.holds().unwrap().pins[0].reason, "the auditor's");
    // As an agent that ssh started: its client is a source.
    let mut agent = Agent::start(&lab);
    let open = Request::Open { uuid: uuid() };
    assert_eq!(agent.ask(&serde_json::to_vec(&open).unwrap()).0, FrameKind::Reply);
    let unpin = json!({"upkeep": {"replica": 0, "ask": {"pin": {"point": first, "reason": null}}}});
    let (kind, answer) = agent.ask(unpin.to_string().as_bytes());
    assert_eq!((kind, answer["kind"].as_str()), (FrameKind::Error, Some("refused")), "{answer}");
    drop(agent);
    // A source's own are its own.
    source.pin(second, Some("mine")).unwrap();
    source.pin(second, None).unwrap();
    operator.pin(first, None).unwrap();
    assert!(operator.holds().unwrap().pins.is_empty());
}

/// An agent as a process, and what it says.
struct Agent(Child);

impl Agent {
    fn start(lab: &Lab) -> Agent {
        let made = Command::new(env!("CARGO_BIN_EXE_virt-replica")).args(["store", "init"]).arg(lab.root()).output();
        assert!(made.unwrap().status.success());
        let child = Command::new(env!("CARGO_BIN_EXE_virt-replica"))
            .args(["agent", "--root"])
            .arg(lab.root())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut agent = Agent(child);
        agent.say(wire::Banner::ours().line(Role::Client).as_bytes());
        let out = agent.0.stdout.as_mut().unwrap();
        let mut byte = [0];
        while byte != *b"\n" {
            out.read_exact(&mut byte).unwrap();
        }
        agent
    }

    fn say(&mut self, bytes: &[u8]) {
        self.0.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    fn ask(&mut self, json: &[u8]) -> (FrameKind, Value) {
        let mut frame = Vec::new();
        wire::write_frame(&mut frame, Head { kind: FrameKind::Request, more: false, id: 1 }, &[], json).unwrap();
        self.say(&frame);
        let mut payload = Vec::new();
        loop {
            let head = wire::read_frame(self.0.stdout.as_mut().unwrap(), &mut payload).unwrap().unwrap();
            if head.kind != FrameKind::Ping {
                return (head.kind, serde_json::from_slice(&payload).unwrap());
            }
        }
    }

    /// Of `/proc/PID/FILE`, the words of the line that begins with this.
    fn proc(&self, file: &str, begins: &str) -> Vec<String> {
        let text = std::fs::read_to_string(format!("/proc/{}/{file}", self.0.id())).unwrap();
        let line = text.lines().find(|l| l.starts_with(begins)).unwrap();
        line[begins.len()..].split_whitespace().map(str::to_owned).collect()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.0.stdin.take();
        self.0.wait().unwrap();
    }
}

/// 25 KB of request took 4.2 GB of the target's memory.
#[test]
fn a_small_request_does_not_cost_the_agent_much_memory_and_there_is_an_end_to_it() {
    let lab = Lab::new();
    let mut agent = Agent::start(&lab);
    assert_eq!(agent.proc("limits", "Max data size")[0], (1u64 << 30).to_string());
    let disks = |count: u64, size: u64| -> Value {
        let disk = |n| json!({"name": format!("d{n}"), "size": size, "fresh": true, "reserve_bytes": 0});
        (0..count).map(disk).collect()
    };
    let mut number = 0;
    let mut begin = |agent: &mut Agent, disks: Value| {
        let domain = format!("0a1b2c3d-0000-4000-8000-{number:012}");
        let open = Request::Open { uuid: domain.parse().unwrap() };
        assert_eq!(agent.ask(&serde_json::to_vec(&open).unwrap()).0, FrameKind::Reply);
        let request = json!({"begin": {"replica": number, "request": {"uuid": domain, "name": "x", "run": "00000000000000aa",
            "generation": 1, "expected_head": null, "disks": disks}}});
        number += 1;
        agent.ask(&serde_json::to_vec(&request).unwrap())
    };
    let (kind, answer) = begin(&mut agent, disks(256, 1 << 50));
    assert_eq!((kind, answer["kind"].as_str()), (FrameKind::Error, Some("usage")), "{answer}");
    // As much as is taken.
    assert_eq!(begin(&mut agent, disks(4, 1 << 50)).0, FrameKind::Reply);
    let peak_kib: u64 = agent.proc("status", "VmHWM:")[0].parse().unwrap();
    assert!(peak_kib < 200 << 10, "{peak_kib} KiB");
    // And not again and again in one session.
    let taken = (0..12).filter(|_| begin(&mut agent, disks(1, 1 << 20)).0 == FrameKind::Reply).count();
    assert_eq!(taken, 7);
    // A number that no field has is refused with the request, and the session goes on.
    let (kind, answer) =
        agent.ask(br#"{"nodes":{"replica":0,"disk":"d0","level":0,"start":0,"end":18446744073709551615}}"#);
    assert_eq!((kind, answer["kind"].as_str()), (FrameKind::Error, Some("protocol")), "{answer}");
    let name = DomainName::new("x").unwrap();
    assert_eq!(agent.ask(json!({"find": {"name": name}}).to_string().as_bytes()).0, FrameKind::Reply);
}
