//! `doctor`: what is left of runs that were cut short, in words, and the way back.

use super::Globals;
use super::output::{Exit, Output};
use clap::Args;
use std::time::Duration;
use virt_replica::error::Result;

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Name or UUID of a domain [default: all domains this host knows]
    domain: Option<String>,
    /// Mend what can be mended, as the next run would
    #[arg(long)]
    repair: bool,
    /// How long a commit may take to become ready before it is left to the next run
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = super::render::parse_duration,
          requires = "repair")]
    ready_timeout: Duration,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

#[cfg(not(feature = "libvirt"))]
pub fn doctor(_: &DoctorArgs, _: &Globals, _: Output) -> Result<Exit> {
    super::no_libvirt("doctor")
}

#[cfg(feature = "libvirt")]
pub use examine::doctor;

#[cfg(feature = "libvirt")]
mod examine {
    use super::*;
    use crate::cli::output::{print, print_json};
    use crate::cli::{render, source};
    use serde_json::json;
    use virt_replica::error::{Error, Kind};
    use virt_replica::hypervisor::Hypervisor as _;
    use virt_replica::name::DomainUuid;
    use virt_replica::replicate::doctor::{Finding, Health};
    use virt_replica::replicate::journal;
    use virt_replica::replicate::report::Report;
    use virt_replica::replicate::settle::SettleOptions;
    use virt_replica::site::Site;

    /// Examines domains, and mends them on request. Exit code 1 if anything is left to be done, 11 if another program
    /// is at work on what was to be mended.
    pub fn doctor(args: &DoctorArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let site = source::connect(globals)?;
        let options = SettleOptions { ready_within: args.ready_timeout, ..SettleOptions::default() };
        let repair = args.repair.then_some(&options);
        let patients = match &args.domain {
            Some(name) => vec![find(&site, name)?],
            None => everybody(&site)?,
        };
        let findings: Vec<Finding> = patients.iter().map(|uuid| examine(&site, uuid, repair)).collect();
        match output.json {
            true => print_json(&json!({ "domains": findings }))?,
            false => print(&describe(&findings, args.domain.is_some()))?,
        }
        let any = |wanted: &[Health]| findings.iter().any(|f| wanted.contains(&f.health));
        Ok(if any(&[Health::Repairable, Health::NeedsPerson]) {
            Exit::Code(1)
        } else if args.repair && any(&[Health::Busy]) {
            // Asked to mend and did not: whoever scripts it must not take that for done.
            Exit::Code(Kind::Busy.exit_code())
        } else {
            Exit::Done
        })
    }

    /// One domain that cannot be examined must not hide the others.
    fn examine(site: &Site, uuid: &DomainUuid, repair: Option<&SettleOptions>) -> Finding {
        site.examine(uuid, repair).unwrap_or_else(|e| Finding {
            uuid: uuid.clone(),
            domain: e.context().domain.clone(),
            health: Health::NeedsPerson,
            explanation: [Some(e.chain()), e.hint_text().map(|h| format!("what to do: {h}"))]
                .into_iter()
                .flatten()
                .collect(),
            done: Vec::new(),
        })
    }

    /// All domains that libvirt knows, and all that have state here.
    fn everybody(site: &Site) -> Result<Vec<DomainUuid>> {
        let mut uuids: Vec<DomainUuid> = site.hypervisor().names()?.into_iter().map(|d| d.uuid).collect();
        for uuid in journal::known_domains(site.state())? {
            if !uuids.contains(&uuid) {
                uuids.push(uuid);
            }
        }
        Ok(uuids)
    }

    /// libvirt may have forgotten a domain that we remember.
    fn find(site: &Site, name: &str) -> Result<DomainUuid> {
        match site.hypervisor().find(name) {
            Ok(domain) => return Ok(domain.uuid),
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(e) => return Err(e),
        }
        for uuid in journal::known_domains(site.state())? {
            let recorded = journal::peek(site.state(), &uuid)?.map(|r| r.domain);
            let reported = journal::last_report::<Report>(site.state(), &uuid).ok().flatten().map(|r| r.domain);
            if uuid.as_str() == name || recorded.iter().chain(&reported).any(|n| n.as_str() == name) {
                return Ok(uuid);
            }
        }
        Err(Error::new(Kind::NotFound, format!("neither libvirt nor this host's journal knows a domain '{name}'"))
            .hint("`virsh list --all` shows libvirt's domains; is the right one asked (--connect, --state-dir)?"))
    }

    fn describe(findings: &[Finding], named: bool) -> String {
        let sound = findings.iter().filter(|f| f.health == Health::Sound).count();
        let mut paragraphs: Vec<String> =
            findings.iter().filter(|f| named || f.health != Health::Sound).map(describe_one).collect();
        if !named {
            paragraphs.push(match (sound, findings.len()) {
                (_, 0) => "no domain is known here".to_owned(),
                (n, all) if n == all => format!("all domains are sound ({all})"),
                (n, all) => format!("{n} of {all} domains are sound"),
            });
        }
        paragraphs.join("\n\n")
    }

    fn describe_one(finding: &Finding) -> String {
        let name = finding.domain.as_deref().unwrap_or(finding.uuid.as_str());
        let verdict = match finding.health {
            Health::Sound => "sound: it is on its own images, and nothing of ours is left on it",
            Health::Busy => "a program of ours works on it right now",
            Health::Repairable => "a run was cut short; `virt-replica doctor --repair` or the next run mends it",
            Health::Repaired => "a run was cut short, and is mended now",
            Health::NeedsPerson => "a person has to look",
        };
        let mut lines = vec![format!("{name}: {verdict}")];
        lines.extend(finding.explanation.iter().map(|text| render::wrap("  - ", text)));
        lines.extend(finding.done.iter().map(|text| render::wrap("  done: ", text)));
        lines.join("\n")
    }
}
