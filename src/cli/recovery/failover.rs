//! `failover`: at the source, hands a domain to its target (planned); on the target, brings one up because its source
//! is gone, undoes that, or makes it the truth.

use super::handover::HandoverArgs;
use super::here::HereArgs;
use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output};
use clap::{ArgGroup, Args};
use virt_replica::error::Result;
use virt_replica::name::PointId;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("here").args(["unplanned", "undo", "commit"]), group = ArgGroup::new("back").args(["undo", "abort"]))]
pub struct FailoverArgs {
    /// Name or UUID of the domain
    domain: String,
    /// At the source: shut the guest down, send the rest, and have this target start it; nothing is lost
    #[arg(long, value_name = "TARGET", conflicts_with = "here")]
    to: Option<String>,
    /// Call a planned failover off: the target ends the domain, then it is started here again
    #[arg(long, requires = "to")]
    abort: bool,
    #[command(flatten)]
    handover: HandoverArgs,
    /// On the target: bring it up from a point, without its source. Its writes since that point are not here
    #[arg(long, requires = "source_is_dead")]
    unplanned: bool,
    /// You have made sure that the domain cannot run at its source any more: the host is off, or cut from storage and
    /// network
    #[arg(long, requires = "unplanned")]
    source_is_dead: bool,
    /// The point [default: the head]
    #[arg(long, value_name = "POINT", requires = "unplanned")]
    point: Option<PointId>,
    /// Ask libvirt of the source first (qemu+ssh://a/system), and go no further if the domain runs there
    #[arg(long, value_name = "URI", requires = "unplanned")]
    ask: Option<String>,
    /// On the target: end it, throw away its writes there, and let its source replicate again
    #[arg(long, requires = "lose_its_writes")]
    undo: bool,
    /// You know that everything written on the target since the failover is lost
    #[arg(long, requires = "back")]
    lose_its_writes: bool,
    /// On the target: stay here for good. The generation rises, the old source is refused for ever, and there is no
    /// undo
    #[arg(long)]
    commit: bool,
    #[command(flatten)]
    here: HereArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

#[cfg(not(feature = "libvirt"))]
pub fn failover(_: &FailoverArgs, _: &Globals, _: Output) -> Result<Exit> {
    crate::cli::globals::no_libvirt("failover")
}

#[cfg(feature = "libvirt")]
pub use act::failover;

#[cfg(feature = "libvirt")]
mod act {
    use super::*;
    use crate::cli::recovery::handover;
    use crate::cli::speak::output::{Message, print};
    use crate::cli::speak::render;
    use serde_json::json;
    use virt_replica::error::{Error, Kind};
    use virt_replica::name::{DomainName, Generation};
    use virt_replica::recovery::failover::FailoverRecord;

    pub fn failover(args: &FailoverArgs, globals: &Globals, output: Output) -> Result<Exit> {
        match &args.to {
            Some(to) if args.abort => {
                return handover::abort(&args.handover, &args.domain, to, args.lose_its_writes, globals, output);
            }
            Some(to) => return handover::planned(&args.handover, &args.domain, to, globals, output),
            None if !(args.unplanned || args.undo || args.commit) => return Err(which_one()),
            None => {}
        }
        let here = args.here.connect(globals)?;
        let say = |what: &str| output.step(what);
        let (mut generation, mut known) = (None, None);
        let (record, action) = if args.undo {
            (here.undo_failover(&args.domain, &say)?, "undone")
        } else if args.commit {
            let (record, committed) = here.commit_failover(&args.domain, &say)?;
            generation = Some(committed);
            (record, "committed")
        } else {
            let found = here.find_for_failover(&args.domain, args.point.as_ref())?;
            known = found.point.autostart;
            (here.failover(&found, args.ask.as_deref(), &say)?, "running")
        };
        match output.json {
            true => Message { message_type: "failover", body: body(&record, generation, action, known) }.print()?,
            false => print(&describe(&record, generation, action, known))?,
        }
        Ok(Exit::Done)
    }

    fn which_one() -> Error {
        Error::new(Kind::Usage, "is the source alive, or gone?").hint(
            "at a source that is alive: `virt-replica failover DOMAIN --to TARGET`, and nothing is lost; on the target, if the source \
             is gone: `virt-replica failover DOMAIN --unplanned --source-is-dead`",
        )
    }

    fn body(
        record: &FailoverRecord,
        generation: Option<Generation>,
        action: &str,
        known: Option<bool>,
    ) -> serde_json::Value {
        // If the point does not record autostart, the source's order does.
        let autostart = if record.wanted.autostart { Some(true) } else { known.map(|_| false) };
        json!({
            "domain": record.domain, "uuid": record.uuid, "point": record.point, "frozen_at": record.frozen_at,
            "since": record.started_at, "overlays": record.dir, "action": action, "generation": generation,
            "autostart": autostart,
        })
    }

    fn describe(record: &FailoverRecord, generation: Option<Generation>, action: &str, known: Option<bool>) -> String {
        let (name, point) = (&record.domain, &record.point);
        match (action, generation) {
            ("running", _) => [
                format!("{name} runs here, from point {point}, as it was at {}", render::time(record.frozen_at)),
                render::wrap("  ", "its source is refused from now on; keep it shut off"),
                render::wrap("  ", &starts_with_host(name, record.wanted.autostart, known)),
                render::wrap("  ", &format!("what it writes goes to {}", record.dir.display())),
                render::wrap(
                    "  next: ",
                    &format!(
                        "`virt-replica failover {name} --commit` to stay, or `--undo --lose-its-writes` to go back"
                    ),
                ),
            ]
            .join("\n"),
            ("committed", Some(generation)) => {
                format!("{name} lives here now: generation {generation}; its old source is refused for ever")
            }
            _ => format!(
                "{name} does not run here any more, and what it wrote here is gone; its source may replicate again"
            ),
        }
    }

    /// `known`: whether it started with its source's host, by the point.
    fn starts_with_host(name: &DomainName, is_set: bool, known: Option<bool>) -> String {
        match known {
            _ if is_set => "it is to start with this host, as it did with its source's".to_owned(),
            Some(true) => format!(
                "it started with its source's host, and libvirt here has not taken that on: `virsh autostart {name}`"
            ),
            Some(false) => "it does not start with this host, as it did not with its source's".to_owned(),
            None => format!(
                "whether it started with its source's host is not known of this point, so it does not start with this one: \
                 `virsh autostart {name}` if it should"
            ),
        }
    }
}
