//! What a run says while it works: bars on a terminal, lines elsewhere, JSON lines for a script.

use crate::cli::speak::output::{Message, Output};
use crate::cli::speak::progress::{bar, say};
use crate::cli::speak::render;
use indicatif::ProgressBar;
use serde_json::json;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use virt_replica::engine::pump::Progress;
use virt_replica::engine::stats::Mode;
use virt_replica::name::DiskName;
use virt_replica::replicate::cycle::Watch;

/// A script hears of progress at most this often.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// How long each disk took, for the rates of the report.
#[derive(Debug, Clone)]
pub struct DiskTime {
    pub name: DiskName,
    pub time: Duration,
}

/// Watches a run for the people or the script in front of it.
pub struct Watcher {
    style: Style,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Bars,
    Lines,
    Json,
    Silent,
}

#[derive(Default)]
struct State {
    current: Option<Current>,
    done: Vec<DiskTime>,
}

struct Current {
    name: DiskName,
    size_bytes: u64,
    progress: Arc<Progress>,
    bar: Option<ProgressBar>,
    since: Instant,
    reported: Instant,
}

impl Watcher {
    pub fn new(output: Output) -> Watcher {
        let style = match output {
            Output { json: true, .. } => Style::Json,
            Output { quiet: true, .. } => Style::Silent,
            _ if std::io::stderr().is_terminal() => Style::Bars,
            _ => Style::Lines,
        };
        Watcher { style, state: Mutex::default() }
    }

    /// Ends the last bar. Returns how long each disk took, in the order they were read.
    pub fn finish(&self) -> Vec<DiskTime> {
        let mut state = self.lock();
        self.end_disk(&mut state);
        std::mem::take(&mut state.done)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A display that panicked is no reason to end a run.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn end_disk(&self, state: &mut State) {
        let Some(current) = state.current.take() else { return };
        self.report(&current);
        if let Some(bar) = &current.bar {
            // Its line goes where it belongs in the story, among the steps.
            bar.finish_and_clear();
        }
        let time = current.since.elapsed();
        if matches!(self.style, Style::Bars | Style::Lines) {
            let read = current.progress.read.load(Ordering::Relaxed);
            let sent = current.progress.sent.load(Ordering::Relaxed);
            let (read, sent, ms) = (render::bytes(read), render::bytes(sent), render::millis(time.as_secs_f64() * 1e3));
            say(&format!("      {}: {read} read, {sent} sent in {ms}", current.name));
        }
        state.done.push(DiskTime { name: current.name, time });
    }

    /// Brings the display up to the counters.
    fn report(&self, current: &Current) {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let p = &current.progress;
        if let Some(bar) = &current.bar {
            bar.set_position(load(&p.scanned).min(current.size_bytes));
            bar.set_message(format!("{} sent", render::bytes(load(&p.sent))));
        }
        if self.style == Style::Json {
            emit(
                "progress",
                json!({
                    "disk": current.name,
                    "bytes_total": current.size_bytes,
                    "bytes_scanned": load(&p.scanned),
                    "bytes_read": load(&p.read),
                    "bytes_sent": load(&p.sent),
                    "blocks_changed": load(&p.changed_blocks),
                }),
            );
        }
    }
}

impl Watch for Watcher {
    fn step(&self, number: u8, what: &str) {
        self.end_disk(&mut self.lock());
        match self.style {
            Style::Bars | Style::Lines => say(&format!("[{number}/8] {what}")),
            Style::Json => emit("step", json!({ "step": number, "what": what })),
            Style::Silent => {}
        }
    }

    fn disk(&self, name: &DiskName, size_bytes: u64, mode: Mode, progress: &Arc<Progress>) {
        let mut state = self.lock();
        self.end_disk(&mut state);
        let now = Instant::now();
        let bar = (self.style == Style::Bars).then(|| bar(name.as_str(), size_bytes));
        match self.style {
            Style::Lines => say(&format!("      {name}: {}, {mode}", render::bytes(size_bytes))),
            Style::Json => emit("disk", json!({ "disk": name, "bytes_total": size_bytes, "mode": mode })),
            Style::Bars | Style::Silent => {}
        }
        let progress = progress.clone();
        state.current = Some(Current { name: name.clone(), size_bytes, progress, bar, since: now, reported: now });
    }

    fn tick(&self) {
        let mut state = self.lock();
        let Some(current) = state.current.as_mut() else { return };
        let due = self.style == Style::Bars || current.reported.elapsed() >= REPORT_INTERVAL;
        if due {
            current.reported = Instant::now();
            self.report(current);
        }
    }

    fn warn(&self, text: &str) {
        match self.style {
            Style::Json => emit("warning", json!({ "message": text })),
            _ => say(&format!("warning: {text}")),
        }
    }
}

/// A line for the script. It may have gone away; the run goes on for the domain's sake.
fn emit(message_type: &str, body: serde_json::Value) {
    if let Err(e) = (Message { message_type, body }).print() {
        tracing::debug!("{}", e.chain());
    }
}
