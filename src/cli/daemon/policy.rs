//! `policy`: are the policies right, what do they mean, when do they run.

use crate::cli::daemon;
use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output, print, print_json};
use crate::cli::speak::render;
use clap::{Args, Subcommand};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::json;
use std::path::PathBuf;
use virt_replica::config::{Config, policy_files};
use virt_replica::error::{Error, Kind, Result};
use virt_replica::policy::select::{Pair, SeenDomain, Selection, select};
use virt_replica::policy::{Policy, keys, no_name_twice, schedule};

#[derive(Debug, Args)]
pub struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Read policies and say everything that is wrong with them
    Check(CheckArgs),
    /// Show policies with every default written out
    Show(ShowArgs),
    /// Say when the next runs begin
    Next(NextArgs),
    /// Print the JSON Schema of a policy, for editors
    Schema,
    /// Do once all that is due (for a timer), or ask the daemon for a run of one domain
    Run(daemon::RunArgs),
    /// Show the state of the daemon, and every domain with its RPO
    Status(daemon::DaemonStatusArgs),
    /// Have the daemon begin no run of a domain, or none at all, until `resume`
    Pause(daemon::HoldArgs),
    /// Let the daemon begin runs again
    Resume(daemon::HoldArgs),
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// Policies to check; without any: all beside the configuration
    files: Vec<PathBuf>,
    /// Ask libvirt too, and check which domains the policies select
    #[arg(long)]
    domains: bool,
}

#[derive(Debug, Args)]
struct ShowArgs {
    /// Name of a policy; without it: all
    name: Option<String>,
}

#[derive(Debug, Args)]
struct NextArgs {
    /// Only this domain
    domain: Option<String>,
    /// Show this many runs of each domain and target
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    count: u16,
    /// From this moment on instead of now (2026-10-25T01:00:00Z)
    #[arg(long, value_name = "TIME")]
    at: Option<Timestamp>,
    /// Print JSON for scripts
    #[arg(long)]
    json: bool,
}

impl PolicyArgs {
    pub fn json(&self) -> bool {
        match &self.command {
            PolicyCommand::Next(args) => args.json,
            PolicyCommand::Status(args) => args.json,
            _ => false,
        }
    }

    /// Whether it replicates, and has something to tell.
    pub fn tells(&self) -> bool {
        matches!(self.command, PolicyCommand::Run(_))
    }
}

pub fn policy(args: &PolicyArgs, globals: &Globals, output: Output) -> Result<Exit> {
    match &args.command {
        PolicyCommand::Check(args) => check(args, globals, output),
        PolicyCommand::Show(args) => show(args, globals),
        PolicyCommand::Next(args) => next(args, globals, output),
        PolicyCommand::Run(args) => daemon::run(args, globals),
        PolicyCommand::Status(args) => daemon::status(args, output),
        PolicyCommand::Pause(args) => daemon::pause(args),
        PolicyCommand::Resume(args) => daemon::resume(args),
        PolicyCommand::Schema => {
            let schema = serde_json::to_string_pretty(&keys::schema()).expect("a schema is plain JSON");
            print(&schema)?;
            Ok(Exit::Done)
        }
    }
}

/// Every mistake of every file, not only the first.
fn check(args: &CheckArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let config = globals.config()?;
    let files = match args.files.as_slice() {
        [] => policy_files(globals.config_path())?,
        files => files.to_vec(),
    };
    let mut policies = Vec::new();
    let mut mistakes = Vec::new();
    for file in &files {
        match config.policy(file) {
            Ok(policy) => policies.push(policy),
            Err(e) => mistakes.push(e),
        }
    }
    mistakes.extend(no_name_twice(&policies).err());
    if args.domains && mistakes.is_empty() {
        let found = selection(&policies, &config, globals)?;
        for (policy, selector) in &found.unmatched {
            let policy = &policies[*policy];
            let place = format!("{}: policy '{}'", policy.file.display(), policy.name);
            crate::cli::speak::progress::say(&format!("warning: {place}: '{selector}' is no domain of this host"));
        }
        mistakes.extend(found.clashes);
    }
    let Some(last) = mistakes.pop() else {
        if !output.quiet {
            let words: Vec<String> =
                policies.iter().map(|p| format!("{}: {} is right", p.file.display(), p.name)).collect();
            print(&if words.is_empty() { "there are no policies".to_owned() } else { words.join("\n") })?;
        }
        return Ok(Exit::Done);
    };
    // The last is printed where every error is; those before it look the same.
    mistakes.iter().for_each(|e| output.error(e));
    Err(last)
}

fn show(args: &ShowArgs, globals: &Globals) -> Result<Exit> {
    let config = globals.config()?;
    let mut policies = config.policies(globals.config_path())?;
    if let Some(name) = &args.name {
        policies.retain(|p| p.name == *name);
        if policies.is_empty() {
            return Err(Error::new(Kind::NotFound, format!("no policy is called '{name}'"))
                .hint("`virt-replica policy show` shows all"));
        }
    }
    let texts = policies.into_iter().map(|mut p| {
        if p.store.is_none() {
            p.overlay_dir = p.overlay_dir.or_else(|| config.defaults.overlay_dir.clone());
        }
        format!("# {}\n{p}", p.file.display())
    });
    print(texts.collect::<Vec<_>>().join("---\n").trim_end())?;
    Ok(Exit::Done)
}

#[cfg(feature = "libvirt")]
fn domains(globals: &Globals) -> Result<Vec<SeenDomain>> {
    crate::cli::run::source::seen_domains(&crate::cli::run::source::connect(globals)?)
}

#[cfg(not(feature = "libvirt"))]
fn domains(_: &Globals) -> Result<Vec<SeenDomain>> {
    crate::cli::globals::no_libvirt("policy")
}

fn selection(policies: &[Policy], config: &Config, globals: &Globals) -> Result<Selection> {
    let domains = if policies.iter().any(|p| p.store.is_none()) { domains(globals)? } else { Vec::new() };
    Ok(select(policies, &domains, &crate::cli::daemon::replicas(policies)?, &config.urls()))
}

/// When a domain goes to a target.
struct Row<'a> {
    pair: &'a Pair,
    policy: &'a Policy,
    times: Vec<Timestamp>,
}

fn next(args: &NextArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let config = globals.config()?;
    let policies = config.policies(globals.config_path())?;
    let found = selection(&policies, &config, globals)?;
    found.clashes.iter().for_each(|e| output.error(e));
    let urls = config.urls();
    let (now, local) = (args.at.unwrap_or_else(Timestamp::now), TimeZone::system());
    let mut rows = Vec::new();
    for pair in &found.pairs {
        let is_meant = |d: &String| pair.domain.name.as_str() == d || pair.domain.uuid.as_str() == d;
        if !args.domain.as_ref().is_none_or(is_meant) {
            continue;
        }
        let policy = &policies[pair.policy];
        let url = urls.get(&pair.target).unwrap_or(&pair.target);
        let shift = schedule::Shift::of(pair.domain.uuid.as_str(), url);
        let past = past(globals, pair, url, now)?;
        let times = policy.schedule(&local).next(shift, &past, now, usize::from(args.count));
        // Of a target: it has no runs.
        if times.is_empty() {
            continue;
        }
        rows.push(Row { pair, policy, times });
    }
    if let (Some(domain), true) = (&args.domain, rows.is_empty()) {
        return Err(Error::new(Kind::NotFound, format!("no policy means a domain '{domain}' of this host")));
    }
    rows.sort_by(|a, b| a.times.cmp(&b.times).then_with(|| a.pair.domain.name.cmp(&b.pair.domain.name)));
    match output.json {
        true => print_json(&json!({ "policies": policies.len(), "next": rows.iter().map(|r| json!({
            "domain": r.pair.domain.name, "uuid": r.pair.domain.uuid, "target": urls.get(&r.pair.target).unwrap_or(&r.pair.target),
            "policy": r.policy.name, "at": r.times,
        })).collect::<Vec<_>>() }))?,
        false => print(&table(&rows, now, &local))?,
    }
    Ok(Exit::Done)
}

/// What the journal knows of the pair's runs.
fn past(globals: &Globals, pair: &Pair, url: &str, now: Timestamp) -> Result<schedule::Past> {
    use virt_replica::replicate::state::{journal, report::Report, stores};
    let spellings = stores::spellings(&globals.state_dir, url);
    let reports: Vec<Report> = journal::recent_reports(&globals.state_dir, &pair.domain.uuid)?;
    let begun = reports.iter().rev().find(|r| spellings.contains(&r.target) && r.point.is_some()).map(|r| r.started_at);
    Ok(schedule::Past { since: now, begun, retry_at: None })
}

fn table(rows: &[Row], now: Timestamp, local: &TimeZone) -> String {
    if rows.is_empty() {
        return "no policy means a domain of this host".to_owned();
    }
    let cells = rows.iter().flat_map(|row| {
        row.times.iter().map(|&at| {
            let time = at.to_zoned(local.clone()).strftime("%a %Y-%m-%d %H:%M:%S %Z").to_string();
            let left = at.duration_since(now).as_secs();
            let left = if left <= 0 { "now".to_owned() } else { render::short_age(left) };
            vec![time, left, row.pair.domain.name.to_string(), row.pair.target.clone(), row.policy.name.clone()]
        })
    });
    render::table(&["Begins", "In", "Domain", "Target", "Policy"], &[1], cells.collect())
}
