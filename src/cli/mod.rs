//! The command line: grammar, dispatch, logging, and how a run of the program ends.
//!
//! One file per family of commands. What a script reads is promised in docs/formats/json.md. Results go to stdout;
//! steps, progress, warnings and errors go to stderr.

mod daemon;
mod debug;
mod globals;
mod plain;
mod recovery;
mod run;
mod serve;
mod speak;
mod status;
mod store;
mod target;

use crate::cli::globals::Globals;
use clap::{Parser, Subcommand};
use daemon::policy;
use plain::{copy, digest, patch};
use recovery::{detach, drill, failback, failover, give_way, migrate, ready};
use run::{doctor, sync, verify};
use speak::output::Output;
use speak::{logging, output};
use std::process::ExitCode;
use store::{export, pin, points, prune, scrub, seed, set_generation};

/// Replicates libvirt/QEMU virtual machines to another host
#[derive(Debug, Parser)]
#[command(name = "virt-replica", version, max_term_width = 100, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed
  2    wrong usage
  3    replicated, but a disk is still on an overlay
  4    no such domain, point or target
  11   something else works on it
  12   keys or host keys
  13   stored data is not what it was
  14   replicated, but a dirty bitmap had lied
  15   replicated, but not all of its disks
  16   replicated, but an I/O error has stopped the guest
  78   wrong configuration
  130  interrupted";

#[derive(Debug, Subcommand)]
enum Command {
    /// Replicate a domain to a target now
    Sync(Box<sync::SyncArgs>),
    /// Say what a run would do and why, touching nothing
    Plan(sync::PlanArgs),
    /// List the recovery points of a domain on a target
    Points(points::PointsArgs),
    /// Show how every domain stands: its own disks, its newest point, its last run
    Status(status::StatusArgs),
    /// Read a point again and compare it with its digests, or the source with its newest point
    Verify(verify::VerifyArgs),
    /// Read all points again, a bit at a time, and find damage
    Scrub(scrub::ScrubArgs),
    /// Remove the points that retention rules no longer keep
    Prune(prune::PruneArgs),
    /// Keep a point from being removed
    Pin(pin::PinArgs),
    /// Let a pinned point be removed again
    Unpin(pin::UnpinArgs),
    /// Read out a disk of a point: as a file, or over NBD on the target itself
    Export(export::ExportArgs),
    /// On a target: say whether a domain could be brought up here, and what is missing
    Ready(ready::ReadyArgs),
    /// On a target: boot a throw-away copy of a point, and wait for evidence that it works
    Drill(drill::DrillArgs),
    /// Hand a domain to its target without loss; or, on a target, bring one up without its source
    Failover(failover::FailoverArgs),
    /// On a target: give a domain that was brought up here for good its own images
    Detach(detach::DetachArgs),
    /// On the former host of a domain that lives elsewhere: make its old content a point of this host's store, and
    /// forget the domain
    GiveWay(give_way::GiveWayArgs),
    /// Hand a domain that was brought up on this host back to its home
    Failback(Box<failback::FailbackArgs>),
    /// Move a running domain to its target with as little downtime as possible
    Migrate(Box<migrate::MigrateArgs>),
    /// Explain what an interrupted run left, and clean it up on request
    Doctor(doctor::DoctorArgs),
    /// Check policies, and say what they mean and when
    Policy(policy::PolicyArgs),
    /// Obey the policies for as long as this host is up (started by systemd)
    Daemon(daemon::DaemonArgs),
    /// On a target: create the store that its sources replicate into
    Store(store::StoreArgs),
    /// On a target: take over a copy of a disk that is here already, before the first run
    Seed(seed::SeedArgs),
    /// Bring images in step with images of this host, here or on another host; no libvirt needed
    Copy(copy::CopyArgs),
    /// Write the digests of an image, to make a patch against it elsewhere
    Digest(digest::DigestArgs),
    /// Write the patch that leads from one image to another
    Diff(patch::DiffArgs),
    /// Apply a patch to an image
    Apply(patch::ApplyArgs),
    /// Look at patches, check them, merge a chain of them into one
    Patch(patch::PatchArgs),
    /// Show what is in a file of ours: to look into what somebody sent, changing nothing
    Debug(debug::DebugArgs),
    /// On a target: correct the generation of a replica that a source drove too far
    SetGeneration(set_generation::SetGenerationArgs),
    /// Serve the store of this host to a source, over stdin and stdout (started over ssh)
    Agent(serve::AgentArgs),
    /// Resume and thaw a guest if its driver dies (started by the driver)
    #[command(hide = true)]
    Deadman(serve::DeadmanArgs),
}

impl Command {
    /// Whether it works unattended, and its log is all that is seen of it.
    fn tells(&self) -> bool {
        match self {
            Command::Daemon(_) => true,
            Command::Policy(args) => args.tells(),
            _ => false,
        }
    }

    /// Whether a script reads the output.
    fn json(&self) -> bool {
        match self {
            Command::Sync(args) => args.run.json,
            Command::Plan(args) => args.run.json,
            Command::Points(args) => args.json,
            Command::Status(args) => args.json,
            Command::Verify(args) => args.json,
            Command::Scrub(args) => args.json,
            Command::Prune(args) => args.json,
            Command::Export(args) => args.json,
            Command::Pin(args) => args.json,
            Command::Unpin(args) => args.json,
            Command::Doctor(args) => args.json,
            Command::Ready(args) => args.json,
            Command::Failover(args) => args.json,
            Command::Detach(args) => args.json,
            Command::GiveWay(args) => args.json,
            Command::Failback(args) => args.json,
            Command::Drill(args) => args.json,
            Command::Migrate(args) => args.json,
            Command::Store(args) => args.json(),
            Command::Seed(args) => args.json,
            Command::SetGeneration(args) => args.json,
            Command::Policy(args) => args.json(),
            Command::Copy(args) => args.json,
            Command::Digest(args) => args.json,
            Command::Diff(args) => args.json,
            Command::Apply(args) => args.json,
            Command::Patch(args) => args.json(),
            Command::Debug(args) => args.json(),
            Command::Agent(_) | Command::Daemon(_) | Command::Deadman(_) => false,
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return output::usage(&e),
    };
    let output = Output { json: cli.command.json(), quiet: cli.globals.quiet, colors: cli.globals.colors() };
    logging::start(&cli.globals, output, cli.command.tells());
    let result = match &cli.command {
        Command::Sync(args) => sync::sync(args, &cli.globals, output),
        Command::Plan(args) => sync::plan(args, &cli.globals, output),
        Command::Points(args) => points::points(args, &cli.globals, output),
        Command::Status(args) => status::status(args, &cli.globals, output),
        Command::Verify(args) => verify::verify(args, &cli.globals, output),
        Command::Scrub(args) => scrub::scrub(args, &cli.globals, output),
        Command::Prune(args) => prune::prune(args, &cli.globals, output),
        Command::Pin(args) => pin::pin(args, &cli.globals),
        Command::Unpin(args) => pin::unpin(args, &cli.globals),
        Command::Export(args) => export::export(args, &cli.globals, output),
        Command::Doctor(args) => doctor::doctor(args, &cli.globals, output),
        Command::Ready(args) => ready::ready(args, &cli.globals, output),
        Command::Failover(args) => failover::failover(args, &cli.globals, output),
        Command::Detach(args) => detach::detach(args, &cli.globals, output),
        Command::GiveWay(args) => give_way::give_way(args, &cli.globals, output),
        Command::Failback(args) => failback::failback(args, &cli.globals, output),
        Command::Drill(args) => drill::drill(args, &cli.globals, output),
        Command::Migrate(args) => migrate::migrate(args, &cli.globals, output),
        Command::Store(args) => store::store(args, output),
        Command::Seed(args) => seed::seed(args, output),
        Command::SetGeneration(args) => set_generation::set_generation(args, &cli.globals, output),
        Command::Policy(args) => policy::policy(args, &cli.globals, output),
        Command::Daemon(args) => daemon::daemon(args, &cli.globals),
        Command::Copy(args) => copy::copy(args, &cli.globals, output),
        Command::Digest(args) => digest::digest(args, &cli.globals, output),
        Command::Diff(args) => patch::diff(args, &cli.globals, output),
        Command::Apply(args) => patch::apply(args, &cli.globals, output),
        Command::Patch(args) => patch::patch(args, output),
        Command::Debug(args) => debug::debug(args, &cli.globals, output),
        Command::Agent(args) => serve::agent(args, &cli.globals),
        Command::Deadman(args) => serve::deadman(args, &cli.globals),
    };
    output.end(result)
}
