//! `debug journal`: the directory of a domain in a host's state, or one of its files: the open run, who holds the lock,
//! what is owed, and the reports.

use super::file;
use super::page::{Finding, List, Look, Page, View, clean, counted};
use crate::cli::speak::render;
use serde::Serialize;
use std::io::{BufRead, BufReader};
use std::path::Path;
use virt_replica::durable::DOCUMENT_MAX;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::file_id::FileId;

use virt_replica::replicate::look::{self, DOCUMENTS, Document, HISTORIES};
use virt_replica::replicate::state::journal::{self, Holder};
use virt_replica::replicate::state::record::{BackupRecord, DiskRecord, OwedHook, Record, StoppedRecord};
use virt_replica::replicate::state::report::{Report, RunOutcome};
use virt_replica::words;

/// Longest line of a history that is read.
const LINE_MAX: u64 = 1 << 20;

/// What a domain's directory holds, or the one file that was named.
#[derive(Default, Serialize)]
pub struct JournalView {
    /// Who holds the lock, or held it last.
    holder: Option<HolderSeen>,
    record: Option<Record>,
    backup: Option<BackupRecord>,
    /// The guest may hold its file systems.
    thaw_owed: bool,
    hook_owed: Option<OwedHook>,
    stopped: Option<StoppedRecord>,
    generation: Option<u64>,
    last: Option<Box<Report>>,
    /// Oldest first, the newest of them.
    reports: Option<List<Line>>,
    /// Lines of a history that are no report, and the byte at which the first begins.
    unreadable: u64,
    findings: Option<List<Finding>>,
}

#[derive(Serialize)]
struct HolderSeen {
    #[serde(flatten)]
    holder: Holder,
    /// Its process has this very file open, here and now.
    holds_now: bool,
}

/// A report, in short.
#[derive(Serialize)]
struct Line {
    started_at: jiff::Timestamp,
    domain: String,
    run: String,
    target: String,
    outcome: RunOutcome,
    point: Option<String>,
    duration_ms: f64,
    freeze_ms: f64,
    pause_ms: f64,
    error: Option<String>,
    warnings: usize,
    alarms: usize,
}

impl From<&Report> for Line {
    fn from(report: &Report) -> Self {
        Line {
            started_at: report.started_at,
            domain: report.domain.to_string(),
            run: report.run_id.to_string(),
            target: clean(&report.target),
            outcome: report.outcome,
            point: report.point.as_ref().map(|point| point.id.to_string()),
            duration_ms: report.duration_ms,
            freeze_ms: report.freeze_ms,
            pause_ms: report.pause_ms,
            error: report.error.as_deref().map(clean),
            warnings: report.warnings.len(),
            alarms: report.alarms.len(),
        }
    }
}

pub fn look(path: &Path, max: usize) -> Result<Look<JournalView>> {
    let mut gathered = Gathered::default();
    match std::fs::metadata(path).is_ok_and(|m| m.is_dir()) {
        true => gathered.directory(path)?,
        false if is_history(path) => gathered.history(path, max)?,
        false => gathered.document(path)?,
    }
    let Gathered { mut view, lines, findings, damage } = gathered;
    view.reports = Some(List::newest_of(lines, max));
    view.findings = Some(List::of(findings, max));
    Ok(Look { view, damage })
}

fn is_history(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "jsonl")
}

#[derive(Default)]
struct Gathered {
    view: JournalView,
    lines: Vec<Line>,
    findings: Vec<Finding>,
    damage: Option<Error>,
}

impl Gathered {
    /// Every document that is there. One that cannot be read keeps no other from being shown.
    fn directory(&mut self, dir: &Path) -> Result<()> {
        let mut seen = false;
        for name in DOCUMENTS.iter().chain(&HISTORIES) {
            let path = dir.join(name);
            // No link is followed inside of a directory: only what lies there is of this domain.
            let Ok(metadata) = path.symlink_metadata() else { continue };
            seen = true;
            let read = match () {
                _ if metadata.is_symlink() => Err(Error::new(Kind::Refused, "this is a symbolic link").path(&path)),
                _ if is_history(&path) => self.history(&path, super::args::SHOWN_ALL),
                _ => self.document(&path),
            };
            if let Err(e) = read {
                self.damaged(e);
            }
        }
        match seen {
            true => Ok(()),
            false if dir.join("domains").is_dir() => Err(Error::new(Kind::Usage, "this is the state of a whole host")
                .path(dir)
                .hint(format!("name the directory of one domain: {}/UUID", dir.join("domains").display()))),
            false => Err(Error::new(Kind::NotFound, "nothing of a journal is in this directory")
                .path(dir)
                .hint("name the directory of a domain, STATE/domains/UUID, or a file of it")),
        }
    }

    fn damaged(&mut self, e: Error) {
        self.findings.push(Finding::of(&e));
        self.damage.get_or_insert(e);
    }

    fn document(&mut self, path: &Path) -> Result<()> {
        let input = file::open(path)?;
        let metadata = input.file.metadata().map_err(|e| Error::io("cannot look at the file", path, e))?;
        let json = input.document(path, DOCUMENT_MAX)?;
        let view = &mut self.view;
        match look::document(path, &words::of_document(&json))? {
            Document::Lock(holder) => {
                let holds_now = journal::is_held(FileId::of(&metadata), &holder);
                view.holder = Some(HolderSeen { holder, holds_now });
            }
            Document::Record(record) => view.record = Some(record),
            Document::Backup(record) => view.backup = Some(record),
            Document::Thaw => view.thaw_owed = true,
            Document::Hook(hook) => view.hook_owed = Some(hook),
            Document::Stopped(record) => view.stopped = Some(record),
            Document::Generation(generation) => view.generation = Some(generation.0),
            Document::Report(report) => view.last = Some(report),
        }
        Ok(())
    }

    /// Line by line; a line that a crash cut short is counted and passed by, as every reader does.
    fn history(&mut self, path: &Path, max: usize) -> Result<()> {
        let mut input = BufReader::new(file::open(path)?.into_reader());
        let (mut line, mut at, mut first_bad) = (Vec::new(), 0u64, None);
        loop {
            line.clear();
            let read = std::io::Read::take(&mut input, LINE_MAX).read_until(b'\n', &mut line);
            let read = read.map_err(|e| Error::io("cannot read the history", path, e).offset(at))?;
            if read == 0 {
                break;
            }
            let text = words::of_document(line.trim_ascii_end());
            match serde_json::from_slice::<Report>(&text) {
                Ok(report) => self.lines.push(Line::from(&report)),
                Err(_) if text.is_empty() => {}
                Err(_) => {
                    self.view.unreadable += 1;
                    first_bad.get_or_insert(at);
                }
            }
            // Memory is for the newest lines alone.
            if self.lines.len() >= 2 * max.max(1) {
                self.lines.drain(..max);
            }
            at += read as u64;
        }
        if let Some(at) = first_bad {
            let what = "lines that are no report: a crash cut them short, or they are of another version";
            self.findings.push(Finding::at(what, at));
        }
        Ok(())
    }
}

impl View for JournalView {
    fn page(&self, page: &mut Page) {
        if let Some(HolderSeen { holder, holds_now }) = &self.holder {
            let now = if *holds_now { "holds the lock now" } else { "held the lock last; its process has it no more" };
            let since = render::time(holder.since);
            page.line("lock", format!("{} (pid {}, since {since}) {now}", clean(&holder.what), holder.pid));
        }
        if let Some(record) = &self.record {
            describe_record(record, page);
        }
        if let Some(record) = &self.backup {
            page.line(
                "backup",
                format!("run {} of {}, since {}", record.run, record.domain, render::time(record.started_at)),
            );
            page.line("", format!("socket {}", clean(record.backup.socket.to_string_lossy())));
            let disks = List::of(&record.backup.disks, super::args::SHOWN);
            page.lines("scratch", "disks", &disks, |d| format!("{}: {}", d.name, clean(d.scratch.to_string_lossy())));
        }
        if self.thaw_owed {
            page.line("thaw", "owed: the guest may hold its file systems");
        }
        page.maybe("hook", self.hook_owed.as_ref().map(|hook| clean(format!("owed: {}", hook.command.join(" ")))));
        page.maybe(
            "stopped",
            self.stopped
                .as_ref()
                .map(|stopped| format!("run {} has a guest to resume that an I/O error has stopped", stopped.run)),
        );
        page.maybe("domain", self.generation.map(|generation| format!("generation {generation}")));
        if let Some(last) = &self.last {
            page.line("last", Line::from(last.as_ref()).text());
            page.maybe("", last.error.as_deref().map(clean));
            page.lines("warnings", "warnings", &List::of(&last.warnings, super::args::SHOWN), |text| clean(text));
            page.lines("alarms", "alarms", &List::of(&last.alarms, super::args::SHOWN), |text| clean(text));
        }
        self.findings.iter().for_each(|findings| page.findings(findings));
        if self.unreadable > 0 {
            page.line("unread", counted(self.unreadable, "line"));
        }
        let header = ["Started", "Run", "Outcome", "Point", "Took", "Frozen", "Paused", "Error"];
        let Some(reports) = &self.reports else { return };
        page.table("older reports", (&header, &[4, 5, 6]), reports, |line| {
            vec![
                render::time(line.started_at),
                line.run.clone(),
                line.outcome().to_owned(),
                line.point.clone().unwrap_or_else(|| "-".to_owned()),
                render::millis(line.duration_ms),
                render::millis(line.freeze_ms),
                render::millis(line.pause_ms),
                line.error.clone().unwrap_or_else(|| "-".to_owned()),
            ]
        });
    }
}

impl Line {
    fn outcome(&self) -> &'static str {
        match self.outcome {
            RunOutcome::Sealed => "sealed",
            RunOutcome::CommitPending => "commit pending",
            RunOutcome::Failed => "failed",
        }
    }

    fn text(&self) -> String {
        let point = self.point.as_deref().map_or(String::new(), |point| format!(", point {point}"));
        let (started, took) = (render::time(self.started_at), render::millis(self.duration_ms));
        let (domain, target, run) = (&self.domain, &self.target, &self.run);
        format!("run {run} of {domain} to {target}: {}{point}, {started}, took {took}", self.outcome())
    }
}

fn describe_record(record: &Record, page: &mut Page) {
    let phase = serde_json::to_value(record.phase).ok().and_then(|phase| phase.as_str().map(str::to_owned));
    let phase = phase.unwrap_or_default();
    page.line("run", format!("{} of {} ({}), open", record.run, record.domain, record.uuid));
    page.line("phase", format!("{phase}, since {}", render::time(record.started_at)));
    page.maybe("frozen", record.frozen_at.map(render::time));
    page.maybe("point", record.point.as_ref().map(|point| format!("{point} is sealed")));
    if record.resume_after {
        page.line("paused", "the domain was paused by the run, or was about to be: it has to be resumed");
    }
    let disks = List::of(&record.disks, super::args::SHOWN);
    page.lines("disks", "disks", &disks, |disk: &&DiskRecord| {
        let complete = if disk.complete_at.is_some() { "; the base is complete" } else { "" };
        format!(
            "{} ({}): base {} {}, overlay {}{complete}",
            disk.name,
            render::bytes(disk.size.0),
            disk.base.format.as_str(),
            clean(disk.base.path.to_string_lossy()),
            clean(disk.overlay.to_string_lossy())
        )
    });
}
