//! `prune`: which points go and why, and then their end; the same at the end of `sync --keep`.

use super::shorten::{Shortened, keep_short};
use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Message, Output, print};
use crate::cli::speak::{render, signals};
use crate::cli::target::{TargetArgs, hang_up};
use clap::Args;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use virt_replica::agent::client::AgentClient;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DomainName, DomainUuid, PointId};
use virt_replica::replica::upkeep::{Holds, Kept, PruneReport, Upkeep as _};
use virt_replica::replica::{PointView, Replica as _, ReplicaView};
use virt_replica::retention::{self, Candidate, Floor, Keep, Verdict};

/// Points removed by one request: its message stays well below what the wire allows.
const BATCH: usize = 4096;

#[derive(Debug, Args)]
#[command(after_help = "\
Rules: last=3,hourly=24,daily=7,weekly=4,monthly=12, or any of these. A point is kept
if any rule keeps it. A rule keeps the newest point of each of the last N hours (days, ...)
that have a point, in this machine's time zone. The newest point of all always stays. So
do points that are pinned, in use, or too young for the target.")]
pub struct PruneArgs {
    /// Name or UUID of the domain
    domain: String,
    #[command(flatten)]
    target: TargetArgs,
    /// Rules for the points to keep; all other points are removed
    #[arg(long, value_name = "RULES", required_unless_present = "points")]
    keep: Option<Keep>,
    /// Remove only this point; may be given more than once
    #[arg(long = "point", value_name = "POINT", conflicts_with = "keep")]
    points: Vec<PointId>,
    /// Say what would be removed and why, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

/// What to remove.
pub enum Wish {
    Keep(Keep),
    Points(Vec<PointId>),
}

/// What was decided, and what was done.
pub struct Pruned {
    pub name: DomainName,
    pub uuid: DomainUuid,
    pub points: Vec<PointView>,
    pub verdicts: Vec<Verdict>,
    /// `None`: only thought through.
    pub report: Option<PruneReport>,
}

pub fn prune(args: &PruneArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let target = args.target.resolve(globals)?;
    let wish = match args.keep {
        Some(keep) => Wish::Keep(keep),
        None => Wish::Points(args.points.clone()),
    };
    let (connection, url) = (target.connection(), target.url.to_string());
    let stop = signals::listen_saying(
        "stopping behind what is being folded (again: at once)",
        "ended at once; the next prune, or the next run, goes on from there",
    )?;
    let pruned = connection.client().and_then(|client| {
        let (uuid, name) = super::named::find(&client, &args.domain, globals)?;
        let pruned = run(&client, uuid, name, &wish, args.dry_run)?;
        let shortened = match args.dry_run {
            true => Shortened::default(),
            false => keep_short(&client, (&pruned.uuid, &pruned.name), &url, output, stop),
        };
        Ok((pruned, shortened))
    });
    hang_up(connection);
    let (pruned, shortened) = pruned?;
    if let Some(warning) = &shortened.warning {
        tracing::warn!("{warning}");
    }
    match output.json {
        true => Message { message_type: "prune", body: pruned.json(&url) }.print()?,
        false => print(&pruned.describe(&url, shortened.note.as_deref()))?,
    }
    Ok(Exit::Done)
}

/// Decides, and unless `dry_run`, removes.
pub fn run(
    client: &Arc<AgentClient>,
    uuid: DomainUuid,
    name: DomainName,
    wish: &Wish,
    dry_run: bool,
) -> Result<Pruned> {
    let replica = client.open(&uuid)?;
    let (view, holds) = (replica.describe()?, replica.holds()?);
    let verdicts = decide(&view, &holds, wish).map_err(|e| e.domain(&name))?;
    let mut report = None;
    if !dry_run {
        let gone: Vec<PointId> = verdicts.iter().filter(|v| v.removed()).map(|v| v.id.clone()).collect();
        let mut all = PruneReport::default();
        // Also with nothing to remove: what earlier prunes left may be folded now.
        for batch in gone.chunks(BATCH).chain(gone.is_empty().then_some(&gone[..])) {
            let one = replica.prune(batch, &mut |_, _| {}).map_err(|e| e.domain(&name))?;
            all.removed.extend(one.removed);
            all.kept.extend(one.kept);
            all.folded.extend(one.folded);
            all.waiting = one.waiting;
            all.bytes_copied += one.bytes_copied;
        }
        report = Some(all);
    }
    Ok(Pruned { name, uuid, points: view.points, verdicts, report })
}

/// Step 8d of a run: prunes by `keep`. Gives what an operator should read; nothing of it fails the run.
#[cfg(feature = "libvirt")]
pub fn after_run(
    client: &Arc<AgentClient>,
    report: &virt_replica::replicate::state::report::Report,
    keep: Option<Keep>,
    output: Output,
) -> Vec<String> {
    let pruned = || -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        if let Some(keep) = keep {
            let (uuid, name) = (report.uuid.clone(), report.domain.clone());
            let pruned = run(client, uuid, name, &Wish::Keep(keep), false)?;
            if output.json {
                Message { message_type: "prune", body: pruned.json(&report.target) }.print()?;
            }
            warnings.extend(pruned.remarks());
        }
        Ok(warnings)
    };
    pruned().unwrap_or_else(|e| vec![format!("points were not pruned: {}", e.chain())])
}

fn decide(view: &ReplicaView, holds: &Holds, wish: &Wish) -> Result<Vec<Verdict>> {
    // A target that knows better than its wall clock how old a point is says so.
    let sealed_at = |point: &PointView| match holds.young.iter().find(|(id, _)| *id == point.id) {
        Some((_, left_s)) => {
            let age_s = holds.min_age_s.saturating_sub(*left_s);
            holds.now.saturating_sub(Duration::from_secs(age_s)).unwrap_or(point.sealed_at)
        }
        None => point.sealed_at,
    };
    let candidate = |point: &PointView| Candidate {
        id: point.id.clone(),
        frozen_at: point.frozen_at,
        sealed_at: sealed_at(point),
        pinned: holds.pins.iter().find(|p| p.point == point.id).map(|p| p.reason.clone()),
        in_use: holds.leases.iter().find(|l| l.point == point.id).map(|l| format!("{}, {}", l.purpose, l.owner)),
    };
    let points: Vec<Candidate> = view.points.iter().map(candidate).collect();
    let floor = Floor { now: holds.now, min_age: Duration::from_secs(holds.min_age_s) };
    match wish {
        Wish::Keep(keep) => Ok(retention::plan(&points, keep, &TimeZone::system(), &floor)),
        Wish::Points(named) => {
            if let Some(unknown) = named.iter().find(|id| !points.iter().any(|p| p.id == **id)) {
                return Err(Error::new(Kind::NotFound, "the target has no such point")
                    .point(unknown)
                    .hint("`virt-replica points DOMAIN --to TARGET` lists them"));
            }
            if let Some(head) = view.head().filter(|head| named.contains(&head.id)) {
                return Err(Error::new(Kind::Refused, "the newest point is never removed").point(&head.id));
            }
            Ok(retention::plan_named(&points, named, &floor))
        }
    }
}

impl Pruned {
    /// Sentences about what was gone around and what waits.
    pub fn remarks(&self) -> Vec<String> {
        let why = |kept: &Kept| format!("point {} was not removed: {}", kept.point, kept.why);
        let report = self.report.iter();
        let kept = report.clone().flat_map(|r| &r.kept).map(why);
        let wait = |kept: &Kept| format!("removed point {} still takes room: {}", kept.point, kept.why);
        kept.chain(report.flat_map(|r| &r.waiting).map(wait)).collect()
    }

    pub fn json(&self, target: &str) -> Value {
        let points = self.points.iter().zip(&self.verdicts).map(|(point, verdict)| {
            let action = if verdict.removed() { "remove" } else { "keep" };
            json!({ "id": point.id, "frozen_at": point.frozen_at, "action": action, "reasons": verdict.kept })
        });
        let report = self.report.clone().unwrap_or_default();
        json!({
            "domain": self.name, "uuid": self.uuid, "target": target, "dry_run": self.report.is_none(),
            "points": points.collect::<Vec<_>>(), "removed": report.removed, "kept": report.kept,
            "folded": report.folded, "waiting": report.waiting, "bytes_copied": report.bytes_copied,
        })
    }

    fn describe(&self, target: &str, note: Option<&str>) -> String {
        let rows = self.points.iter().zip(&self.verdicts).map(|(point, verdict)| {
            let why = match verdict.removed() {
                true => "no rule keeps it".to_owned(),
                false => verdict.kept.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            };
            let action = if verdict.removed() { "remove" } else { "keep" };
            vec![point.id.to_string(), render::time(point.frozen_at), action.to_owned(), why]
        });
        let gone = self.verdicts.iter().filter(|v| v.removed()).count();
        let head = match &self.report {
            None => format!("{} on {target}: {gone} of {} points would be removed", self.name, self.points.len()),
            Some(report) => {
                let (removed, all) = (report.removed.len(), self.points.len());
                format!("{} on {target}: {removed} of {all} points removed", self.name)
            }
        };
        let mut lines = vec![head, String::new()];
        lines.push(render::table(&["Point", "Frozen at", "Action", "Why"], &[], rows.collect()));
        lines.extend(self.verdicts.iter().filter(|v| v.in_the_way()).map(|v| {
            let why: Vec<String> = v.kept.iter().map(ToString::to_string).collect();
            render::wrap("note: ", &format!("no rule keeps point {}, and it stays: {}", v.id, why.join(", ")))
        }));
        lines.extend(self.remarks().iter().map(|r| render::wrap("note: ", r)));
        lines.extend(note.map(|n| render::wrap("note: ", n)));
        lines.join("\n")
    }
}
