//! Every input of [`decide`], and every order of faults in a model of libvirt and QEMU.

use super::*;
use std::collections::{HashMap, HashSet, VecDeque};

fn disk(name: &str) -> DiskName {
    DiskName::new(name).unwrap()
}

const PHASES: [Phase; 4] = [Phase::FreezeIntent, Phase::Frozen, Phase::CommitIntent, Phase::PivotIntent];
const POWERS: [PowerState; 4] = [PowerState::Running, PowerState::Paused, PowerState::Off, PowerState::Gone];
const STANDS: [Stand; 6] =
    [Stand::Base, Stand::Ours, Stand::OursBelow, Stand::BaseBelow, Stand::Foreign, Stand::Absent];
const UNDERS: [Under; 2] = [Under::Recorded, Under::Another];
const JOBS: [Job; 4] = [Job::None, Job::Running, Job::Ready, Job::Foreign];
const FILES: [OverlayFile; 5] =
    [OverlayFile::Missing, OverlayFile::Retired, OverlayFile::Empty, OverlayFile::Used, OverlayFile::Replaced];
const BOOLS: [bool; 2] = [false, true];

fn every_disk(mut f: impl FnMut(DiskFacts, DiskSeen)) {
    for base_complete in BOOLS {
        for live in STANDS {
            for inactive in STANDS {
                for job in JOBS {
                    for overlay in FILES {
                        for under in UNDERS {
                            // What is touched is not as it was frozen.
                            for (base_touched, base_as_frozen) in [(false, false), (false, true), (true, false)] {
                                for shared_storage in BOOLS {
                                    let seen = DiskSeen {
                                        live,
                                        inactive,
                                        under,
                                        job,
                                        overlay,
                                        base_touched,
                                        base_as_frozen,
                                        shared_storage,
                                    };
                                    f(DiskFacts { base_complete }, seen);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn every_domain(mut f: impl FnMut(Situation<'static>)) {
    for phase in PHASES {
        for resume_after in BOOLS {
            for power in POWERS {
                for same_instance in BOOLS {
                    for persistent in BOOLS {
                        for managed_save in BOOLS {
                            f(Situation {
                                phase,
                                resume_after,
                                power,
                                same_instance,
                                persistent,
                                managed_save,
                                commit_denied: false,
                                disks: &[],
                            });
                        }
                    }
                }
            }
        }
    }
}

/// What must hold of every answer, whatever was asked.
fn assert_safe(s: &Situation, action: &Action) {
    let of = |name: &DiskName| s.disks.iter().find(|d| &d.0 == name).expect("an action names one of the disks");
    let has_qemu = matches!(s.power, PowerState::Running | PowerState::Paused);
    let on_base = |seen: &DiskSeen| matches!(seen.live, Stand::Base | Stand::BaseBelow);
    let why = || format!("{s:?} -> {action:?}");
    match action {
        Action::Adopt(d) => {
            let (_, _, seen) = of(d);
            assert!(seen.under == Under::Another && seen.overlay != OverlayFile::Replaced, "{}", why());
            // A QEMU has it open, or its header was read.
            assert!(has_qemu || seen.overlay != OverlayFile::Missing, "{}", why());
        }
        Action::StartCommit(d) | Action::StartCommitBelow(d) => {
            let (_, facts, seen) = of(d);
            assert!(seen.under == Under::Recorded && !s.commit_denied, "only into the image below it: {}", why());
            assert!(has_qemu && !facts.base_complete && !seen.base_touched, "{}", why());
            assert!(matches!(seen.live, Stand::Ours | Stand::OursBelow) && seen.job == Job::None, "{}", why());
            assert!(seen.overlay != OverlayFile::Replaced, "{}", why());
        }
        Action::CommitOffline(d) => {
            let (_, facts, seen) = of(d);
            assert!(seen.under == Under::Recorded, "only into the image below it: {}", why());
            assert!(!facts.base_complete && !seen.base_touched && !s.managed_save, "{}", why());
            assert!(!has_qemu || seen.live == Stand::Absent, "{}", why());
            assert!(!(s.power == PowerState::Paused && s.resume_after), "the guest is held: {}", why());
            assert!(seen.overlay.is_there(), "{}", why());
            // A disk that nothing names any more: only where nobody else can have written to its base.
            let certain = seen.base_as_frozen && !seen.shared_storage && s.phase < Phase::PivotIntent;
            assert!((!has_qemu && seen.inactive == Stand::Ours) || s.power == PowerState::Gone || certain, "{}", why());
        }
        Action::WaitForJob(d) => assert!(has_qemu && of(d).2.job == Job::Running, "{}", why()),
        Action::Pause => assert!(
            has_qemu
                && s.disks
                    .iter()
                    .all(|(_, _, seen)| seen.live != Stand::Ours || seen.job == Job::Ready || s.halts(seen)),
            "{}",
            why()
        ),
        Action::Pivot(d) => {
            let (_, _, seen) = of(d);
            assert!(s.power == PowerState::Paused && s.phase == Phase::PivotIntent, "{}", why());
            assert!(seen.live == Stand::Ours && seen.job == Job::Ready, "{}", why());
        }
        Action::Redefine(d) => {
            let (_, _, seen) = of(d);
            assert!(seen.inactive == Stand::Ours, "{}", why());
            // Redefining first would let it start on the base while the overlay's name exists.
            assert!(!seen.overlay.is_there() && (on_base(seen) || seen.overlay == OverlayFile::Retired), "{}", why());
        }
        Action::MarkComplete(d) => assert!(has_qemu && on_base(&of(d).2), "{}", why()),
        Action::Retire(d) | Action::SetAside(d) => {
            let (_, facts, seen) = of(d);
            assert!(seen.overlay.is_there() && !(has_qemu && seen.live == Stand::Ours), "{}", why());
            assert!(facts.base_complete || s.phase == Phase::PivotIntent, "{}", why());
        }
        Action::Resume => {
            assert!(s.power == PowerState::Paused && s.resume_after, "{}", why());
            // I3: no instruction between the pivot and the retirement.
            let stale_leaf = |seen: &DiskSeen| on_base(seen) && seen.overlay.is_there() && !s.halts(seen);
            assert!(!s.disks.iter().any(|(_, _, seen)| stale_leaf(seen)), "{}", why());
        }
        Action::Discard(d) => {
            let (_, facts, seen) = of(d);
            let absent = !has_qemu || seen.live == Stand::Absent;
            let dropped = absent && s.phase < Phase::PivotIntent && !seen.base_touched && !facts.base_complete;
            assert!(seen.overlay == OverlayFile::Empty && (s.phase == Phase::FreezeIntent || dropped), "{}", why());
            assert!(
                !matches!(seen.inactive, Stand::Ours | Stand::OursBelow) || s.power == PowerState::Gone || has_qemu,
                "{}",
                why()
            );
            assert!(!(has_qemu && matches!(seen.live, Stand::Ours | Stand::OursBelow)), "{}", why());
        }
        Action::Done => {
            assert!(!(s.power == PowerState::Paused && s.resume_after), "the guest is held: {}", why());
            for (_, _, seen) in s.disks {
                assert!(!seen.overlay.is_there(), "{}", why());
                assert!(!(has_qemu && matches!(seen.live, Stand::Ours | Stand::OursBelow)), "{}", why());
                assert!(has_qemu || seen.inactive != Stand::Ours, "{}", why());
            }
        }
        Action::Halt(_) => assert!(!(s.power == PowerState::Paused && s.resume_after), "the guest is held: {}", why()),
    }
}

impl Situation<'_> {
    /// A disk that a person has to look at does not hold up the others, nor the guest.
    fn halts(&self, seen: &DiskSeen) -> bool {
        seen.overlay == OverlayFile::Replaced
            || seen.base_touched
            || (!self.same_instance && self.phase < Phase::PivotIntent)
            || seen.job == Job::Foreign
            || matches!(seen.live, Stand::Ours) // a booted stale leaf halts on its own
    }
}

#[test]
fn every_input_with_one_disk_has_a_safe_answer() {
    let name = disk("vda");
    let mut inputs = 0u64;
    every_disk(|facts, seen| {
        let disks = [(name.clone(), facts, seen)];
        every_domain(|domain| {
            let s = Situation { disks: &disks, ..domain };
            assert_safe(&s, &decide(&s));
            inputs += 1;
        });
    });
    assert_eq!(inputs, 2 * 6 * 6 * 4 * 5 * 2 * 3 * 2 * (4 * 2 * 4 * 2 * 2 * 2));
}

/// A QEMU that may not write to a base is not asked again, and nothing else changes: what is ready is pivoted, and what
/// is off is committed.
#[test]
fn a_denied_commit_halts_only_what_would_begin_one() {
    let (a, b) = (disk("vda"), disk("vdb"));
    let (mut denied, mut same) = (0, 0);
    every_disk(|facts, seen| {
        let one = [(a.clone(), facts, seen)];
        every_domain(|domain| {
            let s = Situation { disks: &one, ..domain };
            let free = decide(&s);
            let bound = decide(&Situation { commit_denied: true, ..s.clone() });
            match free {
                Action::StartCommit(_) | Action::StartCommitBelow(_) => {
                    let halt = Halt { disk: Some(a.clone()), reason: HaltReason::CommitDenied };
                    let held = s.power == PowerState::Paused && s.resume_after;
                    assert!(bound == Action::Halt(halt) || (held && bound == Action::Resume), "{s:?} -> {bound:?}");
                    denied += 1;
                }
                free => {
                    assert_eq!(bound, free, "{s:?}");
                    same += 1;
                }
            }
        });
    });
    assert!(denied > 100 && same > 100_000, "{denied} {same}");
    let on = |job| DiskSeen {
        live: Stand::Ours,
        inactive: Stand::Ours,
        under: Under::Recorded,
        job,
        overlay: OverlayFile::Used,
        base_touched: false,
        base_as_frozen: false,
        shared_storage: false,
    };
    let facts = DiskFacts { base_complete: false };
    let two = [(a, facts, on(Job::None)), (b, facts, on(Job::Ready))];
    let s = Situation {
        phase: Phase::CommitIntent,
        resume_after: false,
        power: PowerState::Running,
        same_instance: true,
        persistent: true,
        managed_save: false,
        commit_denied: true,
        disks: &two,
    };
    assert_eq!(decide(&s), Action::Pause, "the other disk goes on");
}

/// A disk that was hot-plugged, and whose QEMU has ended: nothing but our record names it any more.
#[test]
fn a_disk_that_is_gone_needs_a_person_only_where_something_could_be_lost() {
    let (a, b) = (disk("vda"), disk("vdb"));
    let gone = |overlay, base_as_frozen, base_touched| DiskSeen {
        live: Stand::Absent,
        inactive: Stand::Absent,
        under: Under::Recorded,
        job: Job::None,
        overlay,
        base_touched,
        base_as_frozen,
        shared_storage: false,
    };
    let home = DiskSeen {
        live: Stand::Base,
        inactive: Stand::Base,
        overlay: OverlayFile::Retired,
        ..gone(OverlayFile::Missing, false, false)
    };
    let facts = DiskFacts { base_complete: false };
    for power in [PowerState::Off, PowerState::Running] {
        let of = |phase, seen: DiskSeen| {
            let disks = [(a.clone(), facts, home), (b.clone(), facts, seen)];
            decide(&Situation {
                phase,
                resume_after: false,
                power,
                same_instance: false,
                persistent: true,
                managed_save: false,
                commit_denied: false,
                disks: &disks,
            })
        };
        let halt = Action::Halt(Halt { disk: Some(b.clone()), reason: HaltReason::DiskGone });
        for phase in [Phase::FreezeIntent, Phase::Frozen, Phase::CommitIntent] {
            let empty = gone(OverlayFile::Empty, false, false);
            assert_eq!(of(phase, empty), Action::Discard(b.clone()), "{phase:?} {power:?}: it holds nothing");
        }
        assert_eq!(of(Phase::PivotIntent, gone(OverlayFile::Empty, true, false)), halt, "{power:?}");
        assert_eq!(of(Phase::Frozen, gone(OverlayFile::Empty, false, true)), halt, "{power:?}: a stranger wrote");
        for phase in [Phase::Frozen, Phase::CommitIntent] {
            let used = gone(OverlayFile::Used, true, false);
            assert_eq!(of(phase, used), Action::CommitOffline(b.clone()), "{phase:?} {power:?}");
            assert_eq!(of(phase, gone(OverlayFile::Used, false, false)), halt, "{phase:?} {power:?}: who knows");
            let shared = DiskSeen { shared_storage: true, ..used };
            assert_eq!(of(phase, shared), halt, "{phase:?} {power:?}: another host may have it");
        }
    }
}

#[test]
fn every_input_with_two_disks_has_a_safe_answer() {
    // One representative of every pair of situations that one disk can be in, by what decide() makes of it alone.
    let (a, b) = (disk("vda"), disk("vdb"));
    let (mut checked, mut together) = (0u64, 0);
    every_domain(|domain| {
        let mut classes: HashMap<String, (DiskFacts, DiskSeen)> = HashMap::new();
        every_disk(|facts, seen| {
            let one = [(a.clone(), facts, seen)];
            let class =
                format!("{:?} {:?} {:?}", decide(&Situation { disks: &one, ..domain.clone() }), seen.live, seen.job);
            classes.entry(class).or_insert((facts, seen));
        });
        for (facts_a, seen_a) in classes.values() {
            for (facts_b, seen_b) in classes.values() {
                let disks = [(a.clone(), *facts_a, *seen_a), (b.clone(), *facts_b, *seen_b)];
                let s = Situation { disks: &disks, ..domain.clone() };
                let all = decide_all(&s);
                assert_eq!(all[0], decide(&s));
                all.iter().for_each(|action| assert_safe(&s, action));
                // One step for each disk at most, and all of one kind.
                assert!(all.len() == 1 || all.len() == 2 && all[0] != all[1], "{s:?} -> {all:?}");
                together += all.len() - 1;
                checked += 1;
            }
        }
    });
    assert!(checked > 100_000, "{checked} pairs are too few to mean anything");
    assert!(together > 1_000, "{together} pairs of disks got their step together: too few to mean anything");
}

// ---- a model of libvirt and QEMU, one disk of one block --------------------------------------------------------

/// Contents are version numbers: the guest writes 1, 2, 3 and flushes each.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct World {
    /// What the image right below our overlay holds: the one that was planned, or, once `planned` is there, a
    /// stranger's snapshot above it.
    base: u8,
    /// What the planned image holds since a stranger's snapshot came between plan and freeze.
    planned: Option<u8>,
    /// The overlay under its name: the version it holds, if any was written to it.
    overlay: Option<Option<u8>>,
    /// Newest version the guest has flushed.
    flushed: u8,
    qemu: Option<Qemu>,
    inactive: Names,
    /// The overlay lies under its retired name.
    retired: bool,
    /// The driver holds QEMU's locks on base and overlay: no start.
    locked: bool,
    record: Option<Rec>,
    /// The overlay as the decision under way saw it.
    decided_on: Option<Option<u8>>,
    /// Substeps of the action under way, next first.
    todo: Vec<Sub>,
    faults: u8,
    halted: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Qemu {
    on_ours: bool,
    /// It was started from the planned image, below a stranger's snapshot.
    on_planned: bool,
    paused: bool,
    job: Job,
    instance: u8,
}

/// What the persistent definition names.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Names {
    Ours,
    /// The image right below ours.
    Base,
    /// The planned one, although a stranger's snapshot lies above it.
    Planned,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Rec {
    phase: Phase,
    /// The recorded base is the image right below our overlay.
    adopted: bool,
    resume_after: bool,
    base_complete: bool,
    instance: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Sub {
    Adopt,
    RecordFrozen,
    Freeze,
    RecordCommit,
    StartJob,
    RecordPivot { resume: bool },
    PauseCpus,
    QemuPivots,
    LibvirtSaves,
    MarkComplete,
    Retire,
    Redefine,
    ResumeCpus,
    RecordResumed,
    QemuImgCommit,
    Lock,
    Unlock,
    Discard,
    Close,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Order {
    /// pause, pivot, retire, resume: as built.
    Safe,
    /// The order everybody else has: pivot under a running guest, unlink afterwards.
    RetireAfterResume,
}

const FAULTS_MAX: u8 = 3;

impl World {
    fn start() -> World {
        World {
            base: 0,
            planned: None,
            overlay: None,
            flushed: 0,
            qemu: Some(Qemu { on_ours: false, on_planned: false, paused: false, job: Job::None, instance: 1 }),
            inactive: Names::Base,
            retired: false,
            locked: false,
            record: Some(Rec {
                phase: Phase::FreezeIntent,
                adopted: false,
                resume_after: false,
                base_complete: false,
                instance: 1,
            }),
            decided_on: None,
            todo: vec![Sub::Freeze, Sub::RecordFrozen],
            faults: 0,
            halted: false,
        }
    }

    /// What a guest reads through the overlay, or through the base alone.
    fn view(&self, ours: bool) -> u8 {
        if ours { self.overlay.flatten().unwrap_or(self.base) } else { self.base }
    }

    fn next_action(&self) -> Action {
        let rec = self.record.expect("asked only while a record is open");
        let seen = DiskSeen {
            live: self.qemu.map_or(Stand::Absent, |q| match q.on_ours {
                true => Stand::Ours,
                false => self.stand_of_base(rec, q.on_planned),
            }),
            inactive: match self.inactive {
                Names::Ours => Stand::Ours,
                // Of a domain that runs, only what the definition names is compared, not what lies below it.
                Names::Base if self.is_moved(rec) && self.qemu.is_some() => Stand::Foreign,
                Names::Base => self.stand_of_base(rec, false),
                Names::Planned => self.stand_of_base(rec, true),
            },
            under: match self.is_moved(rec) && self.tells_what_is_under() {
                true => Under::Another,
                false => Under::Recorded,
            },
            job: self.qemu.map_or(Job::None, |q| q.job),
            overlay: match self.overlay {
                None if self.retired => OverlayFile::Retired,
                None => OverlayFile::Missing,
                Some(None) => OverlayFile::Empty,
                Some(Some(_)) => OverlayFile::Used,
            },
            base_touched: false,
            base_as_frozen: false,
            shared_storage: false,
        };
        let disks = [(disk("vda"), DiskFacts { base_complete: rec.base_complete }, seen)];
        decide(&Situation {
            phase: rec.phase,
            resume_after: rec.resume_after,
            power: match self.qemu {
                Some(q) if q.paused => PowerState::Paused,
                Some(_) => PowerState::Running,
                None => PowerState::Off,
            },
            same_instance: self.qemu.is_some_and(|q| q.instance == rec.instance),
            persistent: true,
            managed_save: false,
            commit_denied: false,
            disks: &disks,
        })
    }

    /// The image below our overlay is not the recorded one.
    fn is_moved(&self, rec: Rec) -> bool {
        self.planned.is_some() && !rec.adopted
    }

    /// By the chain of the QEMU that runs, or else by the header of the overlay, retired or not.
    fn tells_what_is_under(&self) -> bool {
        match self.qemu {
            Some(q) => q.on_ours,
            None => self.overlay.is_some() || self.retired,
        }
    }

    /// Where a chain stands that begins with the image below ours, or with the planned one.
    fn stand_of_base(&self, rec: Rec, planned: bool) -> Stand {
        match (self.planned.is_some(), rec.adopted, planned) {
            (false, ..) | (true, false, true) | (true, true, false) => Stand::Base,
            (true, false, false) => Stand::BaseBelow,
            (true, true, true) => Stand::Foreign,
        }
    }

    fn plan_next(&mut self, order: Order) {
        let running = self.qemu.is_some_and(|q| !q.paused);
        // As `Settler::adopt_instance`: started anew on our overlay, it is the instance to watch.
        if let (Some(q), Some(r)) = (self.qemu.filter(|q| q.on_ours), self.record.as_mut()) {
            r.instance = q.instance;
        }
        self.decided_on = self.overlay;
        self.todo = match self.next_action() {
            Action::Adopt(_) => vec![Sub::Adopt],
            Action::StartCommit(_) => vec![Sub::RecordCommit, Sub::StartJob],
            Action::WaitForJob(_) => vec![], // the job gets ready by itself, see `events`
            Action::Pause if order == Order::RetireAfterResume => {
                vec![Sub::RecordPivot { resume: false }, Sub::QemuPivots, Sub::LibvirtSaves, Sub::Retire]
            }
            Action::Pause => vec![Sub::RecordPivot { resume: running }, Sub::PauseCpus],
            Action::Pivot(_) => vec![Sub::QemuPivots, Sub::LibvirtSaves],
            Action::Redefine(_) => vec![Sub::Redefine],
            Action::MarkComplete(_) => vec![Sub::MarkComplete],
            Action::Retire(_) | Action::SetAside(_) => vec![Sub::Retire],
            Action::Resume => vec![Sub::ResumeCpus, Sub::RecordResumed],
            Action::CommitOffline(_) => {
                vec![Sub::RecordCommit, Sub::QemuImgCommit, Sub::Lock, Sub::Retire, Sub::Redefine, Sub::Unlock]
            }
            Action::Discard(_) => vec![Sub::Discard],
            Action::Done => vec![Sub::Close],
            Action::Halt(_) | Action::StartCommitBelow(_) => {
                self.halted = true;
                vec![]
            }
        };
    }

    /// Performs one substep; one that no longer applies fails and ends the action, as the real ones do.
    fn perform(&mut self) {
        let sub = self.todo.remove(0);
        let ok = self.try_perform(sub);
        if !ok || self.todo.is_empty() {
            self.end_action();
        }
    }

    fn overlay_unused(&self) -> bool {
        !self.qemu.is_some_and(|q| q.on_ours) && self.overlay == self.decided_on
    }

    fn end_action(&mut self) {
        self.todo.clear();
        self.locked = false;
        self.decided_on = None;
    }

    fn try_perform(&mut self, sub: Sub) -> bool {
        let unused = self.overlay_unused();
        let moved = self.record.is_some_and(|rec| self.is_moved(rec));
        let Some(rec) = self.record.as_mut() else { return false };
        match sub {
            Sub::Adopt => rec.adopted = true,
            // Not over the image that was planned: the run ends here, and what is left is settled.
            Sub::RecordFrozen if self.planned.is_some() => return false,
            Sub::RecordFrozen => rec.phase = Phase::Frozen,
            Sub::RecordCommit => rec.phase = rec.phase.max(Phase::CommitIntent),
            Sub::RecordPivot { resume } => (rec.phase, rec.resume_after) = (Phase::PivotIntent, resume),
            Sub::RecordResumed => (rec.phase, rec.resume_after) = (Phase::CommitIntent, false),
            Sub::MarkComplete => rec.base_complete = true,
            Sub::Close => (self.record, self.retired) = (None, false),
            Sub::Freeze => match &mut self.qemu {
                Some(q) => {
                    q.on_ours = true;
                    self.overlay = Some(None);
                    self.inactive = Names::Ours;
                }
                None => return false,
            },
            Sub::StartJob | Sub::PauseCpus | Sub::ResumeCpus | Sub::QemuPivots => return self.monitor(sub),
            // libvirt saves when it hears of the pivot, from the QEMU that pivoted and from no later one.
            Sub::LibvirtSaves if self.qemu.is_some_and(|q| !q.on_ours) => self.inactive = Names::Base,
            Sub::LibvirtSaves => return false,
            // QEMU's lock on the overlay is free, and it is as it was decided upon.
            Sub::Retire if unused => (self.overlay, self.retired) = (None, true),
            Sub::Discard if unused => self.overlay = None,
            Sub::Retire | Sub::Discard => return false,
            // What runs, or the recorded base.
            Sub::Redefine => {
                let planned = match self.qemu {
                    Some(q) => q.on_planned,
                    None => moved,
                };
                self.inactive = if planned { Names::Planned } else { Names::Base };
            }
            // Off still, and nothing written since the commit, or the commit has to be done again.
            Sub::Lock if self.qemu.is_none() && self.base == self.view(true) => self.locked = true,
            Sub::Lock => return false,
            Sub::Unlock => self.locked = false,
            Sub::QemuImgCommit => {
                // QEMU's own lock on the overlay: a domain started meanwhile makes this fail.
                if self.qemu.is_some() || self.overlay.is_none() {
                    return false;
                }
                // It is told the recorded base, whatever the overlay lies over.
                if moved {
                    self.planned = Some(self.overlay.flatten().or(self.planned).expect("it was just seen"));
                    return true;
                }
                self.base = self.view(true);
            }
        }
        true
    }

    fn monitor(&mut self, sub: Sub) -> bool {
        let view = self.view(true);
        let Some(q) = self.qemu.as_mut() else { return false };
        match sub {
            // libvirt refuses a commit into an image that is not right below.
            Sub::StartJob if self.planned.is_some() && !self.record.is_some_and(|rec| rec.adopted) => return false,
            Sub::StartJob if q.on_ours => q.job = Job::Running,
            Sub::PauseCpus => q.paused = true,
            Sub::ResumeCpus => q.paused = false,
            Sub::QemuPivots if q.on_ours && q.job == Job::Ready => {
                (q.on_ours, q.job) = (false, Job::None);
                self.base = view;
            }
            _ => return false,
        }
        true
    }

    /// Everything that may happen next. `outside`: faults and people.
    fn successors(&self, order: Order) -> Vec<World> {
        let mut out = Vec::new();
        let mut with = |f: &dyn Fn(&mut World)| {
            let mut w = self.clone();
            f(&mut w);
            out.push(w);
        };
        if !self.todo.is_empty() {
            with(&|w| w.perform());
        } else if self.record.is_some() && !self.halted {
            with(&|w| w.plan_next(order));
            if matches!(self.next_action(), Action::Pivot(_)) {
                // The pause has lasted long enough for other disks: this one is pivoted in the next one.
                with(&|w| w.todo = vec![Sub::ResumeCpus, Sub::RecordResumed]);
            }
        }
        if self.planned.is_none() && self.todo.first() == Some(&Sub::Freeze) && self.qemu.is_some() {
            // A backup tool at the same hour: its snapshot comes between our plan and our freeze.
            with(&|w| w.planned = Some(w.base));
        }
        if let Some(q) = self.qemu {
            if q.job == Job::Running {
                with(&|w| w.qemu.as_mut().unwrap().job = Job::Ready);
            }
            if !q.paused && self.flushed < 3 {
                with(&|w| w.guest_writes());
            }
        } else if !self.locked && (self.inactive != Names::Ours || self.overlay.is_some()) {
            // An operator, or autostart. With the overlay's name gone libvirt refuses: no such file.
            with(&|w| {
                let instance = 2 + w.faults;
                let (on_ours, on_planned) = (w.inactive == Names::Ours, w.inactive == Names::Planned);
                w.qemu = Some(Qemu { on_ours, on_planned, paused: false, job: Job::None, instance });
            });
        }
        if self.faults < FAULTS_MAX {
            if !self.todo.is_empty() {
                with(&|w| w.fault(World::end_action)); // kill -9 of the driver, libvirtd's save lost with it
            }
            if self.faults == 0 && self.qemu.is_some_and(|q| q.paused) {
                // Somebody runs `virsh resume` in the middle. With a crash on top of it nothing could be promised.
                with(&|w| {
                    w.qemu.as_mut().unwrap().paused = false;
                    w.faults = FAULTS_MAX;
                });
            }
            if self.qemu.is_some() {
                with(&|w| w.fault(|w| w.qemu = None)); // kill -9 of QEMU, power cut, shutdown
            }
        }
        out
    }

    fn fault(&mut self, f: impl Fn(&mut World)) {
        self.faults += 1;
        f(self);
    }

    fn guest_writes(&mut self) {
        self.flushed += 1;
        let version = self.flushed;
        match self.qemu.unwrap() {
            Qemu { on_ours: true, .. } => self.overlay = Some(Some(version)),
            Qemu { on_planned: true, .. } => self.planned = Some(version),
            _ => self.base = version,
        }
    }

    /// The one thing that matters: whatever the guest flushed is what it reads, now or at its next start.
    fn reverted(&self) -> Option<String> {
        let (ours, how) = match self.qemu {
            Some(q) => (q.on_ours, "running"),
            // It does not start: that fails closed.
            None if self.inactive == Names::Ours && self.overlay.is_none() => return None,
            None => (self.inactive == Names::Ours, "at its next start"),
        };
        let on_planned = self.qemu.map_or(self.inactive == Names::Planned, |q| q.on_planned);
        let sees = if on_planned { self.planned.unwrap_or(self.base) } else { self.view(ours) };
        (sees != self.flushed).then(|| format!("the guest flushed {} and {how} reads {sees}: {self:?}", self.flushed))
    }

    /// A QEMU whose overlay lost its name would write into a file nobody finds again.
    fn writes_to_nothing(&self) -> bool {
        self.qemu.is_some_and(|q| q.on_ours) && self.overlay.is_none()
    }
}

/// Walks every reachable state; returns the first violation and the number of states.
fn explore(order: Order) -> (Option<String>, usize, usize) {
    let mut seen = HashSet::from([World::start()]);
    let mut queue = VecDeque::from([World::start()]);
    let mut settled = 0;
    while let Some(world) = queue.pop_front() {
        if let Some(what) = world.reverted() {
            return (Some(what), seen.len(), settled);
        }
        if world.writes_to_nothing() {
            return (Some(format!("a running guest's overlay lost its name: {world:?}")), seen.len(), settled);
        }
        if world.record.is_none() {
            settled += 1;
            let whole =
                world.overlay.is_none() && world.inactive == Names::Base && world.qemu.is_none_or(|q| !q.paused);
            if !whole {
                return (Some(format!("settled, but not whole: {world:?}")), seen.len(), settled);
            }
        }
        for next in world.successors(order) {
            if seen.insert(next.clone()) {
                queue.push_back(next);
            }
        }
    }
    (None, seen.len(), settled)
}

#[test]
fn no_order_of_faults_reverts_a_flushed_write() {
    let (violation, states, settled) = explore(Order::Safe);
    assert_eq!(violation, None);
    assert!(states > 1_000 && settled > 10, "{states} states, {settled} settled: the model did not move");
}

#[test]
fn the_model_sees_the_reversion_when_the_order_is_switched_off() {
    let (violation, ..) = explore(Order::RetireAfterResume);
    let what = violation.expect("retiring after the guest ran must revert writes somewhere");
    assert!(what.contains("the guest flushed"), "{what}");
}

#[test]
fn every_state_of_the_model_settles_when_the_faults_end() {
    // From each reachable state, with no further fault: the loop ends, and the guest is not held.
    let mut seen = HashSet::from([World::start()]);
    let mut queue = VecDeque::from([World::start()]);
    while let Some(world) = queue.pop_front() {
        let mut w = world.clone();
        for steps in 0.. {
            assert!(steps < 60, "does not settle: {world:?}");
            if w.record.is_none() || w.halted {
                break;
            }
            if !w.todo.is_empty() {
                w.perform();
            } else if let Some(q) = w.qemu.as_mut().filter(|q| q.job == Job::Running) {
                q.job = Job::Ready;
            } else {
                w.plan_next(Order::Safe);
            }
        }
        assert!(!w.halted, "a fault of the model needs no person: {world:?}");
        assert!(w.qemu.is_none_or(|q| !q.paused), "the guest is held: {world:?}");
        for next in world.successors(Order::Safe) {
            if seen.insert(next.clone()) {
                queue.push_back(next);
            }
        }
    }
}
