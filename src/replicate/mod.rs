//! Replicates one domain once. Start with [`cycle`], the page that tells the whole story of a run.
//!
//! Deciding is pure: [`plan`] says what a run will do, [`decide`] what the next step is, from a record and an observation.
//! Acting is thin: [`settle`] performs what was decided, for the normal run and for every recovery alike.

pub mod account;
pub mod audit;
pub(crate) mod away;
pub mod backup;
pub mod birth;
pub mod capture;
pub mod choice;
pub mod compare;
pub mod cycle;
pub mod deadman;
pub mod decide;
pub mod demoted;
pub mod doctor;
#[cfg(test)]
mod fake;
pub mod forecast;
pub mod freeze_hooks;
pub mod generation;
pub mod guard;
pub mod halts;
mod held;
pub(crate) mod held_dir;
mod history;
pub mod journal;
mod label;
pub mod leftover;
pub mod look;
mod marks;
pub mod observe;
pub mod offline;
pub mod plan;
pub mod pump;
pub mod quiesce;
pub mod report;
pub mod rights;
pub(crate) mod room;
pub mod settle;
pub mod settle_options;
pub mod source;
pub mod stopped;
pub mod stores;
mod surroundings;
pub mod survey;
mod tail;
mod target_gate;
pub mod throttle;
pub mod turnover;
