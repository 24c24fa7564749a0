//! `ready`: whether a domain could be brought up on this host, or on a target, and what is missing.

use super::here::HereArgs;
use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output, print, print_json};
use crate::cli::speak::{advice, render};
use crate::cli::target::{SshArgs, Target, hang_up};
use clap::Args;
use serde_json::json;
use virt_replica::error::{Result, printable};
use virt_replica::name::{DomainName, DomainUuid, PointId};
use virt_replica::recovery::bringup::{BringUp as _, Readiness};
use virt_replica::recovery::ready::{Color, Finding, Question};
use virt_replica::transport::Service;

#[derive(Debug, Args)]
pub struct ReadyArgs {
    /// Name or UUID of the domain
    domain: String,
    /// Ask this target instead of this host, as a planned failover would: ssh://[user@]host[:port][/root], or a name of
    /// the configuration
    #[arg(long, value_name = "TARGET", conflicts_with_all = ["root", "mapping"])]
    to: Option<String>,
    /// The point [default: the head]
    #[arg(long, value_name = "POINT")]
    point: Option<PointId>,
    #[command(flatten)]
    here: HereArgs,
    #[command(flatten)]
    ssh: SshArgs,
    /// Print the lines to paste into recovery.yaml on the target, and nothing else
    #[arg(long, conflicts_with = "json")]
    suggest: bool,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

/// Exit code 1 if anything is red.
pub fn ready(args: &ReadyArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let answer = match &args.to {
        Some(to) => there(to, args, globals)?,
        None => here(args, globals)?,
    };
    let is_ready = answer.readiness.red().is_none();
    if args.suggest {
        print(&suggestion(&answer))?;
        return Ok(if is_ready { Exit::Done } else { Exit::Code(1) });
    }
    match output.json {
        true => print_json(&json!({
            "domain": answer.name, "uuid": answer.uuid, "target": answer.target, "point": answer.readiness.point,
            "ready": is_ready, "findings": answer.readiness.findings, "suggestion": answer.readiness.suggestion,
        }))?,
        false => print(&describe(&answer))?,
    }
    Ok(if is_ready { Exit::Done } else { Exit::Code(1) })
}

struct Answer {
    name: DomainName,
    uuid: DomainUuid,
    /// `None`: this host.
    target: Option<String>,
    readiness: Readiness,
}

fn there(to: &str, args: &ReadyArgs, globals: &Globals) -> Result<Answer> {
    let mut target = Target::resolve(to, &args.ssh, &globals.config()?)?;
    target.ssh.service = Service::Failover;
    let connection = target.connection();
    let asked = || {
        let client = connection.client()?;
        let (uuid, name) = crate::cli::store::named::find(&client, &args.domain, globals)?;
        let readiness = advice::said(client.bring_up(&uuid).ready(args.point.as_ref())?);
        Ok(Answer { name, uuid, target: Some(target.url.to_string()), readiness })
    };
    let answer = asked();
    hang_up(connection);
    answer
}

#[cfg(feature = "libvirt")]
fn here(args: &ReadyArgs, globals: &Globals) -> Result<Answer> {
    let here = args.here.connect(globals)?;
    let found = here.find(&args.domain, args.point.as_ref())?;
    let readiness = advice::said(here.readiness(&found)?);
    Ok(Answer { name: found.name, uuid: found.uuid, target: None, readiness })
}

#[cfg(not(feature = "libvirt"))]
fn here(args: &ReadyArgs, _: &Globals) -> Result<Answer> {
    let _ = &args.here;
    crate::cli::globals::no_libvirt("ready without --to")
}

/// Of another host's words: printable ones only, a line each.
fn suggestion(answer: &Answer) -> String {
    match answer.readiness.suggestion.as_slice() {
        [] => "# recovery.yaml needs nothing more for this domain".to_owned(),
        lines => lines.iter().take(200).map(|line| printable(line, 300)).collect::<Vec<_>>().join("\n"),
    }
}

fn describe(answer: &Answer) -> String {
    let Answer { name, readiness: Readiness { point, findings, .. }, .. } = answer;
    let place = answer.target.as_ref().map_or("here".to_owned(), |target| format!("on {target}"));
    let red = findings.iter().filter(|f| f.color == Color::Red).count();
    let verdict = match red {
        0 => format!("{name} can be brought up {place} from point {point}"),
        n => format!("{name} cannot be brought up {place} yet: {n} to do"),
    };
    // What the guest will not notice is for the JSON.
    let of_interest = |f: &&Finding| f.question != Question::Devices || f.color != Color::Green;
    let lines = findings.iter().filter(of_interest).flat_map(describe_one);
    std::iter::once(verdict).chain(lines).collect::<Vec<_>>().join("\n")
}

fn describe_one(finding: &Finding) -> Vec<String> {
    let color = match finding.color {
        Color::Green => "ok",
        Color::Yellow => "note",
        Color::Red => "RED",
    };
    let label = format!("  {color:4} {:13} ", finding.question.words());
    let to_do = finding.advice.as_ref().map(|advice| render::wrap(&format!("{:20} to do: ", ""), advice));
    [render::wrap(&label, &finding.what)].into_iter().chain(to_do).collect()
}
