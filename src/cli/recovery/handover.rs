//! What `failover --to` and `migrate` have in common: at the source, with a target that is reachable.

use crate::cli::target::{CreateStore, SshArgs};
use clap::Args;
use std::time::Duration;
use virt_replica::name::DiskName;

/// How the guest goes down, and what goes with it.
#[derive(Debug, Args)]
pub struct HandoverArgs {
    /// How long the guest may take to shut down. After that it keeps running, and nothing has changed
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = crate::cli::speak::render::parse_duration)]
    timeout: Duration,
    /// Then end it as by a power cut: data that it has not flushed is lost
    #[arg(long)]
    force_off: bool,
    /// Leave this disk out (vdb), as the runs before did: the domain no longer has it there; may be given more than
    /// once
    #[arg(long = "exclude-disk", value_name = "DISK")]
    exclude_disks: Vec<DiskName>,
    #[command(flatten)]
    create_store: CreateStore,
    #[command(flatten)]
    ssh: SshArgs,
}

#[cfg(feature = "libvirt")]
pub use act::{Prepared, abort, describe, planned};

#[cfg(feature = "libvirt")]
mod act {
    use super::*;
    use crate::cli::globals::Globals;
    use crate::cli::run::source;
    use crate::cli::run::watch::Watcher;
    use crate::cli::speak::output::{Exit, Message, Output, print};
    use crate::cli::speak::{render, signals};
    use crate::cli::target::{Target, hang_up};
    use serde_json::json;
    use std::sync::atomic::AtomicBool;
    use virt_replica::error::{Error, Kind, Result};
    use virt_replica::hypervisor::Hypervisor as _;
    use virt_replica::name::{DomainName, DomainUuid};
    use virt_replica::recovery::handover::{self, DiskFormat, Report};
    use virt_replica::replicate::cycle;
    use virt_replica::replicate::state::handover_record;
    use virt_replica::run_settings::RunSettings;
    use virt_replica::transport::Service;
    use virt_replica::transport::target::TargetUrl;
    use virt_replica::wiring::handover::Means;
    use virt_replica::wiring::{Connection, Site};

    /// A head that is older is brought up to date before the guest goes down.
    const HEAD_AGE_MAX: Duration = Duration::from_secs(120);

    /// All that a handover needs, found and checked.
    pub struct Prepared {
        pub site: Site,
        pub connection: Connection,
        pub runs: cycle::Request,
        pub request: handover::Request,
        pub stop: &'static AtomicBool,
        output: Output,
        watcher: Watcher,
    }

    impl Prepared {
        pub fn new(args: &HandoverArgs, domain: &str, to: &str, globals: &Globals, output: Output) -> Result<Prepared> {
            let config = globals.config()?;
            let mut target = Target::resolve(to, &args.ssh, &config)?;
            if matches!(target.url, TargetUrl::Local { .. }) {
                return Err(Error::new(
                    Kind::Usage,
                    "a domain is handed to another host, and this target is on this one",
                )
                .hint("name a target by ssh://"));
            }
            target.ssh.service = Service::Failover;
            let settings = RunSettings { exclude_disks: args.exclude_disks.clone(), ..RunSettings::default() };
            let runs = source::request(domain, &target, globals, &config, &settings)?;
            let site = source::connect(globals)?;
            let (name, uuid) = find(&site, domain)?;
            let request = handover::Request {
                domain: name,
                uuid,
                to: target.url.to_string(),
                handover: source::new_run()?,
                timeout: args.timeout,
                force_off: args.force_off,
                commit: false,
                head_age_max: HEAD_AGE_MAX,
                disk_format: DiskFormat::default(),
            };
            let stop = signals::listen_saying(
                "stopping: the domain is left, or put back, as it was (unless the target has been asked to start it)",
                "ended at once; the same command goes on, and with --abort puts the domain back",
            )?;
            Ok(Prepared {
                site,
                connection: target.connection_for_runs(globals, args.create_store),
                runs,
                request,
                stop,
                output,
                watcher: Watcher::new(output),
            })
        }

        /// Does it, and hangs up, however it went.
        pub fn with<T>(self, act: impl FnOnce(&Prepared, &Means) -> Result<T>) -> Result<T> {
            let tell = |what: &str| self.output.step(what);
            let means = Means {
                target: &self.connection,
                runs: &self.runs,
                new_run: &source::new_run,
                watch: &self.watcher,
                say: &tell,
                stop: self.stop,
            };
            let done = act(&self, &means);
            self.watcher.finish();
            hang_up(self.connection);
            done
        }
    }

    /// By name, UUID or id. One that was handed over may not be defined here any more: then the record of that knows
    /// it.
    fn find(site: &Site, domain: &str) -> Result<(DomainName, DomainUuid)> {
        match site.hypervisor().find(domain) {
            Ok(found) => Ok((found.name, found.uuid)),
            Err(e) if e.kind() == Kind::NotFound => {
                let mut handed = handover_record::all(site.state())?.into_iter();
                let found = handed.find(|r| r.domain.as_str() == domain || r.uuid.as_str() == domain);
                found.map(|record| (record.domain, record.uuid)).ok_or(e)
            }
            Err(e) => Err(e),
        }
    }

    /// `failover DOMAIN --to TARGET`.
    pub fn planned(args: &HandoverArgs, domain: &str, to: &str, globals: &Globals, output: Output) -> Result<Exit> {
        let prepared = Prepared::new(args, domain, to, globals, output)?;
        let report = prepared.with(|p, means| p.site.hand_over(means, &p.request))?;
        match output.json {
            true => Message { message_type: "handover", body: &report }.print()?,
            false => print(&describe(&report, true).join("\n"))?,
        }
        Ok(Exit::Done)
    }

    /// `failover DOMAIN --to TARGET --abort`.
    pub fn abort(
        args: &HandoverArgs,
        domain: &str,
        to: &str,
        lose_its_writes: bool,
        globals: &Globals,
        output: Output,
    ) -> Result<Exit> {
        let prepared = Prepared::new(args, domain, to, globals, output)?;
        let record = prepared.with(|p, means| p.site.call_off(means, &p.request.uuid, lose_its_writes))?;
        let body = json!({
            "domain": record.domain, "uuid": record.uuid, "to": record.to, "handover": record.handover, "started": record.ran,
        });
        match output.json {
            true => Message { message_type: "handover_aborted", body }.print()?,
            false => print(&format!(
                "{} is this host's again{}; {} does not run it, and will not",
                record.domain,
                if record.ran { ", and runs" } else { "" },
                record.to
            ))?,
        }
        Ok(Exit::Done)
    }

    /// The report for people. `undo`: it can still be undone.
    pub fn describe(report: &Report, undo: bool) -> Vec<String> {
        let (name, to) = (&report.domain, &report.to);
        let point = report.point.as_ref().map_or(String::new(), |point| format!(", from point {point}"));
        let mut lines = vec![format!("{name} runs on {to} now{point}; here it stays shut off")];
        if let (Some(down), Some(shutdown)) = (report.downtime_ms, report.shutdown_ms) {
            lines.push(format!(
                "  down for {}, after a shutdown of {}",
                render::millis(down),
                render::millis(shutdown)
            ));
        }
        let sent = report.last_run_ms.map_or(String::new(), |ms| format!(" in {}", render::millis(ms)));
        lines.push(format!("  the last run sent {}{sent}", render::bytes(report.last_run_bytes)));
        lines.extend(report.warnings.iter().map(|w| render::wrap("warning: ", w)));
        if undo {
            lines.push(render::wrap(
                "  next: ",
                &format!("`virt-replica failover {name} --commit` on the target to stay; to go back and lose what it writes there, `virt-replica failover {name} --to {to} --abort --lose-its-writes` here"),
            ));
        }
        lines
    }
}
