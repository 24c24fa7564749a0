//! `daemon`, and `policy run`, `status`, `pause`, `resume`: replication by policies, and a word with who does it.

pub(super) mod policy;

use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output, print, print_json};
use crate::cli::speak::render;
use clap::Args;
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use virt_replica::daemon::control::{Ask, ask_daemon};
use virt_replica::error::Result;
use virt_replica::policy::Policy;
use virt_replica::policy::select::{SeenDomain, SeenReplica};
use virt_replica::replica::lag;
use virt_replica::replica::left_out::Skipped;
use virt_replica::wiring::{self, runtime_dir};

#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Serve /metrics for Prometheus here: a loopback address and a port
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    #[command(flatten)]
    socket: SocketArgs,
}

#[derive(Debug, Args)]
pub struct SocketArgs {
    /// The daemon's control socket [default: /run/virt-replica/control.sock]
    #[arg(long, value_name = "FILE")]
    control: Option<PathBuf>,
}

impl SocketArgs {
    fn path(&self) -> PathBuf {
        self.control.clone().unwrap_or_else(|| runtime_dir().join("control.sock"))
    }
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Ask the daemon for a run of this domain now. Without it, do once all that is due, without a daemon
    domain: Option<String>,
    #[command(flatten)]
    socket: SocketArgs,
}

#[derive(Debug, Args)]
pub struct HoldArgs {
    /// Name or UUID of a domain; without it: all
    domain: Option<String>,
    #[command(flatten)]
    socket: SocketArgs,
}

#[derive(Debug, Args)]
pub struct DaemonStatusArgs {
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    socket: SocketArgs,
}

pub fn daemon(args: &DaemonArgs, globals: &Globals) -> Result<Exit> {
    serve(globals, false, args.http, Some(args.socket.path()))
}

/// With a domain a question to the daemon; without one a pass of its own, which ends.
pub fn run(args: &RunArgs, globals: &Globals) -> Result<Exit> {
    match &args.domain {
        Some(domain) => {
            ask_daemon(&args.socket.path(), &Ask::Sync { domain: domain.clone() })?;
            Ok(Exit::Done)
        }
        None => serve(globals, true, None, None),
    }
}

pub fn pause(args: &HoldArgs) -> Result<Exit> {
    ask_daemon(&args.socket.path(), &Ask::Pause { domain: args.domain.clone() })?;
    Ok(Exit::Done)
}

pub fn resume(args: &HoldArgs) -> Result<Exit> {
    ask_daemon(&args.socket.path(), &Ask::Resume { domain: args.domain.clone() })?;
    Ok(Exit::Done)
}

pub fn status(args: &DaemonStatusArgs, output: Output) -> Result<Exit> {
    let answer = ask_daemon(&args.socket.path(), &Ask::Status {})?;
    let status = &answer["status"];
    match output.json {
        true => print_json(status)?,
        false => print(&describe(status))?,
    }
    Ok(Exit::Done)
}

/// For people: problems first, then a row of each domain and target.
fn describe(status: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or("-").to_owned();
    let mut lines = Vec::new();
    for (key, what) in
        [("libvirt_error", "libvirt cannot be asked"), ("config_error", "the new configuration is wrong")]
    {
        if let Some(why) = status[key].as_str() {
            lines.push(render::wrap("PROBLEM: ", &format!("{what}: {why}")));
        }
    }
    let lag = |v: &Value| v.as_i64().map_or("-".to_owned(), render::short_age);
    let rows = status["domains"].as_array().map_or(&[][..], Vec::as_slice).iter().map(|row| {
        let state = match () {
            _ if !row["lives_on"].is_null() => "demoted".to_owned(),
            _ if !row["promoted_since"].is_null() => "promoted here".to_owned(),
            _ if !row["breach_since"].is_null() => "RPO BROKEN".to_owned(),
            _ if !row["running"].is_null() => format!("step {}", row["running"]["step"]),
            _ if row["policy"].is_null() => "no policy".to_owned(),
            _ if row["paused"] == true => "paused".to_owned(),
            _ if row["failures"].as_u64() > Some(0) => format!("failed {} times", row["failures"]),
            _ if row["frozen_at"].is_null() => "not yet".to_owned(),
            _ if !row["clock_ahead_s"].is_null() => "CLOCK WRONG".to_owned(),
            _ if unprotected(row).next().is_some() => "partly protected".to_owned(),
            _ => "ok".to_owned(),
        };
        let next = row["next_at"].as_str().and_then(|t| t.parse().ok()).map_or("-".to_owned(), render::minute);
        vec![
            text(&row["domain"]),
            text(&row["target"]),
            state,
            lag(&row["lag_s"]),
            lag(&row["rpo_s"]),
            next,
            text(&row["policy"]),
        ]
    });
    let header = ["Domain", "Target", "State", "Lag", "RPO", &format!("Next run ({})", render::zone_now()), "Policy"];
    lines.push(render::table(&header, &[3, 4], rows.collect()));
    for row in status["domains"].as_array().map_or(&[][..], Vec::as_slice) {
        let label = format!(" {}: ", text(&row["domain"]));
        lines.extend(row["clock_ahead_s"].as_i64().map(|s| render::wrap(&label, &lag::told(s))));
        lines.extend(unprotected(row).map(|s| render::wrap(&label, &s.told())));
    }
    lines.join("\n")
}

/// The disks of a row that nobody protects.
fn unprotected(row: &Value) -> impl Iterator<Item = Skipped> {
    serde_json::from_value::<Vec<Skipped>>(row["unprotected"].clone()).unwrap_or_default().into_iter()
}

/// The replicas that policies of a target may mean.
pub fn replicas(policies: &[Policy]) -> Result<Vec<SeenReplica>> {
    let stores: BTreeSet<&PathBuf> = policies.iter().filter_map(|p| p.store.as_ref()).collect();
    let mut found = Vec::new();
    for store in stores {
        found.extend(wiring::replicas_of(store)?.into_iter().map(|(uuid, name, _)| SeenReplica {
            domain: SeenDomain { name, uuid, tags: Vec::new() },
            store: store.clone(),
        }));
    }
    Ok(found)
}

#[cfg(not(feature = "libvirt"))]
fn serve(_: &Globals, _: bool, _: Option<SocketAddr>, _: Option<PathBuf>) -> Result<Exit> {
    crate::cli::globals::no_libvirt("daemon")
}

#[cfg(feature = "libvirt")]
use service::serve;

#[cfg(feature = "libvirt")]
mod service {
    use super::*;
    use crate::cli::run::source;
    use crate::cli::speak::signals::{self, Signals};
    use std::sync::mpsc::{self, Sender};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;
    use virt_replica::daemon::event::Event;
    use virt_replica::daemon::notify::Notify;
    use virt_replica::daemon::service::{self, Input, Lister, Options, SeenInStore};
    use virt_replica::daemon::worker::Program;
    use virt_replica::error::{Error, Kind};
    use virt_replica::replica::ReplicaView;
    use virt_replica::wiring::{Site, SiteOptions};

    /// How often libvirt is asked which domains there are.
    const LIST_EVERY: Duration = Duration::from_secs(30);

    pub fn serve(globals: &Globals, once: bool, http: Option<SocketAddr>, control: Option<PathBuf>) -> Result<Exit> {
        let (inputs, inbox) = mpsc::channel();
        listen(inputs.clone())?;
        let options = Options {
            config: globals.config_path().to_owned(),
            config_named: globals.config.is_some(),
            state: globals.state_dir.clone(),
            program: Program {
                path: own_program()?,
                globals: child_globals(globals),
                state: globals.state_dir.clone(),
            },
            list: lister(globals),
            list_store: Arc::new(|root| {
                let seen = |(uuid, name, view): (_, _, ReplicaView)| SeenInStore {
                    domain: SeenDomain { name, uuid, tags: Vec::new() },
                    head: view.head().map(|h| h.as_of()),
                    promoted_since: view.promoted.map(|p| p.since),
                };
                Ok(wiring::replicas_of(root)?.into_iter().map(seen).collect())
            }),
            list_every: LIST_EVERY,
            once,
            control,
            http,
            notify: Notify::from_env(),
            fields: crate::cli::speak::logging::is_journal(),
            random: source::random,
        };
        match service::run(options, inbox, inputs)? {
            failed if once && failed > 0 => {
                Err(Error::new(Kind::Io, format!("{failed} runs failed; what was wrong stands above")))
            }
            _ => Ok(Exit::Done),
        }
    }

    /// This program's file, asked for once: an upgrade puts another behind the same path, and that is the one to start.
    fn own_program() -> Result<PathBuf> {
        std::env::current_exe().map_err(|e| Error::from_io("cannot find this program's file", e))
    }

    /// What a run has to be told so that it means the same host as we do.
    fn child_globals(globals: &Globals) -> Vec<String> {
        let mut args = vec!["--state-dir".to_owned(), globals.state_dir.to_string_lossy().into_owned()];
        if let Some(config) = &globals.config {
            args.extend(["--config".to_owned(), config.to_string_lossy().into_owned()]);
        }
        if let Some(uri) = globals.uri() {
            args.extend(["--connect".to_owned(), uri]);
        }
        args
    }

    /// Asks libvirt over one connection; a new one after each failure.
    fn lister(globals: &Globals) -> Lister {
        let options = SiteOptions { uri: globals.uri(), state: globals.state_dir.clone() };
        let site: Mutex<Option<Site>> = Mutex::new(None);
        Arc::new(move || {
            let mut site = site.lock().unwrap_or_else(|e| e.into_inner());
            let asked = match site.take() {
                Some(site) => site,
                None => Site::connect(options.clone())?,
            };
            let names = source::seen_domains(&asked)?;
            *site = Some(asked);
            Ok(names)
        })
    }

    /// SIGHUP reads the configuration again; SIGTERM and SIGINT stop in order.
    fn listen(inputs: Sender<Input>) -> Result<()> {
        let Signals { runtime, mut int, mut term, mut hup } = signals::register()?;
        std::thread::spawn(move || {
            runtime.block_on(async {
                loop {
                    let input = tokio::select! {
                        _ = int.recv() => Input::Event(Box::new(Event::Stop)),
                        _ = term.recv() => Input::Event(Box::new(Event::Stop)),
                        _ = hup.recv() => Input::Reload,
                    };
                    if inputs.send(input).is_err() {
                        return;
                    }
                }
            });
        });
        Ok(())
    }
}
