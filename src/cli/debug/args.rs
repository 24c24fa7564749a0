//! Arguments that all subjects of `debug` share.

use clap::Args;
use std::path::PathBuf;

/// Entries of a list that are shown, and with `--all`.
pub(super) const SHOWN: usize = 100;
pub(super) const SHOWN_ALL: usize = 100_000;

/// What every subject takes.
#[derive(Debug, Args)]
pub struct LookArgs {
    /// Files to look into
    #[arg(required = true, value_name = "FILE")]
    pub(super) files: Vec<PathBuf>,
    /// Show 100000 entries of each list, not only 100
    #[arg(long)]
    pub(super) all: bool,
    /// Print JSON for scripts
    #[arg(long)]
    pub(super) json: bool,
}

impl LookArgs {
    pub(super) fn max(&self) -> usize {
        if self.all { SHOWN_ALL } else { SHOWN }
    }
}
