//! Replication without anybody watching: policies are obeyed for as long as the host is up.
//!
//! ```text
//!   signals, control socket, /metrics          children: virt-replica sync, doctor; hooks
//!              |    events                              ^   |
//!              v                                orders  |   v  signs of life, ends
//!          service  ----- event, now ----->  engine (pure)  -----> orders
//!              |
//!            state     what must survive a crash: last runs, waits, breaches, pauses
//! ```
//!
//! [`engine`] decides: a state, an event and the time in, orders out. Everything else acts and reports back. Each run
//! is a process of its own, so that its crash never takes the daemon with it; a daemon that dies takes no run with it
//! either. docs/daemon.md.

pub mod check;
mod checking;
pub mod checks;
#[cfg(test)]
mod checks_tests;
pub mod control;
pub mod engine;
#[cfg(test)]
mod engine_tests;
pub mod event;
pub mod http;
pub mod input;
pub mod metrics;
pub mod notify;
mod page;
pub mod pair;
mod run;
pub mod service;
mod serving;
pub mod state;
pub mod status;
pub mod worker;
