//! `digest`: the digests of an image in a file.

use crate::cli::globals::Globals;
use crate::cli::plain::shared::{
    BackingArgs, FORMATS, OutFile, absolute, beside, listen, open_source, print_beside, unless_stopped, watched,
};
use crate::cli::speak::output::{Exit, Output, print, print_json};
use crate::cli::speak::render;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use virt_replica::engine::pump::Progress;
use virt_replica::error::Result;
use virt_replica::plain::kept_digests;
use virt_replica::plain::source::hash;
use virt_replica::wiring::{plain as site, workers};

#[derive(Debug, Args)]
pub struct DigestArgs {
    /// The image: a file or block device
    image: PathBuf,
    /// Write the digests here; - for stdout
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Format of the image; never guessed from the content [default: raw or qcow2, by its name]
    #[arg(long, value_name = "FORMAT", value_parser = FORMATS)]
    format: Option<String>,
    #[command(flatten)]
    backing: BackingArgs,
    /// Replace the file if it is there
    #[arg(long)]
    force: bool,
    /// Read the image although a QEMU is writing to it. The digests then belong to no single moment
    #[arg(long)]
    force_share: bool,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

pub fn digest(args: &DigestArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let image = absolute(&args.image)?;
    let mut out = OutFile::create(&args.output, args.force)?;
    let stop = listen()?;
    let options = site::read_options(&globals.state_dir, args.force_share, &args.backing.dirs);
    let source = open_source(args.format.as_ref(), &image, &options)?;
    let progress = Progress::default();
    let name = image.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let good = || unless_stopped(stop).and_then(|()| source.keep_going());
    let hashed = watched(&name, source.size().0, &progress, beside(output, out.is_stdout()), || {
        hash(source.image.as_ref(), workers(), &progress, &good)
    })?;
    good()?;
    let size = source.size();
    source.close()?;
    kept_digests::write(&hashed.nodes, hashed.root, &mut out)?;
    let (piped, bytes_read) = (out.is_stdout(), progress.read.load(Ordering::Relaxed));
    out.commit()?;
    let said = format!("{} has root {}; {} read", image.display(), hashed.root, render::bytes(bytes_read));
    match (piped, output.json) {
        (true, _) => print_beside(&said, output),
        (_, true) => {
            print_json(&json!({ "image": image, "size": size, "root": hashed.root, "bytes_read": bytes_read }))?;
        }
        _ => print(&said)?,
    }
    Ok(Exit::Done)
}
