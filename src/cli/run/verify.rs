//! `verify`: a point against its own digests, or the live domain against its newest point.

use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Message, Output, print};
use crate::cli::speak::progress::bar;
use crate::cli::speak::render;
use crate::cli::target::{Target, TargetArgs, hang_up};
use clap::Args;
use serde_json::json;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virt_replica::agent::client::AgentClient;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DomainName, DomainUuid, PointId};
use virt_replica::replica::upkeep::{Damage, Upkeep as _};
use virt_replica::replica::{Replica as _, VerifyReport};
use virt_replica::replicate::plan::capture_choice::CaptureWish;
use virt_replica::transport::target::TargetUrl;

/// A script hears of progress at most this often.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Name or UUID of the domain
    domain: String,
    #[command(flatten)]
    target: TargetArgs,
    /// The point to read [default: the head]
    #[arg(long, value_name = "POINT")]
    point: Option<PointId>,
    /// Freeze the domain, read it, and compare it with the head. Writes of the guest since then differ
    #[arg(long, conflicts_with = "point")]
    against_source: bool,
    /// With --against-source: put the overlays of all disks into this directory
    #[arg(long, value_name = "DIR", requires = "against_source")]
    overlay_dir: Option<PathBuf>,
    /// With --against-source: how to make the disks stand still: overlay, backup, or auto
    #[arg(long, value_name = "WAY", requires = "against_source")]
    capture: Option<CaptureWish>,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

pub fn verify(args: &VerifyArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let config = globals.config()?;
    let target = Target::resolve(&args.target.to, &args.target.ssh, &config)?;
    if args.against_source {
        return against_source(args, globals, &config, &target, output);
    }
    let connection = target.connection();
    let verified = connection.client().and_then(|client| against_digests(args, &client, globals, output));
    hang_up(connection);
    let (uuid, name, report, known) = verified?;
    let equal = report.is_whole();
    if output.json {
        let body = json!({
            "domain": name, "uuid": uuid, "target": target.url.to_string(), "against": "digests", "equal": equal,
            "point": report.point, "disks": report.disks, "damaged_attachments": report.damaged_attachments,
            "known_damage": known,
        });
        Message { message_type: "verify", body }.print()?;
    } else {
        let known = known.iter().map(|d| format!("\n known from a scrub: {}", render::damage(d)));
        print(&(describe(&name, &target.url, &report) + &known.collect::<String>()))?;
    }
    if equal {
        return Ok(Exit::Done);
    }
    Err(Error::new(Kind::Corrupt, "the point is not what was sealed")
        .domain(&name)
        .point(&report.point)
        .hint("do not boot it; look at the target's disk; `virt-replica scrub` says what else is damaged, and then the next sync mends the newest point"))
}

fn against_digests(
    args: &VerifyArgs,
    client: &Arc<AgentClient>,
    globals: &Globals,
    output: Output,
) -> Result<(DomainUuid, DomainName, VerifyReport, Vec<Damage>)> {
    let (uuid, name) = crate::cli::store::named::find(client, &args.domain, globals)?;
    let replica = client.open(&uuid)?;
    let view = replica.describe()?;
    let newest = || view.head().map(|p| p.id.clone());
    let Some(point) = args.point.clone().or_else(newest) else {
        return Err(Error::new(Kind::NotFound, "the target has no point of it").domain(&name));
    };
    if !view.points.iter().any(|p| p.id == point) {
        return Err(Error::new(Kind::NotFound, "the target has no such point")
            .domain(&name)
            .point(&point)
            .hint("`virt-replica points DOMAIN --to TARGET` lists them"));
    }
    let bar = (!output.json && !output.quiet && std::io::stderr().is_terminal()).then(|| bar("read", 0));
    let mut reported = Instant::now();
    let report = replica.verify(&point, &mut |done, total| {
        if let Some(bar) = &bar {
            bar.set_length(total);
            bar.set_position(done);
        }
        if output.json && reported.elapsed() >= REPORT_INTERVAL {
            reported = Instant::now();
            let body = json!({ "bytes_done": done, "bytes_total": total });
            // A script that has gone away loses nothing but this line.
            drop(Message { message_type: "progress", body }.print());
        }
    });
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    let reads = |d: &Damage| d.point == point || d.dependants.contains(&point);
    let known = replica.holds()?.scrub.damage.into_iter().filter(reads).collect();
    Ok((uuid, name, report?, known))
}

fn describe(name: &DomainName, target: &TargetUrl, report: &VerifyReport) -> String {
    let verdict = if report.is_whole() { "is whole" } else { "is damaged" };
    let rows = report.disks.iter().map(|d| {
        let damaged = match d.damaged.as_slice() {
            [] if d.root != d.root_expected => "root differs".to_owned(),
            [] => "-".to_owned(),
            first => {
                let shown: Vec<String> = first.iter().take(8).map(u64::to_string).collect();
                let more = if d.damaged_count > shown.len() as u64 { ", ..." } else { "" };
                format!("{} ({}{more})", d.damaged_count, shown.join(", "))
            }
        };
        vec![d.name.to_string(), render::bytes(d.bytes_read), d.blocks.to_string(), damaged]
    });
    let mut lines = vec![format!("point {} of {name} on {target} {verdict}", report.point), String::new()];
    lines.push(render::table(&["Disk", "Read", "Blocks", "Damaged blocks"], &[1, 2], rows.collect()));
    lines.extend(report.damaged_attachments.iter().map(|a| format!(" {}: damaged or gone", a.file_name())));
    lines.join("\n")
}

#[cfg(not(feature = "libvirt"))]
fn against_source(
    _: &VerifyArgs,
    _: &Globals,
    _: &virt_replica::config::Config,
    _: &Target,
    _: Output,
) -> Result<Exit> {
    crate::cli::globals::no_libvirt("verify --against-source")
}

#[cfg(feature = "libvirt")]
fn against_source(
    args: &VerifyArgs,
    globals: &Globals,
    config: &virt_replica::config::Config,
    target: &Target,
    output: Output,
) -> Result<Exit> {
    use crate::cli::run::{source, watch::Watcher};
    use crate::cli::speak::signals;
    use virt_replica::run_settings::RunSettings;

    // A bitmap is what might be wrong: it is not asked.
    let settings = RunSettings {
        overlay_dir: args.overlay_dir.clone(),
        capture: args.capture,
        compare: true,
        ..RunSettings::default()
    };
    let request = source::request(&args.domain, target, globals, config, &settings)?;
    let stop = signals::listen()?;
    let site = source::connect(globals)?;
    let connection = target.connection();
    let watcher = Watcher::new(output);
    let compared = site.compare(&connection, &request, &watcher, stop);
    watcher.finish();
    hang_up(connection);
    let compared = compared?;
    let equal = compared.disks.iter().all(|d| d.equal);
    if output.json {
        let body = json!({
            "domain": args.domain, "target": target.url.to_string(), "against": "source", "equal": equal,
            "frozen_at": compared.frozen_at, "freeze_ms": compared.freeze_ms, "pause_ms": compared.pause_ms,
            "pause_sum_ms": compared.pause_sum_ms, "pauses": compared.pauses,
            "disks": compared.disks, "warnings": compared.warnings,
        });
        Message { message_type: "verify", body }.print()?;
    } else {
        let rows = compared.disks.iter().map(|d| {
            let differ = if d.equal { "-".to_owned() } else { d.blocks_differ.to_string() };
            vec![d.name.to_string(), render::bytes(d.size.0), render::bytes(d.bytes_read), differ]
        });
        let verdict = if equal { "equals" } else { "differs from" };
        print(&format!(
            "{}, frozen at {}, {verdict} its newest point on {}\n\n{}",
            args.domain,
            render::time(compared.frozen_at),
            target.url,
            render::table(&["Disk", "Size", "Read", "Blocks that differ"], &[1, 2, 3], rows.collect()),
        ))?;
        compared.warnings.iter().for_each(|w| crate::cli::speak::progress::say(&format!("warning: {w}")));
    }
    if equal {
        return Ok(Exit::Done);
    }
    Err(Error::new(Kind::Corrupt, "the domain is not what the newest point on the target is")
        .domain(&args.domain)
        .hint(
            "a guest that runs writes: to tell damage from news, shut it off, `virt-replica sync` it, and verify again",
        ))
}
