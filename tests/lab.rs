//! The lab suite: the whole product on real libvirt, QEMU and sshd, on the two hosts of `tests/lab/lab`.
//!
//! `make test-lab` brings several labs up and runs it. Every test is a process of its own with a lab that no other test
//! uses meanwhile (`tests/run/in-lab`). Where there is one lab for all, as under `cargo test`, a test still owns only
//! its domain, its files and its store; `support` says how it gets that lab for itself where it must. After each test
//! the domain runs on its own image and no overlay of ours is left.

#![allow(clippy::duplicate_mod, reason = "the same tests run over two ways of capture: see by_backup")]

/// What every run and plan is told beside what its test says: nothing, so by overlay. `by_backup` says otherwise.
const WAY: &[&str] = &[];

#[path = "lab/suite/audit.rs"]
mod audit;
#[path = "lab/suite/bitmaps.rs"]
mod bitmaps;
#[path = "lab/suite/bitmaps_hands.rs"]
mod bitmaps_hands;
#[path = "lab/suite/bitmaps_off.rs"]
mod bitmaps_off;
#[path = "lab/suite/by_backup.rs"]
mod by_backup;
#[path = "lab/suite/capture.rs"]
mod capture;
#[path = "lab/suite/consistency.rs"]
mod consistency;
#[path = "lab/suite/contract.rs"]
mod contract;
#[path = "lab/suite/cost.rs"]
mod cost;
#[path = "lab/suite/crash.rs"]
mod crash;
#[path = "lab/suite/crash_backup.rs"]
mod crash_backup;
#[path = "lab/suite/crash_bench.rs"]
mod crash_bench;
#[path = "lab/suite/crash_came_back.rs"]
mod crash_came_back;
#[path = "lab/suite/crash_detach.rs"]
mod crash_detach;
#[path = "lab/suite/crash_drill.rs"]
mod crash_drill;
#[path = "lab/suite/crash_failback.rs"]
mod crash_failback;
#[path = "lab/suite/crash_failover.rs"]
mod crash_failover;
#[path = "lab/suite/crash_handover.rs"]
mod crash_handover;
#[path = "lab/suite/crash_hands.rs"]
mod crash_hands;
#[path = "lab/suite/crash_hooks.rs"]
mod crash_hooks;
#[path = "lab/suite/crash_live_only.rs"]
mod crash_live_only;
#[path = "lab/suite/crash_machine.rs"]
mod crash_machine;
#[path = "lab/suite/crash_power.rs"]
mod crash_power;
#[path = "lab/suite/crash_qmp.rs"]
mod crash_qmp;
#[path = "lab/suite/crash_quiesce.rs"]
mod crash_quiesce;
#[path = "lab/suite/crash_raw.rs"]
mod crash_raw;
#[path = "lab/suite/crash_stopped.rs"]
mod crash_stopped;
#[path = "lab/suite/daemon.rs"]
mod daemon;
#[path = "lab/suite/daemon_soak.rs"]
mod daemon_soak;
#[path = "lab/suite/definitions.rs"]
mod definitions;
#[path = "lab/suite/domain.rs"]
#[allow(dead_code, reason = "the vocabulary of the tests, whichever of them are compiled")]
mod domain;
#[path = "lab/suite/edges.rs"]
mod edges;
#[path = "lab/suite/formats.rs"]
mod formats;
#[path = "lab/suite/handover.rs"]
mod handover;
#[path = "lab/suite/identity.rs"]
mod identity;
#[path = "lab/suite/limits.rs"]
mod limits;
#[path = "lab/suite/many_disks.rs"]
mod many_disks;
#[path = "lab/suite/migrate.rs"]
mod migrate;
#[path = "lab/suite/mute.rs"]
mod mute;
#[path = "lab/suite/plain.rs"]
mod plain;
#[path = "lab/suite/points.rs"]
mod points;
#[path = "lab/suite/recovery.rs"]
mod recovery;
#[path = "lab/suite/room.rs"]
mod room;
#[path = "lab/suite/runbooks.rs"]
mod runbooks;
#[path = "lab/suite/scrub.rs"]
mod scrub;
#[path = "lab/suite/seeds.rs"]
mod seeds;
#[path = "lab/suite/states.rs"]
mod states;
#[path = "lab/suite/support.rs"]
#[allow(dead_code, reason = "the vocabulary of the tests, whichever of them are compiled")]
mod support;
#[path = "lab/suite/targets.rs"]
mod targets;
#[path = "lab/suite/tpm.rs"]
mod tpm;
#[path = "lab/suite/tracked.rs"]
mod tracked;
#[path = "lab/suite/verify.rs"]
mod verify;
#[path = "lab/suite/volumes.rs"]
mod volumes;
