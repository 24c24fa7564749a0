//! The same tests once more, with every run by backup: what a point promises does not depend on how the disks were made
//! to stand still. What is only so by overlay, the tests ask of `domain::by_backup`.

/// What every run and plan is told here.
pub const WAY: &[&str] = &["--capture", "backup"];

#[path = "audit.rs"]
mod audit;
#[path = "bitmaps.rs"]
mod bitmaps;
#[path = "consistency.rs"]
mod consistency;
#[path = "cost.rs"]
mod cost;
#[path = "domain.rs"]
#[allow(dead_code, reason = "the vocabulary of the tests, whichever of them are compiled")]
mod domain;
#[path = "formats.rs"]
mod formats;
#[path = "states.rs"]
mod states;
#[path = "support.rs"]
#[allow(dead_code, reason = "the vocabulary of the tests, whichever of them are compiled")]
mod support;
#[path = "tracked.rs"]
#[allow(dead_code, reason = "the vocabulary of the tests, whichever of them are compiled")]
mod tracked;
#[path = "verify.rs"]
mod verify;
