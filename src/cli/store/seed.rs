//! `seed`: adopts a copy of a disk that is at the target already, so that the first run sends only what differs.

use crate::cli::plain::shared::BackingArgs;
use crate::cli::speak::output::{Exit, Output, print, print_json};
use crate::cli::speak::progress::bar;
use crate::cli::speak::render;
use crate::cli::target::CreateStore;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::image::{Format, Layer};
use virt_replica::name::{DiskName, DomainUuid};
use virt_replica::transport::target::ROOT_DEFAULT;
use virt_replica::wiring;

#[derive(Debug, Args)]
pub struct SeedArgs {
    /// UUID of the domain (`virsh domuuid DOMAIN` on the source)
    domain: String,
    /// The copy: a file or block device on this host. It is read and left as it is
    #[arg(long, value_name = "IMAGE")]
    from: PathBuf,
    /// Its format; never guessed, because a guest can make a raw image look like any other
    #[arg(long, value_parser = ["raw", "qcow2"])]
    format: String,
    /// The disk that the copy is of
    #[arg(long, value_name = "DISK", default_value = "vda")]
    disk: DiskName,
    #[command(flatten)]
    backing: BackingArgs,
    /// Directory of the store
    #[arg(long, value_name = "DIR", default_value = ROOT_DEFAULT)]
    root: PathBuf,
    #[command(flatten)]
    create_store: CreateStore,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

pub fn seed(args: &SeedArgs, output: Output) -> Result<Exit> {
    let uuid = DomainUuid::new(&args.domain).map_err(|_| {
        Error::new(Kind::Usage, format!("'{}' is not a UUID", args.domain))
            .hint("the target does not know the names of the source: `virsh domuuid DOMAIN` there prints it")
    })?;
    let path = std::path::absolute(&args.from).map_err(|e| Error::io("this cannot be an image", &args.from, e))?;
    let format = if args.format == "raw" { Format::Raw } else { Format::Qcow2 };
    let layer = Layer { path, format, block_device: wiring::is_block_device(&args.from), data_file: None };
    if args.create_store.create_store {
        wiring::stores::create(&args.root)?;
    }
    let shown = (!output.quiet && !output.json).then(|| bar(args.disk.as_str(), 0));
    let adopted = wiring::seed(&args.root, &uuid, &args.disk, (&layer, &args.backing.dirs), &mut |done, all| {
        if let Some(bar) = &shown {
            bar.set_length(all);
            bar.set_position(done);
        }
    });
    if let Some(bar) = &shown {
        bar.finish_and_clear();
    }
    let (size, data_bytes) = adopted?;
    match output.json {
        true => print_json(&json!({ "uuid": uuid, "disk": args.disk, "size": size, "data_bytes": data_bytes }))?,
        false => print(&format!(
            "disk {} of {uuid}: {} of data in {} are in the store; the first run compares with them",
            args.disk,
            render::bytes(data_bytes),
            render::bytes(size.0)
        ))?,
    }
    Ok(Exit::Done)
}
