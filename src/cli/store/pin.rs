//! `pin` and `unpin`: a point that is not to be removed.

use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, print, print_json};
use crate::cli::target::{TargetArgs, hang_up};
use clap::Args;
use serde_json::json;
use virt_replica::error::Result;
use virt_replica::name::PointId;
use virt_replica::replica::upkeep::Upkeep as _;

#[derive(Debug, Args)]
pub struct PinArgs {
    /// Name or UUID of the domain
    domain: String,
    /// The point
    point: PointId,
    #[command(flatten)]
    target: TargetArgs,
    /// The reason, for readers later
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct UnpinArgs {
    /// Name or UUID of the domain
    domain: String,
    /// The point
    point: PointId,
    #[command(flatten)]
    target: TargetArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

pub fn pin(args: &PinArgs, globals: &Globals) -> Result<Exit> {
    set(&args.domain, &args.point, &args.target, globals, Some(&args.reason), args.json)
}

pub fn unpin(args: &UnpinArgs, globals: &Globals) -> Result<Exit> {
    set(&args.domain, &args.point, &args.target, globals, None, args.json)
}

fn set(
    domain: &str,
    point: &PointId,
    target: &TargetArgs,
    globals: &Globals,
    reason: Option<&str>,
    json: bool,
) -> Result<Exit> {
    let target = target.resolve(globals)?;
    let connection = target.connection();
    let done = connection.client().and_then(|client| {
        let (uuid, name) = super::named::find(&client, domain, globals)?;
        client.open(&uuid)?.pin(point, reason).map_err(|e| e.domain(&name))?;
        Ok((uuid, name))
    });
    hang_up(connection);
    let (uuid, name) = done?;
    let pinned = reason.is_some();
    if json {
        let url = target.url.to_string();
        print_json(&json!({ "domain": name, "uuid": uuid, "target": url, "point": point, "pinned": pinned }))?;
    } else {
        let word = if pinned { "pinned" } else { "not pinned any more" };
        print(&format!("point {point} of {name} on {} is {word}", target.url))?;
    }
    Ok(Exit::Done)
}
