//! Explains in words what is wrong with a domain, and mends it on request, through the same loop as every run.

use super::cycle::{record_in_domain, settle_domain};
use super::plan::is_our_overlay;
use crate::error::advice::Advice;
use crate::error::{Kind, Result};
use crate::hypervisor::DomainView;
use crate::name::DomainUuid;
use crate::replicate::capture::backup;
use crate::replicate::run::Ports;
use crate::replicate::settle::decide::{Action, Job, OverlayFile, Phase, PowerState, Stand, Under, decide};
use crate::replicate::settle::halts::halt_error;
use crate::replicate::settle::observe::observe;
use crate::replicate::settle::options::SettleOptions;
use crate::replicate::settle::stopped;
use crate::replicate::state::journal::{self, Journal};
use crate::replicate::state::record::Record;
use serde::Serialize;
use std::path::Path;

/// What was found of one domain.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// UUID of the domain that was examined.
    pub uuid: DomainUuid,
    /// Name of the domain, from libvirt or else from the record. `None`: neither knows it.
    pub domain: Option<String>,
    /// State of the domain after the examination, and after the repair if one was asked for.
    pub health: Health,
    /// What was found, sentence by sentence.
    pub explanation: Vec<String>,
    /// What a person does next: for the program to put into words at the end of the explanation.
    #[serde(skip)]
    pub advice: Option<Advice>,
    /// What was done about it; empty unless repair was asked for.
    pub done: Vec<String>,
}

/// State of a domain as `doctor` judges it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Nothing of ours is left on it.
    Sound,
    /// Another program of ours works on it right now.
    Busy,
    /// Something was left behind; `--repair` mends it.
    Repairable,
    /// It was mended just now.
    Repaired,
    /// A person has to look.
    NeedsPerson,
}

/// Examines one domain; with `repair`, settles it. Without, touches nothing.
pub fn examine(ports: &Ports, state: &Path, uuid: &DomainUuid, repair: Option<&SettleOptions>) -> Result<Finding> {
    let domain = match ports.hypervisor.observe(uuid) {
        Ok(domain) => Some(domain),
        Err(e) if e.kind() == Kind::NotFound => None,
        Err(e) => return Err(e),
    };
    let record = match journal::peek(state, uuid)? {
        Some(record) => Some(record),
        None => record_in_domain(ports.hypervisor, uuid)?,
    };
    let name = domain.as_ref().map(|d| d.name.to_string()).or_else(|| record.as_ref().map(|r| r.domain.to_string()));
    let mut finding = Finding {
        uuid: uuid.clone(),
        domain: name,
        health: Health::Sound,
        explanation: Vec::new(),
        advice: None,
        done: Vec::new(),
    };
    let left = journal::peek_backup(state, uuid)?;
    let thaw_owed = journal::peek_thaw(state, uuid)?;
    let hook_owed = journal::peek_hook(state, uuid)?;
    let paused = domain.as_ref().and_then(|d| d.paused);
    let resume_owed = journal::peek_stopped(state, uuid)?.is_some();
    if record.is_none() && left.is_none() && !thaw_owed && !hook_owed && !resume_owed {
        explain_without_record(domain.as_ref(), &mut finding);
        return Ok(finding);
    }
    // Whoever holds the lock is at work: what is there now is on its way somewhere else.
    let open = if repair.is_some() { Journal::open_after_deadman } else { Journal::open };
    let journal = match open(state, uuid, "doctor", (ports.clock)()) {
        Ok(journal) => journal,
        Err(e) if e.kind() == Kind::Busy => {
            finding.health = Health::Busy;
            finding.explanation.push(e.to_string());
            return Ok(finding);
        }
        Err(e) => return Err(e),
    };
    if let Some(record) = &record {
        explain(ports, record, &mut finding)?;
        finding.explanation.extend(stopped::still_on_overlay(paused).map(|stopped| stopped.why));
    } else if !resume_owed {
        finding.explanation.extend(stopped::remark(paused).map(|stopped| stopped.why));
    }
    if let Some(left) = &left {
        let (said, halted) = backup::explain(ports.backups, left)?;
        finding.explanation.extend(said);
        let settled_first = record.is_none() || finding.health != Health::NeedsPerson;
        finding.health = if halted || !settled_first { Health::NeedsPerson } else { Health::Repairable };
    }
    explain_owed(&mut finding, thaw_owed, hook_owed, resume_owed);
    if let Some(options) = repair.filter(|_| finding.health == Health::Repairable) {
        mend(ports, &journal, options, &mut finding)?;
    }
    Ok(finding)
}

/// What a run owed the guest, or the operator's program, when it was cut short.
fn explain_owed(finding: &mut Finding, thaw_owed: bool, hook_owed: bool, resume_owed: bool) {
    let owed = [
        (
            thaw_owed,
            "the guest agent was asked to hold the guest's file systems, and has not said since that it let them go",
        ),
        (hook_owed, "the hook before the freeze was run, and the one after it was not"),
        (
            resume_owed,
            "QEMU stopped the guest after an I/O error while a run held its disks, and no run has resumed it since",
        ),
    ];
    for (_, what) in owed.iter().filter(|(owed, _)| *owed) {
        finding.explanation.push((*what).into());
        if finding.health == Health::Sound {
            finding.health = Health::Repairable;
        }
    }
}

fn mend(ports: &Ports, journal: &Journal, options: &SettleOptions, finding: &mut Finding) -> Result<()> {
    let (_, account, left_open) = settle_domain(ports, journal, &finding.uuid, options)?;
    finding.done.extend(account.steps);
    finding.done.extend(account.alarms);
    // A domain that is gone by now stands no longer.
    let stands = stopped::remark(ports.hypervisor.paused(&finding.uuid).ok().flatten()).is_some();
    finding.health = match left_open {
        None if stands || journal.is_thaw_owed()? => Health::NeedsPerson,
        None => Health::Repaired,
        Some(what) => {
            finding.explanation.push(what);
            Health::NeedsPerson
        }
    };
    Ok(())
}

fn explain_without_record(domain: Option<&DomainView>, finding: &mut Finding) {
    let Some(domain) = domain else { return };
    if let Some(stopped) = stopped::remark(domain.paused) {
        finding.health = Health::NeedsPerson;
        finding.explanation.push(stopped.why);
    }
    for disk in &domain.disks {
        let live = disk.live.as_ref().map(|c| &c.top().path);
        let defined = disk.inactive.as_ref().map(|l| &l.path);
        if let Some(path) = live.into_iter().chain(defined).find(|p| is_our_overlay(p)) {
            finding.health = Health::NeedsPerson;
            finding.explanation.push(format!(
                "disk '{0}' is on {1}, an overlay of virt-replica that this host has no record of: commit it with \
                 `virsh blockcommit {2} {0} --active --shallow --pivot --wait`, then delete the file",
                disk.name,
                path.display(),
                domain.name
            ));
        }
    }
}

fn explain(ports: &Ports, record: &Record, finding: &mut Finding) -> Result<()> {
    let seen = observe(ports.hypervisor, record)?;
    let say = &mut finding.explanation;
    say.push(format!("run {} of {:.0} was cut short; {}", record.run, record.started_at, phase_words(record.phase)));
    say.push(match seen.power {
        PowerState::Running => "the domain runs".into(),
        PowerState::Paused if record.resume_after => "the domain is paused, by us".into(),
        PowerState::Paused => "the domain is paused, not by us".into(),
        PowerState::Off => "the domain is shut off".into(),
        PowerState::Gone => "libvirt does not know the domain any more".into(),
    });
    for ((name, _, disk), recorded) in seen.disks.iter().zip(&record.disks) {
        say.push(format!(
            "disk '{name}': runs on {}, is defined on {}; {}; the overlay {} {}",
            stand_words(disk.live, disk.under),
            stand_words(disk.inactive, disk.under),
            job_words(disk.job),
            recorded.overlay.display(),
            overlay_words(disk.overlay)
        ));
    }
    match decide(&seen.situation(record)) {
        Action::Halt(halt) => {
            let e = halt_error(record, &halt);
            say.push(e.to_string());
            finding.advice = e.advice().cloned();
            finding.health = Health::NeedsPerson;
        }
        Action::Done => {
            say.push("everything is back in place; only the record is left to close".into());
            finding.health = Health::Repairable;
        }
        next => {
            say.push(format!("next step: {}", action_words(&next)));
            finding.health = Health::Repairable;
        }
    }
    Ok(())
}

fn phase_words(phase: Phase) -> &'static str {
    match phase {
        Phase::FreezeIntent => "it was about to put overlays over the disks",
        Phase::Frozen => "the disks were on their overlays",
        Phase::CommitIntent => "the overlays were being committed",
        Phase::PivotIntent => "the disks were being pivoted back to their images",
    }
}

fn stand_words(stand: Stand, under: Under) -> &'static str {
    match stand {
        Stand::Ours if under == Under::Another => "our overlay, over somebody's snapshot",
        Stand::OursBelow if under == Under::Another => {
            "somebody's snapshot above our overlay, which is above another one"
        }
        Stand::Base => "its own image",
        Stand::Ours => "our overlay",
        Stand::OursBelow => "somebody's snapshot above our overlay",
        Stand::BaseBelow => "somebody's snapshot above its own image",
        Stand::Foreign => "an image that is neither its own nor our overlay",
        Stand::Absent => "nothing",
    }
}

fn job_words(job: Job) -> &'static str {
    match job {
        Job::None => "no block job",
        Job::Running => "its commit is running",
        Job::Ready => "its commit is ready for the pivot",
        Job::Foreign => "somebody's block job is running",
    }
}

fn overlay_words(overlay: OverlayFile) -> &'static str {
    match overlay {
        OverlayFile::Missing => "is gone",
        OverlayFile::Retired => "is renamed away",
        OverlayFile::Empty => "is there, and nothing was written to it",
        OverlayFile::Used => "is there, with what the guest wrote since the freeze",
        OverlayFile::Replaced => "was replaced by another file",
    }
}

fn action_words(action: &Action) -> String {
    match action {
        Action::Adopt(d) => format!("record which image the overlay of {d} lies over, and commit it into that"),
        Action::StartCommit(d) => format!("commit the overlay of {d}"),
        Action::StartCommitBelow(d) => format!("commit our overlay of {d} below the snapshot that was put above it"),
        Action::WaitForJob(d) => format!("wait for the commit of {d}"),
        Action::Pause => "pause the guest for the pivot".into(),
        Action::Pivot(d) => format!("pivot {d} to its image"),
        Action::Redefine(d) => format!("put the definition of {d} back to its image"),
        Action::MarkComplete(d) => format!("record that the image of {d} is complete"),
        Action::Retire(d) | Action::SetAside(d) => format!("rename the overlay of {d} away"),
        Action::Resume => "let the guest run".into(),
        Action::CommitOffline(d) => format!("commit the overlay of {d} with qemu-img"),
        Action::Discard(d) => format!("remove the unused overlay of {d}"),
        Action::Done | Action::Halt(_) => "none".into(),
    }
}
