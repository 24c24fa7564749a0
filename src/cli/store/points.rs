//! `points`: what a target has of a domain. Works where the source, or its libvirt, is gone.

use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output, print, print_json};
use crate::cli::speak::render;
use crate::cli::target::{TargetArgs, hang_up};
use clap::Args;
use serde_json::json;
use virt_replica::error::Result;
use virt_replica::name::{DomainName, DomainUuid};
use virt_replica::replica::upkeep::{Holds, Upkeep as _};
use virt_replica::replica::{PointView, Replica as _, ReplicaView, lag};
use virt_replica::transport::target::TargetUrl;
use virt_replica::wiring::Connection;

#[derive(Debug, Args)]
pub struct PointsArgs {
    /// Name or UUID of the domain
    domain: String,
    #[command(flatten)]
    target: TargetArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

/// Lists the points of a domain, oldest first.
pub fn points(args: &PointsArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let target = args.target.resolve(globals)?;
    let connection = target.connection();
    let found = find(&connection, &args.domain, globals);
    hang_up(connection);
    let (uuid, name, view, holds) = found?;
    match output.json {
        true => print_json(&json!({
            "domain": name, "uuid": uuid, "target": target.url.to_string(), "generation": view.generation, "path": view.path,
            "points": view.points, "pins": holds.pins, "leases": holds.leases, "links": holds.links, "depth": holds.depth,
            "scrub": holds.scrub, "promoted": view.promoted,
        }))?,
        false => print(&describe(&name, &target.url, &view, &holds))?,
    }
    Ok(Exit::Done)
}

fn find(
    connection: &Connection,
    domain: &str,
    globals: &Globals,
) -> Result<(DomainUuid, DomainName, ReplicaView, Holds)> {
    let client = connection.client()?;
    let (uuid, name) = super::named::find(&client, domain, globals)?;
    let replica = client.open(&uuid)?;
    Ok((uuid, name, replica.describe()?, replica.holds()?))
}

fn describe(name: &DomainName, target: &TargetUrl, view: &ReplicaView, holds: &Holds) -> String {
    let Some(head) = view.head() else { return format!("{name} has no point on {target}") };
    let rows = view.points.iter().flat_map(point_rows).collect();
    let mut lines = vec![render::table(&["Point", "Frozen at", "State", "Disk", "Mode", "Sent"], &[5], rows)];
    lines.push(format!("\n Images of the head, {}, generation {}:", head.id, head.generation));
    lines.extend(head.disks.iter().map(|d| format!(" {}  {}", d.name, d.image.display())));
    let held = holds.pins.iter().map(|p| match p.reason.as_str() {
        "" => format!(" Pinned: {}", p.point),
        reason => format!(" Pinned: {} ({reason})", p.point),
    });
    let used = holds.leases.iter().map(|l| format!(" In use: {} ({}, {})", l.point, l.purpose, l.owner));
    let damaged = holds.scrub.damage.iter().map(|d| format!(" Damaged: {}", render::damage(d)));
    let missing = head.left_out.unprotected().map(|s| format!(" Not in the head: {}, it {}", s.name, s.reason));
    let why = head.consistency_reason.iter().map(|why| format!(" State of the head: {why}"));
    let clock = lag::ahead_s(head.frozen_at, head.sealed_at).map(|s| format!(" {}", lag::told(s)));
    let held: Vec<String> = held.chain(used).chain(damaged).chain(missing).chain(why).chain(clock).collect();
    if !held.is_empty() {
        lines.push(String::new());
        lines.extend(held);
    }
    lines.join("\n")
}

/// A point's first disk stands on the point's own line.
fn point_rows(point: &PointView) -> impl Iterator<Item = Vec<String>> {
    point.disks.iter().enumerate().map(|(at, disk)| {
        let of_point = |text: String| if at == 0 { text } else { String::new() };
        vec![
            of_point(point.id.to_string()),
            of_point(render::time(point.frozen_at)),
            of_point(render::consistency(point.consistency).to_owned()),
            disk.name.to_string(),
            disk.stats.mode.to_string(),
            render::bytes(disk.stats.bytes_sent),
        ]
    })
}
