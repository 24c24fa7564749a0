//! The next step that brings a domain back onto its own images, decided from the record and from what is observed.
//!
//! Pure, total, and the only place where this is decided: the normal commit, the recovery after any crash, the
//! dead-man and `doctor` all call [`decide`] in a loop until it says [`Action::Done`] or [`Action::Halt`]. Every step
//! may be cut short and repeated.
//!
//! The rules rest on one invariant (I3 in docs/replication.md): between the pivot and the moment the overlay's name is
//! durably gone, the guest runs nothing. Therefore, *while the overlay's name exists, the overlay chain is a correct
//! view of the disk; once it is gone, only the base is*. What breaks the invariant from outside (somebody resumes the
//! domain by hand, starts it from another definition, writes to the base) is told apart below, and where it cannot be
//! told apart, nothing is touched: [`Action::Halt`].
//!
//! `docs/replication.md` has the same table for people. The tests enumerate the whole input space, and explore a model
//! of libvirt and QEMU with faults at every step.

use crate::error::advice::{Advice, Repair};
use crate::name::DiskName;

/// How far the run had come when it last wrote its record. Written before the step it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Overlays may exist from here on.
    FreezeIntent,
    /// Every disk was seen on its overlay.
    Frozen,
    /// Bases may be a mixture from here on: only base plus overlay is valid (I5).
    CommitIntent,
    /// vCPUs may be paused by us, disks may have pivoted.
    PivotIntent,
}

/// The record of one disk, as far as decisions need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DiskFacts {
    /// The base holds everything the guest wrote, and the overlay is as it was when that was recorded: it may be older
    /// than the base by now and may never be committed again.
    pub base_complete: bool,
}

/// The position of a chain, compared with the recorded base and overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stand {
    /// The base is the uppermost layer, as before the run.
    Base,
    /// Our overlay is the uppermost layer, over an image: see [`Under`].
    Ours,
    /// Foreign layers above our overlay, which is over an image: see [`Under`].
    OursBelow,
    /// Foreign layers directly above the base; our overlay is not in the chain.
    BaseBelow,
    /// Neither our overlay nor the base as recorded.
    Foreign,
    /// There is no such chain: the domain does not run, has no persistent definition, or lacks the disk.
    Absent,
}

/// Which image lies right below our overlay: by the running chain, or for a domain that is off by the overlay's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Under {
    /// The recorded base; or there is no overlay that could tell.
    Recorded,
    /// Another one: somebody's snapshot came between the plan and our freeze, or somebody changed the chain below us.
    Another,
}

/// Block job on a disk, as libvirt reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Job {
    /// No block job works on the disk.
    None,
    /// A commit, not yet ready; with our overlay in the chain it can only be ours, libvirt allows one job per disk.
    Running,
    /// An active commit waits for its pivot.
    Ready,
    /// A job of another kind.
    Foreign,
}

/// The file under the overlay's recorded name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OverlayFile {
    /// Neither under its name nor under the retired one.
    Missing,
    /// Renamed away by us: the base is the disk.
    Retired,
    /// Ours, and no guest data was ever written to it.
    Empty,
    /// Ours, with data.
    Used,
    /// Another file under the same name.
    Replaced,
}

impl OverlayFile {
    /// The overlay is there under its name, so the chain with it is the view of the disk.
    pub fn is_there(self) -> bool {
        matches!(self, OverlayFile::Empty | OverlayFile::Used)
    }

    fn is_gone(self) -> bool {
        matches!(self, OverlayFile::Missing | OverlayFile::Retired)
    }
}

/// Whether a QEMU runs the domain on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PowerState {
    /// QEMU runs the domain and its vCPUs run.
    Running,
    /// QEMU runs the domain and its vCPUs stand still, by us or by somebody else.
    Paused,
    /// Defined, and no QEMU runs it here.
    Off,
    /// Not known to this libvirt: a transient domain that ended, or one that was undefined or migrated away.
    Gone,
}

/// The observation of one disk, compared with the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DiskSeen {
    /// The chain of the running domain. `Absent`: it does not run, or lacks the disk.
    pub live: Stand,
    /// The chain of the persistent definition. `Absent`: there is none, or it lacks the disk.
    pub inactive: Stand,
    /// Which image lies right below our overlay.
    pub under: Under,
    /// Block job that works on the disk.
    pub job: Job,
    /// The file under the overlay's recorded name.
    pub overlay: OverlayFile,
    /// The base was written to since the freeze although no commit of ours had begun, or the overlay was written to
    /// after the base had become complete.
    pub base_touched: bool,
    /// The base is exactly as it was frozen, by its length and times, or only our own `qemu-img` has changed it since;
    /// `false` where that cannot be told.
    pub base_as_frozen: bool,
    /// The images lie on storage that other hosts may have open.
    pub shared_storage: bool,
}

/// Everything a decision is made from.
#[derive(Debug, Clone)]
pub struct Situation<'a> {
    /// How far the run had come, as its record says.
    pub phase: Phase,
    /// The record says that we paused, or were about to, a domain that ran.
    pub resume_after: bool,
    /// Whether a QEMU runs the domain now.
    pub power: PowerState,
    /// The QEMU that runs now is the one that was frozen, or was since seen running on our overlays.
    pub same_instance: bool,
    /// The domain had a persistent definition when the run began.
    pub persistent: bool,
    /// libvirt holds a saved memory image of the domain.
    pub managed_save: bool,
    /// This QEMU was refused to write to a base: asking again is of no use before it ends.
    pub commit_denied: bool,
    /// Disks of the record, each with its recorded facts and its observation.
    pub disks: &'a [(DiskName, DiskFacts, DiskSeen)],
}

/// One step. Each is idempotent, or decided anew after it failed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Record the image right below our overlay as the base: that is what was frozen, and what the overlay completes.
    Adopt(DiskName),
    /// Record [`Phase::CommitIntent`], then start committing our overlay, the uppermost layer.
    StartCommit(DiskName),
    /// Record [`Phase::CommitIntent`], then commit our overlay below foreign layers, which stay.
    StartCommitBelow(DiskName),
    /// Let the disk's commit go on.
    WaitForJob(DiskName),
    /// Every disk is ready: record [`Phase::PivotIntent`] and whether to resume, arm the dead-man, stop the vCPUs.
    Pause,
    /// Everything stands: pivot the disk.
    Pivot(DiskName),
    /// Point the persistent definition at the image that the guest runs on, or at the base of a domain that is off.
    Redefine(DiskName),
    /// Record that the disk's base is complete, so that its overlay is never committed again.
    MarkComplete(DiskName),
    /// Holding QEMU's locks on the overlay, and if it is as it was observed: rename it away and sync its directory.
    /// From here on only the base is the disk.
    Retire(DiskName),
    /// As [`Action::Retire`], but keep the file for a person: what made it stale was not seen.
    SetAside(DiskName),
    /// Every pivoted disk is retired: let the guest run.
    Resume,
    /// No QEMU has the disk: commit with `qemu-img`; then, holding QEMU's own locks so that it cannot start, and if
    /// nothing changed since, retire and redefine, in this order: the reverse could start on the base while the
    /// overlay's name exists.
    CommitOffline(DiskName),
    /// Remove an overlay that never held data and that nothing refers to.
    Discard(DiskName),
    /// The domain stands on its own images: close the record.
    Done,
    /// Touch nothing; a person has to look. Tried again at the next run.
    Halt(Halt),
}

impl Action {
    /// Quick, and checked again by libvirt or under QEMU's locks when it is done. A commit with `qemu-img` is neither
    /// quick nor may it rest on an old observation: the domain can be started meanwhile.
    fn is_for_many(&self) -> bool {
        match self {
            Action::Adopt(_) | Action::StartCommit(_) | Action::StartCommitBelow(_) | Action::Pivot(_) => true,
            Action::Redefine(_) => true,
            Action::MarkComplete(_) | Action::Retire(_) | Action::SetAside(_) | Action::Discard(_) => true,
            Action::WaitForJob(_) | Action::Pause | Action::Resume | Action::CommitOffline(_) => false,
            Action::Done | Action::Halt(_) => false,
        }
    }
}

/// Why nothing may be touched.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Halt {
    /// Name of the disk that is the reason. `None`: no single disk is.
    pub disk: Option<DiskName>,
    /// The finding that forbids every further step.
    pub reason: HaltReason,
}

/// Reason for a halt. `explain` gives the words for the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HaltReason {
    /// A saved memory image belongs to the disks as they stand, overlay included.
    ManagedSave,
    /// A block job that is not ours runs on the disk.
    ForeignJob,
    /// The chain is neither the recorded base nor our overlay over it.
    ForeignChain,
    /// The disk was unplugged while it was on our overlay.
    DiskGone,
    /// The overlay's name holds another file.
    OverlayReplaced,
    /// The overlay was deleted before it was committed: what the guest wrote since the freeze is lost.
    OverlayLost,
    /// The base was opened and written below our overlay, which also holds writes.
    BaseTouched,
    /// The domain runs, or is defined to run, on the base although the overlay holds writes that were not committed.
    StartedOnBase,
    /// Foreign layers lie above our overlay and the domain is off.
    OursBelowOff,
    /// The domain is gone from here and its storage is shared: it may run on another host.
    MayRunElsewhere,
    /// AppArmor keeps this QEMU from writing to the base: it was started while the disk was on our overlay.
    CommitDenied,
    /// libvirtd died inside the freeze: the guest writes to our overlay, libvirt believes in the base. Found in acting,
    /// never decided: no observation through libvirt shows it.
    LibvirtLostTrack,
}

impl HaltReason {
    /// An explanation for the person who is called: the event, and the next step.
    pub fn explain(self) -> (&'static str, Advice) {
        match self {
            HaltReason::ManagedSave => (
                "a saved memory image refers to the disk with our overlay",
                Repair::StartSaved.into(),
            ),
            HaltReason::ForeignJob => (
                "a block job that is not ours runs on the disk",
                Repair::EndBlockJob.into(),
            ),
            HaltReason::ForeignChain => (
                "the disk's chain is neither the recorded base nor our overlay over it",
                Repair::CompareWithRecord.into(),
            ),
            HaltReason::DiskGone => (
                "the disk was unplugged while it was on our overlay; the overlay holds what was written since the freeze",
                Repair::PlugIn.into(),
            ),
            HaltReason::OverlayReplaced => (
                "another file lies under the overlay's name",
                "find out who put it there; the domain is not touched until the recorded file is back or the record is settled by hand".into(),
            ),
            HaltReason::OverlayLost => (
                "the overlay was deleted before it was committed; writes since the freeze are lost unless a copy of it exists",
                "put the overlay file back if you can; otherwise point the definition at the base (virsh edit), knowing that it is as old as the freeze".into(),
            ),
            HaltReason::BaseTouched => (
                "the base image was written to below our overlay",
                "both files hold writes the other lacks; keep both, decide by hand which one is right".into(),
            ),
            HaltReason::StartedOnBase => (
                "the domain uses the base although the overlay holds writes that were never committed",
                "keep both files; shut the domain down before it diverges further and decide which image is right".into(),
            ),
            HaltReason::OursBelowOff => (
                "another snapshot lies above our overlay and the domain is off",
                Repair::Start.into(),
            ),
            HaltReason::MayRunElsewhere => (
                "the domain is no longer here and its images lie on shared storage; it may run on another host",
                Repair::OnOtherHost.into(),
            ),
            HaltReason::CommitDenied => (
                "AppArmor denies QEMU to write to the disk's own image: libvirt before 12.1 forbids that to a domain that is started while the disk is on an overlay",
                Repair::ShutOff.into(),
            ),
            HaltReason::LibvirtLostTrack => (
                "libvirtd died inside the freeze and has lost track: the guest writes to our overlay, libvirt believes in the base",
                Repair::ShutDown.into(),
            ),
        }
    }
}

/// Decides the next step. See the module's page for the rules it keeps.
pub fn decide(s: &Situation) -> Action {
    match s.power {
        PowerState::Running | PowerState::Paused => decide_live(s),
        PowerState::Off | PowerState::Gone => decide_off(s),
    }
}

/// All that one observation permits: the next step, and the same step for every other disk that would get it if it
/// stood alone. Each disk's rule is its own, so what is done to one disk changes nothing for another. Without this, `n`
/// disks would cost `n` observations of `n` disks each, and most of them while the guest stands.
pub fn decide_all(s: &Situation) -> Vec<Action> {
    let first = decide(s);
    if !first.is_for_many() {
        return vec![first];
    }
    let kind = std::mem::discriminant(&first);
    let alone = |disk| decide(&Situation { disks: std::slice::from_ref(disk), ..s.clone() });
    let also = s.disks.iter().map(alone).filter(|a| std::mem::discriminant(a) == kind && *a != first);
    let also: Vec<Action> = also.collect();
    std::iter::once(first).chain(also).collect()
}

/// A QEMU runs the domain.
fn decide_live(s: &Situation) -> Action {
    let paused = s.power == PowerState::Paused;
    let mut halts = Vec::new();
    let mut start = None;
    let mut waiting = None;
    let mut ready = Vec::new();
    let mut unready_ours = false;

    for (name, facts, seen) in s.disks {
        match live_disk(s, facts, seen) {
            Live::Settled => {}
            // A disk that was pivoted comes first: until its overlay's name is gone, nothing may run.
            Live::Act(act) => return act(name.clone()),
            Live::Start(act) => {
                start.get_or_insert_with(|| act(name.clone()));
                unready_ours = true;
            }
            Live::Wait => {
                waiting.get_or_insert_with(|| Action::WaitForJob(name.clone()));
                unready_ours = true;
            }
            Live::Ready => ready.push(name.clone()),
            Live::Halt(reason) => halts.push(Halt { disk: Some(name.clone()), reason }),
        }
    }

    // The guest is never held for longer than what needs it: a pause of ours goes on only to pivot, now.
    if paused && s.resume_after && (s.phase != Phase::PivotIntent || ready.is_empty() || unready_ours) {
        return Action::Resume;
    }
    if let Some(action) = start.or(waiting) {
        return action;
    }
    if let Some(first) = ready.first() {
        // A domain that somebody else paused needs no pause of ours and gets no resume.
        return if paused && s.phase == Phase::PivotIntent { Action::Pivot(first.clone()) } else { Action::Pause };
    }
    match halts.into_iter().next() {
        Some(halt) => Action::Halt(halt),
        None => Action::Done,
    }
}

enum Live {
    Settled,
    Act(fn(DiskName) -> Action),
    Start(fn(DiskName) -> Action),
    Wait,
    Ready,
    Halt(HaltReason),
}

fn live_disk(s: &Situation, facts: &DiskFacts, seen: &DiskSeen) -> Live {
    match seen.live {
        Stand::Base | Stand::BaseBelow => live_on_base(s, facts, seen),
        _ if seen.overlay == OverlayFile::Replaced => Live::Halt(HaltReason::OverlayReplaced),
        Stand::Ours => match seen.job {
            // A stale overlay was booted. Committing it would revert what the guest flushed to the base.
            _ if facts.base_complete => Live::Halt(HaltReason::BaseTouched),
            // Before the rest: what is known of another image's times says nothing of this one.
            _ if seen.under == Under::Another => Live::Act(Action::Adopt),
            _ if seen.base_touched => Live::Halt(HaltReason::BaseTouched),
            Job::None if s.commit_denied => Live::Halt(HaltReason::CommitDenied),
            Job::None => Live::Start(Action::StartCommit),
            Job::Running => Live::Wait,
            Job::Ready => Live::Ready,
            Job::Foreign => Live::Halt(HaltReason::ForeignJob),
        },
        Stand::OursBelow => match seen.job {
            _ if facts.base_complete => Live::Halt(HaltReason::BaseTouched),
            _ if seen.under == Under::Another => Live::Act(Action::Adopt),
            _ if seen.base_touched => Live::Halt(HaltReason::BaseTouched),
            Job::None if s.commit_denied => Live::Halt(HaltReason::CommitDenied),
            Job::None => Live::Start(Action::StartCommitBelow),
            Job::Running => Live::Wait,
            Job::Ready | Job::Foreign => Live::Halt(HaltReason::ForeignJob),
        },
        Stand::Absent if seen.overlay.is_gone() => Live::Settled,
        Stand::Absent => match gone_disk(s, facts, seen) {
            Some(Gone::Discard) => Live::Act(Action::Discard),
            // It takes its time: the guest is not held meanwhile.
            Some(Gone::Commit) => Live::Start(Action::CommitOffline),
            None => Live::Halt(HaltReason::DiskGone),
        },
        Stand::Foreign if seen.overlay == OverlayFile::Retired => Live::Settled,
        Stand::Foreign => Live::Halt(HaltReason::ForeignChain),
    }
}

/// The running QEMU uses the base (or foreign layers directly above it) and not our overlay.
fn live_on_base(s: &Situation, facts: &DiskFacts, seen: &DiskSeen) -> Live {
    let definition_behind = s.persistent && seen.inactive == Stand::Ours;
    match seen.overlay {
        // libvirt's own save of the definition was lost or never happened.
        OverlayFile::Missing | OverlayFile::Retired if definition_behind => Live::Act(Action::Redefine),
        OverlayFile::Missing | OverlayFile::Retired => Live::Settled,
        OverlayFile::Replaced => Live::Halt(HaltReason::OverlayReplaced),
        OverlayFile::Empty if s.phase == Phase::FreezeIntent && !definition_behind => Live::Act(Action::Discard),
        _ if facts.base_complete => Live::Act(Action::Retire),
        // Another start than the one we froze, on the base: after a pivot the base was complete when it started, and
        // only libvirt's own save of a pivot names the base again. Before, the overlay holds writes the base lacks.
        _ if !s.same_instance && s.phase < Phase::PivotIntent => Live::Halt(HaltReason::StartedOnBase),
        _ if !s.same_instance => Live::Act(Action::SetAside),
        // Retired first even where libvirt's definition is behind: with the name gone a start fails closed, with the
        // definition changed first a start could write to an overlay that nothing names.
        _ if s.power == PowerState::Paused && s.phase == Phase::PivotIntent => Live::Act(Action::Retire),
        // It runs on the base while the overlay's name exists: pivoted or resumed by another hand.
        _ => Live::Act(Action::MarkComplete),
    }
}

/// The next step for the overlay of a disk that is gone.
enum Gone {
    Discard,
    Commit,
}

/// A disk that no QEMU of this domain has (it was hot-plugged, and its QEMU has ended, or it was unplugged): what can
/// be done about its overlay without a person.
///
/// QEMU's locks are taken before either image is touched. An overlay that holds nothing goes. One that holds writes is
/// committed where the base is exactly as it was frozen: once a commit by QEMU has begun, the base's times no longer
/// tell of a stranger.
fn gone_disk(s: &Situation, facts: &DiskFacts, seen: &DiskSeen) -> Option<Gone> {
    if facts.base_complete || seen.base_touched {
        return None;
    }
    let committable = matches!(s.phase, Phase::Frozen | Phase::CommitIntent)
        && seen.base_as_frozen
        && seen.under == Under::Recorded
        && !seen.shared_storage
        && !s.managed_save;
    match (seen.inactive, seen.overlay) {
        (Stand::OursBelow, _) => None,
        // The definition names the overlay: it has to be put right as well.
        (Stand::Ours, OverlayFile::Empty | OverlayFile::Used) if committable => Some(Gone::Commit),
        (Stand::Ours, _) => None,
        (_, OverlayFile::Empty) if s.phase < Phase::PivotIntent => Some(Gone::Discard),
        (_, OverlayFile::Used) if committable => Some(Gone::Commit),
        _ => None,
    }
}

/// No QEMU runs the domain here.
fn decide_off(s: &Situation) -> Action {
    let mut halts = Vec::new();
    for (name, facts, seen) in s.disks {
        match off_disk(s, facts, seen) {
            Off::Settled => {}
            Off::Act(act) => return act(name.clone()),
            Off::Halt(reason) => halts.push(Halt { disk: Some(name.clone()), reason }),
        }
    }
    match halts.into_iter().next() {
        Some(halt) => Action::Halt(halt),
        None => Action::Done,
    }
}

enum Off {
    Settled,
    Act(fn(DiskName) -> Action),
    Halt(HaltReason),
}

fn off_disk(s: &Situation, facts: &DiskFacts, seen: &DiskSeen) -> Off {
    if seen.overlay == OverlayFile::Replaced {
        return Off::Halt(HaltReason::OverlayReplaced);
    }
    // A saved image resumes with the very chain it was saved with.
    if s.managed_save && (seen.overlay.is_there() || seen.inactive == Stand::Ours) {
        return Off::Halt(HaltReason::ManagedSave);
    }
    let gone = s.power == PowerState::Gone;
    if gone && seen.shared_storage && seen.overlay.is_there() {
        return Off::Halt(HaltReason::MayRunElsewhere);
    }
    match seen.inactive {
        Stand::OursBelow => Off::Halt(HaltReason::OursBelowOff),
        Stand::Ours if seen.under == Under::Another && seen.overlay != OverlayFile::Missing => Off::Act(Action::Adopt),
        Stand::Ours => match seen.overlay {
            // We retired it: the base is the disk, and libvirt's definition is behind.
            OverlayFile::Retired => Off::Act(Action::Redefine),
            OverlayFile::Missing => Off::Halt(HaltReason::OverlayLost),
            _ if facts.base_complete => Off::Act(Action::Retire),
            _ if seen.base_touched => Off::Halt(HaltReason::BaseTouched),
            _ => Off::Act(Action::CommitOffline),
        },
        Stand::Base | Stand::BaseBelow => match seen.overlay {
            OverlayFile::Missing | OverlayFile::Retired => Off::Settled,
            OverlayFile::Empty if s.phase == Phase::FreezeIntent => Off::Act(Action::Discard),
            // libvirt names the base again only once it has seen the pivot: the base was complete then, and may have
            // been run and written since. Committing could revert that; retiring cannot.
            _ if facts.base_complete => Off::Act(Action::Retire),
            _ if seen.base_touched => Off::Halt(HaltReason::BaseTouched),
            _ if s.phase == Phase::PivotIntent => Off::Act(Action::SetAside),
            _ => Off::Halt(HaltReason::StartedOnBase),
        },
        Stand::Foreign => match seen.overlay {
            OverlayFile::Retired => Off::Settled,
            _ => Off::Halt(HaltReason::ForeignChain),
        },
        // A transient domain that ended, or a disk taken out of the definition: nothing names the images but our
        // record.
        Stand::Absent => match seen.overlay {
            OverlayFile::Retired => Off::Settled,
            OverlayFile::Missing if s.phase == Phase::FreezeIntent => Off::Settled,
            OverlayFile::Missing => Off::Halt(HaltReason::OverlayLost),
            OverlayFile::Empty if s.phase == Phase::FreezeIntent => Off::Act(Action::Discard),
            _ if facts.base_complete => Off::Act(Action::Retire),
            _ if seen.under == Under::Another => Off::Act(Action::Adopt),
            _ if !gone => match gone_disk(s, facts, seen) {
                Some(Gone::Discard) => Off::Act(Action::Discard),
                Some(Gone::Commit) => Off::Act(Action::CommitOffline),
                None => Off::Halt(HaltReason::DiskGone),
            },
            _ if seen.base_touched => Off::Halt(HaltReason::BaseTouched),
            _ => Off::Act(Action::CommitOffline),
        },
    }
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
