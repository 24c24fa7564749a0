//! `ready`: whether a domain could be brought up on this host, and what is missing.

use super::Globals;
use super::here::HereArgs;
use super::output::{Exit, Output};
use clap::Args;
use virt_replica::error::Result;
use virt_replica::name::PointId;

#[derive(Debug, Args)]
pub struct ReadyArgs {
    /// Name or UUID of the domain
    domain: String,
    /// The point [default: the head]
    #[arg(long, value_name = "POINT")]
    point: Option<PointId>,
    #[command(flatten)]
    here: HereArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

#[cfg(not(feature = "libvirt"))]
pub fn ready(_: &ReadyArgs, _: &Globals, _: Output) -> Result<Exit> {
    super::no_libvirt("ready")
}

#[cfg(feature = "libvirt")]
pub use look::ready;

#[cfg(feature = "libvirt")]
mod look {
    use super::*;
    use crate::cli::output::{print, print_json};
    use crate::cli::render;
    use serde_json::json;
    use virt_replica::recovery::ready::{Color, Finding, Question, worst};
    use virt_replica::site::here::Found;

    /// Exit code 1 if anything is red.
    pub fn ready(args: &ReadyArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let here = args.here.connect(globals)?;
        let found = here.find(&args.domain, args.point.as_ref())?;
        let findings = here.ready(&found)?;
        let is_ready = worst(&findings) < Color::Red;
        match output.json {
            true => print_json(&json!({
                "domain": found.name, "uuid": found.uuid, "point": found.point.id, "ready": is_ready, "findings": findings,
            }))?,
            false => print(&describe(&found, &findings))?,
        }
        Ok(if is_ready { Exit::Done } else { Exit::Code(1) })
    }

    fn describe(found: &Found, findings: &[Finding]) -> String {
        let red = findings.iter().filter(|f| f.color == Color::Red).count();
        let verdict = match red {
            0 => format!("{} can be brought up here from point {}", found.name, found.point.id),
            n => format!("{} cannot be brought up here yet: {n} to do", found.name),
        };
        let mut lines = vec![verdict];
        for finding in findings {
            // What the guest will not notice is for the JSON.
            if finding.question == Question::Devices && finding.color == Color::Green {
                continue;
            }
            let color = match finding.color {
                Color::Green => "ok",
                Color::Yellow => "note",
                Color::Red => "RED",
            };
            let label = format!("  {color:4} {:13} ", finding.question.words());
            lines.push(render::wrap(&label, &finding.what));
            if let Some(advice) = &finding.advice {
                lines.push(render::wrap(&format!("{:20} to do: ", ""), advice));
            }
        }
        lines.join("\n")
    }
}
