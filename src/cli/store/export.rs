//! `export`: a disk of a point, as a file on this host, or over NBD on the host of the store.

use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Message, Output, print};
use crate::cli::speak::progress::bar;
use crate::cli::speak::render;
use crate::cli::target::{Target, TargetArgs, hang_up};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virt_replica::agent::client::AgentClient;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::image::Format;
use virt_replica::name::{DiskName, DomainName, DomainUuid, PointId};
use virt_replica::replica::receive::{self, receive_file};
use virt_replica::replica::upkeep::Upkeep as _;
use virt_replica::replica::{PointDisk, Replica as _};
use virt_replica::transport::target::TargetUrl;
use virt_replica::wiring;

/// A script hears of progress at most this often.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Name or UUID of the domain
    domain: String,
    #[command(flatten)]
    target: TargetArgs,
    /// The point [default: the head]
    #[arg(long, value_name = "POINT")]
    point: Option<PointId>,
    /// The disk [default: the only one]
    #[arg(long, value_name = "DISK")]
    disk: Option<DiskName>,
    /// Write this file on this host
    #[arg(long, value_name = "FILE", required_unless_present = "nbd")]
    output: Option<PathBuf>,
    /// Format of that file
    #[arg(long, default_value = "raw", conflicts_with = "nbd")]
    format: ExportFormat,
    /// Replace the file if it is there
    #[arg(long, conflicts_with = "nbd")]
    force: bool,
    /// Serve it read-only on this unix socket until interrupted; only for a store on this host (--to /root)
    #[arg(long, value_name = "SOCKET", conflicts_with = "output")]
    nbd: Option<PathBuf>,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ExportFormat {
    Raw,
    Qcow2,
}

/// What was asked for, found.
struct Found {
    uuid: DomainUuid,
    name: DomainName,
    point: PointId,
    disk: PointDisk,
}

pub fn export(args: &ExportArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let target = args.target.resolve(globals)?;
    let Some(path) = &args.output else {
        return serve(args, &target, globals, output);
    };
    let connection = target.connection();
    let exported = connection.client().and_then(|client| {
        let found = find(&client, args, globals)?;
        let bytes = to_file(&client, &found, path, args, output).map_err(|e| e.domain(&found.name))?;
        Ok((found, bytes))
    });
    hang_up(connection);
    let (found, bytes) = exported?;
    let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
    if output.json {
        let body = json!({
            "domain": found.name, "uuid": found.uuid, "target": target.url.to_string(), "point": found.point,
            "disk": found.disk.name, "output": path, "size": found.disk.size, "bytes_written": bytes, "root": found.disk.root,
        });
        Message { message_type: "export", body }.print()?;
    } else {
        print(&describe(&found, &path, bytes))?;
    }
    Ok(Exit::Done)
}

fn serve(args: &ExportArgs, target: &Target, globals: &Globals, output: Output) -> Result<Exit> {
    let socket = args.nbd.as_deref().expect("one of the two is there, says the grammar");
    let TargetUrl::Local { root } = &target.url else {
        return Err(Error::new(Kind::Usage, "NBD is served on the host of the store only")
            .hint("run this on the target with `--to ROOT`, or export into a file with --output"));
    };
    let connection = target.connection();
    let found = connection.client().and_then(|client| find(&client, args, globals));
    hang_up(connection);
    let found = found?;
    let stop = crate::cli::speak::signals::listen_saying("ending the server (again: at once)", "ended at once")?;
    let ready = || match output.json {
        true => {
            let body = json!({
                "domain": found.name, "uuid": found.uuid, "target": target.url.to_string(), "point": found.point,
                "disk": found.disk.name, "socket": socket, "size": found.disk.size,
            });
            Message { message_type: "nbd", body }.print()
        }
        false => print(&format!(
            "{} of point {} of {} is served on {} until this is interrupted",
            found.disk.name,
            found.point,
            found.name,
            socket.display()
        )),
    };
    wiring::serve_nbd(root, &found.uuid, &found.point, &found.disk.name, socket, &ready, stop)
        .map_err(|e| e.domain(&found.name).point(&found.point))?;
    Ok(Exit::Done)
}

fn describe(found: &Found, path: &Path, bytes: u64) -> String {
    format!(
        "{} of point {} of {} is in {}: {} of data, {} in all, every block compared",
        found.disk.name,
        found.point,
        found.name,
        path.display(),
        render::bytes(bytes),
        render::bytes(found.disk.size.0)
    )
}

fn find(client: &Arc<AgentClient>, args: &ExportArgs, globals: &Globals) -> Result<Found> {
    let (uuid, name) = super::named::find(client, &args.domain, globals)?;
    let view = client.open(&uuid)?.describe()?;
    let point = match &args.point {
        Some(id) => view.points.iter().find(|p| p.id == *id),
        None => view.head(),
    };
    let Some(point) = point else {
        let e = Error::new(Kind::NotFound, "the target has no such point").domain(&name);
        let e = args.point.iter().fold(e, |e, id| e.point(id));
        return Err(e.hint("`virt-replica points DOMAIN --to TARGET` lists them"));
    };
    let names: Vec<&str> = point.disks.iter().map(|d| d.name.as_str()).collect();
    let disk = match (&args.disk, point.disks.as_slice()) {
        (Some(wanted), _) => point.disk(wanted).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("the point has no disk '{wanted}'"))
                .hint(format!("it has {}", names.join(", ")))
        })?,
        (None, [only]) => only,
        (None, _) => {
            return Err(Error::new(Kind::Usage, "the point has several disks")
                .domain(&name)
                .hint(format!("add --disk with one of {}", names.join(", "))));
        }
    };
    Ok(Found { uuid, name, point: point.id.clone(), disk: disk.clone() })
}

fn to_file(client: &Arc<AgentClient>, found: &Found, path: &Path, args: &ExportArgs, output: Output) -> Result<u64> {
    let format = match args.format {
        ExportFormat::Raw => Format::Raw,
        ExportFormat::Qcow2 => Format::Qcow2,
    };
    let into = receive::Output { path: path.to_owned(), format, force: args.force };
    // Held as long as the stream: that ends with it.
    let replica = client.open(&found.uuid)?;
    let mut stream = replica.export(&found.point, &found.disk.name)?;
    let bar =
        (!output.json && !output.quiet && std::io::stderr().is_terminal()).then(|| bar(found.disk.name.as_str(), 0));
    let mut reported = Instant::now();
    let written = receive_file(stream.as_mut(), &found.uuid, &found.disk, &into, &mut |done, total| {
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
    let closed = stream.close();
    let written = written?;
    if let Err(e) = closed {
        tracing::debug!("the export did not end in order: {}", e.chain());
    }
    Ok(written)
}
