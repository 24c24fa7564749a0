//! Construction only, and the only module that names every concrete adapter: from a hypervisor's URI and a target's
//! name to ready-made ports.

mod connection;
#[cfg(feature = "libvirt")]
pub mod handover;
mod host;
#[cfg(feature = "libvirt")]
pub mod local_bringup;
#[cfg(feature = "libvirt")]
pub mod local_target;
pub mod plain;
#[cfg(feature = "libvirt")]
pub mod retire_home_copy;
mod serve;
#[cfg(feature = "libvirt")]
mod source;
pub mod stores;

pub use crate::image::chain::is_block_device;
pub use connection::{Connection, end_connections, find_replica};
pub use host::{new_run, open_options, random_bytes, runtime_dir, workers};
#[cfg(feature = "libvirt")]
pub use serve::serve_failover;
pub use serve::{serve_agent, serve_images};
#[cfg(feature = "libvirt")]
pub use source::{Site, SiteOptions};
pub use stores::{depth_max, replicas_of, seed, serve_nbd};
