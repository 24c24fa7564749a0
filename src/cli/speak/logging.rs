//! The log: lines on stderr, or entries of the journal where stderr is one.

use super::output::Output;
use super::progress;
use crate::cli::globals::Globals;
use std::os::unix::fs::MetadataExt;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Logs go to stderr, above the progress bars if there are any. `tells`: what it does is worth a line without being
/// asked.
pub fn start(globals: &Globals, output: Output, tells: bool) {
    let level = match (globals.quiet, globals.verbose.max(u8::from(tells))) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "warn,virt_replica=info",
        (_, 2) => "info,virt_replica=debug",
        _ => "trace",
    };
    let filter = EnvFilter::builder().try_from_env().unwrap_or_else(|_| EnvFilter::new(level));
    // Only a second subscriber makes starting fail, and there is none.
    if let Some(journal) = is_journal().then(tracing_journald::layer).and_then(Result::ok) {
        let journal = journal.with_field_prefix(Some("VIRT_REPLICA".to_owned()));
        let _ = tracing_subscriber::registry().with(filter).with(journal).try_init();
        return;
    }
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(output.colors).with_target(false);
    let builder = builder.with_writer(|| progress::AboveBars);
    let _ = match globals.verbose {
        0 => builder.without_time().compact().try_init(),
        _ => builder.compact().try_init(),
    };
}

/// Whether stderr leads to the journal: systemd says which file that is (systemd.exec(5), `$JOURNAL_STREAM`), and
/// whoever redirected it since has another.
pub fn is_journal() -> bool {
    let Some(told) = std::env::var("JOURNAL_STREAM").ok() else { return false };
    let stderr = std::fs::metadata("/proc/self/fd/2");
    stderr.is_ok_and(|m| told == format!("{}:{}", m.dev(), m.ino()))
}
