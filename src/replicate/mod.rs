//! Replicates one domain once. Start with [`cycle`], the page that tells the whole story of a run.
//!
//! Deciding is pure: [`plan`] says what a run will do, [`settle::decide`] what the next step is, from a record and an
//! observation. Acting is thin: [`settle`] performs what was decided, for the normal run and for every recovery alike.
//!
//! The rooms: [`plan`] before the freeze, [`capture`] how the disks are made to stand still, [`tracking`] which parts
//! of them changed, [`settle`] the way home, [`state`] what a run leaves behind in files.

mod attachments;
pub mod capture;
pub mod compare;
pub mod cycle;
pub mod doctor;
#[cfg(test)]
mod fake;
pub(crate) mod free_space;
pub mod look;
pub mod plan;
pub mod run;
pub mod settle;
pub mod state;
mod target_gate;
pub mod tracking;
