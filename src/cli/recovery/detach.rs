//! `detach`: images of its own for a domain that was brought up on this host for good.

use super::here::HereArgs;
use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output};
use clap::{Args, ValueEnum};
use virt_replica::error::Result;
use virt_replica::replicate::state::handover_record::DiskFormat;

#[derive(Debug, Args)]
pub struct DetachArgs {
    /// Name or UUID of the domain
    domain: String,
    /// Copy at most this much per second (100M) [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = crate::cli::speak::render::parse_bytes)]
    rate: Option<u64>,
    /// Format of its images. raw needs a copy of the whole disk, and holds the guest for a moment. same: as they were
    /// at the source [default: as the migration asked for, or qcow2]
    #[arg(long, value_name = "FORMAT")]
    disk_format: Option<WantedFormat>,
    #[command(flatten)]
    here: HereArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

/// What images are to be once they are a domain's own.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum WantedFormat {
    Qcow2,
    Raw,
    Same,
}

impl From<WantedFormat> for DiskFormat {
    fn from(wanted: WantedFormat) -> DiskFormat {
        match wanted {
            WantedFormat::Qcow2 => DiskFormat::Qcow2,
            WantedFormat::Raw => DiskFormat::Raw,
            WantedFormat::Same => DiskFormat::Same,
        }
    }
}

#[cfg(not(feature = "libvirt"))]
pub fn detach(_: &DetachArgs, _: &Globals, _: Output) -> Result<Exit> {
    crate::cli::globals::no_libvirt("detach")
}

#[cfg(feature = "libvirt")]
pub use act::detach;

#[cfg(feature = "libvirt")]
mod act {
    use super::*;
    use crate::cli::speak::output::{Message, print};
    use crate::cli::speak::{render, signals};
    use serde_json::json;
    use std::cell::Cell;
    use virt_replica::name::DiskName;
    use virt_replica::wiring::local_target::Told;

    pub fn detach(args: &DetachArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let stop = signals::listen_saying(
            "leaving it to QEMU, which goes on copying (again: at once)",
            "ended at once; `virt-replica detach` again goes on from there",
        )?;
        let here = args.here.connect(globals)?;
        let say = |what: &str| output.step(what);
        let said = Cell::new(0);
        let progress = |disk: &DiskName, done: u64, total: u64| {
            let tenth = (done * 10).checked_div(total).unwrap_or(0);
            if said.replace(tenth) != tenth {
                say(&format!("disk {disk}: {} of {} are looked at", render::bytes(done), render::bytes(total)));
            }
        };
        let done = here.detach(
            &args.domain,
            args.rate,
            args.disk_format.map(DiskFormat::from),
            Told { say: &say, progress: &progress },
            stop,
        )?;
        let (record, warnings) = (&done.record, &done.warnings);
        match output.json {
            true => {
                let body = json!({
                    "domain": record.domain, "uuid": record.uuid, "point": record.point, "images": record.dir,
                    "disks": record.detached, "raw": record.raw, "warnings": warnings,
                });
                Message { message_type: "detach", body }.print()?;
            }
            false => {
                let mut lines = vec![format!("{} has images of its own, in {}", record.domain, record.dir.display())];
                lines.push(render::wrap("  ", &format!("point {} is not read by it any more", record.point)));
                lines.extend(warnings.iter().map(|w| render::wrap("warning: ", w)));
                print(&lines.join("\n"))?;
            }
        }
        Ok(Exit::Done)
    }
}
