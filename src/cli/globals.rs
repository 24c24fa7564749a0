//! The options that every command takes.

use clap::{ArgAction, Args};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use virt_replica::config::{CONFIG_FILE, Config};
use virt_replica::error::Result;
use virt_replica::replicate::state::journal::STATE_DIR;

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(super) struct Globals {
    /// libvirt's URI, as virsh has it
    #[arg(short, long, global = true, value_name = "URI", env = "LIBVIRT_DEFAULT_URI", hide_env_values = true)]
    connect: Option<String>,

    /// Where this host keeps its own state
    #[arg(long, global = true, value_name = "DIR", env = "VIRT_REPLICA_STATE_DIR", hide_env_values = true,
          default_value = STATE_DIR)]
    pub(super) state_dir: PathBuf,

    /// Targets with names [default: /etc/virt-replica/virt-replica.yaml]
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,

    /// Say nothing but results, warnings and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(super) quiet: bool,

    /// Log more; twice for every decision (RUST_LOG overrides it)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(super) verbose: u8,

    /// Use no colours (also with NO_COLOR in the environment)
    #[arg(long, global = true)]
    no_color: bool,
}

impl Globals {
    /// An empty URI means the same as none.
    #[cfg_attr(not(feature = "libvirt"), expect(dead_code, reason = "there is nothing to connect to"))]
    pub(super) fn uri(&self) -> Option<String> {
        self.connect.clone().filter(|uri| !uri.is_empty())
    }

    pub(super) fn config(&self) -> Result<Config> {
        Config::load(self.config_path(), self.config.is_some())
    }

    /// Where the configuration is; its policies lie beside it.
    pub(super) fn config_path(&self) -> &Path {
        self.config.as_deref().unwrap_or(CONFIG_FILE.as_ref())
    }

    pub(super) fn colors(&self) -> bool {
        let asked_not = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        !self.no_color && !asked_not && std::io::stderr().is_terminal()
    }
}

/// A build without libvirt serves a target; it has no source side.
#[cfg(not(feature = "libvirt"))]
pub(super) fn no_libvirt<T>(command: &str) -> Result<T> {
    use virt_replica::error::{Error, Kind};
    Err(Error::new(Kind::Usage, format!("this build has no libvirt: it cannot '{command}'")).hint(
        "install the package with libvirt on the source, or build with `cargo build --release` (needs libvirt-dev)",
    ))
}
