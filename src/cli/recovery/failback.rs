//! `failback`: on the host where a domain was brought up, hands it to its home again.

use super::handover::HandoverArgs;
use super::here::HereArgs;
use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output};
use clap::Args;
use virt_replica::error::Result;

#[derive(Debug, Args)]
pub struct FailbackArgs {
    /// Name, UUID or id of the domain, which runs on this host
    domain: String,
    /// Its home: ssh://[user@]host[:port][/root], or a name of the configuration
    #[arg(long, value_name = "HOME")]
    to: String,
    /// You know that the home loses its own content of the domain. The content becomes a pinned point of the home's
    /// store, and the definition goes
    #[arg(long, required = true)]
    home_loses: bool,
    /// Commit nothing: `failover --to HOME --abort --lose-its-writes` here brings it back, until somebody commits
    #[arg(long)]
    keep_undo: bool,
    #[command(flatten)]
    handover: HandoverArgs,
    #[command(flatten)]
    here: HereArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

#[cfg(not(feature = "libvirt"))]
pub fn failback(_: &FailbackArgs, _: &Globals, _: Output) -> Result<Exit> {
    crate::cli::globals::no_libvirt("failback")
}

#[cfg(feature = "libvirt")]
pub use act::failback;

#[cfg(feature = "libvirt")]
mod act {
    use super::*;
    use crate::cli::recovery::handover::{Prepared, describe};
    use crate::cli::speak::output::{Message, print};
    use crate::cli::speak::render;
    use serde_json::json;
    use std::time::Duration;
    use virt_replica::recovery::failback::CameHome;

    pub fn failback(args: &FailbackArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let here = args.here.connect(globals)?;
        let mut prepared = Prepared::new(&args.handover, &args.domain, &args.to, globals, output)?;
        // What the home gave way with is a young point, and no word of what is here: a comparison with it may take
        // hours, and is made while the guest works, as everything is that can be.
        prepared.request.head_age_max = Duration::ZERO;
        let done = prepared.with(|p, means| p.site.fail_back(&here, means, &p.request, args.keep_undo))?;
        match output.json {
            true => {
                let body = json!({ "handover": done.handover, "old": done.old, "generation": done.generation });
                Message { message_type: "failback", body }.print()?;
            }
            false => print(&words(&done).join("\n"))?,
        }
        Ok(Exit::Done)
    }

    fn words(done: &CameHome) -> Vec<String> {
        let (name, to) = (&done.handover.domain, &done.handover.to);
        let mut lines = describe(&done.handover, done.generation.is_none());
        if let Some(old) = &done.old {
            let what =
                format!("what {to} had is point {old} of its store, pinned: `virt-replica unpin` there lets it go");
            lines.push(render::wrap("  ", &what));
        }
        if let Some(generation) = done.generation {
            lines.push(render::wrap("  ", &format!("committed: generation {generation}; what ran here is gone, and the replica here is open for {to} again")));
            lines.push(render::wrap("  next: ", &format!("on {to}, `virt-replica sync {name} --to` this host protects it again, and `virt-replica detach {name}` gives it images of its own")));
        }
        lines
    }
}
