//! `give-way`: what this host has of a domain that lives elsewhere becomes a point of its own store.

use super::here::HereArgs;
use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output};
use crate::cli::target::CreateStore;
use clap::Args;
use virt_replica::error::Result;

#[derive(Debug, Args)]
pub struct GiveWayArgs {
    /// Name or UUID of the domain
    domain: String,
    /// You know that the domain lives on another host, and that its definition is removed here
    #[arg(long, required = true)]
    lives_elsewhere: bool,
    #[command(flatten)]
    create_store: CreateStore,
    #[command(flatten)]
    here: HereArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

#[cfg(not(feature = "libvirt"))]
pub fn give_way(_: &GiveWayArgs, _: &Globals, _: Output) -> Result<Exit> {
    crate::cli::globals::no_libvirt("give-way")
}

#[cfg(feature = "libvirt")]
pub use act::give_way;

#[cfg(feature = "libvirt")]
mod act {
    use super::*;
    use crate::cli::run::source;
    use crate::cli::speak::output::{Message, print};
    use crate::cli::speak::render;
    use serde_json::json;
    use virt_replica::error::Kind;

    pub fn give_way(args: &GiveWayArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let here = args.here.connect_creating(globals, args.create_store)?;
        // Once it has given way only the store knows it.
        let (uuid, name) = match source::connect(globals)?
            .hypervisor()
            .names()?
            .into_iter()
            .find(|d| d.name.as_str() == args.domain || d.uuid.as_str() == args.domain)
        {
            Some(found) => (found.uuid, found.name),
            None => {
                here.find(&args.domain, None).map(|found| (found.uuid, found.name)).map_err(|e| match e.kind() {
                    Kind::NotFound => {
                        e.hint("neither libvirt nor the store knows it; `virsh list --all` shows the domains")
                    }
                    _ => e,
                })?
            }
        };
        let say = |what: &str| output.step(what);
        let done = here.give_way(&uuid, &say).map_err(|e| e.domain(&name))?;
        match (output.json, &done.point) {
            (true, point) => {
                let body = json!({ "domain": name, "uuid": uuid, "point": point });
                Message { message_type: "give_way", body }.print()?;
            }
            (false, Some(point)) => print(
                &[
                    format!("{name} has given way: what this host had is point {point} of its own store"),
                    render::wrap("  ", "it is pinned: `virt-replica unpin` lets it go when nobody misses anything"),
                    render::wrap("  ", "its old images stay where they are; nothing here needs them any more"),
                    render::wrap(
                        "  next: ",
                        "where the domain lives, `virt-replica sync` to this host sends what differs",
                    ),
                ]
                .join("\n"),
            )?,
            (false, None) => print(&format!("libvirt has no domain {name} here: there is nothing to give way"))?,
        }
        Ok(Exit::Done)
    }
}
