//! A domain in a tiny notation, and what is planned for it.

use super::*;
use crate::block::digest::Digest;
use crate::engine::stats::DiskStats;
use crate::error::Kind;
use crate::hypervisor::{BlockJob, BlockJobKind, Ended};
use crate::image::Format;
use crate::name::{DomainName, DomainUuid, PointId, RunId};
use crate::replica::{Consistency, PointDisk, PointView};
use crate::replicate::plan::capture_choice::{CommitFacts, choose};
use crate::replicate::plan::facts::Room;
use jiff::Timestamp;

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

fn name(disk: &str) -> DiskName {
    DiskName::new(disk).unwrap()
}

fn layer(path: &str) -> Layer {
    let block_device = path.starts_with("/dev/");
    let format = if block_device { Format::Raw } else { Format::Qcow2 };
    Layer { path: path.into(), format, block_device, data_file: None }
}

/// A running domain: `"vda vdb"` are plain disks; `vdc:ro`, `vdc:share`, `vdc:cdrom`, `vdc:job`, `vdc:stray`,
/// `vdc:moved`, `vdc:block` and `vdc:nosize` are what they say.
fn domain(notation: &str) -> DomainView {
    let disks = notation.split_whitespace().map(|word| {
        let (disk, trait_) = word.split_once(':').unwrap_or((word, ""));
        let path = match trait_ {
            "stray" => format!("/pool/{disk}.{disk}.vr-0123abcd.qcow2"),
            "block" => format!("/dev/vg/{disk}"),
            _ => format!("/pool/{disk}.qcow2"),
        };
        let defined = if trait_ == "moved" { "/pool/other.qcow2".to_owned() } else { path.clone() };
        let job = BlockJob { kind: BlockJobKind::Other, ready: false, done_bytes: 0, total_bytes: 1 };
        DiskView {
            name: name(disk),
            kind: match trait_ {
                "cdrom" => DiskKind::Removable("is a cdrom".into()),
                "luks" => DiskKind::Unsupported("is encrypted by QEMU (luks)".into()),
                _ => DiskKind::Image,
            },
            live: Some(Chain(vec![layer(&path)])),
            inactive: Some(layer(&defined)),
            size: (trait_ != "nosize").then_some(DiskSize(1 << 30)),
            job: (trait_ == "job").then_some(job),
            read_only: trait_ == "ro",
            shareable: trait_ == "share",
        }
    });
    DomainView {
        name: DomainName::new("db01").unwrap(),
        uuid: DomainUuid::new(UUID).unwrap(),
        id: Some(1),
        power: Power::Running,
        ended: Ended::Unknown,
        paused: None,
        persistent: true,
        managed_save: false,
        domain_job: None,
        disks: disks.collect(),
        record: None,
        nvram: None,
        tpm: None,
        guest_agent: false,
    }
}

/// Planned by the capture that is asked for.
fn plan(
    domain: &DomainView,
    facts: &[DiskFacts],
    replica: &ReplicaView,
    generation: Generation,
    options: &PlanOptions,
) -> Plan {
    let chosen = choose(domain.power, options.capture, &CommitFacts::default());
    super::plan(domain, facts, replica, generation, options, chosen)
}

fn facts(domain: &DomainView) -> Vec<DiskFacts> {
    domain
        .disks
        .iter()
        .map(|d| DiskFacts {
            name: d.name.clone(),
            chain: Ok(d.live.clone().unwrap()),
            allocated_bytes: 100 << 20,
            reader: "in process".into(),
            overlay_room: Some(Room { file_system: 1, free_bytes: 10 << 30, beside_image: true }),
            tracked: Tracked::Doubt("no dirty bitmap is kept".into()),
        })
        .collect()
}

/// A replica whose head has these disks; `""` has no point.
fn replica(disks: &str) -> ReplicaView {
    let run = RunId::from_bits(1);
    let disks: Vec<PointDisk> = disks
        .split_whitespace()
        .map(|d| PointDisk {
            name: name(d),
            image: "x".into(),
            size: DiskSize(1 << 30),
            root: Digest([7; 32]),
            stats: DiskStats::default(),
        })
        .collect();
    let point = PointView {
        id: PointId::from_parts(1, &run),
        generation: Generation(1),
        frozen_at: Timestamp::UNIX_EPOCH,
        sealed_at: Timestamp::UNIX_EPOCH,
        consistency: Consistency::Crash,
        consistency_reason: None,
        autostart: None,
        tpm_programs: None,
        run,
        disks: disks.clone(),
        attachments: Vec::new(),
        left_out: Default::default(),
    };
    ReplicaView {
        generation: Generation(1),
        points: if disks.is_empty() { Vec::new() } else { vec![point] },
        free_bytes: 1 << 40,
        path: "/r".into(),
        open_point: None,
        seeds: Vec::new(),
        damaged: Vec::new(),
        promoted: None,
    }
}

fn planned(notation: &str, head: &str) -> Plan {
    let domain = domain(notation);
    plan(&domain, &facts(&domain), &replica(head), Generation(1), &PlanOptions::default())
}

/// `"vda=full vdb=digest -vdc"`, then the conflicts.
fn shown(plan: &Plan) -> String {
    let mut words: Vec<String> = plan.disks.iter().map(|d| format!("{}={}", d.name, d.mode)).collect();
    words.extend(plan.skipped.iter().map(|s| format!("-{}", s.name)));
    words.join(" ")
}

/// The plan of a domain whose disk the head has by `mode`, with or without a doubt, and which is tracked as `tracked`
/// now.
fn tracked_as(before: DiskStats, tracked: Tracked, options: &PlanOptions) -> Plan {
    let domain = domain("vda");
    let mut facts = facts(&domain);
    facts[0].tracked = tracked;
    let mut replica = replica("vda");
    replica.points[0].disks[0].stats = before;
    plan(&domain, &facts, &replica, Generation(1), options)
}

/// A disk whose head is damaged is compared, or starts anew, whatever its bitmap says; the others are as they would be.
#[test]
fn what_a_scrub_found_in_the_head_is_sent_again() {
    let planned = |beyond_repair, options: &PlanOptions| {
        let domain = domain("vda vdb");
        let mut facts = facts(&domain);
        facts.iter_mut().for_each(|f| f.tracked = Tracked::By { bitmap: "b".into(), dirty_bytes: 0 });
        let damaged = vec![HeadDamage { disk: name("vdb"), bytes: 65536, beyond_repair }];
        plan(&domain, &facts, &ReplicaView { damaged, ..replica("vda vdb") }, Generation(1), options)
    };
    let mended = planned(false, &PlanOptions::default());
    assert_eq!(shown(&mended), "vda=bitmap vdb=digest");
    let disk = &mended.disks[1];
    assert!(disk.reason.contains("65536 damaged bytes") && disk.bitmap.is_none() && !disk.tracking_doubt, "{disk:?}");
    let told = disk.repaired().unwrap();
    assert!(told.contains("vdb") && told.contains("sent again"), "{told}");
    assert_eq!(mended.disks[0].repaired(), None);
    let anew = planned(true, &PlanOptions::default());
    assert_eq!((shown(&anew).as_str(), anew.disks[1].head), ("vda=bitmap vdb=full", None));
    assert!(anew.disks[1].reason.contains("starts anew"), "{}", anew.disks[1].reason);
    let full = planned(false, &PlanOptions { full: true, ..PlanOptions::default() });
    assert_eq!(full.disks[1].reason, "asked for by the operator");
}

#[test]
fn two_doubts_in_a_row_are_told_and_what_was_asked_for_is_none() {
    let doubted =
        DiskStats { mode: Mode::Digest, tracking_doubt: true, reason: "first".into(), ..DiskStats::default() };
    let doubt = || Tracked::Doubt("second".into());
    let as_usual = PlanOptions::default();
    let told = |plan: Plan| plan.disks[0].doubted_again();
    let both = told(tracked_as(doubted.clone(), doubt(), &as_usual)).expect("twice");
    assert!(both.contains("first") && both.contains("second"), "{both}");
    assert_eq!(tracked_as(doubted.clone(), doubt(), &as_usual).notes, [both]);

    let known = Tracked::By { bitmap: "b".into(), dirty_bytes: 0 };
    let raw_and_off = Tracked::Untracked("a raw image".into());
    let (compare, full) =
        (PlanOptions { compare: true, ..as_usual.clone() }, PlanOptions { full: true, ..as_usual.clone() });
    assert_eq!(told(tracked_as(DiskStats::default(), doubt(), &as_usual)), None, "only once");
    assert_eq!(told(tracked_as(doubted.clone(), known, &as_usual)), None, "tracked again");
    assert_eq!(told(tracked_as(doubted.clone(), raw_and_off, &as_usual)), None, "cannot be tracked");
    assert_eq!(told(tracked_as(doubted.clone(), doubt(), &compare)), None, "asked for");
    assert_eq!(told(tracked_as(doubted, doubt(), &full)), None, "asked for");
}

/// The bitmap that turns out to be unreadable at the freeze is a doubt like any other.
#[test]
fn a_doubt_that_comes_after_the_plan_counts_too() {
    let known = Tracked::By { bitmap: "b".into(), dirty_bytes: 0 };
    let doubted = DiskStats { tracking_doubt: true, reason: "first".into(), ..DiskStats::default() };
    let mut plan = tracked_as(doubted, known, &PlanOptions::default());
    assert_eq!(plan.disks[0].mode, Mode::Bitmap);
    plan.disks[0].doubt("it cannot be read");
    assert_eq!((plan.disks[0].mode, plan.disks[0].tracking_doubt), (Mode::Digest, true));
    assert!(plan.disks[0].doubted_again().is_some_and(|w| w.contains("first") && w.contains("it cannot be read")));
}

#[test]
fn the_first_run_is_full_and_later_ones_compare() {
    let first = planned("vda vdb", "");
    assert_eq!(shown(&first), "vda=full vdb=full");
    assert_eq!(first.disks[0].reserve_bytes, 100 << 20);
    assert!(first.disks[0].head.is_none());
    let second = planned("vda vdb", "vda vdb");
    assert_eq!(shown(&second), "vda=digest vdb=digest");
    assert_eq!(second.disks[0].head, Some((DiskSize(1 << 30), Digest([7; 32]))));
    assert!(second.conflicts.is_empty());
}

#[test]
fn a_new_disk_alone_starts_full_and_a_removed_one_hinders_nobody() {
    assert_eq!(shown(&planned("vda vdb", "vda")), "vda=digest vdb=full");
    assert_eq!(shown(&planned("vda", "vda vdb")), "vda=digest");
}

#[test]
fn a_believed_bitmap_is_followed_and_a_doubt_is_compared_with_its_reason() {
    let mut domain = domain("vda vdb vdc");
    domain.disks[2].size = Some(DiskSize(2 << 30));
    let mut facts = facts(&domain);
    let by = |dirty_bytes| Tracked::By { bitmap: "vr-x-1".into(), dirty_bytes };
    facts[0].tracked = by(7 << 20);
    facts[1].tracked = Tracked::Doubt("QEMU ended without saving the dirty bitmap".into());
    facts[2].tracked = by(0);
    let options = PlanOptions::default();
    let tracked = plan(&domain, &facts, &replica("vda vdb vdc"), Generation(1), &options);
    assert_eq!(shown(&tracked), "vda=bitmap vdb=digest vdc=bitmap");
    assert_eq!(tracked.disks[0].bitmap.as_deref(), Some("vr-x-1"));
    let reserved: Vec<u64> = tracked.disks.iter().map(|d| d.reserve_bytes >> 20).collect();
    assert_eq!(reserved, [7, 0, 100], "what is marked; nothing known; what a grown disk may hold");
    assert!(tracked.disks[1].reason.contains("without saving"), "{}", tracked.disks[1].reason);
    assert!(tracked.disks[2].reason.contains("grew"), "{}", tracked.disks[2].reason);
    domain.disks[0].size = Some(DiskSize(1 << 20));
    let shrunk = plan(&domain, &facts, &replica("vda vdb vdc"), Generation(1), &options);
    assert_eq!(shrunk.disks[0].mode, Mode::Digest);
    let asked = PlanOptions { compare: true, ..options };
    assert_eq!(plan(&domain, &facts, &replica("vda"), Generation(1), &asked).disks[0].mode, Mode::Digest);
}

/// The way home after a planned failover: a bitmap like any other, with a reason of its own, over which the audit goes
/// too.
#[test]
fn the_bitmap_of_a_failover_is_followed_with_a_reason_of_its_own() {
    let born = "vr-failover-0707-image";
    let by = |bitmap: &str| Tracked::By { bitmap: bitmap.into(), dirty_bytes: 3 << 20 };
    let options = PlanOptions::default();
    let mut first = tracked_as(DiskStats::default(), by(born), &options);
    let disk = &first.disks[0];
    assert_eq!((disk.mode, disk.bitmap.as_deref(), disk.reserve_bytes), (Mode::Bitmap, Some(born), 3 << 20));
    assert!(disk.reason.contains("what the failover began from") && disk.audit.is_some(), "{disk:?}");
    assert!(disk.tracked_from_failover() && !disk.tracking_doubt);
    // A run that made its point by it, and died before it was dropped: the next one knows, by whatever it is led
    // itself.
    let by_birth = DiskStats { mode: Mode::Bitmap, reason: disk.reason.clone(), ..DiskStats::default() };
    assert!(tracked_as(by_birth, by("vr-x-1"), &options).disks[0].tracked_from_failover());
    assert!(!tracked_as(DiskStats::default(), by("vr-x-1"), &options).disks[0].tracked_from_failover());
    // It has lied: compared after all, and it goes all the same.
    first.disks[0].doubt("it lied");
    assert!(first.disks[0].tracked_from_failover() && first.disks[0].tracking_doubt);

    let mut domain = domain("vda");
    domain.disks[0].size = Some(DiskSize(2 << 30));
    let mut facts = facts(&domain);
    facts[0].tracked = by(born);
    let grown = plan(&domain, &facts, &replica("vda"), Generation(1), &options);
    assert!(grown.disks[0].mode == Mode::Bitmap && grown.disks[0].reason.contains("the new range counts as changed"));
}

#[test]
fn every_reason_is_a_sentence() {
    for plan in [planned("vda", ""), planned("vda vdb", "vda")] {
        for disk in &plan.disks {
            assert!(disk.reason.split_whitespace().count() > 4, "{:?}", disk.reason);
        }
    }
}

#[test]
fn what_cannot_be_frozen_is_skipped_with_its_reason() {
    let plan = planned("vda vdb:cdrom vdc:ro vdd:share", "");
    assert_eq!(shown(&plan), "vda=full -vdb -vdc -vdd");
    assert!(plan.skipped.iter().all(|s| !s.reason.is_empty()));
    assert_eq!(planned("vda:cdrom", "").conflicts, [Conflict::NoDisks]);
}

/// What we cannot do makes the domain partly protected until the operator names the disk; a drive for media never does.
#[test]
fn a_disk_that_we_skip_is_not_one_that_the_operator_left_out() {
    for (notation, excluded, unprotected) in [
        ("vda vdb:luks vdc:ro vdd:share vde:cdrom", "", "vdb vdc vdd"),
        ("vda vdb:luks vdc:ro vdd:share vde:cdrom", "vdb vdd", "vdc"),
        ("vda vdb", "vdb", ""),
    ] {
        let domain = domain(notation);
        let exclude_disks = excluded.split_whitespace().map(name).collect();
        let options = PlanOptions { exclude_disks, ..PlanOptions::default() };
        let plan = plan(&domain, &facts(&domain), &replica(""), Generation(1), &options);
        let found: Vec<&str> = plan.skipped.unprotected().map(|s| s.name.as_str()).collect();
        assert_eq!(found.join(" "), unprotected, "{notation} without {excluded}");
        assert_eq!(plan.conflicts, [], "it is no reason not to protect the rest");
    }
}

#[test]
fn conflicts_name_their_disk_and_say_what_to_do() {
    for (notation, kind) in [
        ("vda vdb:job", Kind::Busy),
        ("vda vdb:stray", Kind::Conflict),
        ("vda vdb:moved", Kind::Conflict),
        ("vda vdb:nosize", Kind::Conflict),
    ] {
        let plan = planned(notation, "");
        let refusal = plan.refusal().unwrap_or_else(|| panic!("{notation} is refused"));
        assert_eq!(refusal.kind(), kind, "{notation}");
        assert_eq!(refusal.context().disk.as_deref(), Some("vdb"), "{notation}");
        assert!(refusal.advice().is_some(), "{notation}");
    }
}

#[test]
fn a_replica_of_a_later_generation_is_not_written_to() {
    let domain = domain("vda");
    let mut promoted = replica("vda");
    promoted.generation = Generation(2);
    let plan = plan(&domain, &facts(&domain), &promoted, Generation(1), &PlanOptions::default());
    assert_eq!(plan.conflicts, [Conflict::Promoted { ours: Generation(1), theirs: Generation(2) }]);
}

#[test]
fn a_replica_whose_domain_runs_on_the_target_is_not_written_to_whatever_its_generation() {
    let domain = domain("vda");
    for committed in [false, true] {
        let mut replica = replica("vda");
        let point = replica.head().unwrap().id.clone();
        replica.promoted =
            Some(crate::replica::upkeep::Promoted { point, since: jiff::Timestamp::UNIX_EPOCH, committed });
        let plan = plan(&domain, &facts(&domain), &replica, Generation(1), &PlanOptions::default());
        let refusal = plan.refusal().expect("it is refused");
        assert_eq!(refusal.kind(), Kind::Conflict);
        match committed {
            true => assert!(refusal.hint_text().unwrap().starts_with("leave the domain here shut off"), "{refusal}"),
            false => {
                assert_eq!(refusal.advice(), Some(&crate::error::advice::Failover::LeaveOffOrUndo.into()), "{refusal}")
            }
        }
    }
}

#[test]
fn no_directory_for_an_overlay_and_no_room_for_a_copy_are_found_before_the_freeze() {
    let domain = domain("vda");
    let mut cramped = facts(&domain);
    cramped[0].overlay_room = None;
    let options = PlanOptions::default();
    let plan_ = plan(&domain, &cramped, &replica(""), Generation(1), &options);
    assert!(matches!(plan_.conflicts[..], [Conflict::NoOverlayDir { .. }]));
    assert_eq!(plan_.refusal().unwrap().kind(), Kind::Usage);
    let mut full_target = replica("");
    full_target.free_bytes = (100 << 20) - 1;
    let plan_ = plan(&domain, &facts(&domain), &full_target, Generation(1), &options);
    assert!(matches!(plan_.conflicts[..], [Conflict::NoTargetSpace { .. }]));
}

#[test]
fn a_domain_that_is_off_needs_no_overlay_and_so_no_room_for_one() {
    let mut off = domain("vda");
    off.power = Power::Off;
    let mut cramped = facts(&off);
    cramped[0].overlay_room = None;
    let plan = plan(&off, &cramped, &replica(""), Generation(1), &PlanOptions::default());
    assert_eq!((plan.capture, plan.conflicts.len()), (CaptureKind::Off, 0));
}

#[test]
fn overlays_lie_beside_files_and_in_their_own_directory_for_devices() {
    let options = PlanOptions { block_overlay_dir: "/overlays".into(), ..PlanOptions::default() };
    assert_eq!(overlay_dir(&layer("/pool/a.qcow2"), &options), Path::new("/pool"));
    assert_eq!(overlay_dir(&layer("/dev/vg/a"), &options), Path::new("/overlays"));
    let asked = PlanOptions { overlay_dir: Some("/fast".into()), ..options };
    assert_eq!(overlay_dir(&layer("/pool/a.qcow2"), &asked), Path::new("/fast"));
}

#[test]
fn a_long_name_of_an_image_leaves_room_for_those_of_its_overlay() {
    use crate::replicate::capture::names::run_file;
    let run = RunId::from_bits(0x1234_5678_9abc_def0);
    let domain = domain("vda");
    let mut disk = plan(&domain, &facts(&domain), &replica(""), Generation(1), &PlanOptions::default()).disks.remove(0);
    let mut named = |stem: &str, dir: &str| {
        disk.chain.0[0].path = Path::new(dir).join(format!("{stem}.qcow2"));
        disk.overlay_dir = dir.into();
        run_file(&disk, &run, "qcow2")
    };
    assert_eq!(named("web", "/pool"), Path::new("/pool/web.vda.vr-12345678.qcow2"));
    for (stem, dir) in [
        ("l".repeat(249), "/pool".to_owned()),
        ("ö".repeat(124), "/pool".to_owned()),
        ("x".repeat(99), format!("/{}", "d/".repeat(2000))),
    ] {
        let path = named(&stem, &dir);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.len() + ".retired".len() <= 255 && path.as_os_str().len() + ".retired".len() < 4096, "{name}");
        assert!(is_our_overlay(&path) && name.contains(".vda.vr-"), "{name}");
    }
}

#[test]
fn our_overlays_are_known_by_name() {
    for (path, ours) in [
        ("/pool/a.vda.vr-0123abcd.qcow2", true),
        ("/pool/a.vr-0123abcd.qcow2", true),
        ("/pool/a.vr-0123abcd.qcow2.retired", false),
        ("/pool/a.vr-0123abc.qcow2", false),
        ("/pool/a.qcow2", false),
        ("/pool/vr-0123abcd.qcow2", false),
    ] {
        assert_eq!(is_our_overlay(Path::new(path)), ours, "{path}");
    }
}
