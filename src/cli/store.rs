//! `store`: the directory on a target that holds its replicas.

pub(super) mod export;
// A build without libvirt prints less than it could.
#[cfg_attr(not(feature = "libvirt"), allow(dead_code))]
pub(super) mod named;
pub(super) mod pin;
pub(super) mod pointfile;
pub(super) mod points;
pub(super) mod prune;
pub(super) mod scrub;
pub(super) mod seed;
pub(super) mod set_generation;
pub(super) mod shorten;

use crate::cli::speak::output::{Exit, Output, print, print_json};
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::PathBuf;
use virt_replica::error::Result;
use virt_replica::transport::target::ROOT_DEFAULT;
use virt_replica::wiring::stores;

#[derive(Debug, Args)]
pub struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Create a store in this directory, or print the id of the one that exists
    Init {
        /// Directory of the store
        #[arg(value_name = "ROOT", default_value = ROOT_DEFAULT)]
        root: PathBuf,
        /// Print JSON for scripts
        #[arg(long)]
        json: bool,
    },
}

impl StoreArgs {
    pub fn json(&self) -> bool {
        let StoreCommand::Init { json, .. } = &self.command;
        *json
    }
}

pub fn store(args: &StoreArgs, output: Output) -> Result<Exit> {
    let StoreCommand::Init { root, .. } = &args.command;
    let seen = stores::create(root)?;
    let (root, id) = (seen.root.display().to_string(), seen.id.as_ref().map(|id| id.to_string()));
    if output.json {
        print_json(&json!({ "root": root, "id": id, "created": seen.created, "adopted": seen.adopted }))?;
        return Ok(Exit::Done);
    }
    let id = id.unwrap_or_else(|| "no id yet (it cannot be written to)".to_owned());
    print(&match (seen.created, seen.adopted) {
        (true, _) => format!("{root} is a store now: {id}"),
        (_, true) => format!("{root} is a store of an earlier version; its id is {id} from now on"),
        _ => format!("{root} is a store already: {id}"),
    })?;
    Ok(Exit::Done)
}
