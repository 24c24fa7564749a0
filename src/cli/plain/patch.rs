//! `diff`, `apply` and `patch`: patches of plain images in files and pipes.

use super::envelope::{KeyArgs, ProtectedOut, UnwrapArgs, WrapArgs};
use crate::cli::globals::Globals;
use crate::cli::plain::shared::{
    BackingArgs, FORMATS, WayArgs, absolute, beside, format, input, listen, open_source, print_beside, unless_stopped,
    watched,
};
use crate::cli::speak::output::{Exit, Message, Output, print, print_json};
use crate::cli::speak::render;
use crate::cli::target::{CreateStore, SshArgs, Target, hang_up};
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use virt_replica::engine::pump::Progress;
use virt_replica::envelope::Opened;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::PointId;
use virt_replica::patch::Compression;
use virt_replica::plain::copy::Sending;
use virt_replica::plain::diff::{Diffed, KnownByDigests, Nothing};
use virt_replica::plain::patchfile::{self, Applied, PatchInfo};
use virt_replica::plain::source::Source;
use virt_replica::plain::target::LocalOptions;
use virt_replica::plain::{Finish, PlainTarget, WayWish, Wish, diff as story, kept_digests, merge, redo};
use virt_replica::wiring::plain::{self as site, Place};
use virt_replica::wiring::{Connection, workers};

#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The image that the patch leads to: a file or block device
    #[arg(required_unless_present = "point", conflicts_with = "point")]
    source: Option<PathBuf>,
    #[command(flatten)]
    base: BaseArgs,
    #[command(flatten)]
    pub(in crate::cli) since: SinceArgs,
    /// Write the patch here; - for stdout
    #[arg(short, long, value_name = "PATCH")]
    pub(in crate::cli) output: PathBuf,
    /// Format of the source; never guessed from the content [default: raw or qcow2, by its name]
    #[arg(long, value_name = "FORMAT", value_parser = FORMATS)]
    source_format: Option<String>,
    /// Format of the base; never guessed from the content [default: raw or qcow2, by its name]
    #[arg(long, value_name = "FORMAT", value_parser = FORMATS)]
    base_format: Option<String>,
    /// Replace the patch if it is there
    #[arg(long)]
    pub(in crate::cli) force: bool,
    /// Compress it: a level of zstd, 1 (fast) to 19 (small), no, or auto: 1 while that is not slower
    #[arg(long, value_name = "LEVEL", default_value_t = Compression::FAST)]
    compress: Compression,
    #[command(flatten)]
    backing: BackingArgs,
    /// Read images although a QEMU is writing to them. The result of the patch may then be torn, as after a power cut
    /// or worse
    #[arg(long)]
    force_share: bool,
    #[command(flatten)]
    pub(in crate::cli) wrap: WrapArgs,
    #[command(flatten)]
    pub(in crate::cli) ssh: SshArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

/// What the patch leads from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct BaseArgs {
    /// The image that the patch leads from, here or as ssh://[user@]host[:port]/path
    #[arg(long, value_name = "IMAGE")]
    base: Option<String>,
    /// Its digests, as `digest` wrote them; blocks then travel whole
    #[arg(long, value_name = "FILE")]
    base_digest: Option<PathBuf>,
    /// Nothing: the patch holds the whole image
    #[arg(long)]
    from_nothing: bool,
    /// No image, but a whole recovery point of a store (--to): all disks of this domain at this point [default: the
    /// head], and everything else in the point. It goes into one file, from nothing or from another point (--since)
    #[arg(long, value_name = "DOMAIN[@POINT]", requires = "to")]
    point: Option<String>,
}

/// Which store a point is in, and what it leads on from.
#[derive(Debug, Args)]
pub(in crate::cli) struct SinceArgs {
    /// The point that the file leads on from. The target of the file must have it as its newest point
    #[arg(long, value_name = "POINT", requires = "point")]
    pub(in crate::cli) since: Option<PointId>,
    /// The store to read: ssh://[user@]host[:port][/root], local:/root, /root, or a name of the configuration
    #[arg(long, value_name = "TARGET", requires = "point")]
    pub(in crate::cli) to: Option<String>,
}

pub fn diff(args: &DiffArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let source = match (&args.base.point, &args.source) {
        (Some(point), _) => return crate::cli::store::pointfile::diff(args, point, globals, output),
        (None, Some(source)) => source,
        (None, None) => return Err(Error::new(Kind::Usage, "an image or a point is needed")),
    };
    let path = absolute(source)?;
    let out = ProtectedOut::create(&args.output, args.force, &args.wrap)?;
    let stop = listen()?;
    let (base, connection) = open_base(args, globals)?;
    let read = site::read_options(&globals.state_dir, args.force_share, &args.backing.dirs);
    let source = open_source(args.source_format.as_ref(), &path, &read)?;
    let made = make(&source, base.as_ref(), out, &path, args.compress, output, stop);
    drop(base);
    if let Some(connection) = connection {
        hang_up(connection);
    }
    let (closed, (diffed, piped)) = (source.close(), made?);
    closed?;
    let said = format!(
        "a patch of {} with {} changed blocks leads to root {}; {} read",
        render::bytes(diffed.bytes),
        diffed.blocks_changed,
        diffed.to_root,
        render::bytes(diffed.bytes_read)
    );
    match (piped, output.json) {
        (true, _) => print_beside(&said, output),
        (_, true) => print_json(&json!({ "source": path, "patch": args.output, "made": diffed }))?,
        _ => print(&said)?,
    }
    Ok(Exit::Done)
}

fn make(
    source: &Source,
    base: &dyn PlainTarget,
    mut out: ProtectedOut,
    path: &Path,
    compression: Compression,
    output: Output,
    stop: &AtomicBool,
) -> Result<(Diffed, bool)> {
    let sending = Sending { workers: workers(), compression, throttle: None };
    let progress = Progress::default();
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let diffed = watched(&name, source.size().0, &progress, beside(output, out.is_stdout()), || {
        story::diff(source, base, &mut out, None, &sending, &progress, &|| unless_stopped(stop))
    })?;
    let piped = out.is_stdout();
    out.commit()?;
    Ok((diffed, piped))
}

fn open_base(args: &DiffArgs, globals: &Globals) -> Result<(Box<dyn PlainTarget>, Option<Connection>)> {
    if let Some(file) = &args.base.base_digest {
        let (nodes, root) = kept_digests::read(std::io::BufReader::new(input(file)?)).map_err(|e| e.path(file))?;
        return Ok((Box::new(KnownByDigests { nodes, root }), None));
    }
    let Some(base) = &args.base.base else { return Ok((Box::new(Nothing), None)) };
    let place = Place::parse(base)?;
    let connection = place.host().map(|host| site::images_on(host, &args.ssh.options()));
    let wish = Wish {
        path: place.path().to_owned(),
        format: format(args.base_format.as_ref(), place.path()),
        read_only: true,
        way: WayWish::Auto,
        digests: None,
        size: None,
        force_share: args.force_share,
        afresh: false,
    };
    let backing = args.backing.dirs.clone();
    let options = LocalOptions { backing, ..site::local_options(&globals.state_dir, None) };
    let target = site::open_image(&wish, connection.as_ref(), &options)?;
    Ok((target, connection))
}

#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// The patch, or the file with a point; - for stdin
    #[arg(required_unless_present = "finish")]
    patch: Option<PathBuf>,
    /// The image: a file or block device. For a patch that starts from nothing, a file that does not exist yet
    #[arg(required_unless_present_any = ["finish", "to"])]
    image: Option<PathBuf>,
    /// Make a new point of a file with a point, in the store of this target: ssh://[user@]host[:port][/root],
    /// local:/root, /root, or a name of the configuration
    #[arg(long, value_name = "TARGET", conflicts_with_all = ["image", "finish", "undo", "format", "atomic", "in_place", "force"])]
    to: Option<String>,
    /// Finish an interrupted change of this image, and do nothing else
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["patch", "image", "undo"])]
    finish: Option<PathBuf>,
    /// Write the patch that leads back into this file, before anything is changed
    #[arg(long, value_name = "FILE", conflicts_with = "in_place")]
    undo: Option<PathBuf>,
    /// Format of the image; never guessed from the content [default: raw or qcow2, by its name]
    #[arg(long, value_name = "FORMAT", value_parser = FORMATS)]
    format: Option<String>,
    #[command(flatten)]
    way: WayArgs,
    /// Let a patch that starts from nothing replace an existing image
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    unwrap: UnwrapArgs,
    #[command(flatten)]
    create_store: CreateStore,
    #[command(flatten)]
    ssh: SshArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

pub fn apply(args: &ApplyArgs, globals: &Globals, output: Output) -> Result<Exit> {
    if let Some(image) = &args.finish {
        return finish(&absolute(image)?, globals, output);
    }
    if let (Some(file), Some(to)) = (&args.patch, &args.to) {
        return crate::cli::store::pointfile::apply(
            file,
            &args.unwrap,
            &Target::resolve(to, &args.ssh, &globals.config()?)?,
            args.create_store,
            output,
        );
    }
    let (Some(patch), Some(image)) = (&args.patch, &args.image) else {
        return Err(Error::new(Kind::Usage, "a patch and an image are needed"));
    };
    let image = absolute(image)?;
    if args.unwrap.verifies() && args.way.wish() == WayWish::InPlace {
        let what = "what is written in place is there before the signature is known to be right";
        return Err(
            Error::new(Kind::Usage, what).hint("leave --in-place away: the patch is kept beside the image first")
        );
    }
    let stop = listen()?;
    let input = args.unwrap.open(patch)?.input;
    let options = site::local_options(&globals.state_dir, args.undo.as_deref().map(absolute).transpose()?);
    let open = |header: &virt_replica::patch::Header| {
        let wish = Wish {
            path: image.clone(),
            format: format(args.format.as_ref(), &image),
            read_only: false,
            way: args.way.wish(),
            digests: None,
            size: Some(if header.from_root.is_some() { header.size_from } else { header.size }),
            force_share: false,
            afresh: true,
        };
        site::open_image(&wish, None, &options)
    };
    let progress = Progress::default();
    let name = image.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let size = std::fs::metadata(&image).map_or(0, |m| m.len());
    let mut told = |done, _| progress.scanned.store(done, Ordering::Relaxed);
    let good = || unless_stopped(stop);
    let applied = watched(&name, size, &progress, output, || {
        patchfile::apply(input, &open, &Finish::default(), args.force, &mut told, &good)
    })?;
    if output.json {
        print_json(&json!({ "image": image, "undo": args.undo, "applied": applied }))?;
    } else {
        print(&describe(&applied, &image))?;
    }
    Ok(Exit::Done)
}

fn finish(image: &Path, globals: &Globals, output: Output) -> Result<Exit> {
    let finished = redo::finish(image, &site::redo_dir(&globals.state_dir))?;
    let said = if finished { "what was cut short on it is done now" } else { "nothing was cut short on it" };
    match output.json {
        true => print_json(&json!({ "image": image, "finished": finished }))?,
        false => print(&format!("{}: {said}", image.display()))?,
    }
    Ok(Exit::Done)
}

fn describe(applied: &Applied, image: &Path) -> String {
    let image = image.display();
    match (applied.already, applied.way) {
        (false, Some(way)) => {
            format!("{image} has root {} now; {} blocks changed, {way}", applied.root, applied.blocks_changed)
        }
        _ => format!("{image} has root {} already; nothing was changed", applied.root),
    }
}

#[derive(Debug, Args)]
pub struct PatchArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Say what a patch leads from and to, and how much it holds
    Info(LookArgs),
    /// Check every block of a patch that can be checked without its base
    Verify(LookArgs),
    /// Make one patch of a chain of them
    Merge(MergeArgs),
}

#[derive(Debug, Args)]
struct LookArgs {
    /// The patch; - for stdin
    patch: PathBuf,
    #[command(flatten)]
    unwrap: UnwrapArgs,
    /// Print JSON for scripts
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct MergeArgs {
    /// The patches, in the order in which they are applied
    #[arg(num_args = 2.., required = true, value_name = "PATCH")]
    patches: Vec<PathBuf>,
    /// Write the one patch here; - for stdout
    #[arg(short, long, value_name = "PATCH")]
    output: PathBuf,
    /// Replace it if it is there
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    keys: KeyArgs,
    #[command(flatten)]
    wrap: WrapArgs,
    /// Print JSON for scripts
    #[arg(long)]
    json: bool,
}

impl PatchArgs {
    pub fn json(&self) -> bool {
        match &self.verb {
            Verb::Info(args) | Verb::Verify(args) => args.json,
            Verb::Merge(args) => args.json,
        }
    }
}

pub fn patch(args: &PatchArgs, output: Output) -> Result<Exit> {
    match &args.verb {
        Verb::Info(args) => look(args, false, output)?,
        Verb::Verify(args) => look(args, true, output)?,
        Verb::Merge(args) => merge_all(args, output)?,
    }
    Ok(Exit::Done)
}

fn look(args: &LookArgs, check: bool, output: Output) -> Result<()> {
    let path = &args.patch;
    let Opened { input, protection } = args.unwrap.open(path)?;
    let info = patchfile::look(input, check).map_err(|e| e.path(path))?;
    if output.json {
        let body = json!({ "patch": path, "checked": check, "protection": protection, "info": info });
        return Message { message_type: "patch", body }.print();
    }
    let mut text = table(&info);
    if protection.encrypted {
        text += "\nsecret  encrypted, for a key that was named";
    }
    if let Some(said) = &protection.signed {
        text += &format!("\nsigned  by the key that was named: {said}");
    }
    if check {
        let pieces = match info.blocks_in_pieces {
            0 => String::new(),
            n => format!("; {n} that travel in pieces are checked where they are applied"),
        };
        text = format!("{text}\nwhole: every record and every block is what it says{pieces}");
    }
    print(&text)
}

fn table(info: &PatchInfo) -> String {
    let of = match (&info.domain, &info.disk) {
        (Some(domain), Some(disk)) => format!("disk {disk} of domain {domain}"),
        _ => "a plain image".to_owned(),
    };
    let from = match info.from_root {
        Some(root) => format!("root {root}, {} bytes", info.size_from),
        None => "nothing".to_owned(),
    };
    format!(
        "of      {of}\nfrom    {from}\nto      root {}, {} bytes\nblocks  {} whole, {} in pieces, {} zero\nbytes   {}, with {} of content",
        info.to_root,
        info.size,
        info.blocks_whole,
        info.blocks_in_pieces,
        info.blocks_zero,
        render::bytes(info.bytes),
        render::bytes(info.content_bytes)
    )
}

fn merge_all(args: &MergeArgs, output: Output) -> Result<()> {
    let mut out = ProtectedOut::create(&args.output, args.force, &args.wrap)?;
    let patches = args.keys.open_all(&args.patches)?;
    let header = merge::merge(patches, &mut out)?;
    let piped = out.is_stdout();
    out.commit()?;
    let said = format!("{} patches are one, which leads to {} bytes", args.patches.len(), header.size);
    match (piped, output.json) {
        (true, _) => print_beside(&said, output),
        (_, true) => print_json(&json!({ "patches": args.patches, "output": args.output, "size": header.size }))?,
        _ => print(&said)?,
    }
    Ok(())
}
