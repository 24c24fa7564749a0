//! What a source knows and says while its libvirt is away.

use super::*;
use virt_replica::replicate::settle::decide::Phase;
use virt_replica::replicate::state::journal::{DiskRecord, Journal, Record};
use virt_replica::replicate::state::report::{Report, RunOutcome};

/// Where no libvirt can be.
const NO_LIBVIRT: &str = "qemu+unix:///system?socket=/nonexistent/socket";

fn open_record(overlay: &Path) -> Record {
    let base = Layer { path: "/pool/web01.qcow2".into(), format: Format::Qcow2, block_device: false, data_file: None };
    Record {
        format: 1,
        run: RunId::from_bits(7),
        domain: DomainName::new("web01").unwrap(),
        uuid: DomainUuid::new(UUID).unwrap(),
        instance: Some(3),
        boot: None,
        persistent: true,
        phase: Phase::CommitIntent,
        resume_after: false,
        ran: true,
        commit_denied: None,
        disks: vec![DiskRecord {
            name: DiskName::new("vda").unwrap(),
            base,
            overlay: overlay.to_owned(),
            size: DiskSize(1 << 20),
            base_stamp: None,
            overlay_id: None,
            complete_at: None,
            live_only: false,
            off_commit: false,
        }],
        started_at: Timestamp::UNIX_EPOCH,
        frozen_at: Some(Timestamp::UNIX_EPOCH),
        point: None,
    }
}

fn report(store: &StoreWithPoints, outcome: RunOutcome, target: &str) -> Report {
    let uuid = DomainUuid::new(UUID).unwrap();
    let view = Store::open(&store.root(), &uuid, Timestamp::now).unwrap().describe().unwrap();
    let failed = outcome == RunOutcome::Failed;
    Report {
        domain: DomainName::new("web01").unwrap(),
        uuid,
        target: target.to_owned(),
        run_id: RunId::from_bits(9),
        started_at: Timestamp::UNIX_EPOCH,
        outcome,
        point: view.head().cloned().filter(|_| !failed),
        capture: None,
        capture_reason: None,
        held_ms: None,
        freeze_ms: 1.0,
        pause_ms: 2.0,
        pause_sum_ms: None,
        pauses: None,
        duration_ms: 3.0,
        skipped: Default::default(),
        alarms: Vec::new(),
        guest_stopped: None,
        warnings: Vec::new(),
        target_seen: None,
        target_lacks: Vec::new(),
        error: failed.then(|| "the target is on fire".to_owned()),
        error_kind: None,
    }
}

/// Status is asked for when things are bad: libvirt down, a commit pending, the last run failed.
#[test]
fn status_tells_what_the_journal_knows_when_libvirt_is_down() {
    let store = StoreWithPoints::new();
    let state = store.dir.path().join("state");
    let overlay = store.dir.path().join("web01.vda.vr-00000000.qcow2");
    std::fs::write(&overlay, "").unwrap();
    let journal = Journal::open(&state, &DomainUuid::new(UUID).unwrap(), "test", Timestamp::UNIX_EPOCH).unwrap();
    journal.keep_report(&report(&store, RunOutcome::Sealed, "dr1")).unwrap();
    journal.keep_report(&report(&store, RunOutcome::Failed, "dr1")).unwrap();
    journal.keep_report(&report(&store, RunOutcome::Failed, "dr2")).unwrap();
    journal.write(&open_record(&overlay)).unwrap();
    drop(journal);
    let status = |more: &[&str]| {
        let output =
            run(&[&["status", "--json", "-c", NO_LIBVIRT, "--state-dir", state.to_str().unwrap()], more].concat());
        expect_code(&output, 0);
        assert!(stderr(&output).contains("libvirt was not asked"), "{}", stderr(&output));
        serde_json::from_str::<Value>(&stdout(&output)).unwrap()
    };

    let json = status(&[]);
    assert_eq!(json["head_from"], "journal");
    let rows = json["domains"].as_array().unwrap();
    assert_eq!(rows.len(), 2, "one for each target: {json}");
    let dr1 = rows.iter().find(|r| r["target"] == "dr1").unwrap();
    assert_eq!((&dr1["domain"], &dr1["uuid"]), (&"web01".into(), &UUID.into()));
    assert_eq!((&dr1["state"], &dr1["running"]), (&"commit_pending".into(), &Value::Null));
    assert_eq!(dr1["head"]["id"], "000002-00000002", "a failed run does not hide the point before it");
    assert_eq!(dr1["head"]["frozen_at"], "2026-01-02T03:02:05Z");
    assert!(dr1["lag_s"].as_i64().unwrap() > 0);
    assert_eq!(
        (&dr1["last_run"]["outcome"], &dr1["last_run"]["error"]),
        (&"failed".into(), &"the target is on fire".into())
    );
    assert_eq!(dr1["overlays"][0]["path"], overlay.to_str().unwrap());
    let dr2 = rows.iter().find(|r| r["target"] == "dr2").unwrap();
    assert_eq!((&dr2["head"], &dr2["lag_s"]), (&Value::Null, &Value::Null));

    let json = status(&["web01", "--to", &store.target()]);
    assert_eq!(json["head_from"], "target");
    assert_eq!(json["domains"][0]["head"]["id"], "000002-00000002");
    assert_eq!(json["domains"][0]["target"], store.target());
}

#[test]
fn status_of_an_unknown_domain_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["status", "web01", "-c", NO_LIBVIRT, "--state-dir", dir.path().to_str().unwrap()];
    expect_code(&run(&args), 4);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "status makes nothing");
}

/// Nothing may be touched, here or at the target, by a run that cannot see its domain.
#[test]
fn a_run_without_libvirt_ends_before_it_begins() {
    let dir = tempfile::tempdir().unwrap();
    let (root, state) = (dir.path().join("root"), dir.path().join("state"));
    for command in ["sync", "plan"] {
        let mut program = program();
        program.args([command, "web01", "--json", "--to"]).arg(&root).arg("--state-dir").arg(&state);
        let output = program.env("LIBVIRT_DEFAULT_URI", NO_LIBVIRT).output().unwrap();
        expect_code(&output, 1);
        let text = stderr(&output);
        let end: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(end["kind"], "unavailable", "{text}");
        assert!(!root.exists() && !state.exists());
    }
}
