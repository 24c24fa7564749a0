//! Looks at a domain and its files, and describes both in the words of [`mod@super::decide`], relative to a record.
//!
//! Reads only; the moment it describes is over when it returns, which is why acting re-checks what matters.

use super::decide::{DiskFacts, DiskSeen, Job, OverlayFile, Phase, PowerState, Situation, Stand, Under};
use crate::block::{BLOCK_LEN, DiskSize};
use crate::error::{Error, Kind, Result, ResultExt, advice};
use crate::file_id::Stamp;
use crate::hypervisor::{BlockJobKind, DiskView, DomainView, Hypervisor, Power};
use crate::image::{Chain, Layer, chain};
use crate::name::{DiskName, DomainUuid};
use crate::replicate::state::journal::boot_id;
use crate::replicate::state::record::{DiskRecord, Record};
use std::path::Path;

/// What was seen of a domain with an open record.
#[derive(Debug, Clone)]
pub struct Observation {
    /// `None` when libvirt does not know the domain any more.
    pub domain: Option<DomainView>,
    /// Whether a QEMU runs the domain on this host.
    pub power: PowerState,
    /// The running QEMU is the recorded one: same libvirt id, in the same boot of the host.
    pub same_instance: bool,
    /// libvirt holds a saved memory image of the domain.
    pub managed_save: bool,
    /// Each disk of the record, in the record's order, with recorded facts and what was seen.
    pub disks: Vec<(DiskName, DiskFacts, DiskSeen)>,
    /// The overlays' stamps of this moment, in the record's order; what an action may rely on.
    pub overlay_stamps: Vec<Option<Stamp>>,
    /// The images right below our overlays, in the record's order; `None` where that is not known.
    pub under: Vec<Option<Layer>>,
    /// The QEMU that runs now was refused to write to a base.
    pub commit_denied: bool,
}

impl Observation {
    /// Joins the observation with its record, as input for `decide`.
    pub fn situation<'a>(&'a self, record: &Record) -> Situation<'a> {
        Situation {
            phase: record.phase,
            resume_after: record.resume_after,
            power: self.power,
            same_instance: self.same_instance,
            persistent: record.persistent,
            managed_save: self.managed_save,
            commit_denied: self.commit_denied,
            disks: &self.disks,
        }
    }

    /// Whether we hold the guest's vCPUs.
    pub fn held(&self, record: &Record) -> bool {
        self.power == PowerState::Paused && record.resume_after
    }
}

/// Observes the domain of a record; its disks have no sizes. Blocks on libvirt and `stat`; runs `qemu-img info` only
/// for a domain that is off, where an overlay of ours is there, or the definition names neither base nor overlay.
pub fn observe(hypervisor: &dyn Hypervisor, record: &Record) -> Result<Observation> {
    let domain = match hypervisor.observe_without_sizes(&record.uuid) {
        Ok(view) => Some(view),
        Err(e) if e.kind() == Kind::NotFound => None,
        Err(e) => return Err(e.domain(&record.domain)),
    };
    let power = match domain.as_ref().map(|d| d.power) {
        Some(Power::Running) => PowerState::Running,
        Some(Power::Paused) => PowerState::Paused,
        Some(Power::Off) => PowerState::Off,
        None => PowerState::Gone,
    };
    let mut disks = Vec::with_capacity(record.disks.len());
    let mut overlay_stamps = Vec::with_capacity(record.disks.len());
    let mut under = Vec::with_capacity(record.disks.len());
    let runs = matches!(power, PowerState::Running | PowerState::Paused);
    for disk in &record.disks {
        let view = domain.as_ref().and_then(|d| d.disk(&disk.name));
        let below = image_under(disk, view, runs);
        let (facts, seen, stamp) = disk_seen(record, disk, power, view, below.as_ref())
            .on_disk(&disk.name)
            .map_err(|e| e.domain(&record.domain))?;
        disks.push((disk.name.clone(), facts, seen));
        overlay_stamps.push(stamp);
        under.push(below);
    }
    let same_boot = record.boot.is_none() || record.boot == boot_id();
    let is = |id: Option<u32>| same_boot && domain.as_ref().is_some_and(|d| d.id.is_some() && d.id == id);
    Ok(Observation {
        power,
        same_instance: is(record.instance),
        commit_denied: is(record.commit_denied),
        managed_save: domain.as_ref().is_some_and(|d| d.managed_save),
        domain,
        disks,
        overlay_stamps,
        under,
    })
}

/// The image right below our overlay: in the chain of the running QEMU, or, while none runs, by the header of the
/// overlay, which may have been retired. `None` where neither tells.
fn image_under(disk: &DiskRecord, view: Option<&DiskView>, runs: bool) -> Option<Layer> {
    let chain = view.and_then(|v| v.live.as_ref());
    if runs {
        let layers = &chain?.0;
        let at = layers.iter().position(|layer| layer.path == disk.overlay)?;
        return layers.get(at + 1).cloned();
    }
    let files = [disk.overlay.clone(), disk.retired()];
    let there = files.iter().find(|path| path.exists())?;
    // One that cannot be read is not committed either: see `chain::commits_into`.
    chain::backing_of(there).ok().flatten()
}

fn disk_seen(
    record: &Record,
    disk: &DiskRecord,
    power: PowerState,
    view: Option<&DiskView>,
    under: Option<&Layer>,
) -> Result<(DiskFacts, DiskSeen, Option<Stamp>)> {
    let stamp = Stamp::of(&disk.overlay)?;
    let overlay = overlay_file(disk, stamp)?;
    let base_unchanged = match disk.base_stamp {
        Some(then) => Stamp::of(&disk.base.path)?.is_some_and(|now| then.is(&now)),
        None => false,
    };
    let base_changed = disk.base_stamp.is_some() && !base_unchanged && record.phase < Phase::CommitIntent;
    let overlay_touched = matches!((disk.complete_at, stamp), (Some(then), Some(now)) if !then.is(&now));
    let seen = DiskSeen {
        live: view.and_then(|v| v.live.as_ref()).map_or(Stand::Absent, |chain| stand(disk, chain)),
        inactive: match (power, view) {
            (PowerState::Off, None) if disk.live_only => gone_with_its_instance(overlay),
            _ => inactive_stand(disk, view)?,
        },
        job: match view.and_then(|v| v.job) {
            None => Job::None,
            Some(job) if job.kind == BlockJobKind::Other => Job::Foreign,
            Some(job) if job.ready => Job::Ready,
            Some(_) => Job::Running,
        },
        under: match under {
            Some(layer) if !chain::is_same_image(&layer.path, &disk.base.path) => Under::Another,
            _ => Under::Recorded,
        },
        overlay,
        base_touched: base_changed || overlay_touched,
        // A block device has no telling times.
        base_as_frozen: disk.off_commit || (base_unchanged && !chain::is_block_device(&disk.base.path)),
        shared_storage: chain::on_shared_storage(&disk.base.path),
    };
    Ok((DiskFacts { base_complete: disk.complete_at.is_some() && !overlay_touched }, seen, stamp))
}

fn overlay_file(disk: &DiskRecord, stamp: Option<Stamp>) -> Result<OverlayFile> {
    let is_ours = |s: Stamp| disk.overlay_id.is_none_or(|id| id.is(&s.id));
    Ok(match stamp {
        Some(s) if !is_ours(s) => OverlayFile::Replaced,
        Some(s) if s.len_bytes <= empty_overlay_len(disk.size) => OverlayFile::Empty,
        Some(_) => OverlayFile::Used,
        None => match Stamp::of(&disk.retired())? {
            Some(s) if is_ours(s) => OverlayFile::Retired,
            _ => OverlayFile::Missing,
        },
    })
}

/// Length up to which a qcow2 overlay cannot hold guest data: header, refcount table, one refcount block, and the L1
/// table. A first guest write adds at least an L2 table and a data cluster.
fn empty_overlay_len(size: DiskSize) -> u64 {
    const CLUSTER: u64 = BLOCK_LEN as u64;
    let l1_entries = size.0.div_ceil(CLUSTER * (CLUSTER / 8));
    3 * CLUSTER + (l1_entries * 8).next_multiple_of(CLUSTER)
}

/// Where a whole chain stands, by the paths libvirt reports.
fn stand(disk: &DiskRecord, chain: &Chain) -> Stand {
    let at = |path: &Path| chain.0.iter().position(|layer| layer.path == path);
    match (at(&disk.overlay), at(&disk.base.path)) {
        // An overlay over nothing is none.
        (Some(n), _) if n + 1 == chain.0.len() => Stand::Foreign,
        (Some(0), _) => Stand::Ours,
        (Some(_), _) => Stand::OursBelow,
        (None, Some(0)) => Stand::Base,
        (None, Some(_)) => Stand::BaseBelow,
        _ => Stand::Foreign,
    }
}

fn inactive_stand(disk: &DiskRecord, view: Option<&DiskView>) -> Result<Stand> {
    let Some(top) = view.and_then(|v| v.inactive.as_ref()) else { return Ok(Stand::Absent) };
    if top.path == disk.overlay {
        return Ok(Stand::Ours);
    }
    if top.path == disk.base.path {
        return Ok(Stand::Base);
    }
    // Only an off domain's definition decides anything deeper, and only then may qemu-img look at the images.
    if view.is_some_and(|v| v.live.is_some()) {
        return Ok(Stand::Foreign);
    }
    Ok(resolve(top).map_or(Stand::Foreign, |chain| stand(disk, &chain)))
}

/// Where a disk stands that only an instance had which is over. No definition will name it; our overlay, while it has
/// its name, holds what the guest wrote to the disk last.
fn gone_with_its_instance(overlay: OverlayFile) -> Stand {
    if overlay.is_there() { Stand::Ours } else { Stand::Base }
}

/// The whole chain below a definition's image, by the backing files recorded in the images. `Refused` where a format is
/// not recorded: it is never guessed.
pub fn resolve(top: &Layer) -> Result<Chain> {
    chain::resolve_chain(top).map_err(|e| {
        e.hint("record the format of the backing file (qemu-img rebase -u -F FORMAT -b FILE IMAGE) while the domain is off")
    })
}

/// A domain that cannot be found by any name is an error with the way to look.
pub fn find(hypervisor: &dyn Hypervisor, name: &str) -> Result<DomainView> {
    hypervisor.find(name).map_err(|e| match e.kind() {
        Kind::NotFound => Error::new(Kind::NotFound, format!("there is no domain '{name}' here"))
            .source(e)
            .advise(advice::Host::FindDomain),
        _ => e,
    })
}

/// The copy of the record in the domain's own metadata: the one that survives the loss of our state directory.
pub fn record_in_domain(hypervisor: &dyn Hypervisor, uuid: &DomainUuid) -> Result<Option<Record>> {
    let domain = match hypervisor.observe(uuid) {
        Ok(domain) => domain,
        Err(e) if e.kind() == Kind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let Some(text) = domain.record else { return Ok(None) };
    let record: Record = serde_json::from_str(&text).map_err(|e| {
        Error::new(Kind::Corrupt, "the record in the domain's metadata cannot be understood")
            .source(e)
            .domain(&domain.name)
            .hint("it may be a newer virt-replica's; `virsh metadata DOMAIN https://virt-replica.org/xmlns/record/1` shows it")
    })?;
    if record.uuid != *uuid || record.format != 1 {
        return Err(Error::new(Kind::Corrupt, "the record in the domain's metadata is another domain's or version's")
            .domain(&domain.name)
            .hint("a clone made of this domain's XML carries it along: remove it with `virsh metadata DOMAIN URI --remove`"));
    }
    Ok(Some(record))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Format;
    use crate::replicate::state::journal::tests::record;

    /// `"ours<base"` is a chain, uppermost first, in the names of the record's files.
    fn chain(notation: &str) -> Chain {
        let layer = |name: &str| Layer {
            path: match name {
                "base" => "/pool/a.qcow2".into(),
                "ours" => "/pool/a.vr-0000.qcow2".into(),
                other => format!("/pool/{other}").into(),
            },
            format: Format::Qcow2,
            block_device: false,
            data_file: None,
        };
        Chain(notation.split('<').map(layer).collect())
    }

    #[test]
    fn chains_are_told_apart_by_where_our_files_stand() {
        let disk = &record(Phase::Frozen).disks[0];
        for (notation, expected) in [
            ("base", Stand::Base),
            ("base<golden", Stand::Base),
            ("ours<base", Stand::Ours),
            ("ours<base<golden", Stand::Ours),
            ("user<ours<base", Stand::OursBelow),
            ("user<base", Stand::BaseBelow),
            ("user<user2<base<golden", Stand::BaseBelow),
            ("other", Stand::Foreign),
            ("ours", Stand::Foreign),
            // Which image it lies over is told apart below.
            ("ours<other<base", Stand::Ours),
            ("ours<other", Stand::Ours),
            ("user<ours<other<base", Stand::OursBelow),
            ("base<ours", Stand::Foreign),
        ] {
            assert_eq!(stand(disk, &chain(notation)), expected, "{notation}");
        }
    }

    /// It was plugged in without `--persistent`, and its instance ended on our overlay: what the guest wrote is
    /// committed.
    #[test]
    fn a_disk_that_went_with_its_instance_is_committed_from_the_record() {
        let mut record = record(Phase::Frozen);
        let dir = tempfile::tempdir().unwrap();
        record.disks[0].overlay = dir.path().join("a.vr-0000.qcow2");
        record.disks[0].base.path = dir.path().join("a.qcow2");
        (record.disks[0].base_stamp, record.disks[0].overlay_id) = (None, None);
        std::fs::write(&record.disks[0].base.path, b"base").unwrap();
        std::fs::write(&record.disks[0].overlay, vec![1; 1 << 20]).unwrap();
        let next = |record: &Record, power| {
            let (facts, seen, _) = disk_seen(record, &record.disks[0], power, None, None).unwrap();
            let disks = [(record.disks[0].name.clone(), facts, seen)];
            crate::replicate::settle::decide::decide(&Situation {
                phase: record.phase,
                resume_after: false,
                power,
                same_instance: false,
                persistent: true,
                managed_save: false,
                commit_denied: false,
                disks: &disks,
            })
        };
        use crate::replicate::settle::decide::{Action, HaltReason};
        let halted = next(&record, PowerState::Off);
        assert!(matches!(halted, Action::Halt(ref h) if h.reason == HaltReason::DiskGone), "{halted:?}");
        record.disks[0].live_only = true;
        assert_eq!(next(&record, PowerState::Off), Action::CommitOffline(record.disks[0].name.clone()));
        std::fs::rename(&record.disks[0].overlay, record.disks[0].retired()).unwrap();
        assert_eq!(next(&record, PowerState::Off), Action::Done);
    }

    /// Somebody's snapshot between our plan and our freeze: our overlay lies over theirs.
    #[test]
    fn the_image_that_was_frozen_is_the_one_below_our_overlay() {
        let disk = &record(Phase::FreezeIntent).disks[0];
        let view = |notation: &str| DiskView {
            name: disk.name.clone(),
            kind: crate::hypervisor::DiskKind::Image,
            live: Some(chain(notation)),
            inactive: None,
            size: None,
            job: None,
            read_only: false,
            shareable: false,
        };
        for (notation, expected) in [
            ("ours<base<golden", Some("/pool/a.qcow2")),
            ("ours<theirs<base", Some("/pool/theirs")),
            ("user<ours<theirs<base", Some("/pool/theirs")),
            ("theirs<base", None),
            ("ours", None),
        ] {
            let found = image_under(disk, Some(&view(notation)), true);
            assert_eq!(found.as_ref().map(|layer| layer.path.as_path()), expected.map(Path::new), "{notation}");
        }
        assert_eq!(image_under(disk, None, true), None, "unplugged");
    }

    #[test]
    fn a_fresh_overlay_is_empty_and_one_written_cluster_is_not() {
        let fresh = |size: u64| {
            let clusters_of_l1 = size.div_ceil(1 << 29).saturating_mul(8).div_ceil(65536).max(1);
            3 * 65536 + clusters_of_l1 * 65536
        };
        for size in [1 << 20, 1 << 30, 16 << 40] {
            assert_eq!(empty_overlay_len(DiskSize(size)), fresh(size));
        }
    }
}
