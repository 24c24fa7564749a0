//! `scrub`: all points of a replica read again, as slowly as is wished; an interrupt leaves the rest to the next one.

use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Message, Output, print};
use crate::cli::speak::progress::{bar, say};
use crate::cli::speak::{render, signals};
use crate::cli::target::{TargetArgs, hang_up};
use clap::Args;
use serde_json::json;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virt_replica::agent::client::AgentClient;
use virt_replica::block::BLOCK_LEN;
use virt_replica::engine::pace::Pace;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DomainName, DomainUuid};
use virt_replica::replica::upkeep::{Damage, SCRUB_STEP_MAX, ScrubStart, Scrubbing, Upkeep as _};

/// A script hears of progress at most this often.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Read at once where there is no rate: an interrupt waits for no longer than that takes.
const PORTION: u64 = 16 << 20;

/// Longest rest without a look at the signals.
const NAP: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub struct ScrubArgs {
    /// Name or UUID of the domain
    domain: String,
    #[command(flatten)]
    target: TargetArgs,
    /// Read at most this much per second (20M)
    #[arg(long, value_name = "BYTES", value_parser = crate::cli::speak::render::parse_bytes)]
    rate: Option<u64>,
    /// Begin again with the oldest point, even if the last scrub was interrupted
    #[arg(long)]
    restart: bool,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

/// How far it came.
struct Scrubbed {
    start: ScrubStart,
    bytes_read: u64,
    bytes_done: u64,
    found: Vec<Damage>,
    finished: bool,
}

pub fn scrub(args: &ScrubArgs, globals: &Globals, output: Output) -> Result<Exit> {
    if args.rate == Some(0) {
        return Err(Error::new(Kind::Usage, "at a rate of 0 nothing is ever read"));
    }
    let target = args.target.resolve(globals)?;
    let stop = signals::listen_saying(
        "stopping; the next scrub goes on from here (again: at once)",
        "ended at once; the next scrub goes on from here",
    )?;
    let connection = target.connection();
    let scrubbed = connection.client().and_then(|client| run(&client, args, globals, output, stop));
    hang_up(connection);
    let (uuid, name, scrubbed, known) = scrubbed?;
    if output.json {
        let body = json!({
            "domain": name, "uuid": uuid, "target": target.url.to_string(), "resumed": scrubbed.start.resumed,
            "finished": scrubbed.finished, "bytes_read": scrubbed.bytes_read, "bytes_done": scrubbed.bytes_done,
            "bytes_total": scrubbed.start.bytes_total, "found": scrubbed.found, "damage": known,
        });
        Message { message_type: "scrub", body }.print()?;
    } else {
        print(&describe(&name, &target.url.to_string(), &scrubbed, &known))?;
    }
    match (known.is_empty(), scrubbed.finished) {
        (false, _) => Err(Error::new(Kind::Corrupt, "stored points are damaged").domain(&name).hint(
            "look at the target's storage; the next `virt-replica sync` sends again what the newest point reads of it, older points stay damaged",
        )),
        (true, false) => Err(Error::new(Kind::Interrupted, "the scrub was stopped by a signal")
            .domain(&name)
            .hint("the next `virt-replica scrub` reads the rest")),
        (true, true) => Ok(Exit::Done),
    }
}

fn run(
    client: &Arc<AgentClient>,
    args: &ScrubArgs,
    globals: &Globals,
    output: Output,
    stop: &AtomicBool,
) -> Result<(DomainUuid, DomainName, Scrubbed, Vec<Damage>)> {
    let (uuid, name) = super::named::find(client, &args.domain, globals)?;
    let replica = client.open(&uuid)?;
    let mut scrubbing = replica.scrub(args.restart).map_err(|e| e.domain(&name))?;
    let scrubbed = read_all(scrubbing.as_mut(), args.rate, output, stop);
    let closed = scrubbing.close();
    let scrubbed = scrubbed.map_err(|e| e.domain(&name))?;
    if let Err(e) = closed {
        tracing::debug!("the scrub did not end in order: {}", e.chain());
    }
    // Also what earlier ones found, as far as it is still there.
    let known = replica.holds()?.scrub.damage;
    Ok((uuid, name, scrubbed, known))
}

fn read_all(
    scrubbing: &mut dyn Scrubbing,
    rate_bytes: Option<u64>,
    output: Output,
    stop: &AtomicBool,
) -> Result<Scrubbed> {
    let start = scrubbing.start();
    let began = Instant::now();
    let mut pace = rate_bytes.map(|rate| Pace::new(rate, began.elapsed()));
    let portion = pace.as_ref().map_or(PORTION, |pace| pace.portion(BLOCK_LEN as u64, SCRUB_STEP_MAX));
    let bar =
        (!output.json && !output.quiet && std::io::stderr().is_terminal()).then(|| bar("read", start.bytes_total));
    let mut reported = Instant::now();
    let mut scrubbed =
        Scrubbed { start, bytes_read: 0, bytes_done: start.bytes_done, found: Vec::new(), finished: false };
    while !scrubbed.finished && !stop.load(Ordering::Relaxed) {
        let step = scrubbing.step(portion)?;
        step.found.iter().filter(|_| !output.json).for_each(|d| say(&format!("damaged: {}", render::damage(d))));
        scrubbed.found.extend(step.found);
        scrubbed.bytes_read += step.bytes_read;
        (scrubbed.bytes_done, scrubbed.finished) = (step.bytes_done, step.end);
        if let Some(bar) = &bar {
            bar.set_position(step.bytes_done);
        }
        if output.json && reported.elapsed() >= REPORT_INTERVAL {
            reported = Instant::now();
            let body = json!({ "bytes_done": step.bytes_done, "bytes_total": start.bytes_total });
            // A script that has gone away loses nothing but this line.
            drop(Message { message_type: "progress", body }.print());
        }
        if let Some(pace) = &mut pace {
            rest(pace.rest(step.bytes_read, began.elapsed()), stop);
        }
    }
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    Ok(scrubbed)
}

fn rest(mut left: Duration, stop: &AtomicBool) {
    while !left.is_zero() && !stop.load(Ordering::Relaxed) {
        let nap = left.min(NAP);
        std::thread::sleep(nap);
        left -= nap;
    }
}

fn describe(name: &DomainName, target: &str, scrubbed: &Scrubbed, known: &[Damage]) -> String {
    let how = match (scrubbed.finished, scrubbed.start.resumed) {
        (true, false) => "all points of",
        (true, true) => "the rest of the points of",
        (false, _) => "a part of the points of",
    };
    let read = render::bytes(scrubbed.bytes_read);
    let verdict = if known.is_empty() { "nothing is known to be damaged" } else { "damaged are:" };
    let mut lines = vec![format!("read {how} {name} on {target} again, {read}: {verdict}")];
    lines.extend(known.iter().map(|d| format!(" {}", render::damage(d))));
    lines.join("\n")
}
