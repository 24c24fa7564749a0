//! What the commands for plain images share: formats, files that appear when they are whole, progress.

use crate::cli::speak::output::{Message, Output};
use crate::cli::speak::progress::bar;
use crate::cli::speak::{render, signals};
use clap::Args;
use serde_json::json;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;
use virt_replica::engine::pump::Progress;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::image::foreign::format::AnyFormat;
use virt_replica::plain::source::{ReadOptions, Source};
use virt_replica::plain::{WayWish, format_by_name};

/// How often the terminal and scripts hear of progress.
const TICK: Duration = Duration::from_millis(200);
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// How images are changed.
#[derive(Debug, Args)]
pub struct WayArgs {
    /// How to change an existing image without ever tearing it: reflink (a clone takes its place), copy (a copy does),
    /// redo (in place, with the patch kept beside it), or auto (the cheapest that works)
    #[arg(long, value_name = "WAY", default_value = "auto")]
    atomic: WayWish,
    /// Change it at once, without a safety net: an interruption leaves a mixture of old and new, until it is repeated
    #[arg(long, conflicts_with = "atomic")]
    in_place: bool,
}

impl WayArgs {
    pub fn wish(&self) -> WayWish {
        if self.in_place { WayWish::InPlace } else { self.atomic }
    }
}

/// Which files of this host an image may name.
#[derive(Debug, Args)]
pub struct BackingArgs {
    /// Allow backing images and data files of an image in this directory; may be given more than once [always: the
    /// image's own directory]
    #[arg(long = "backing", value_name = "DIR")]
    pub dirs: Vec<PathBuf>,
}

/// As given, or raw or qcow2 as the name says.
pub fn format(given: Option<&String>, path: &Path) -> AnyFormat {
    given.and_then(|given| given.parse().ok()).unwrap_or_else(|| format_by_name(path).into())
}

/// Formats that an image may have.
pub const FORMATS: [&str; 7] = ["raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed"];

/// Opens an image that is read, in the format given or as its name says.
pub fn open_source(given: Option<&String>, path: &Path, options: &ReadOptions) -> Result<Source> {
    Source::open_any(path, format(given, path), options)
}

pub fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io("this is no path", path, e))
}

/// A file that is read, or stdin for `-`.
pub fn input(path: &Path) -> Result<Box<dyn Read + Send>> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin()));
    }
    let file = File::open(path).map_err(|e| Error::io("cannot open the file", path, e))?;
    Ok(Box::new(file))
}

/// A file that appears under its name when it is whole and durable, or stdout for `-`.
pub enum OutFile {
    Stdout(io::Stdout),
    File { part: BufWriter<NamedTempFile>, path: PathBuf, force: bool },
}

impl OutFile {
    /// `Conflict` if the file is there, unless `force`; nothing is written to a terminal.
    pub fn create(path: &Path, force: bool) -> Result<OutFile> {
        if path == Path::new("-") {
            let out = io::stdout();
            return match out.is_terminal() {
                true => Err(Error::new(Kind::Usage, "this is not for a terminal").hint("name a file, or use a pipe")),
                false => Ok(OutFile::Stdout(out)),
            };
        }
        let path = absolute(path)?;
        if !force && path.symlink_metadata().is_ok() {
            return Err(exists(&path));
        }
        let dir = path.parent().unwrap_or(Path::new("/"));
        let part = NamedTempFile::new_in(dir).map_err(|e| Error::io("cannot create the file", &path, e))?;
        Ok(OutFile::File { part: BufWriter::with_capacity(1 << 20, part), path, force })
    }

    /// Whether results go elsewhere, because stdout has the content.
    pub fn is_stdout(&self) -> bool {
        matches!(self, OutFile::Stdout(_))
    }

    /// Gives the file its name, durably.
    pub fn commit(self) -> Result<()> {
        let OutFile::File { part, path, force } = self else { return Ok(()) };
        let cannot = |e| Error::io("cannot write the file", &path, e);
        let part = part.into_inner().map_err(|e| cannot(e.into_error()))?;
        part.as_file().sync_all().map_err(cannot)?;
        let named = match force {
            true => part.persist(&path),
            false => part.persist_noclobber(&path),
        };
        match named {
            Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Err(exists(&path)),
            Err(e) => Err(cannot(e.error)),
            Ok(_) => {
                let dir = path.parent().unwrap_or(Path::new("/"));
                File::open(dir).and_then(|d| d.sync_all()).map_err(cannot)
            }
        }
    }
}

impl Write for OutFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            OutFile::Stdout(out) => out.write(bytes),
            OutFile::File { part, .. } => part.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            OutFile::Stdout(out) => out.flush(),
            OutFile::File { part, .. } => part.flush(),
        }
    }
}

fn exists(path: &Path) -> Error {
    Error::new(Kind::Conflict, "the file is there already").path(path).hint("name another one, or add --force")
}

/// As `output`, without JSON where stdout has the content.
pub fn beside(output: Output, piped: bool) -> Output {
    Output { json: output.json && !piped, ..output }
}

/// A result that goes to stderr because stdout has the content.
pub fn print_beside(text: &str, output: Output) {
    if !output.quiet {
        crate::cli::speak::progress::say(text);
    }
}

/// Listens to signals; the first one ends the work in order.
pub fn listen() -> Result<&'static AtomicBool> {
    signals::listen_saying("stopping; nothing is put in place (again: at once)", "ended at once")
}

/// The error of a work that a signal ended.
pub fn unless_stopped(stop: &AtomicBool) -> Result<()> {
    match stop.load(Ordering::Relaxed) {
        true => Err(Error::new(Kind::Interrupted, "interrupted; what was there is still there")),
        false => Ok(()),
    }
}

/// Does `work` while the terminal, or a script, is told how far it is. `name` stands before the bar.
pub fn watched<T: Send>(
    name: &str,
    size_bytes: u64,
    progress: &Progress,
    output: Output,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(name, size_bytes, progress, output, &done));
        let result = work();
        done.store(true, Ordering::Relaxed);
        watcher.thread().unpark();
        result
    })
}

fn watch(name: &str, size_bytes: u64, progress: &Progress, output: Output, done: &AtomicBool) {
    let shows = !output.json && !output.quiet && io::stderr().is_terminal();
    let shown = shows.then(|| bar(name, size_bytes));
    let mut reported = Instant::now();
    while !done.load(Ordering::Relaxed) {
        std::thread::park_timeout(TICK);
        let (at, sent) = (progress.scanned.load(Ordering::Relaxed), progress.sent.load(Ordering::Relaxed));
        if let Some(bar) = &shown {
            bar.set_position(at);
            bar.set_message(if sent > 0 { format!("{} sent ", render::bytes(sent)) } else { String::new() });
        }
        if output.json && reported.elapsed() >= REPORT_INTERVAL && !done.load(Ordering::Relaxed) {
            reported = Instant::now();
            let body = json!({ "image": name, "bytes_done": at, "bytes_total": size_bytes, "bytes_sent": sent });
            // A script that has gone away loses nothing but this line.
            drop(Message { message_type: "progress", body }.print());
        }
    }
    if let Some(bar) = &shown {
        bar.finish_and_clear();
    }
}
