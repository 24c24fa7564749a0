//! `status`: how every domain stands, from this host's journal and libvirt, and with `--to` from the target itself.
//!
//! Touches nothing and takes no lock: it may be asked every second. What could not be learnt is said to be unknown
//! (I22), and whose word the head is, is said too: the journal knows what this host shipped, only the target knows what
//! is still there.

use super::target::SshArgs;
use clap::Args;
use std::time::Duration;

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Name, UUID or id of a domain [default: all domains]
    domain: Option<String>,
    /// Ask this target for the newest points (URL or name as for sync)
    #[arg(long, value_name = "TARGET")]
    to: Option<String>,
    /// Ask it too whether each domain could be brought up there from its newest point. Its host must allow failovers
    #[arg(long, requires = "to", conflicts_with = "nagios")]
    ready: bool,
    #[command(flatten)]
    ssh: SshArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
    /// Look again every this many seconds, until ended
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", require_equals = true,
          conflicts_with = "json", value_parser = clap::value_parser!(u32).range(1..))]
    watch: Option<u32>,
    /// Answer as a monitoring plugin does: one line, performance data, exit code 0, 1, 2 or 3. A lag beyond the RPO of
    /// the domain's policy is critical, and beyond four fifths of it a warning
    #[arg(long, conflicts_with_all = ["json", "watch"])]
    nagios: bool,
    /// With --nagios: warn at this lag, whatever the policies say
    #[arg(long, value_name = "TIME", requires = "nagios", value_parser = crate::cli::speak::render::parse_duration)]
    warning: Option<Duration>,
    /// With --nagios: this lag is critical, whatever the policies say
    #[arg(long, value_name = "TIME", requires = "nagios", value_parser = crate::cli::speak::render::parse_duration)]
    critical: Option<Duration>,
}

#[cfg(not(feature = "libvirt"))]
pub fn status(
    _: &StatusArgs,
    _: &crate::cli::globals::Globals,
    _: crate::cli::speak::output::Output,
) -> virt_replica::error::Result<crate::cli::speak::output::Exit> {
    crate::cli::globals::no_libvirt("status")
}

#[cfg(feature = "libvirt")]
pub use gather::status;

#[cfg(feature = "libvirt")]
mod gather;
#[cfg(feature = "libvirt")]
mod nagios;
#[cfg(feature = "libvirt")]
mod view;
