//! Gathers what `status` shows, from libvirt, the journal and the target. Reads only.

use super::StatusArgs;
use super::nagios::{self, Limits};
use super::view::{Alarm, Head, HeadFrom, LastRun, Overlay, Ready, Row, Seen, describe, state};
use crate::cli::globals::Globals;
use crate::cli::run::source;
use crate::cli::speak::output::{Exit, Output, print, print_json};
use crate::cli::speak::progress::say;
use crate::cli::speak::{advice, render, signals};
use crate::cli::target::{Target, hang_up};
use jiff::Timestamp;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use virt_replica::error::{Error, Kind, Result};
use virt_replica::hypervisor::{DomainView, Hypervisor as _, Power};
use virt_replica::name::{DomainName, DomainUuid};
use virt_replica::policy::select::select;
use virt_replica::recovery::bringup::BringUp as _;
use virt_replica::replica::lag::Age;
use virt_replica::replica::left_out::Skipped;
use virt_replica::replica::{Replica as _, ReplicaView, lag};
use virt_replica::replicate::cycle::record_in_domain;
use virt_replica::replicate::plan::is_our_overlay;
use virt_replica::replicate::settle::decide::{Action, decide};
use virt_replica::replicate::settle::halts::halt_error;
use virt_replica::replicate::settle::observe::observe;
use virt_replica::replicate::settle::stopped;
use virt_replica::replicate::state::journal::{self, Record};
use virt_replica::replicate::state::report::{Report, RunOutcome};
use virt_replica::replicate::state::{handover_record, stores};
use virt_replica::transport::Service;
use virt_replica::wiring::{Connection, Site};

/// A domain that libvirt, the journal or the target knows.
struct Known {
    uuid: DomainUuid,
    view: Option<DomainView>,
    on_target: Option<DomainName>,
    reports: Vec<Report>,
}

impl Known {
    fn name(&self, record: Option<&Record>) -> String {
        let seen = self.view.as_ref().map(|v| v.name.clone());
        let named = seen.or_else(|| record.map(|r| r.domain.clone()));
        let named = named.or_else(|| self.reports.last().map(|r| r.domain.clone()));
        named.or_else(|| self.on_target.clone()).map_or_else(|| self.uuid.to_string(), String::from)
    }

    fn is_called(&self, name: &str) -> bool {
        let id = self.view.as_ref().and_then(|v| v.id).map(|id| id.to_string());
        self.uuid.as_str() == name || self.name(None) == name || id.as_deref() == Some(name)
    }
}

/// Where the answers come from, held open from one look to the next.
struct Sources<'a> {
    args: &'a StatusArgs,
    globals: &'a Globals,
    site: Option<Site>,
    target: Option<(Target, Connection)>,
}

impl<'a> Sources<'a> {
    fn open(args: &'a StatusArgs, globals: &'a Globals) -> Result<Self> {
        let target = match &args.to {
            Some(to) => Some(Target::resolve(to, &args.ssh, &globals.config()?)?),
            None => None,
        };
        let target = target.map(|mut t| {
            if args.ready {
                t.ssh.service = Service::Failover;
            }
            let connection = t.connection();
            (t, connection)
        });
        Ok(Self { args, globals, site: None, target })
    }

    /// Asks all of them. The journal is worth reading just when libvirt is down: then `said` is told so.
    fn look(&mut self, said: &mut dyn FnMut(&str)) -> Result<Vec<Row>> {
        if self.site.is_none() {
            self.site = source::connect(self.globals)
                .inspect_err(|e| said(&format!("warning: libvirt was not asked: {}", e.chain())))
                .ok();
        }
        let target = self.target.as_ref().map(|(target, connection)| (target, connection));
        rows(self.args, self.globals, self.site.as_ref(), target)
    }

    fn heads_from(&self) -> HeadFrom {
        if self.target.is_some() { HeadFrom::Target } else { HeadFrom::Journal }
    }

    fn close(self) {
        self.target.into_iter().for_each(|(_, connection)| hang_up(connection));
    }
}

pub fn status(args: &StatusArgs, globals: &Globals, output: Output) -> Result<Exit> {
    if args.nagios {
        return plugin(args, globals);
    }
    let mut sources = Sources::open(args, globals)?;
    if let Some(seconds) = args.watch {
        return watch(sources, Duration::from_secs(seconds.into()));
    }
    let rows = sources.look(&mut say);
    let from = sources.heads_from();
    sources.close();
    let rows = rows?;
    match output.json {
        true => print_json(&json!({ "head_from": from, "domains": rows }))?,
        false => print(&describe(&rows, from))?,
    }
    Ok(Exit::Done)
}

/// Looks again and again until a signal comes. What cannot be learnt now may be learnt at the next look.
fn watch(mut sources: Sources, every: Duration) -> Result<Exit> {
    let stop = signals::listen_saying("stopping", "ended at once")?;
    let screen = std::io::stdout().is_terminal();
    while !stop.load(Ordering::Relaxed) {
        let mut lines = vec![format!("virt-replica, {}, every {} s", render::time(Timestamp::now()), every.as_secs())];
        let looked = sources.look(&mut |text| lines.push(text.to_owned()));
        lines.push(match looked {
            Ok(mut rows) => {
                // What needs somebody stays in sight, however small the window is.
                rows.sort_by_key(Row::is_well);
                describe(&rows, sources.heads_from())
            }
            Err(e) => {
                // A connection that broke is made anew.
                sources.site = None;
                format!("error: {}", e.chain())
            }
        });
        let text = lines.join("\n");
        print(&if screen { frame(&text, rows_of_screen()) } else { format!("{text}\n") })?;
        let until = Instant::now() + every;
        while Instant::now() < until && !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    sources.close();
    Ok(Exit::Done)
}

fn rows_of_screen() -> usize {
    rustix::termios::tcgetwinsize(std::io::stdout()).map_or(24, |size| usize::from(size.ws_row))
}

/// A screen of `rows` lines: from the upper left corner, each line to its end, and nothing below, so that nothing
/// flickers. What has no place is counted.
fn frame(text: &str, rows: usize) -> String {
    let room = rows.max(3) - 2;
    let mut lines: Vec<&str> = text.lines().collect();
    let hidden = lines.len().saturating_sub(room);
    let more = format!(" ... and {hidden} more lines: make the window larger");
    if hidden > 0 {
        lines.truncate(room);
        lines.push(&more);
    }
    format!("\x1b[H{}\x1b[K\x1b[J", lines.join("\x1b[K\n"))
}

/// A plugin always answers in its own form, also when it cannot answer.
fn plugin(args: &StatusArgs, globals: &Globals) -> Result<Exit> {
    let answer = Sources::open(args, globals).and_then(|mut sources| {
        let answer = answer(&mut sources);
        sources.close();
        answer
    });
    let (text, code) = answer.unwrap_or_else(|e| {
        let why = e.chain().replace('|', "/").replace('\n', " ");
        (format!("VIRT-REPLICA UNKNOWN - {why}"), nagios::Verdict::Unknown.code())
    });
    print(&text)?;
    Ok(if code == 0 { Exit::Done } else { Exit::Code(code) })
}

fn answer(sources: &mut Sources) -> Result<(String, u8)> {
    let mut rows = sources.look(&mut |_| {})?;
    let rpos = rpos(sources.globals, sources.site.as_ref(), &mut rows)?;
    let rpo = |row: &Row| rpos.get(&(row.uuid.clone(), row.target.clone()?)).copied();
    Ok(nagios::report(&rows, |row| limits(sources.args, rpo(row))))
}

fn limits(args: &StatusArgs, rpo: Option<Duration>) -> Limits {
    Limits { warning: args.warning.or(rpo.map(|r| r * 4 / 5)), critical: args.critical.or(rpo) }
}

/// The RPO of each domain and target by the policies; a pair that has no row yet gets one.
fn rpos(
    globals: &Globals,
    site: Option<&Site>,
    rows: &mut Vec<Row>,
) -> Result<BTreeMap<(DomainUuid, String), Duration>> {
    let config = globals.config()?;
    let policies = config.policies(globals.config_path())?;
    let seen = match site {
        Some(site) => source::seen_domains(site)?,
        None => Vec::new(),
    };
    let urls = config.urls();
    let mut rpos = BTreeMap::new();
    for pair in select(&policies, &seen, &[], &urls).pairs {
        let Some(rpo) = policies[pair.policy].rpo else { continue };
        let (uuid, url) = (pair.domain.uuid, urls[&pair.target].clone());
        let spellings = stores::spellings(&globals.state_dir, &url);
        let row = rows.iter().find(|r| r.uuid == uuid && r.target.as_ref().is_some_and(|t| spellings.contains(t)));
        let url = row.and_then(|r| r.target.clone()).unwrap_or(url);
        if !rows.iter().any(|r| r.uuid == uuid && r.target.as_ref() == Some(&url)) {
            match rows.iter_mut().find(|r| r.uuid == uuid && r.target.is_none()) {
                // It has never been replicated anywhere: this is where it is awaited.
                Some(row) => row.target = Some(url.clone()),
                None => rows.push(Row::awaited(pair.domain.name.to_string(), uuid.clone(), url.clone())),
            }
        }
        rpos.insert((uuid, url), rpo);
    }
    Ok(rpos)
}

fn rows(
    args: &StatusArgs,
    globals: &Globals,
    site: Option<&Site>,
    target: Option<(&Target, &Connection)>,
) -> Result<Vec<Row>> {
    let mut known = everybody(&globals.state_dir, site, target.map(|(_, c)| c))?;
    if let Some(name) = &args.domain {
        known.retain(|k| k.is_called(name));
        if known.is_empty() {
            return Err(Error::new(Kind::NotFound, format!("no domain '{name}' is known here"))
                .hint("`virt-replica status` shows all; is the right libvirt asked (--connect)?"));
        }
    }
    let mut rows = Vec::new();
    for domain in &known {
        let record = open_record(&globals.state_dir, site, domain)?;
        match target {
            Some((target, connection)) => {
                let replica = connection.client()?.open(&domain.uuid)?.describe()?;
                let mut row =
                    row(globals, site, domain, record.as_ref(), Some(&target.url.to_string()), Some(&replica))?;
                if args.ready && row.head.is_some() {
                    match connection.client()?.bring_up(&domain.uuid).ready(None) {
                        Ok(readiness) => row.ready = Some(Ready::from(&advice::said(readiness))),
                        Err(e) => {
                            row.notes.push(format!("whether the target could bring it up is not known: {}", e.chain()))
                        }
                    }
                }
                rows.push(row);
            }
            None => {
                for target in targets(&globals.state_dir, &domain.reports) {
                    rows.push(row(globals, site, domain, record.as_ref(), target.as_deref(), None)?);
                }
            }
        }
    }
    Ok(rows)
}

fn everybody(state: &Path, site: Option<&Site>, connection: Option<&Connection>) -> Result<Vec<Known>> {
    let mut known: Vec<Known> = Vec::new();
    let views = site.map_or(Ok(Vec::new()), |s| s.hypervisor().list())?;
    known.extend(views.into_iter().map(|view| Known {
        uuid: view.uuid.clone(),
        view: Some(view),
        on_target: None,
        reports: Vec::new(),
    }));
    known.sort_by_key(|k| k.name(None));
    let mut add = |uuid: DomainUuid, on_target: Option<DomainName>| match known.iter_mut().find(|k| k.uuid == uuid) {
        Some(k) => k.on_target = on_target,
        None => known.push(Known { uuid, view: None, on_target, reports: Vec::new() }),
    };
    journal::known_domains(state)?.into_iter().for_each(|uuid| add(uuid, None));
    if let Some(connection) = connection {
        connection.client()?.find("")?.into_iter().for_each(|(uuid, name)| add(uuid, Some(name)));
    }
    for k in &mut known {
        k.reports = journal::recent_reports(state, &k.uuid)?;
    }
    Ok(known)
}

/// Targets this domain was replicated to, in order of their newest run; `[None]` for none.
fn targets(state: &Path, reports: &[Report]) -> Vec<Option<String>> {
    let mut targets: Vec<Option<String>> = Vec::new();
    let mut told: Vec<String> = Vec::new();
    for report in reports.iter().rev() {
        if !told.contains(&report.target) {
            // A store that was reached by several URLs is one target, under the newest of them.
            told.extend(stores::spellings(state, &report.target));
            targets.push(Some(report.target.clone()));
        }
    }
    if targets.is_empty() {
        targets.push(None);
    }
    targets
}

fn open_record(state: &Path, site: Option<&Site>, domain: &Known) -> Result<Option<Record>> {
    if let Some(record) = journal::peek(state, &domain.uuid)? {
        return Ok(Some(record));
    }
    match (site, &domain.view) {
        (Some(site), Some(view)) if view.record.is_some() => record_in_domain(site.hypervisor(), &domain.uuid),
        _ => Ok(None),
    }
}

fn row(
    globals: &Globals,
    site: Option<&Site>,
    domain: &Known,
    record: Option<&Record>,
    target: Option<&str>,
    replica: Option<&ReplicaView>,
) -> Result<Row> {
    let now = Timestamp::now();
    let spellings = target.map_or_else(Vec::new, |target| stores::spellings(&globals.state_dir, target));
    let reports = || domain.reports.iter().filter(|r| spellings.contains(&r.target));
    let head = match replica {
        Some(view) => view.head().map(Head::from),
        None => reports().rev().find_map(|r| r.point.as_ref()).map(Head::from),
    };
    let running = journal::holder(&globals.state_dir, &domain.uuid)?;
    let mut notes = Vec::new();
    let stuck = match (site, record) {
        // Whoever is at work is on his way somewhere else.
        (Some(site), Some(record)) if running.is_none() => stuck(site, record, &mut notes),
        (_, None) => stray(domain, &mut notes),
        _ => false,
    };
    let stopped = stopped::remark(domain.view.as_ref().and_then(|view| view.paused));
    notes.splice(0..0, stopped.iter().map(|stopped| stopped.why.clone()));
    let handed = handover_record::peek(&globals.state_dir, &domain.uuid)?;
    let power = domain.view.as_ref().map_or(Power::Off, |view| view.power);
    let both = handed.as_ref().and_then(|record| record.alarm(power));
    notes.splice(0..0, handed.as_ref().map(|record| record.refusal(power).what().to_owned()));
    if site.is_some() && domain.view.is_none() {
        notes.push("libvirt does not know it (any more)".to_owned());
    }
    let lied = reports().next_back().is_some_and(|r| !r.alarms.is_empty());
    let damaged = replica.map_or(&[][..], |view| &view.damaged);
    notes.extend(replica.into_iter().flat_map(of_target));
    let age = head.as_ref().map(|h| lag::age(h.frozen_at, h.sealed_at, now));
    notes.extend(head.iter().flat_map(|head| of_head(head, age)));
    let seen = Seen {
        open: record.map(|r| r.phase),
        backup: journal::peek_backup(&globals.state_dir, &domain.uuid)?.is_some(),
        stuck: stuck || both.is_some() || stopped.is_some(),
        handed: handed.as_ref().map(|record| record.stage),
        promoted: replica.is_some_and(|view| view.promoted.is_some()),
        observed: domain.view.is_some(),
        replicated: head.is_some(),
        partly: head.as_ref().is_some_and(|h| h.left_out.is_partly()),
        alarmed: !damaged.is_empty() || age.is_some_and(|a| a.ahead_s.is_some()) || lied,
    };
    let alarms = reports().flat_map(|r| r.alarms.iter().map(|a| Alarm { at: r.started_at, message: a.clone() }));
    let since = |t: Timestamp| now.duration_since(t).as_secs();
    Ok(Row {
        domain: domain.name(record),
        uuid: domain.uuid.clone(),
        state: state(seen),
        notes,
        target: target.map(str::to_owned),
        lag_s: age.and_then(|a| a.lag_s),
        clock_ahead_s: age.and_then(|a| a.ahead_s),
        head,
        last_run: reports().next_back().map(last_run),
        running: running.map(|h| format!("{} (pid {})", h.what, h.pid)),
        overlays: record.map_or_else(Vec::new, |r| overlays(r, since)),
        alarms: alarms.collect(),
        ready: None,
    })
}

fn last_run(report: &Report) -> LastRun {
    LastRun {
        run_id: report.run_id.clone(),
        started_at: report.started_at,
        duration_ms: report.duration_ms,
        outcome: report.outcome,
        error: report.error.clone().filter(|_| report.outcome == RunOutcome::Failed),
    }
}

/// What of the newest point a person should know.
fn of_head(head: &Head, age: Option<Age>) -> Vec<String> {
    let clock = age.and_then(|a| a.ahead_s).map(lag::told);
    clock.into_iter().chain(head.left_out.unprotected().map(Skipped::told)).collect()
}

/// What the target says that a person should know.
fn of_target(replica: &ReplicaView) -> Vec<String> {
    let promoted = replica.promoted.iter().map(|p| format!("{}, since {}", p.why(), render::time(p.since)));
    let damaged = replica.damaged.iter().map(|d| {
        format!(
            "disk {} of the newest point is damaged at the target: the next run sends it again; `virt-replica points` says where",
            d.disk
        )
    });
    promoted.chain(damaged).collect()
}

/// Whether a person is needed, by the same decision that `doctor` and the next run make.
fn stuck(site: &Site, record: &Record, notes: &mut Vec<String>) -> bool {
    match observe(site.hypervisor(), record) {
        Ok(seen) => match decide(&seen.situation(record)) {
            Action::Halt(halt) => {
                notes.push(format!("{}: see `virt-replica doctor`", halt_error(record, &halt)));
                true
            }
            _ => {
                notes.push("a run was cut short; the next one, or `virt-replica doctor --repair`, mends it".to_owned());
                false
            }
        },
        Err(e) => {
            notes.push(format!("could not be examined: {}", e.chain()));
            true
        }
    }
}

/// Overlays of ours without a record.
fn stray(domain: &Known, notes: &mut Vec<String>) -> bool {
    let Some(view) = &domain.view else { return false };
    let mut any = false;
    for disk in &view.disks {
        let live = disk.live.as_ref().map(|c| &c.top().path);
        let defined = disk.inactive.as_ref().map(|l| &l.path);
        if let Some(path) = live.into_iter().chain(defined).find(|p| is_our_overlay(p)) {
            notes.push(format!(
                "disk {} is on {} without a record: see `virt-replica doctor`",
                disk.name,
                path.display()
            ));
            any = true;
        }
    }
    any
}

/// The recorded overlays that are still there under their names.
fn overlays(record: &Record, age: impl Fn(Timestamp) -> i64) -> Vec<Overlay> {
    let since = record.frozen_at.unwrap_or(record.started_at);
    let there = record.disks.iter().filter(|d| d.overlay.exists());
    there.map(|d| Overlay { disk: d.name.clone(), path: d.overlay.clone(), since, age_s: age(since) }).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_frame_fits_the_screen_and_says_what_does_not() {
        let text = (1..=10).map(|n| n.to_string()).collect::<Vec<_>>().join("\n");
        let whole = super::frame(&text, 12);
        assert!(whole.starts_with("\x1b[H1\x1b[K\n2") && whole.ends_with("10\x1b[K\x1b[J"), "{whole:?}");
        let cut = super::frame(&text, 6);
        assert!(cut.contains("4\x1b[K\n ... and 6 more lines") && !cut.contains("5\x1b"), "{cut:?}");
    }
}
