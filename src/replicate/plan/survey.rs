//! Finds out what planning needs to know beyond the views: chains, how they will be read, room for overlays.
//!
//! Reads headers and file systems; touches nothing. Deciding is [`plan`](crate::replicate::plan)'s.

use super::{forecast, rights};
use crate::error::Result;
use crate::hypervisor::backup::BackupJob;
use crate::hypervisor::{DiskKind, DiskView, DomainView, Power};
use crate::image::open::EXPORT;
use crate::image::{Chain, Format, chain, qemu_img};
use crate::name::DiskName;
use crate::replica::{PointView, ReplicaView};
use crate::replicate::attachments::describe;
use crate::replicate::free_space::free_bytes;
use crate::replicate::plan::capture_choice::{CommitFacts, choose};
use crate::replicate::plan::conflict::Conflict;
use crate::replicate::plan::facts::{DiskFacts, Room};
use crate::replicate::plan::options::{CaptureKind, CaptureWish};
use crate::replicate::plan::planned::Plan;
use crate::replicate::plan::{capture_choice, overlay_dir, plan};
use crate::replicate::run::{Ports, Request};
use crate::replicate::settle::observe;
use crate::replicate::state::generation::generation;
use crate::replicate::state::report::Report;
use crate::replicate::state::{handover_record, journal, stores};
use crate::replicate::tracking::bitmap_rotation::{self, Tracked};
use crate::replicate::tracking::failover_bitmap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Steps 2 and 3 alone: what a run would do. Touches nothing, here or there.
pub fn plan_only(ports: &Ports, request: &Request) -> Result<Plan> {
    let domain = observe::find(ports.hypervisor, &request.domain)?;
    let handed = handover_record::peek(&request.state, &domain.uuid)?;
    let handed = handover_record::may_run(handed, domain.power, &request.target, request.handover.as_ref())?;
    let view = (ports.replica)(&domain.uuid)?.describe()?;
    if let Some(record) = handed.filter(|_| view.promoted.is_some()) {
        return Err(record.refusal(domain.power));
    }
    let mut plan = make_plan(ports, request, &domain, &view)?;
    let record = journal::peek(&request.state, &domain.uuid)?;
    if let Some(left) = journal::peek_backup(&request.state, &domain.uuid)? {
        // The job in the way may be the one that is ended first.
        let ends = match ports.backups.running_backup(&domain.uuid)? {
            BackupJob::Running(running) => left.backup.is(&running),
            BackupJob::Hollow | BackupJob::None => false,
        };
        if ends {
            plan.conflicts.retain(|c| !matches!(c, Conflict::DomainJob { .. }));
        }
        plan.notes.push("an earlier run by backup was cut short; the next one ends its job first".to_owned());
    }
    if record.is_some() || domain.record.is_some() {
        let what = "an earlier run was cut short; the next one settles it first".to_owned();
        plan.conflicts.retain(|c| !matches!(c, Conflict::StrayOverlay { .. }));
        plan.notes.push(what);
    } else if plan.conflicts.is_empty() {
        let mut notes = Vec::new();
        describe(ports, request, &domain, &plan, &mut notes)?;
        plan.notes.extend(notes);
    }
    Ok(plan)
}

/// Gathers what planning needs to know beyond the views, and plans. Touches nothing.
pub fn make_plan(ports: &Ports, request: &Request, domain: &DomainView, replica: &ReplicaView) -> Result<Plan> {
    let past = past(request, domain);
    let capture = choose(domain.power, request.plan.capture, &commit_facts(ports, request, domain, &past)?);
    let facts: Vec<DiskFacts> = domain
        .disks
        .iter()
        .filter(|d| d.kind == DiskKind::Image)
        .map(|disk| disk_facts(ports, request, domain, disk, replica.head(), capture.kind))
        .collect();
    let own = generation(&request.state, &domain.uuid)?;
    let generation = if request.plan.take_over { own.max(replica.generation) } else { own };
    let mut plan = plan(domain, &facts, replica, generation, &request.plan, capture);
    forecast::foresee(&mut plan, &facts, replica, &past, (ports.clock)(), &request.plan.space);
    let hindrances = rights::hindrances(ports.backups, &plan, &request.run);
    plan.conflicts.extend(hindrances.into_iter().map(Conflict::Hindered));
    Ok(plan)
}

/// What is known that could keep an overlay from being committed; asked only where it decides.
fn commit_facts(ports: &Ports, request: &Request, domain: &DomainView, past: &[Report]) -> Result<CommitFacts> {
    if request.plan.capture != CaptureWish::Auto || domain.power == Power::Off {
        return Ok(CommitFacts::default());
    }
    let replicated = |d: &&DiskView| !request.plan.exclude_disks.contains(&d.name);
    let holds = |d: &&DiskView| {
        let top = d.live.as_ref().map(Chain::top).filter(|top| top.format == Format::Qcow2);
        top.is_some_and(|top| qemu_img::holds_snapshots(top).unwrap_or(false))
    };
    let disks = domain.disks.iter().filter(replicated).filter(holds);
    Ok(CommitFacts {
        confinement: Some(ports.hypervisor.confinement(&domain.uuid)?),
        internal_snapshots: disks.map(|d| d.name.clone()).collect(),
        unfinished: capture_choice::unfinished(past),
    })
}

/// The last runs of this domain to this target. They are a help to guess, and no more: without them there is a default.
fn past(request: &Request, domain: &DomainView) -> Vec<Report> {
    let mut past = journal::recent_reports::<Report>(&request.state, &domain.uuid).unwrap_or_default();
    let spellings = stores::spellings_of(&request.state, &request.target, request.store.get());
    past.retain(|report| spellings.contains(&report.target));
    past
}

fn disk_facts(
    ports: &Ports,
    request: &Request,
    domain: &DomainView,
    disk: &DiskView,
    head: Option<&PointView>,
    capture: CaptureKind,
) -> DiskFacts {
    let chain = match (&disk.live, &disk.inactive) {
        (Some(chain), _) if domain.power != Power::Off => chain::with_data_files(chain.clone()).map_err(|e| e.chain()),
        (_, Some(top)) => observe::resolve(top).map_err(|e| e.chain()),
        _ => Err("no image is known for it".to_owned()),
    };
    let reader = chain.as_ref().ok().map(|c| match capture {
        // QEMU reads what it runs on; whether we could does not matter.
        CaptureKind::Backup => Ok(EXPORT.to_owned()),
        CaptureKind::Overlay | CaptureKind::Off => (ports.explain_image)(c),
    });
    let (reader, chain) = match reader {
        Some(Ok(reader)) => (reader, chain),
        Some(Err(e)) => (String::new(), Err(rights::told(&e))),
        None => (String::new(), chain),
    };
    let (allocated_bytes, overlay_room) = match &chain {
        Ok(chain) => (allocated(chain), room(&overlay_dir(chain.top(), &request.plan), &chain.top().path)),
        Err(_) => (0, None),
    };
    let tracked = tracked(ports, request, domain, &disk.name, chain.as_ref().ok(), head);
    DiskFacts { name: disk.name.clone(), chain, allocated_bytes, reader, overlay_room, tracked }
}

/// Whether a bitmap of the running QEMU, or of the image of a domain that is off, leads on from the head: from its run,
/// or from its very content.
fn tracked(
    ports: &Ports,
    request: &Request,
    domain: &DomainView,
    disk: &DiskName,
    chain: Option<&Chain>,
    head: Option<&PointView>,
) -> Tracked {
    let (Some(chain), Some(head)) = (chain, head) else {
        return Tracked::Untracked("there is no newest point to lead on from".into());
    };
    if let Some(why) = chain::must_not_be_tracked(chain.top()) {
        return Tracked::Untracked(why);
    }
    let off = domain.power == Power::Off;
    if let Some(why) = chain::keeps_no_bitmap(chain.top()).filter(|_| off) {
        return Tracked::Untracked(why);
    }
    let image = bitmap_rotation::identity(chain.top());
    let keys = stores::keys(&request.state, &request.target, request.store.get());
    let names = || keys.iter().map(|key| bitmap_rotation::bitmap_name(key, &head.run, &image)).collect();
    let root = head.disk(disk).map(|d| &d.root);
    let tracking = if off { ports.stored } else { ports.tracking };
    let judged = match tracking.bitmaps(&domain.uuid, &chain.0) {
        Ok(layers) => failover_bitmap::judge(&layers, &bitmap_rotation::known_name(&layers, names()), root, &image),
        Err(e) => Tracked::Doubt(format!("its dirty bitmaps cannot be looked at ({})", e.chain())),
    };
    match judged {
        // How much a stored bitmap marks is known only when it is read.
        Tracked::By { bitmap, .. } if off => {
            match tracking.dirty(&domain.uuid, &[(chain.top().clone(), bitmap.clone())]) {
                Ok(ranges) => {
                    Tracked::By { bitmap, dirty_bytes: ranges.iter().flatten().map(|range| range.len()).sum() }
                }
                Err(e) => Tracked::Doubt(format!("the dirty bitmap cannot be read ({})", e.chain())),
            }
        }
        judged => judged,
    }
}

/// Bytes that a chain's images occupy; what cannot be looked at counts with its full size.
fn allocated(chain: &Chain) -> u64 {
    chain
        .0
        .iter()
        .map(|layer| match qemu_img::info(&layer.path, layer.format, true) {
            Ok(info) if !chain::is_block_device(&layer.path) => info.actual_size_bytes,
            Ok(info) => info.virtual_size.0,
            Err(_) => u64::MAX / 1024,
        })
        .sum()
}

fn room(dir: &Path, image: &Path) -> Option<Room> {
    let device = |path: &Path| std::fs::metadata(path).ok().map(|m| m.dev());
    let file_system = device(dir)?;
    Some(Room { file_system, free_bytes: free_bytes(dir)?, beside_image: device(image) == Some(file_system) })
}
