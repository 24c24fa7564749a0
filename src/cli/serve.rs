//! The programs behind the program: the agent on a target, the dead-man beside a run.

use crate::cli::globals::Globals;
use crate::cli::speak::advice;
use crate::cli::speak::output::Exit;
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;
use virt_replica::error::Result;
use virt_replica::name::DomainUuid;
use virt_replica::replica::store::Limits;
use virt_replica::transport::target::ROOT_DEFAULT;
use virt_replica::wiring;

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Directory of the store, or of the images that may be read and written
    #[arg(long, value_name = "DIR", default_value = ROOT_DEFAULT)]
    root: PathBuf,
    /// Serve the images below the root to `copy` and `diff`, and no store
    #[arg(long, conflicts_with_all = ["min_age", "max_depth"])]
    images: bool,
    /// Also bring domains up from the store, or end them, if a source asks for it in a planned failover
    #[arg(long, conflicts_with = "images")]
    failover: bool,
    /// Names of networks, machine types and paths of the source on this host [default: recovery.yaml beside the
    /// configuration]
    #[arg(long, value_name = "FILE", requires = "failover")]
    mapping: Option<PathBuf>,
    /// Remove no point younger than this, whatever a client asks for (7d, 12h)
    #[arg(long, value_name = "AGE", default_value = "0s", value_parser = crate::cli::speak::render::parse_age)]
    min_age: Duration,
    /// Once a disk of the newest point has this many images, give it one that stands alone [default: as many as libvirt
    /// of this release starts, at most 64]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(2..))]
    max_depth: Option<u64>,
    /// The operator of this host asks, not a source: pins of this host may be removed (started by commands on this
    /// host)
    #[arg(long, hide = true, conflicts_with = "images")]
    operator: bool,
}

#[derive(Debug, Args)]
pub struct DeadmanArgs {
    /// The domain to guard
    uuid: DomainUuid,
}

pub fn agent(args: &AgentArgs, globals: &Globals) -> Result<Exit> {
    // Its client decides when it ends: an interrupt for the client's whole process group is not meant for it.
    ignore_interrupts();
    bound_memory();
    if args.images {
        wiring::serve_images(&args.root, &globals.state_dir, advice::words)?;
        return Ok(Exit::Done);
    }
    let limits = Limits { min_age: args.min_age, depth_max: args.max_depth.unwrap_or_else(wiring::depth_max) };
    match args.failover {
        true => serve_failover(args, limits, globals)?,
        false => wiring::serve_agent(&args.root, limits, args.operator, advice::words)?,
    }
    Ok(Exit::Done)
}

#[cfg(feature = "libvirt")]
fn serve_failover(args: &AgentArgs, limits: Limits, globals: &Globals) -> Result<()> {
    let connect = || crate::cli::recovery::here::connect(globals, &args.root, args.mapping.as_deref());
    wiring::serve_failover(&args.root, limits, args.operator, advice::words, &connect)
}

#[cfg(not(feature = "libvirt"))]
fn serve_failover(_: &AgentArgs, _: Limits, _: &Globals) -> Result<()> {
    crate::cli::globals::no_libvirt("agent --failover")
}

#[cfg(feature = "libvirt")]
pub fn deadman(args: &DeadmanArgs, globals: &Globals) -> Result<Exit> {
    use virt_replica::replicate::settle::deadman;
    // Taken before anything slow: the driver must not be able to die unnoticed.
    let driver = deadman::parent();
    ignore_interrupts();
    crate::cli::run::source::connect(globals)?.guard(&args.uuid, driver)?;
    Ok(Exit::Done)
}

#[cfg(not(feature = "libvirt"))]
pub fn deadman(args: &DeadmanArgs, _: &Globals) -> Result<Exit> {
    crate::cli::globals::no_libvirt(&format!("deadman {}", args.uuid))
}

/// Most memory of an agent that is not backed by a file: several times what the largest replica costs.
const AGENT_MEMORY_MAX: u64 = 1 << 30;

/// If a source makes the agent allocate without end, the agent ends and the host goes on. The limit counts written
/// memory (`RLIMIT_DATA`). Threads and the allocator reserve address space (`RLIMIT_AS`) generously, and that costs
/// nothing. Programs that the agent starts inherit the limit.
fn bound_memory() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Data);
    let current = Some(now.current.map_or(AGENT_MEMORY_MAX, |current| current.min(AGENT_MEMORY_MAX)));
    if let Err(e) = setrlimit(Resource::Data, Rlimit { current, maximum: now.maximum }) {
        tracing::warn!("the agent's memory is not bounded: {e}");
    }
}

fn ignore_interrupts() {
    // SAFETY: only the disposition of two signals changes; no handler runs.
    unsafe {
        libc::signal(libc::SIGINT, libc::SIG_IGN);
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
    }
}
