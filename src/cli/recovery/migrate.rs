//! `migrate`: moves a running domain to its target, down for no longer than it has to be.

use super::detach::WantedFormat;
use super::handover::HandoverArgs;
use crate::cli::globals::Globals;
use crate::cli::run::limits::LinkArgs;
use crate::cli::speak::output::{Exit, Output};
use clap::Args;
use jiff::Timestamp;
use jiff::civil::Time;
use jiff::tz::TimeZone;
use std::time::Duration;
use virt_replica::error::Result;

#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Name or UUID of the domain
    domain: String,
    /// Target: ssh://[user@]host[:port][/root], or a name of the configuration
    #[arg(long, value_name = "TARGET")]
    to: String,
    /// Cut over once the guest would be down for no longer, its shutdown included
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = crate::cli::speak::render::parse_duration)]
    max_downtime: Duration,
    /// Cut over at this time, and not before: 02:30, or 2026-05-01T02:30:00Z
    #[arg(long, value_name = "TIME", value_parser = parse_at)]
    at: Option<Timestamp>,
    /// Give up after so many rounds; the domain runs here as before
    #[arg(long, value_name = "COUNT", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds_max: u32,
    /// Cut over after one round, whatever the forecast
    #[arg(long, conflicts_with = "at")]
    now: bool,
    /// Do not commit it at the target: it can be undone from there
    #[arg(long)]
    keep_undo: bool,
    /// Format of its images there, once `detach` gives it its own; same: as they are here
    #[arg(long, value_name = "FORMAT", default_value = "qcow2")]
    disk_format: WantedFormat,
    #[command(flatten)]
    link: LinkArgs,
    #[command(flatten)]
    handover: HandoverArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

/// A moment, or a time of the day: the next one in this host's time zone.
fn parse_at(text: &str) -> std::result::Result<Timestamp, String> {
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    let wrong = |_| "write it as 02:30, or as 2026-05-01T02:30:00Z".to_owned();
    next_time(text.parse::<Time>().map_err(wrong)?, Timestamp::now(), TimeZone::system()).map_err(|e| e.to_string())
}

fn next_time(time: Time, now: Timestamp, zone: TimeZone) -> std::result::Result<Timestamp, jiff::Error> {
    let today = now.to_zoned(zone.clone()).date();
    let at = today.to_datetime(time).to_zoned(zone.clone())?.timestamp();
    if at > now { Ok(at) } else { Ok(today.tomorrow()?.to_datetime(time).to_zoned(zone)?.timestamp()) }
}

#[cfg(not(feature = "libvirt"))]
pub fn migrate(_: &MigrateArgs, _: &Globals, _: Output) -> Result<Exit> {
    crate::cli::globals::no_libvirt("migrate")
}

#[cfg(feature = "libvirt")]
pub use act::migrate;

#[cfg(feature = "libvirt")]
mod act {
    use super::*;
    use crate::cli::recovery::handover::{Prepared, describe};
    use crate::cli::speak::output::{Message, print};
    use crate::cli::speak::{progress, render, signals};
    use virt_replica::recovery::migrate::{Decision, Limits, Report, Request, Round, Ui, Why};

    pub fn migrate(args: &MigrateArgs, globals: &Globals, output: Output) -> Result<Exit> {
        let mut prepared = Prepared::new(&args.handover, &args.domain, &args.to, globals, output)?;
        prepared.runs.throttle = args.link.throttle()?;
        prepared.runs.compression = args.link.compression(true);
        // Whoever comes here is warm: the rounds saw to that.
        prepared.request.head_age_max = Duration::MAX;
        prepared.request.commit = !args.keep_undo;
        prepared.request.disk_format = args.disk_format.into();
        let told = |round: &Round| match output.json {
            true => drop(Message { message_type: "round", body: round }.print()),
            false if output.quiet => {}
            false => progress::say(&line(round)),
        };
        let ui = Ui { told: &told, cut: signals::cut_over(!output.json)? };
        let limits =
            Limits { downtime_max: args.max_downtime, at: args.at, rounds_max: args.rounds_max, now: args.now };
        let request = Request { handover: prepared.request.clone(), limits };
        let report = prepared.with(|p, means| p.site.migrate(means, &request, &ui))?;
        match output.json {
            true => Message { message_type: "migrate", body: &report }.print()?,
            false => print(&describe_migration(&report))?,
        }
        Ok(Exit::Done)
    }

    fn line(round: &Round) -> String {
        let did = format!(
            "round {}: {} in {}",
            round.round,
            render::bytes(round.bytes_sent),
            render::millis(round.duration_ms)
        );
        let forecast = match &round.forecast {
            None => "how long the guest would be down is not known yet".to_owned(),
            Some(f) => {
                let (down, come) = (render::millis(f.downtime_ms), render::bytes(f.dirty_rate_bytes));
                format!("the guest would be down for about {down} ({}; it writes {come}/s)", f.terms())
            }
        };
        let then = match round.decision {
            Decision::GoOn => "another round",
            Decision::Wait => "waiting for the time to cut over",
            Decision::CutOver(Why::Forecast) => "cutting over",
            Decision::CutOver(Why::Time) => "it is time: cutting over",
            Decision::CutOver(Why::Asked) => "cutting over as asked",
            Decision::Diverges | Decision::TooManyRounds => "giving up",
        };
        format!("{did}; {forecast}; {then}")
    }

    fn describe_migration(report: &Report) -> String {
        let mut lines = describe(&report.handover, false);
        let bytes: u64 = report.rounds.iter().map(|r| r.bytes_sent).sum();
        lines.push(format!("  {} rounds before that sent {}", report.rounds.len(), render::bytes(bytes)));
        if let Some(measured) = report.measured_ms {
            let forecast =
                report.forecast_ms.map_or(String::new(), |ms| format!("; the forecast was {}", render::millis(ms)));
            lines.push(format!("  from the shutdown to its start there {}{forecast}", render::millis(measured)));
        }
        match report.generation {
            Some(generation) => lines.push(format!("  committed: generation {generation}; there is no undo")),
            None => lines.push(render::wrap(
                "  next: ",
                &format!("`virt-replica failover {} --commit` on the target to stay", report.handover.domain),
            )),
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_the_day_is_the_next_one() {
        let now: Timestamp = "2026-05-01T02:30:00Z".parse().unwrap();
        let at = |text: &str| next_time(text.parse().unwrap(), now, TimeZone::UTC).unwrap().to_string();
        assert_eq!(at("02:31"), "2026-05-01T02:31:00Z");
        assert_eq!(at("02:30"), "2026-05-02T02:30:00Z");
        assert_eq!(parse_at("2026-05-01T02:30:00Z").unwrap(), now);
        assert!(parse_at("soon").unwrap_err().contains("02:30"));
    }
}
