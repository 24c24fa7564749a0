//! `diff --point` and `apply --to`: whole recovery points in files and pipes.

use crate::cli::globals::Globals;
use crate::cli::plain::envelope::{ProtectedOut, UnwrapArgs};
use crate::cli::plain::patch::DiffArgs;
use crate::cli::plain::shared::{beside, listen, print_beside, unless_stopped, watched};
use crate::cli::speak::output::{Exit, Output, print, print_json};
use crate::cli::speak::render;
use crate::cli::target::{CreateStore, Target, hang_up};
use serde_json::json;
use std::path::Path;
use std::sync::atomic::Ordering;
use virt_replica::engine::pump::Progress;
use virt_replica::error::Result;
use virt_replica::name::PointId;
use virt_replica::replica::pointfile::{self, Brought, Written};

/// `DOMAIN@POINT`, or a domain alone, which may have an `@` in its name.
fn domain_and_point(text: &str) -> (&str, Option<PointId>) {
    match text.rsplit_once('@') {
        Some((domain, point)) => match PointId::new(point) {
            Ok(point) => (domain, Some(point)),
            Err(_) => (text, None),
        },
        None => (text, None),
    }
}

pub fn diff(args: &DiffArgs, of: &str, globals: &Globals, output: Output) -> Result<Exit> {
    let (domain, point) = domain_and_point(of);
    let to = args.since.to.as_deref().expect("the grammar demands it beside a point");
    let target = Target::resolve(to, &args.ssh, &globals.config()?)?;
    let mut out = ProtectedOut::create(&args.output, args.force, &args.wrap)?;
    let stop = listen()?;
    let connection = target.connection();
    let progress = Progress::default();
    let written = connection.client().and_then(|client| {
        let (uuid, name) = super::named::find(&client, domain, globals)?;
        let replica = client.open(&uuid)?;
        let mut told = |bytes| {
            progress.sent.store(bytes, Ordering::Relaxed);
            unless_stopped(stop)
        };
        let which = (args.since.since.as_ref(), point.as_ref());
        let told = &mut told;
        watched(name.as_str(), 0, &progress, beside(output, out.is_stdout()), || {
            pointfile::write(&replica, (&uuid, &name), which, &mut out, told).map_err(|e| e.domain(&name))
        })
    });
    hang_up(connection);
    let written = written?;
    let piped = out.is_stdout();
    out.commit()?;
    let said = describe_written(&written);
    match (piped, output.json) {
        (true, _) => print_beside(&said, output),
        (_, true) => {
            print_json(&json!({ "target": target.url.to_string(), "output": args.output, "written": written }))?;
        }
        _ => print(&said)?,
    }
    Ok(Exit::Done)
}

fn describe_written(written: &Written) -> String {
    let carried = &written.carried;
    let from = carried.since.as_ref().map_or("nothing".to_owned(), |since| format!("point {}", since.point));
    format!(
        "point {} of {} with {} is in {}, from {from} on",
        carried.point,
        carried.name,
        disks(carried.disks.len()),
        render::bytes(written.bytes)
    )
}

fn disks(n: usize) -> String {
    if n == 1 { "its disk".to_owned() } else { format!("its {n} disks") }
}

pub fn apply(
    file: &Path,
    unwrap: &UnwrapArgs,
    target: &Target,
    create_store: CreateStore,
    output: Output,
) -> Result<Exit> {
    let stop = listen()?;
    let input = unwrap.open(file)?.input;
    let connection = target.connection_creating(create_store);
    let progress = Progress::default();
    let size = std::fs::metadata(file).map_or(0, |m| m.len());
    let name = file.file_name().map_or("point".to_owned(), |name| name.to_string_lossy().into_owned());
    let brought = connection.client().and_then(|client| {
        let mut told = |bytes| {
            progress.scanned.store(bytes, Ordering::Relaxed);
            unless_stopped(stop)
        };
        let told = &mut told;
        watched(&name, size, &progress, output, || {
            pointfile::apply(input, |carried| client.open(&carried.uuid), told).map_err(|e| e.path(file))
        })
    });
    hang_up(connection);
    let brought = brought?;
    match output.json {
        true => print_json(&json!({ "file": file, "target": target.url.to_string(), "brought": brought }))?,
        false => print(&describe_brought(&brought, target))?,
    }
    Ok(Exit::Done)
}

fn describe_brought(brought: &Brought, target: &Target) -> String {
    let (carried, here, url) = (&brought.carried, &brought.point_here, &target.url);
    match brought.already {
        true => format!("{url} has this point of {} already, as {here}; nothing was changed", carried.name),
        false => format!(
            "point {here} of {} is in {url} now, with {}; {} written",
            carried.name,
            disks(carried.disks.len()),
            render::bytes(brought.bytes_written)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_stands_behind_the_last_at_sign() {
        let point = PointId::new("000001-00000001").unwrap();
        assert_eq!(domain_and_point("shop@000001-00000001"), ("shop", Some(point.clone())));
        assert_eq!(domain_and_point("a@b@000001-00000001"), ("a@b", Some(point)));
        assert_eq!(domain_and_point("a@b"), ("a@b", None));
        assert_eq!(domain_and_point("shop"), ("shop", None));
    }
}
