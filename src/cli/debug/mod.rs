//! `debug`: what is in a file of ours, for who has to find out why something went wrong. Read-only.
//!
//! One file per subject. Each makes a view out of a file with the reader that the program itself uses, and says at
//! which byte that ended and why. This page has the grammar, and prints the views.
//!
//! Invariants
//! - Nothing is written, no lock is taken, nothing is decrypted without a key, and nothing is waited for.
//! - Memory and output are bounded on any input: lists keep their first entries, files are read in pieces.
//!
//! What each shows: docs/troubleshooting.md. JSON: docs/formats/json.md.

mod args;
mod digests;
mod extents;
mod file;
mod journal;
mod page;
mod patch;
mod pointfile;
mod points;
mod protection;
mod wire;

use super::Globals;
use crate::cli::plain::envelope::KeyArgs;
use crate::cli::speak::output::{Exit, Message, Output, print};
use args::LookArgs;
use clap::{Args, Subcommand};
use jiff::Timestamp;
use page::{Finding, Look, Page, View, with_advice};
use serde::Serialize;
use std::path::Path;
use virt_replica::error::Result;

#[derive(Debug, Args)]
pub struct DebugArgs {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Debug, Subcommand)]
enum Subject {
    /// Show the chain of an image, and which parts of it are data or zero
    Extents(extents::ExtentsArgs),
    /// Show the header, the groups and the records of a patch, with their offsets
    Patch(KeyedArgs),
    /// Show the points of a replica's directory, of a manifest, or of a point in a file
    Points(KeyedArgs),
    /// Show the record, the lock and the reports of a domain's directory, or one of these files
    Journal(LookArgs),
    /// Show the digest tree of a head, digests in a file, or a change list
    Digests(LookArgs),
    /// Show the messages of a session that was captured, in either direction
    Wire(LookArgs),
}

/// The same, of files that may be protected.
#[derive(Debug, Args)]
struct KeyedArgs {
    #[command(flatten)]
    look: LookArgs,
    #[command(flatten)]
    keys: KeyArgs,
}

impl DebugArgs {
    fn look(&self) -> &LookArgs {
        match &self.subject {
            Subject::Extents(args) => &args.look,
            Subject::Patch(args) | Subject::Points(args) => &args.look,
            Subject::Journal(args) | Subject::Digests(args) | Subject::Wire(args) => args,
        }
    }

    pub fn json(&self) -> bool {
        self.look().json
    }
}

pub fn debug(args: &DebugArgs, globals: &Globals, output: Output) -> Result<Exit> {
    let (look, now) = (args.look(), Timestamp::now());
    match &args.subject {
        Subject::Extents(args) => each("extents", look, output, |path, max| extents::look(path, args, globals, max)),
        Subject::Patch(args) => each("patch", look, output, |path, max| patch::look(path, &args.keys, max)),
        Subject::Points(args) => each("points", look, output, |path, max| points::look(path, &args.keys, now, max)),
        Subject::Journal(_) => each("journal", look, output, journal::look),
        Subject::Digests(_) => each("digests", look, output, digests::look),
        Subject::Wire(_) => each("wire", look, output, wire::look),
    }
}

/// Looks into one file after the other. One that is damaged keeps no other from being shown; the exit code is that of
/// the first error.
fn each<V: View>(
    subject: &'static str,
    args: &LookArgs,
    output: Output,
    one: impl Fn(&Path, usize) -> Result<Look<V>>,
) -> Result<Exit> {
    let mut code = None;
    for (n, path) in args.files.iter().enumerate() {
        let error = match one(path, args.max()) {
            Ok(Look { view, damage }) => {
                let damage = damage.map(|e| with_advice(e.path(path)));
                let text = match output.json {
                    true => String::new(),
                    false => text(path, &view, damage.as_ref().map(Finding::of).as_ref()),
                };
                match output.json {
                    true => told(subject, path, &view, damage.as_ref().map(Finding::of)).print()?,
                    false => print(&if n == 0 { text } else { format!("\n{text}") })?,
                }
                damage
            }
            Err(e) => Some(e.path(path)),
        };
        if let Some(e) = error {
            output.error(&e);
            code.get_or_insert(e.kind().exit_code());
        }
    }
    Ok(code.map_or(Exit::Done, Exit::Code))
}

fn text(path: &Path, view: &impl View, damage: Option<&Finding>) -> String {
    let mut page = Page::default();
    page.line("file", page::clean(path.to_string_lossy()));
    view.page(&mut page);
    if let Some(damage) = damage {
        page.line("", "");
        page.line("damaged", &damage.what);
    }
    page.text()
}

#[derive(Serialize)]
struct Told<'a, V> {
    subject: &'static str,
    file: String,
    /// Why the view ends where it does; `null`: it is whole.
    damage: Option<Finding>,
    #[serde(flatten)]
    view: &'a V,
}

fn told<'a, V: View>(
    subject: &'static str,
    path: &Path,
    view: &'a V,
    damage: Option<Finding>,
) -> Message<'static, Told<'a, V>> {
    let file = path.to_string_lossy().into_owned();
    Message { message_type: "debug", body: Told { subject, file, damage, view } }
}

#[cfg(test)]
mod tests;
