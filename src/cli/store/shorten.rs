//! Keeping chains short, after a run and after a prune: the target says when, and does it; here is who lets it.

use crate::cli::speak::advice;
use crate::cli::speak::output::{Message, Output};
use crate::cli::speak::progress::bar;
use crate::cli::speak::render;
use serde_json::json;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use virt_replica::agent::client::AgentClient;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DomainName, DomainUuid};
use virt_replica::replica::upkeep::{ShortenStart, Shortening, Upkeep as _};

/// Copied at once: an interrupt waits for no longer than that takes.
const PORTION: u64 = 16 << 20;

/// What came of it.
#[derive(Debug, Default, PartialEq)]
pub struct Shortened {
    /// What was done, as a sentence.
    pub note: Option<String>,
    /// What an operator should read.
    pub warning: Option<String>,
}

/// Has the newest point's images stand alone, if the target finds them too many. Nothing of it fails what came before.
pub fn keep_short(
    client: &Arc<AgentClient>,
    (uuid, name): (&DomainUuid, &DomainName),
    target: &str,
    output: Output,
    stop: &AtomicBool,
) -> Shortened {
    match shorten(client, uuid, output, stop) {
        Ok(None) => Shortened::default(),
        Ok(Some((start, bytes_copied))) => {
            if output.json {
                let body = json!({
                    "domain": name, "uuid": uuid, "target": target, "point": start.point, "disks": start.disks,
                    "bytes_copied": bytes_copied,
                });
                // A script that has gone away loses nothing but this line.
                drop(Message { message_type: "shorten", body }.print());
            }
            let disks: Vec<&str> = start.disks.iter().map(|d| d.as_str()).collect();
            let note = format!(
                "the images of point {} ({}) stand alone now, {} copied at the target: the chain had become as deep as the target allows",
                start.point,
                disks.join(", "),
                render::bytes(bytes_copied)
            );
            Shortened { note: Some(note), warning: None }
        }
        Err(e) => Shortened { note: None, warning: Some(unshortened(&e)) },
    }
}

fn unshortened(e: &Error) -> String {
    let next = match e.kind() {
        Kind::Busy | Kind::Interrupted => "the next run tries again".to_owned(),
        _ => advice::of(e).unwrap_or_else(|| "reading it gets slower with each; the next run tries again".to_owned()),
    };
    format!(
        "a disk of the newest point consists of more images than the target allows, and they stay: {}; {next}",
        e.chain()
    )
}

/// `None`: there was nothing to do.
fn shorten(
    client: &Arc<AgentClient>,
    uuid: &DomainUuid,
    output: Output,
    stop: &AtomicBool,
) -> Result<Option<(ShortenStart, u64)>> {
    // It ends with the replica: that has to stay open.
    let replica = client.open(uuid)?;
    let Some(mut shortening) = replica.shorten()? else { return Ok(None) };
    let copied = copy_all(shortening.as_mut(), output, stop);
    let start = shortening.start();
    if let Err(e) = shortening.close() {
        tracing::debug!("the shortening did not end in order: {}", e.chain());
    }
    Ok(Some((start, copied?)))
}

fn copy_all(shortening: &mut dyn Shortening, output: Output, stop: &AtomicBool) -> Result<u64> {
    let start = shortening.start();
    let bar =
        (!output.json && !output.quiet && std::io::stderr().is_terminal()).then(|| bar("copy", start.bytes_total));
    let copied = loop {
        if stop.load(Ordering::Relaxed) {
            break Err(Error::new(Kind::Interrupted, "stopped by a signal"));
        }
        match shortening.step(PORTION) {
            Ok(step) if step.end => break Ok(step.bytes_done),
            Ok(step) => bar.iter().for_each(|bar| bar.set_position(step.bytes_done)),
            Err(e) => break Err(e),
        }
    };
    bar.iter().for_each(|bar| bar.finish_and_clear());
    copied
}
