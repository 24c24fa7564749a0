//! `virt-replica` replicates libvirt/QEMU virtual machines to another host.
//!
//! The map, in dependency order; arrows in the code point down this list only (a test keeps it so):
//!
//! ```text
//!        cli (in the binary)
//!              |
//!       site · daemon        site: the only file that names concrete adapters; daemon: policies obeyed, unattended
//!              |
//!    replicate · recovery    the story: settle, observe, plan, freeze, ship, seal, commit, retire
//!       · plain                  (start reading at replicate/cycle.rs); what the replica is for; images of no domain
//!              |
//!     plan · decide           pure: plain views in, values out
//!              |
//!  image  hypervisor  replica  transport      ports: traits, plain views, and their adapters
//!              |                              (agent and wire stand beside replica)
//!  policy · retention · patch · wire          rules and formats: values or bytes in, values out
//!  envelope                                   what protects a file on its way
//!  manifest · xml
//!              |
//!     hook · yaml · units · users · flock · file_id · words · trust
//!              |
//!       block · name · error                  words
//! ```

// Not among the lints of Cargo.toml: clippy takes the helpers of integration tests for code that is no test.
#![deny(clippy::unwrap_used)]

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
