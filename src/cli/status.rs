//! `status`: how every domain stands, from this host's journal and libvirt, and with `--to` from the target itself.
//!
//! Touches nothing and takes no lock: it may be asked every second. What could not be learnt is said to be unknown
//! (I22), and whose word the head is, is said too: the journal knows what this host shipped, only the target knows what
//! is still there.

use super::target::SshArgs;
use clap::Args;

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Name, UUID or id of a domain [default: all domains]
    domain: Option<String>,
    /// Ask this target for the newest points (URL or name as for sync)
    #[arg(long, value_name = "TARGET")]
    to: Option<String>,
    #[command(flatten)]
    ssh: SshArgs,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

#[cfg(not(feature = "libvirt"))]
pub fn status(
    _: &StatusArgs,
    _: &super::Globals,
    _: super::output::Output,
) -> virt_replica::error::Result<super::output::Exit> {
    super::no_libvirt("status")
}

#[cfg(feature = "libvirt")]
pub use gather::status;

#[cfg(feature = "libvirt")]
mod gather;
#[cfg(feature = "libvirt")]
mod view;
