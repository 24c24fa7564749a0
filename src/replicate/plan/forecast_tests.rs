//! Guests that write so fast, runs that were so quick, and whether their overlays fit.

use super::*;
use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::engine::stats::DiskStats;
use crate::image::{Chain, Format, Layer};
use crate::name::{DomainName, DomainUuid, Generation, PointId, RunId};
use crate::replica::{Consistency, PointView};
use crate::replicate::capture::quiesce::Quiesce;
use crate::replicate::plan::options::OVERLAY_SPACE_MIN;
use crate::replicate::state::report::RunOutcome;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn name(disk: &str) -> DiskName {
    DiskName::new(disk).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn point(frozen_at: i64, disks: &[(&str, Mode, u64)]) -> PointView {
    let disk = |(disk, mode, bytes): &(&str, Mode, u64)| PointDisk {
        name: name(disk),
        image: "x".into(),
        size: DiskSize(100 * GIB),
        root: Digest([7; 32]),
        stats: DiskStats { mode: *mode, bytes_read: *bytes, blocks_changed: bytes >> 16, ..DiskStats::default() },
    };
    let run = RunId::from_bits(1);
    PointView {
        id: PointId::from_parts(1, &run),
        generation: Generation(1),
        frozen_at: at(frozen_at),
        sealed_at: at(frozen_at),
        consistency: Consistency::Crash,
        consistency_reason: None,
        autostart: None,
        tpm_programs: None,
        run,
        disks: disks.iter().map(disk).collect(),
        attachments: Vec::new(),
        left_out: Default::default(),
    }
}

/// A run that froze at a second, lasted so long, and read so many bytes of vda.
fn run(frozen_at: i64, seconds: f64, mode: Mode, bytes: u64) -> Report {
    Report {
        domain: DomainName::new("db01").unwrap(),
        uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
        target: "dr1".into(),
        run_id: RunId::from_bits(1),
        started_at: at(frozen_at),
        outcome: RunOutcome::Sealed,
        point: Some(point(frozen_at, &[("vda", mode, bytes)])),
        capture: None,
        capture_reason: None,
        freeze_ms: 1.0,
        held_ms: None,
        pause_ms: 1.0,
        pause_sum_ms: None,
        pauses: None,
        duration_ms: seconds * 1000.0,
        skipped: Default::default(),
        alarms: Vec::new(),
        guest_stopped: None,
        warnings: Vec::new(),
        target_seen: None,
        target_lacks: Vec::new(),
        error: None,
        error_kind: None,
    }
}

fn replica(frozen_at: Option<i64>) -> ReplicaView {
    ReplicaView {
        generation: Generation(1),
        points: frozen_at.map(|at| point(at, &[("vda", Mode::Full, 0)])).into_iter().collect(),
        free_bytes: 1 << 40,
        path: "/r".into(),
        open_point: None,
        seeds: Vec::new(),
        damaged: Vec::new(),
        promoted: None,
    }
}

pub(in crate::replicate) fn disk(disk: &str, mode: Mode, reserve_bytes: u64) -> DiskPlan {
    DiskPlan {
        name: name(disk),
        size: DiskSize(100 * GIB),
        mode,
        reason: "why".into(),
        reader: "in process".into(),
        reserve_bytes,
        overlay_bytes: None,
        commit_bytes_max: 0,
        data_bytes: 0,
        chain: Chain(vec![Layer {
            path: "/pool/a.qcow2".into(),
            format: Format::Qcow2,
            block_device: false,
            data_file: None,
        }]),
        bitmap: None,
        audit: None,
        overlay_dir: "/pool".into(),
        head: None,
        tracking_doubt: false,
        repairs: None,
        head_stats: DiskStats::default(),
    }
}

pub(in crate::replicate) fn plan(disks: Vec<DiskPlan>) -> Plan {
    Plan {
        domain: DomainName::new("db01").unwrap(),
        uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
        capture: CaptureKind::Overlay,
        capture_reason: String::new(),
        quiesce: Quiesce::No,
        generation: Generation(1),
        head: None,
        head_run: None,
        hold_s: None,
        disks,
        skipped: Default::default(),
        conflicts: Vec::new(),
        notes: Vec::new(),
    }
}

fn facts(disk: &str, dirty_bytes: Option<u64>, free_bytes: u64, beside_image: bool) -> DiskFacts {
    DiskFacts {
        name: name(disk),
        chain: Err("is not looked at".into()),
        allocated_bytes: 50 * GIB,
        reader: String::new(),
        overlay_room: Some(Room { file_system: 1, free_bytes, beside_image }),
        tracked: match dirty_bytes {
            Some(dirty_bytes) => Tracked::By { bitmap: "b".into(), dirty_bytes },
            None => Tracked::Untracked("why".into()),
        },
    }
}

/// A bitmap that marks so much, so many seconds after the head.
fn bitmap_run(dirty_bytes: u64, seconds: i64, past: &[Report], free_bytes: u64, beside_image: bool) -> Plan {
    let mut plan = plan(vec![disk("vda", Mode::Bitmap, dirty_bytes)]);
    let facts = [facts("vda", Some(dirty_bytes), free_bytes, beside_image)];
    foresee(&mut plan, &facts, &replica(Some(0)), past, at(seconds), &SpaceOptions::default());
    plan
}

#[test]
fn an_overlay_grows_as_fast_as_the_bitmap_did_and_as_long_as_the_reading_lasts() {
    // 2400 MiB in 600 s are 4 MiB/s; at 24 MiB/s they are read in 100 s, and 10 s come on top; twice that to be safe.
    let plan = bitmap_run(2400 * MIB, 600, &[], 100 * GIB, false);
    assert_eq!(plan.hold_s, Some(110));
    assert_eq!(plan.disks[0].overlay_bytes, Some(4 * MIB * 110 * 2));
    assert_eq!(plan.conflicts, []);
}

#[test]
fn the_floor_is_kept_free_beside_the_growth_to_the_byte() {
    let growth = 4 * MIB * 110 * 2;
    let enough = growth + OVERLAY_SPACE_MIN;
    assert_eq!(bitmap_run(2400 * MIB, 600, &[], enough, false).conflicts, []);
    let refused = bitmap_run(2400 * MIB, 600, &[], enough - 1, false);
    assert!(
        matches!(
            refused.conflicts[..],
            [Conflict::NoOverlaySpace { growth_bytes, floor_bytes: OVERLAY_SPACE_MIN, hold_s: 110, .. }] if growth_bytes == growth
        ),
        "{:?}",
        refused.conflicts
    );
    let told = refused.refusal().unwrap();
    assert_eq!(told.kind(), crate::error::Kind::Space);
    for words in ["/pool", "110 s", "880 MiB", "1135 MiB are free", "256 MiB are to stay free"] {
        assert!(told.what().contains(words), "{words:?} in {}", told.what());
    }
    // Beside its image the same overlay needs its room twice.
    assert_eq!(bitmap_run(2400 * MIB, 600, &[], enough, true).conflicts.len(), 1);
    assert_eq!(bitmap_run(2400 * MIB, 600, &[], enough + growth, true).conflicts, []);
}

#[test]
fn runs_that_were_slow_make_a_run_long_and_small_ones_say_nothing() {
    let small = run(0, 30.0, Mode::Bitmap, MIB);
    let other_mode = run(1, 1000.0, Mode::Digest, GIB);
    let fast = run(2, 10.0, Mode::Bitmap, GIB);
    let slow = run(3, 100.0, Mode::Bitmap, 1000 * MIB);
    let hold = |past: &[Report]| bitmap_run(1000 * MIB, 3600, past, 1 << 40, false).hold_s.unwrap();
    assert_eq!(hold(&[small.clone(), other_mode.clone()]), 10 + 41, "the default");
    assert_eq!(hold(&[fast.clone(), other_mode.clone()]), 10 + 9);
    assert_eq!(hold(&[slow.clone(), fast.clone(), small]), 10 + 100, "the slowest counts");
    let long_ago: Vec<Report> = std::iter::once(slow).chain(vec![fast; RUNS]).collect();
    assert_eq!(hold(&long_ago), 10 + 9, "the slow one is forgotten");
}

#[test]
fn what_the_runs_before_saw_counts_where_the_bitmap_has_seen_less() {
    // 60 MiB a minute, twice; then a quiet moment.
    let past =
        [run(-120, 5.0, Mode::Full, GIB), run(-60, 5.0, Mode::Bitmap, 60 * MIB), run(0, 5.0, Mode::Digest, 60 * MIB)];
    let plan = bitmap_run(0, 100, &past, 1 << 40, false);
    assert_eq!(plan.disks[0].overlay_bytes, Some(MIB * 10 * 2));
    // A failed run between them sealed nothing, and is no observation.
    let mut failed = run(0, 5.0, Mode::Bitmap, GIB);
    failed.point = None;
    let past = [past[0].clone(), past[1].clone(), failed, past[2].clone()];
    assert_eq!(bitmap_run(0, 100, &past, 1 << 40, false).disks[0].overlay_bytes, Some(MIB * 10 * 2));
}

/// A first copy: nobody has seen the guest write.
#[test]
fn where_nothing_was_seen_the_floor_alone_is_asked_for() {
    let first = |free_bytes| {
        let mut plan = plan(vec![disk("vda", Mode::Full, 50 * GIB)]);
        let facts = [facts("vda", None, free_bytes, true)];
        foresee(&mut plan, &facts, &replica(None), &[], at(0), &SpaceOptions::default());
        plan
    };
    let plan = first(OVERLAY_SPACE_MIN);
    assert_eq!((plan.disks[0].overlay_bytes, plan.hold_s), (None, Some(10 + 50 * 1024 / 24)));
    assert_eq!(plan.conflicts, []);
    assert_eq!(plan.disks[0].commit_bytes_max, 50 * GIB, "what the image does not have yet");
    assert_eq!(first(OVERLAY_SPACE_MIN - 1).conflicts.len(), 1);
    let full_after_full = [run(0, 60.0, Mode::Full, GIB), run(60, 60.0, Mode::Full, GIB)];
    assert_eq!(rate_of_runs(&name("vda"), &full_after_full), None, "what a disk holds is no change");
}

#[test]
fn overlays_on_one_file_system_share_its_room() {
    let both = |second_file_system| {
        let mut plan = plan(vec![disk("vda", Mode::Bitmap, 240 * MIB), disk("vdb", Mode::Bitmap, 240 * MIB)]);
        // 24 MiB/s each, for 10 + 2 * 10 s, twice.
        let free = OVERLAY_SPACE_MIN + 24 * MIB * 30 * 2 + MIB;
        let mut facts = [facts("vda", Some(240 * MIB), free, false), facts("vdb", Some(240 * MIB), free, false)];
        facts[1].overlay_room.as_mut().unwrap().file_system = second_file_system;
        foresee(&mut plan, &facts, &replica(Some(0)), &[], at(10), &SpaceOptions::default());
        plan.conflicts.len()
    };
    assert_eq!(both(1), 1);
    assert_eq!(both(2), 0);
}

#[test]
fn a_burst_is_no_rate_no_overlay_outgrows_its_disk_and_clocks_may_be_set_back() {
    let burst = bitmap_run(240 * MIB, 1, &[], 1 << 40, false);
    assert_eq!(burst.disks[0].overlay_bytes, Some(24 * MIB * 20 * 2), "as if in 10 s");
    let back = bitmap_run(240 * MIB, -1000, &[], 1 << 40, false);
    assert_eq!(back.disks[0].overlay_bytes, burst.disks[0].overlay_bytes);
    let flood = bitmap_run(90 * GIB, 10, &[], 1 << 40, false);
    assert_eq!(flood.disks[0].overlay_bytes, Some(100 * GIB));
    let absurd = bitmap_run(u64::MAX, 10, &[], 1 << 40, true);
    assert_eq!(absurd.disks[0].overlay_bytes, Some(100 * GIB));
    assert_eq!(absurd.conflicts, [], "50 GiB more at its commit, of the TiB that is free");
}

#[test]
fn a_domain_that_is_off_needs_no_room() {
    let mut plan = plan(vec![disk("vda", Mode::Digest, 0)]);
    plan.capture = CaptureKind::Off;
    foresee(&mut plan, &[facts("vda", None, 0, true)], &replica(None), &[], at(0), &SpaceOptions::default());
    assert_eq!((plan.hold_s, plan.conflicts.len()), (None, 0));
}
