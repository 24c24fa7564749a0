//! `sync` and `plan`: one run of one domain, done or only thought through.

use super::limits::LimitArgs;
use crate::cli::Globals;
use crate::cli::speak::output::{Exit, Output};
use crate::cli::target::{CreateStore, TargetArgs};
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;
use virt_replica::error::Result;
use virt_replica::name::DiskName;
use virt_replica::replicate::capture::quiesce::Quiesce;
use virt_replica::replicate::plan::capture_choice::CaptureWish;
use virt_replica::replicate::tracking::audit::AuditOptions;
use virt_replica::retention::Keep;

#[derive(Debug, Args)]
pub struct SyncArgs {
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    create_store: CreateStore,
    /// Keep secrets (graphics passwords) in the definition that travels with the point
    #[arg(long)]
    with_secrets: bool,
    /// Afterwards remove the points that these rules do not keep: last=3,hourly=24,daily=7,weekly=4,monthly=12
    #[arg(long, value_name = "RULES")]
    keep: Option<Keep>,
    /// How long a commit may take to become ready before it is left to the next run
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = crate::cli::speak::render::parse_duration)]
    ready_timeout: Duration,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub run: RunArgs,
}

/// What decides how a run is planned.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name, UUID or id of the domain
    domain: String,
    #[command(flatten)]
    target: TargetArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
    /// How the disks of a running domain are made to stand still: overlay, backup, or auto (by backup where an overlay
    /// may not be committed) [default: overlay, or the configuration's]
    #[arg(long, value_name = "WAY")]
    capture: Option<CaptureWish>,
    /// Have the guest agent hold the guest's file systems while the disks are frozen: no, try, or require (without it
    /// there is no point)
    #[arg(long, value_name = "WHEN", default_value = "no", value_parser = <Quiesce as std::str::FromStr>::from_str)]
    quiesce: Quiesce,
    /// Only if that many points less one have not been so: 4 asks in every fourth run
    #[arg(long, value_name = "RUNS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    quiesce_every: u32,
    /// Longest time that they may be held
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_freeze_budget)]
    freeze_budget: Duration,
    /// Lay the overlays (or scratch files) of all disks into this directory instead of beside their images
    #[arg(long, value_name = "DIR")]
    overlay_dir: Option<PathBuf>,
    /// Keep this much free where overlays (or scratch files) lie, beside what they are expected to grow to
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = crate::cli::speak::render::parse_bytes)]
    min_free_source: u64,
    /// Leave this disk out (vdb); may be given more than once. A disk that cannot be replicated, and that is not named so, makes
    /// the domain partly protected: exit code 15
    #[arg(long = "exclude-disk", value_name = "DISK")]
    exclude_disks: Vec<DiskName>,
    /// Read every block and compare it, whatever a dirty bitmap says
    #[arg(long, conflicts_with = "full")]
    compare: bool,
    /// Send everything, whatever the target has already
    #[arg(long)]
    full: bool,
    /// Say that this host is the domain's source from now on, though the replica follows another one or knows a later
    /// generation
    #[arg(long)]
    take_over: bool,
    /// Check the dirty bitmaps: every so many runs have compared a whole disk once; 0 checks nothing
    #[arg(long, value_name = "RUNS", default_value_t = AuditOptions::default().every_runs)]
    audit_runs: u32,
    /// Most to read for that check, per disk and run
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = crate::cli::speak::render::parse_bytes)]
    audit_bytes: u64,
    /// Most time for that check, per disk and run
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = crate::cli::speak::render::parse_duration)]
    audit_time: Duration,
}

/// Shorter than 2 s no guest agent answers in time, and longer than a minute no guest waits.
fn parse_freeze_budget(text: &str) -> std::result::Result<Duration, String> {
    let budget = crate::cli::speak::render::parse_duration(text)?;
    match (2..=60).contains(&budget.as_secs()) {
        true => Ok(budget),
        false => Err("it has to be between 2s and 1m".to_owned()),
    }
}

#[cfg(not(feature = "libvirt"))]
pub fn sync(_: &SyncArgs, _: &Globals, _: Output) -> Result<Exit> {
    crate::cli::no_libvirt("sync")
}

#[cfg(not(feature = "libvirt"))]
pub fn plan(_: &PlanArgs, _: &Globals, _: Output) -> Result<Exit> {
    crate::cli::no_libvirt("plan")
}

#[cfg(feature = "libvirt")]
pub use run::{plan, sync};

#[cfg(feature = "libvirt")]
mod run {
    use super::*;
    use crate::cli::run::foresee::lacks;
    use crate::cli::run::source;
    use crate::cli::run::watch::{DiskTime, Watcher};
    use crate::cli::speak::output::{
        AUDIT_ALARM, COMMIT_PENDING, GUEST_STOPPED, Message, PARTLY_PROTECTED, print, print_json,
    };
    use crate::cli::speak::{advice, render, signals};
    use crate::cli::store::prune;
    use crate::cli::store::shorten::keep_short;
    use crate::cli::target::{Target, hang_up};
    use std::sync::atomic::AtomicBool;
    use virt_replica::engine::stats::AuditStats;
    use virt_replica::error::Context;
    use virt_replica::replica::Replica;
    use virt_replica::replica::left_out::Cause;
    use virt_replica::replicate::capture::quiesce::QuiesceOptions;
    use virt_replica::replicate::cycle::Request;
    use virt_replica::replicate::plan::forecast::SpaceOptions;
    use virt_replica::replicate::plan::{CaptureKind, Plan, PlanOptions};
    use virt_replica::replicate::state::report::{Report, RunOutcome, TargetSeen};
    use virt_replica::wiring::Connection;

    impl RunArgs {
        fn prepare(&self, globals: &Globals) -> Result<(Target, Request)> {
            let config = globals.config()?;
            let target = Target::resolve(&self.target.to, &self.target.ssh, &config)?;
            let wish = PlanOptions {
                overlay_dir: self.overlay_dir.clone(),
                exclude_disks: self.exclude_disks.clone(),
                full: self.full,
                compare: self.compare,
                take_over: self.take_over,
                audit: AuditOptions {
                    every_runs: self.audit_runs,
                    bytes_max: self.audit_bytes,
                    within: self.audit_time,
                },
                quiesce: QuiesceOptions { wish: self.quiesce, every: self.quiesce_every, budget: self.freeze_budget },
                space: SpaceOptions { min_free_source_bytes: self.min_free_source, ..SpaceOptions::default() },
                ..PlanOptions::default()
            };
            let request = source::request(&self.domain, &target, globals, &config, wish, self.capture)?;
            Ok((target, request))
        }
    }

    /// Runs one domain once, and tells how it went.
    pub fn sync(args: &SyncArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let (target, mut request) = args.run.prepare(globals)?;
        request.settle.ready_within = args.ready_timeout;
        request.with_secrets = args.with_secrets;
        args.limits.apply(&mut request)?;
        let stop = signals::listen()?;
        let site = source::connect(globals)?;
        let connection = target.connection_for_runs(globals, args.create_store);
        let watcher = Watcher::new(output);
        let result = site.sync(&connection, &request, &watcher, stop);
        let times = watcher.finish();
        // Its point is sealed, and its report is kept: whatever becomes of older points, this run has been one.
        let result = result.map(|(mut report, error)| {
            let note = report.point.is_some().then(|| tend(args, &connection, &mut report, output, stop)).flatten();
            if let Some(point) = &report.point {
                report.target_lacks = lacks(&target, &report.uuid, Some(&point.id));
            }
            (report, error, note)
        });
        hang_up(connection);
        let (report, error, note) = result?;
        match output.json {
            true => Message { message_type: "report", body: &report }.print()?,
            false => {
                let mut lines = vec![describe_report(&report, &times)];
                lines.extend(note.map(|n| render::wrap("note: ", &n)));
                print(&lines.join("\n"))?;
            }
        }
        match error {
            Some(e) => Err(e),
            // The worst news: a guest that is down.
            None if report.guest_stopped.as_ref().is_some_and(|g| !g.resumed) => Ok(Exit::Code(GUEST_STOPPED)),
            // The worse news: a pending commit ends by itself.
            None if !report.alarms.is_empty() => Ok(Exit::Code(AUDIT_ALARM)),
            None if report.outcome == RunOutcome::CommitPending => Ok(Exit::Code(COMMIT_PENDING)),
            None if report.skipped.is_partly() => Ok(Exit::Code(PARTLY_PROTECTED)),
            None => Ok(Exit::Done),
        }
    }

    /// Step 8d: what is done about older points, and about the depth of their images. Gives what was done of the latter.
    fn tend(
        args: &SyncArgs,
        connection: &Connection,
        report: &mut Report,
        output: Output,
        stop: &AtomicBool,
    ) -> Option<String> {
        let client = match connection.client() {
            Ok(client) => client,
            Err(e) => {
                report.warnings.push(format!("points were not pruned: {}", e.chain()));
                return None;
            }
        };
        report.warnings.extend(prune::after_run(&client, report, args.keep, output));
        let shortened = keep_short(&client, (&report.uuid, &report.domain), &report.target, output, stop);
        report.warnings.extend(shortened.warning);
        // Of what is seen now a daemon makes its metrics; a target that does not answer any more has made its point all the same.
        report.target_seen = client
            .open(&report.uuid)
            .and_then(|replica| replica.describe())
            .ok()
            .map(|view| TargetSeen { points: view.points.len() as u64, free_bytes: view.free_bytes });
        shortened.note
    }

    /// Says what a run would do.
    pub fn plan(args: &PlanArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let (target, request) = args.run.prepare(globals)?;
        let site = source::connect(globals)?;
        let connection = target.connection();
        let plan = site.plan(&connection, &request);
        hang_up(connection);
        let plan = plan?;
        match output.json {
            true => print_json(&plan)?,
            false => {
                // Of the definition that the newest point there has.
                let lacking = plan.head.as_ref().map(|head| lacks(&target, &plan.uuid, Some(head))).unwrap_or_default();
                let lacking = lacking.iter().map(|l| render::wrap("warning: ", l));
                print(
                    &std::iter::once(describe_plan(&plan, &request.target))
                        .chain(lacking)
                        .collect::<Vec<_>>()
                        .join("\n"),
                )?;
            }
        }
        // A script that asks whether a run would begin reads the answer from the exit code.
        match plan.refusal() {
            Some(refusal) => Err(refusal),
            None if plan.skipped.is_partly() => Ok(Exit::Code(PARTLY_PROTECTED)),
            None => Ok(Exit::Done),
        }
    }

    /// How the disks stood still, where that is worth a line: not by the way that is always taken.
    fn describe_capture(report: &Report) -> Option<String> {
        let reason = report.capture_reason.as_ref().filter(|_| report.capture == Some(CaptureKind::Backup))?;
        Some(render::wrap("  captured ", reason))
    }

    /// The report for people.
    fn describe_report(report: &Report, times: &[DiskTime]) -> String {
        let mut lines = Vec::new();
        match &report.point {
            Some(point) => {
                lines.push(format!("{} is replicated to {}: point {}", report.domain, report.target, point.id));
                lines.push(format!(
                    "  frozen at {} ({})",
                    render::time(point.frozen_at),
                    render::consistency(point.consistency)
                ));
                lines.extend(point.consistency_reason.iter().map(|why| render::wrap("  known     ", why)));
            }
            None => lines.push(format!("{} has no new point on {}", report.domain, report.target)),
        }
        let lasted = |what: &str, ms: f64| match ms {
            0.0 => format!("no {what}"),
            ms => format!("{what} {}", render::millis(ms)),
        };
        let (freeze, pause) = (lasted("freeze", report.freeze_ms), lasted("pause", report.pause_ms));
        let held = report.held_ms.map_or(String::new(), |ms| format!(", file systems held {}", render::millis(ms)));
        lines.push(format!("  {freeze}{held}, {pause}, whole run {}", render::millis(report.duration_ms)));
        lines.extend(describe_capture(report));
        if let Some(point) = &report.point {
            let rows = point.disks.iter().map(|d| {
                let time = times.iter().find(|t| t.name == d.name).map(|t| t.time).unwrap_or_default();
                vec![
                    d.name.to_string(),
                    d.stats.mode.to_string(),
                    render::bytes(d.stats.bytes_read),
                    render::bytes(d.stats.bytes_sent),
                    render::bytes(d.stats.bytes_written),
                    d.stats.blocks_changed.to_string(),
                    render::rate(d.stats.bytes_read, time),
                ]
            });
            let header = ["Disk", "Mode", "Read", "Sent", "Written", "Blocks", "Read rate"];
            lines.push(String::new());
            lines.push(render::table(&header, &[2, 3, 4, 5, 6], rows.collect()));
            lines.push(String::new());
            // Disks that stand side by side and have the same reason share its sentence.
            for group in point.disks.chunk_by(|a, b| a.stats.reason == b.stats.reason) {
                let names: Vec<&str> = group.iter().map(|d| d.name.as_str()).collect();
                lines.push(render::wrap(&format!(" {}: ", names.join(", ")), &group[0].stats.reason));
            }
            for (disk, why) in
                point.disks.iter().filter_map(|d| Some((d, render::compression(d.stats.compression.as_ref()?)?)))
            {
                lines.push(render::wrap(&format!(" {}: ", disk.name), &format!("sent {why}")));
            }
            for (disk, audit) in point.disks.iter().filter_map(|d| Some((d, d.stats.audit.as_ref()?))) {
                lines.push(render::wrap(&format!(" {}: ", disk.name), &describe_audit(audit, disk.size.0)));
            }
        }
        let skipped = report.skipped.iter().filter(|s| s.cause != Cause::Unprotected);
        lines.extend(skipped.map(|s| render::wrap(&format!(" {}: ", s.name), &format!("skipped, it {}", s.reason))));
        lines.extend(report.skipped.unprotected().map(|s| render::wrap("PARTLY PROTECTED: ", &s.told())));
        lines.extend(report.alarms.iter().map(|a| render::wrap("ALARM: ", a)));
        lines.extend(report.warnings.iter().chain(&report.target_lacks).map(|w| render::wrap("warning: ", w)));
        lines.join("\n")
    }

    fn describe_audit(audit: &AuditStats, size_bytes: u64) -> String {
        let verdict = match audit.lies {
            0 => "none had changed".to_owned(),
            n => format!("{n} HAD CHANGED"),
        };
        let next = match audit.next_offset {
            at if at >= size_bytes => "the whole disk has been compared by now".to_owned(),
            at => format!("the next run goes on at {} %", u128::from(at) * 100 / u128::from(size_bytes)),
        };
        let read = render::bytes(audit.bytes_read);
        format!("audit: {} blocks called clean compared, {verdict} ({read} read; {next})", audit.blocks)
    }

    /// The plan for people.
    fn describe_plan(plan: &Plan, target: &str) -> String {
        let mut lines = vec![match &plan.head {
            Some(head) => {
                format!("{} to {target}, on top of point {head} (generation {})", plan.domain, plan.generation)
            }
            None => format!("{} to {target}, the first point (generation {})", plan.domain, plan.generation),
        }];
        lines.push(match plan.capture {
            CaptureKind::Overlay => "  frozen with an overlay over each disk, committed afterwards".to_owned(),
            CaptureKind::Backup => "  served by QEMU as it was, by a backup job; nothing to commit".to_owned(),
            CaptureKind::Off => "  shut off: its disks are read as they are".to_owned(),
        });
        if plan.capture != CaptureKind::Off {
            lines.push(render::wrap("  why    ", &plan.capture_reason));
        }
        for disk in &plan.disks {
            lines.push(String::new());
            lines.push(format!(" {}  {}, {}", disk.name, render::bytes(disk.size.0), disk.mode));
            lines.push(render::wrap("      why    ", &disk.reason));
            for (depth, layer) in disk.chain.0.iter().enumerate() {
                let role = if depth == 0 { "image" } else { "on" };
                lines.push(format!("      {role:6} {} ({})", layer.path.display(), layer.format.as_str()));
            }
            lines.push(render::wrap("      read   ", &disk.reader));
            if let Some(audit) = &disk.audit {
                let (from, to) = (render::bytes(audit.from), render::bytes(audit.to));
                lines.push(format!("      audit  what the bitmap calls clean from {from} to {to}, and a sample"));
            }
            let target =
                (disk.reserve_bytes > 0).then(|| format!("up to {} at the target", render::bytes(disk.reserve_bytes)));
            let source =
                disk.overlay_bytes.map(|b| format!("about {} for what is written meanwhile", render::bytes(b)));
            let room: Vec<String> = target.into_iter().chain(source).collect();
            if !room.is_empty() {
                lines.push(format!("      room   {}", room.join(", ")));
            }
        }
        if !plan.skipped.is_empty() {
            lines.push(String::new());
        }
        let skipped = plan.skipped.iter().filter(|s| s.cause != Cause::Unprotected);
        lines.extend(skipped.map(|s| render::wrap(&format!(" {}  ", s.name), &format!("skipped: it {}", s.reason))));
        lines.extend(plan.skipped.unprotected().map(|s| render::wrap("PARTLY PROTECTED: ", &s.told())));
        lines.extend(plan.notes.iter().map(|n| render::wrap("note: ", n)));
        let about = Context { domain: Some(plan.domain.to_string()), ..Context::default() };
        lines.extend(plan.conflicts.iter().map(|c| {
            let next = advice::words(&c.advice(), &about);
            match c.disk() {
                Some(disk) => format!("conflict: disk '{disk}': {c}\n  {next}"),
                None => format!("conflict: {c}\n  {next}"),
            }
        }));
        lines.join("\n")
    }
}
