//! `drill`: boots a throw-away copy of a point on this host, and waits for evidence that it works.

use super::here::HereArgs;
use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output};
use clap::Args;
use std::time::Duration;
use virt_replica::error::Result;
use virt_replica::name::PointId;
use virt_replica::recovery::probe::Probe;

#[derive(Debug, Args)]
pub struct DrillArgs {
    /// Name or UUID of the domain
    domain: String,
    /// The point [default: the head]
    #[arg(long, value_name = "POINT")]
    point: Option<PointId>,
    /// Evidence to wait for, may be given more than once: agent (the guest agent answers), serial:TEXT (the serial line
    /// prints it), tcp:ADDRESS/PREFIX:PORT (the guest accepts a connection there), script:/PATH (it ends with 0)
    #[arg(long = "probe", value_name = "PROBE", required = true)]
    probes: Vec<Probe>,
    /// How long the evidence may take
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = crate::cli::speak::render::parse_duration)]
    within: Duration,
    #[command(flatten)]
    here: HereArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

#[cfg(not(feature = "libvirt"))]
pub fn drill(_: &DrillArgs, _: &Globals, _: Output) -> Result<Exit> {
    crate::cli::globals::no_libvirt("drill")
}

#[cfg(feature = "libvirt")]
pub use run::drill;

#[cfg(feature = "libvirt")]
mod run {
    use super::*;
    use crate::cli::run::source;
    use crate::cli::speak::output::{Message, print};
    use crate::cli::speak::{render, signals};
    use virt_replica::error::{Error, Kind};
    use virt_replica::recovery::drill::{Outcome, Report};
    use virt_replica::wiring::local_target::DrillWish;

    /// Exit code 0 if all evidence was seen and nothing is left.
    pub fn drill(args: &DrillArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let stop = signals::listen_saying(
            "ending the drill (again: at once)",
            "ended at once; the next drill, or `virt-replica doctor --repair`, removes the rest",
        )?;
        let here = args.here.connect(globals)?;
        let found = here.find(&args.domain, args.point.as_ref())?;
        let wish = DrillWish {
            id: source::new_run()?,
            uuid: source::new_uuid()?,
            bits: source::random(),
            probes: args.probes.clone(),
            within: args.within,
        };
        let say = |what: &str| output.step(what);
        let report = here.drill(&found, wish, &say, stop)?;
        match output.json {
            true => Message { message_type: "drill", body: &report }.print()?,
            false => print(&describe(&report))?,
        }
        if report.outcome == Outcome::Passed {
            return Ok(Exit::Done);
        }
        let why = report.error.as_deref().unwrap_or("not all evidence was seen");
        let error = Error::new(report.error_kind.unwrap_or(Kind::Refused), format!("the drill failed: {why}"));
        Err(error.domain(&report.domain).point(&report.point))
    }

    fn describe(report: &Report) -> String {
        let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1000.0);
        let mut lines = vec![match (report.outcome, report.rto_ms) {
            (Outcome::Passed, Some(rto)) => {
                format!(
                    "{}: the copy of point {} works, {} after the beginning",
                    report.domain,
                    report.point,
                    seconds(rto)
                )
            }
            _ => format!("{}: the drill of point {} FAILED", report.domain, report.point),
        }];
        for evidence in &report.evidence {
            lines.push(match evidence.after_ms {
                Some(ms) => format!("  seen after {}: {}", seconds(ms), evidence.probe),
                None => format!("  not seen: {}", evidence.probe),
            });
        }
        let left = match report.cleaned {
            true => "nothing of it is left but the report",
            false => "the copy could not be removed; `virt-replica doctor --repair`, or the next drill, tries again",
        };
        lines.push(render::wrap("  ", &format!("{left}: {}", report.kept.display())));
        lines.join("\n")
    }
}
