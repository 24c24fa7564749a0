//! `doctor`: what is left of runs that were cut short, in words, and the way back.

use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output};
use clap::Args;
use std::time::Duration;
use virt_replica::error::Result;

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Name or UUID of a domain [default: all domains this host knows]
    domain: Option<String>,
    /// Clean up what can be cleaned up, as the next run would
    #[arg(long)]
    repair: bool,
    /// How long a commit may take to become ready before it is left to the next run
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = crate::cli::speak::render::parse_duration,
          requires = "repair")]
    ready_timeout: Duration,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

#[cfg(not(feature = "libvirt"))]
pub fn doctor(_: &DoctorArgs, _: &Globals, _: Output) -> Result<Exit> {
    crate::cli::globals::no_libvirt("doctor")
}

#[cfg(feature = "libvirt")]
pub use examine::doctor;

#[cfg(feature = "libvirt")]
mod examine {
    use super::*;
    use crate::cli::run::source;
    use crate::cli::speak::output::{print, print_json};
    use crate::cli::speak::{advice, render};
    use serde_json::json;
    use virt_replica::error::{Context, Error, Kind};
    use virt_replica::hypervisor::machine::Machines as _;
    use virt_replica::hypervisor::{Hypervisor as _, Power};
    use virt_replica::name::DomainUuid;
    use virt_replica::recovery::drills::DrillRecord;
    use virt_replica::recovery::failover::{self, FailoverRecord};
    use virt_replica::replicate::doctor::{Finding, Health};
    use virt_replica::replicate::settle::options::SettleOptions;
    use virt_replica::replicate::state::handover_record::{self, Stage};
    use virt_replica::replicate::state::journal;
    use virt_replica::replicate::state::report::Report;
    use virt_replica::wiring::Site;

    /// Examines domains, and mends them on request. Exit code 1 if anything is left to be done, 11 if another program
    /// is at work on what was to be mended.
    pub fn doctor(args: &DoctorArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let site = source::connect(globals)?;
        let options = SettleOptions { ready_within: args.ready_timeout, ..SettleOptions::default() };
        let repair = args.repair.then_some(&options);
        let patients = match &args.domain {
            Some(name) => match find(&site, name) {
                // On a target nobody but a drill or a failover may know it.
                Err(e) if e.kind() == Kind::NotFound && drilled(&site, name)? => Vec::new(),
                found => vec![found?],
            },
            None => everybody(&site)?,
        };
        let mut findings: Vec<Finding> = patients.iter().map(|uuid| examine(&site, uuid, repair)).collect();
        findings.extend(drills(&site, args)?);
        findings.extend(failovers(&site, args)?);
        handovers(&site, args, &mut findings)?;
        findings.iter_mut().for_each(tell);
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
            explanation: vec![e.chain()],
            advice: e.advice().cloned(),
            done: Vec::new(),
        })
    }

    /// Puts the advice into words, as the last sentence of what was found.
    fn tell(finding: &mut Finding) {
        let Some(advice) = finding.advice.take() else { return };
        let about = Context { domain: finding.domain.clone(), ..Context::default() };
        finding.explanation.push(format!("what to do: {}", advice::words(&advice, &about)));
    }

    fn drilled(site: &Site, name: &str) -> Result<bool> {
        let drills = site.abandoned_drills()?.into_iter().map(|r| (r.domain, r.uuid));
        let failovers = site.unfinished_failovers()?.into_iter().map(|r| (r.domain, r.uuid));
        Ok(drills.chain(failovers).any(|(domain, uuid)| domain.as_str() == name || uuid.as_str() == name))
    }

    /// Failovers that were cut short. Up or down is for a person to say: nothing is done about them here.
    fn failovers(site: &Site, args: &DoctorArgs) -> Result<Vec<Finding>> {
        let wanted = |r: &FailoverRecord| {
            args.domain.as_ref().is_none_or(|name| r.domain.as_str() == name || r.uuid.as_str() == name)
        };
        let left = site.unfinished_failovers()?.into_iter().filter(wanted);
        Ok(left
            .map(|record| {
                let name = &record.domain;
                let (what, command) = match record.stage {
                    failover::Stage::Undoing => {
                        ("undoing of a failover to", format!("failover {name} --undo --lose-its-writes"))
                    }
                    failover::Stage::Detaching | failover::Stage::Detached => {
                        ("detaching from", format!("detach {name}"))
                    }
                    failover::Stage::HandingBack => {
                        ("failback after", format!("failback {name} --to HOME --home-loses"))
                    }
                    _ => ("failover to", format!("failover {name} --unplanned --source-is-dead")),
                };
                let explanation = vec![
                    format!("the {what} point {}, begun at {:.0}, was cut short", record.point, record.started_at),
                    format!("what to do: `virt-replica {command}` goes on from there"),
                ];
                let (uuid, domain) = (record.uuid, Some(record.domain.to_string()));
                Finding { uuid, domain, health: Health::NeedsPerson, explanation, advice: None, done: Vec::new() }
            })
            .collect())
    }

    /// Domains that were handed to their targets, or are on the way: where they live, and what is wrong with it.
    fn handovers(site: &Site, args: &DoctorArgs, findings: &mut Vec<Finding>) -> Result<()> {
        for record in handover_record::all(site.state())? {
            if args.domain.as_ref().is_some_and(|n| record.domain.as_str() != n && record.uuid.as_str() != n) {
                continue;
            }
            let power = site.hypervisor().power(&record.uuid)?.unwrap_or(Power::Off);
            let unasked = !record.asked || record.stage == Stage::Undone;
            let refusal = record.refusal(power);
            let mut explanation = vec![refusal.what().to_owned()];
            explanation.extend(advice::of(&refusal).map(|next| format!("what to do: {next}")));
            let mut done = Vec::new();
            let health = match record.stage {
                _ if record.alarm(power).is_some() => Health::NeedsPerson,
                Stage::Moved => Health::Sound,
                _ if unasked && args.repair => match site.settle_handover(&record.uuid) {
                    Ok(_) => {
                        done.push("the domain is back as it was before the handover".to_owned());
                        Health::Repaired
                    }
                    Err(e) if e.kind() == Kind::Busy => Health::Busy,
                    Err(e) => {
                        explanation.push(e.chain());
                        Health::NeedsPerson
                    }
                },
                _ if unasked => Health::Repairable,
                _ => Health::NeedsPerson,
            };
            match findings.iter_mut().find(|f| f.uuid == record.uuid && f.health == Health::Sound) {
                Some(finding) => (finding.health, finding.explanation, finding.done) = (health, explanation, done),
                None => {
                    let (uuid, domain) = (record.uuid, Some(record.domain.to_string()));
                    findings.push(Finding { uuid, domain, health, explanation, advice: None, done });
                }
            }
        }
        Ok(())
    }

    /// Drills on this host that were cut short, and, to mend it, nothing of them any more.
    fn drills(site: &Site, args: &DoctorArgs) -> Result<Vec<Finding>> {
        let wanted = |r: &DrillRecord| {
            args.domain.as_ref().is_none_or(|name| r.domain.as_str() == name || r.uuid.as_str() == name)
        };
        let left = site.abandoned_drills()?.into_iter().filter(wanted);
        Ok(left
            .map(|record| {
                let done = if args.repair { site.settle_drill(&record.id).map(|_| true) } else { Ok(false) };
                let (health, error) = match &done {
                    Ok(true) => (Health::Repaired, None),
                    Ok(false) => (Health::Repairable, None),
                    Err(e) => (Health::NeedsPerson, Some(e.chain())),
                };
                let what = format!(
                    "a drill of point {} was cut short: its copy '{}' may run on, with overlays in {}",
                    record.point,
                    record.drill_domain,
                    record.dir.display()
                );
                Finding {
                    uuid: record.uuid.clone(),
                    domain: Some(record.domain.to_string()),
                    health,
                    explanation: std::iter::once(what).chain(error).collect(),
                    advice: None,
                    done: if health == Health::Repaired {
                        vec!["the copy and all that was made for it is gone".into()]
                    } else {
                        Vec::new()
                    },
                }
            })
            .collect())
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
