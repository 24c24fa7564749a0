//! `copy`: images brought into step, here or over ssh.

use super::copy_tree::{Job, Pair, job};
use crate::cli::globals::Globals;
use crate::cli::plain::shared::{
    BackingArgs, FORMATS, WayArgs, absolute, format, listen, open_source, unless_stopped, watched,
};
use crate::cli::run::limits::LinkArgs;
use crate::cli::speak::output::{Exit, Message, Output, print};
use crate::cli::speak::render;
use crate::cli::target::{SshArgs, hang_up};
use clap::Args;
use serde_json::json;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use virt_replica::block::ByteRange;
use virt_replica::engine::pump::Progress;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::image::Format;
use virt_replica::plain::copy::{self as story, Copied, Copy, Sending};
use virt_replica::plain::source::ReadOptions;
use virt_replica::plain::target::LocalOptions;
use virt_replica::plain::tree::Make;
use virt_replica::plain::{Finish, Wish, changed, meta_of};
use virt_replica::wiring::plain::{self as site, Place};
use virt_replica::wiring::{Connection, workers};

#[derive(Debug, Args)]
pub struct CopyArgs {
    /// The images, and last the place to copy to. Images: files, block devices, or directories of images. Place: a
    /// file, a block device, or a directory (with a slash at its end, or for several images), here or on another host
    /// as ssh://[user@]host[:port]/path
    #[arg(value_name = "PATH", num_args = 2.., required = true)]
    paths: Vec<String>,
    /// Format of the source; never guessed from the content [default: raw or qcow2, by its name]
    #[arg(long, value_name = "FORMAT", value_parser = FORMATS)]
    source_format: Option<String>,
    /// Format of the target; never guessed from the content [default: raw or qcow2, by its name]
    #[arg(long, value_name = "FORMAT", value_parser = FORMATS)]
    target_format: Option<String>,
    #[command(flatten)]
    way: WayArgs,
    /// Keep the target's digests in this directory of its host, so that the next copy need not read it
    #[arg(long, value_name = "DIR")]
    digests: Option<PathBuf>,
    /// Read only the ranges of this list: lines `OFFSET LENGTH` in bytes, JSON, or the output of `thin_delta` or
    /// `era_invalidate`
    #[arg(long, value_name = "FILE")]
    changed: Option<PathBuf>,
    /// Block size of the dm-era device, which `era_invalidate` does not print
    #[arg(long, value_name = "SIZE", requires = "changed", value_parser = crate::cli::speak::render::parse_bytes)]
    changed_block: Option<u64>,
    /// Copy directories with everything in them: subdirectories, hidden files and links, as rsync does. A directory is
    /// copied under its own name, unless its path ends with a slash. Missing directories at the target are made
    #[arg(short = 'r', long)]
    recursive: bool,
    /// Give the target the owner, mode and time of the source, too; with -r also its directories
    #[arg(short = 'a', long)]
    archive: bool,
    /// Say what would be sent, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    #[command(flatten)]
    backing: BackingArgs,
    /// Read the source although a QEMU is writing to it: the copy may be torn as after a power cut, or worse
    #[arg(long)]
    force_share: bool,
    #[command(flatten)]
    link: LinkArgs,
    #[command(flatten)]
    ssh: SshArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

pub fn copy(args: &CopyArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let (to, sources) = args.paths.split_last().expect("the grammar demands two");
    let place = Place::parse(to)?;
    let job = job(sources, to, place.path(), place.host().is_none(), args.recursive)?;
    if args.changed.is_some() && job.images.len() != 1 {
        return Err(Error::new(Kind::Usage, "a list of changes is of one image"));
    }
    if place.host().is_some() && args.digests.as_ref().is_some_and(|dir| dir.is_relative()) {
        return Err(Error::new(Kind::Usage, "the directory of digests is on the other host: name its whole path"));
    }
    let stop = listen()?;
    let connection = place.host().map(|host| site::images_on(host, &args.ssh.options()));
    let done = all(args, &job, globals, output, &place, connection.as_ref(), stop);
    if let Some(connection) = connection {
        hang_up(connection);
    }
    done?;
    match (job.of_directories, output.json) {
        (false, _) => {}
        (true, true) => Message { message_type: "copy_summary", body: job.summary() }.print()?,
        (true, false) => print(&job.summary().describe())?,
    }
    Ok(Exit::Done)
}

/// Directories first, so that the images have a place; what they look like last, because each entry changes their
/// times.
fn all(
    args: &CopyArgs,
    job: &Job,
    globals: &Globals,
    output: Output,
    place: &Place,
    connection: Option<&Connection>,
    stop: &AtomicBool,
) -> Result<()> {
    let make = |make: Make| if args.dry_run { Ok(()) } else { site::make(&make, connection) };
    job.dirs.iter().try_for_each(|dir| make(Make::dir(dir.target.clone())))?;
    job.images.iter().try_for_each(|pair| one(args, globals, output, pair, place, connection, stop))?;
    job.links.iter().try_for_each(|(at, to)| make(Make::link(at.clone(), to.clone())))?;
    let dressed = job.dirs.iter().rev().filter(|dir| args.archive && !dir.source.as_os_str().is_empty());
    for dir in dressed {
        make(Make::dir_as(dir.target.clone(), &dir.source)?)?;
    }
    Ok(())
}

fn one(
    args: &CopyArgs,
    globals: &Globals,
    output: Output,
    pair: &Pair,
    place: &Place,
    connection: Option<&Connection>,
    stop: &AtomicBool,
) -> Result<()> {
    let began = Instant::now();
    let to = format(args.target_format.as_ref(), &pair.target);
    let read = ReadOptions {
        exact: to == Format::Raw.into(),
        ..site::read_options(&globals.state_dir, args.force_share, &args.backing.dirs)
    };
    let source = open_source(args.source_format.as_ref(), &pair.source, &read)?;
    let copied = (|| {
        let backing = args.backing.dirs.clone();
        let local = LocalOptions { backing, ..site::local_options(&globals.state_dir, None) };
        let wish = Wish {
            path: pair.target.clone(),
            format: to,
            read_only: args.dry_run && target_is_there(pair, place),
            way: args.way.wish(),
            digests: args.digests.as_deref().map(absolute).transpose()?,
            size: Some(source.size()),
            force_share: false,
            afresh: false,
        };
        let target = site::open_image(&wish, connection, &local)?;
        let meta = args.archive.then(|| meta_of(&pair.source)).transpose()?;
        let job = Copy {
            source: &source,
            target: target.as_ref(),
            changed: args.changed.as_deref().map(|list| read_list(list, args.changed_block)).transpose()?,
            finish: Finish { meta },
            dry_run: args.dry_run,
            sending: Sending {
                workers: workers(),
                compression: args.link.compression(connection.is_some()),
                throttle: args.link.throttle()?,
            },
        };
        let progress = Progress::default();
        let name = pair.source.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        watched(&name, source.size().0, &progress, output, || story::copy(&job, &progress, &|| unless_stopped(stop)))
    })();
    let files: Vec<PathBuf> = source.files().map(Path::to_owned).collect();
    let closed = source.close();
    let copied = copied?;
    closed?;
    say(&copied, pair, &files, place, args.dry_run, began.elapsed(), output)
}

/// A dry run takes no lock of an image on this host, and changes nothing that was cut short.
fn target_is_there(pair: &Pair, place: &Place) -> bool {
    place.host().is_none() && pair.target.exists()
}

fn read_list(path: &Path, block: Option<u64>) -> Result<Vec<ByteRange>> {
    let mut text = String::new();
    let read = crate::cli::plain::shared::input(path)?.take(changed::LIST_MAX + 1).read_to_string(&mut text);
    read.map_err(|e| Error::io("cannot read the list of changes", path, e))?;
    if text.len() as u64 > changed::LIST_MAX {
        return Err(Error::new(Kind::Usage, "the list of changes is too long").path(path));
    }
    changed::parse(&text, block).map_err(|e| e.path(path))
}

fn say(
    copied: &Copied,
    pair: &Pair,
    files: &[PathBuf],
    place: &Place,
    dry_run: bool,
    took: Duration,
    output: Output,
) -> Result<()> {
    let host = place.host().map(|host| host.host.clone());
    if output.json {
        let body = json!({
            "source": pair.source, "source_files": files, "target": pair.target, "host": host, "dry_run": dry_run,
            "seconds": took.as_secs_f64(), "copied": copied,
        });
        return Message { message_type: "copy", body }.print();
    }
    if let [_, named @ ..] = files
        && !named.is_empty()
    {
        let named: Vec<String> = named.iter().map(|file| file.display().to_string()).collect();
        tracing::info!("{} was read together with {}, which it names", pair.source.display(), named.join(", "));
    }
    for reason in &copied.digests_reasons {
        tracing::info!("no kept digests: {reason}");
    }
    let at = host.map_or_else(|| pair.target.display().to_string(), |h| format!("{h}:{}", pair.target.display()));
    print(&describe(copied, &at, dry_run, took))
}

fn describe(copied: &Copied, at: &str, dry_run: bool, took: Duration) -> String {
    let read = match copied.bytes_read_target {
        0 => format!("{} read here", render::bytes(copied.bytes_read)),
        there => format!("{} read here, {} there", render::bytes(copied.bytes_read), render::bytes(there)),
    };
    let blocks = copied.blocks_changed;
    let differ = render::bytes(blocks.saturating_mul(virt_replica::block::BLOCK_LEN as u64));
    if copied.equal {
        return format!("{at} is as its source; {read}");
    }
    if dry_run {
        return format!("{at} would change in {blocks} blocks ({differ}); {read}");
    }
    let way = copied.way.map(|way| format!(", {way}")).unwrap_or_default();
    let resumed = if copied.resumed { ", going on from a copy that was cut short" } else { "" };
    let sent =
        copied.compression.as_ref().and_then(render::compression).map_or(String::new(), |why| format!(", {why}"));
    format!(
        "{at} changed in {blocks} blocks ({differ}){way}{resumed}; {} sent in {}{sent}; {read}",
        render::bytes(copied.bytes_sent),
        render::millis(took.as_secs_f64() * 1000.0),
    )
}
