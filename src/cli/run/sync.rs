//! `sync` and `plan`: one run of one domain, done or only thought through.

use super::limits::LimitArgs;
use crate::cli::globals::Globals;
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
    /// Take the settings of the run as JSON from standard input (given by the daemon)
    #[arg(long, hide = true, conflicts_with_all = ["WishArgs", "GuestArgs", "LinkArgs", "AfterArgs"])]
    settings_on_stdin: bool,
    #[command(flatten)]
    wish: WishArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    create_store: CreateStore,
    #[command(flatten)]
    after: AfterArgs,
}

/// What becomes of a run's point.
#[derive(Debug, Args)]
struct AfterArgs {
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
    #[command(flatten)]
    wish: WishArgs,
}

/// Which domain, and where to.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name, UUID or id of the domain
    domain: String,
    #[command(flatten)]
    target: TargetArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

/// What decides how a run is planned.
#[derive(Debug, Args)]
pub struct WishArgs {
    /// How to make the disks of a running domain stand still: overlay, backup, or auto (backup if an overlay may not be
    /// committed) [default: overlay, or the configuration's]
    #[arg(long, value_name = "WAY")]
    capture: Option<CaptureWish>,
    /// Have the guest agent hold the guest's file systems during the freeze: no, try, or require (without it there is
    /// no point)
    #[arg(long, value_name = "WHEN", default_value = "no", value_parser = <Quiesce as std::str::FromStr>::from_str)]
    quiesce: Quiesce,
    /// Quiesce every N-th run
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    quiesce_every: u32,
    /// Longest time that the guest agent may hold them
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_freeze_budget)]
    freeze_budget: Duration,
    /// Put the overlays (or scratch files) of all disks into this directory instead of beside their images
    #[arg(long, value_name = "DIR")]
    overlay_dir: Option<PathBuf>,
    /// Keep this much free on the file systems of overlays (or scratch files), beside their expected size
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = crate::cli::speak::render::parse_bytes)]
    min_free_source: u64,
    /// Leave this disk out (vdb); may be given more than once. If a disk cannot be replicated and you do not leave it
    /// out, the domain is partly protected: exit code 15
    #[arg(long = "exclude-disk", value_name = "DISK")]
    exclude_disks: Vec<DiskName>,
    /// Read every block and compare it, whatever a dirty bitmap says
    #[arg(long, conflicts_with = "full")]
    compare: bool,
    /// Send everything, whatever the target already has
    #[arg(long)]
    full: bool,
    /// Make this host the domain's source from now on, even if the replica follows another one or knows a later
    /// generation
    #[arg(long)]
    take_over: bool,
    /// Check the dirty bitmaps: this many runs compare a whole disk once; 0 checks nothing
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
    crate::cli::globals::no_libvirt("sync")
}

#[cfg(not(feature = "libvirt"))]
pub fn plan(_: &PlanArgs, _: &Globals, _: Output) -> Result<Exit> {
    crate::cli::globals::no_libvirt("plan")
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
    use virt_replica::replicate::plan::{CaptureKind, Plan};
    use virt_replica::replicate::state::report::{Report, RunOutcome, TargetSeen};
    use virt_replica::run_settings::RunSettings;
    use virt_replica::wiring::Connection;

    impl WishArgs {
        fn settings(&self) -> RunSettings {
            RunSettings {
                capture: self.capture,
                quiesce: QuiesceOptions { wish: self.quiesce, every: self.quiesce_every, budget: self.freeze_budget },
                overlay_dir: self.overlay_dir.clone(),
                space: SpaceOptions { min_free_source_bytes: self.min_free_source, ..SpaceOptions::default() },
                exclude_disks: self.exclude_disks.clone(),
                compare: self.compare,
                full: self.full,
                take_over: self.take_over,
                audit: AuditOptions {
                    every_runs: self.audit_runs,
                    bytes_max: self.audit_bytes,
                    within: self.audit_time,
                },
                ..RunSettings::default()
            }
        }
    }

    impl SyncArgs {
        /// From the options, or whole from standard input.
        pub(super) fn settings(&self) -> Result<RunSettings> {
            let mut settings = match self.settings_on_stdin {
                true => RunSettings::read(std::io::stdin())?,
                false => {
                    let mut settings = self.wish.settings();
                    self.limits.fill(&mut settings)?;
                    settings.with_secrets = self.after.with_secrets;
                    settings.keep = self.after.keep;
                    settings.ready_within = self.after.ready_timeout;
                    settings
                }
            };
            settings.create_store |= self.create_store.create_store;
            Ok(settings)
        }
    }

    impl RunArgs {
        fn prepare(&self, settings: &RunSettings, globals: &Globals) -> Result<(Target, Request)> {
            let config = globals.config()?;
            let target = Target::resolve(&self.target.to, &self.target.ssh, &config)?;
            let request = source::request(&self.domain, &target, globals, &config, settings)?;
            Ok((target, request))
        }
    }

    /// Runs one domain once, and tells how it went.
    pub fn sync(args: &SyncArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let settings = args.settings()?;
        let (target, request) = args.run.prepare(&settings, globals)?;
        let stop = signals::listen()?;
        let site = source::connect(globals)?;
        let connection = target.connection_for_runs(globals, CreateStore { create_store: settings.create_store });
        let watcher = Watcher::new(output);
        let result = site.sync(&connection, &request, &watcher, stop);
        let times = watcher.finish();
        // Its point is sealed, and its report is kept: whatever becomes of older points, this run has been one.
        let result = result.map(|(mut report, error)| {
            let note =
                report.point.is_some().then(|| tend(settings.keep, &connection, &mut report, output, stop)).flatten();
            if let Some(point) = &report.point {
                report.target_lacks = lacks(&connection, &target, &report.uuid, Some(&point.id));
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

    /// Step 8d: what is done about older points, and about the depth of their images. Gives what was done of the
    /// latter.
    fn tend(
        keep: Option<Keep>,
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
        report.warnings.extend(prune::after_run(&client, report, keep, output));
        let shortened = keep_short(&client, (&report.uuid, &report.domain), &report.target, output, stop);
        report.warnings.extend(shortened.warning);
        // Of what is seen now a daemon makes its metrics; a target that does not answer any more has made its point all
        // the same.
        report.target_seen = client
            .open(&report.uuid)
            .and_then(|replica| replica.describe())
            .ok()
            .map(|view| TargetSeen { points: view.points.len() as u64, free_bytes: view.free_bytes });
        shortened.note
    }

    /// Says what a run would do.
    pub fn plan(args: &PlanArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let (target, request) = args.run.prepare(&args.wish.settings(), globals)?;
        let site = source::connect(globals)?;
        let connection = target.connection();
        let plan = site.plan(&connection, &request);
        // Of the definition that the newest point there has. JSON does not tell it: nobody is made to wait for it.
        let lacking = plan.as_ref().ok().filter(|_| !output.json).and_then(|plan| {
            let head = plan.head.as_ref()?;
            Some(lacks(&connection, &target, &plan.uuid, Some(head)))
        });
        hang_up(connection);
        let plan = plan?;
        match output.json {
            true => print_json(&plan)?,
            false => {
                let lacking = lacking.iter().flatten().map(|l| render::wrap("warning: ", l));
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
        let freeze = lasted("freeze", report.freeze_ms);
        let pause = match (report.pauses, report.pause_sum_ms) {
            (Some(count), Some(sum)) if count > 1 => {
                let longest = render::millis(report.pause_ms);
                format!("{count} pauses, together {} and at most {longest}", render::millis(sum))
            }
            _ => lasted("pause", report.pause_ms),
        };
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

#[cfg(all(test, feature = "libvirt"))]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};
    use std::collections::{BTreeMap, BTreeSet};
    use virt_replica::run_settings::RunSettings;

    #[derive(Debug, Parser)]
    struct Sync {
        #[command(flatten)]
        args: SyncArgs,
    }

    fn settings(words: &str) -> RunSettings {
        let argv = ["sync", "web01", "--to", "dr1"].into_iter().chain(words.split_whitespace());
        Sync::try_parse_from(argv).unwrap_or_else(|e| panic!("{words}: {e}")).args.settings().expect("they fit")
    }

    /// The options that set each key.
    const KEYS: &[(&str, &str)] = &[
        ("capture", "--capture backup"),
        ("quiesce.wish", "--quiesce try"),
        ("quiesce.every", "--quiesce-every 4"),
        ("quiesce.budget", "--freeze-budget 8s"),
        ("overlay_dir", "--overlay-dir /srv/o"),
        ("space.min_free_source_bytes", "--min-free-source 1G"),
        ("space.overlay.bytes_max", "--overlay-max-bytes 1G"),
        ("space.overlay.age_max", "--overlay-max-age 2h"),
        ("exclude_disks", "--exclude-disk vdb"),
        ("compare", "--compare"),
        ("full", "--full"),
        ("take_over", "--take-over"),
        ("audit.every_runs", "--audit-runs 7"),
        ("audit.bytes_max", "--audit-bytes 1M"),
        ("audit.within", "--audit-time 9s"),
        ("rates", "--rate 1M@08:00-18:00/mon"),
        ("timezone", "--timezone Europe/Berlin --rate 1M"),
        ("compression", "--compress no"),
        ("hooks.before", "--before-freeze /bin/flush --before-freeze -x --before-freeze-timeout 5s"),
        ("hooks.after", "--after-freeze /bin/on"),
        ("with_secrets", "--with-secrets"),
        ("keep", "--keep last=3,daily=7"),
        ("ready_within", "--ready-timeout 2h"),
        ("create_store", "--create-store"),
    ];

    #[test]
    fn every_key_of_the_settings_has_its_option() {
        let plain = RunSettings::default().by_key();
        let table: BTreeMap<&str, &str> = KEYS.iter().copied().collect();
        let ours: BTreeSet<&str> = plain.keys().map(String::as_str).collect();
        assert_eq!(ours, table.keys().copied().collect(), "a key has no option here, or an option no key");
        for (key, words) in table {
            let set = settings(words).by_key();
            let key_is_set = set.iter().any(|(at, value)| at.starts_with(key) && plain.get(at) != Some(value));
            assert!(key_is_set, "{words} does not arrive as {key}");
        }
    }

    /// Whatever is an option of the run cannot be said beside the settings: it would not be heard.
    #[test]
    fn settings_on_stdin_stand_alone() {
        let command = Sync::command();
        let this = command.get_arguments().find(|a| a.get_id() == "settings_on_stdin").unwrap();
        let conflicts: BTreeSet<String> =
            command.get_arg_conflicts_with(this).iter().map(|a| a.get_id().to_string()).collect();
        let beside = [
            "domain",
            "to",
            "json",
            "settings_on_stdin",
            "create_store",
            "identity",
            "ssh_config",
            "known_hosts",
            "accept_new_host_key",
        ];
        for arg in command.get_arguments().map(|a| a.get_id().as_str()) {
            assert!(beside.contains(&arg) != conflicts.contains(arg), "{arg} beside --settings-on-stdin");
        }
        let both = ["sync", "web01", "--to", "dr1", "--settings-on-stdin", "--full"];
        assert_eq!(Sync::try_parse_from(both).unwrap_err().kind(), clap::error::ErrorKind::ArgumentConflict);
    }
}
