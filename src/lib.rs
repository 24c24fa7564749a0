//! `virt-replica` replicates libvirt/QEMU virtual machines to another host.
//!
//! The map. Each module uses only modules on lower lines, and stands as low as its imports allow. `tests/it/tidy.rs`
//! compares this picture, and the same one in docs/architecture.md, with the imports. Start reading at
//! [`replicate::cycle`].
//!
//! ```text
//! cli                                      grammar, rendering, exit codes; in the binary. The library never prints
//! wiring                                   construction only: names every adapter
//! agent · daemon                           the other end of a session; policies, unattended
//! config · recovery · run_settings         targets; ready drill failover migrate; how a run is done
//! replicate                                the story of a run: settle observe plan freeze ship seal commit retire
//! plain · replica                          images of no domain: copy diff apply; the store of points, and its port
//! engine · hypervisor · policy             finds and ships differences; the port to libvirt; when to run, and how
//! durable · hook · image · patch · retention · transport    files, images, formats, the way to a host
//! block · envelope · failpoint · file_id · name · trust · users · words · yaml    words; what protects a file
//! error · flock · units
//! ```

// Not among the lints of Cargo.toml: clippy takes the helpers of integration tests for code that is no test.
#![deny(clippy::unwrap_used)]
#![deny(missing_docs)]

pub mod durable;
pub mod error;
pub mod failpoint;
pub mod file_id;
pub mod flock;
pub mod hook;
pub mod name;
pub mod trust;
pub mod units;
pub mod users;
pub mod words;
pub mod yaml;

pub mod block;
pub mod envelope;
pub mod patch;
pub mod policy;
pub mod retention;

pub mod engine;

pub mod agent;
pub mod hypervisor;
pub mod image;
pub mod replica;
pub mod transport;

pub mod config;

pub mod replicate;

pub mod plain;
pub mod recovery;

pub mod run_settings;

pub mod daemon;
pub mod wiring;
