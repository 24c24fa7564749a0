//! The first SIGINT, SIGTERM or SIGHUP asks a run to end in order, the second ends the process where it stands.
//!
//! Even the second costs nothing but time: the dead-man lets the guest go, and the next run settles the rest.

use super::progress;
#[cfg(feature = "libvirt")]
use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use virt_replica::error::{Error, Result};

static STOP: AtomicBool = AtomicBool::new(false);

/// Listens from now on; the flag is set by the first signal.
#[cfg(feature = "libvirt")]
pub fn listen() -> Result<&'static AtomicBool> {
    listen_saying(
        "stopping in order: the domain goes back onto its own images (again: at once)",
        "ended at once; the next run, or `virt-replica doctor`, puts the domain right",
    )
}

/// Set by SIGUSR1, and, with `keys`, by Enter where somebody sits in front of it: a migration cuts over.
#[cfg(feature = "libvirt")]
pub fn cut_over(keys: bool) -> Result<&'static AtomicBool> {
    static CUT: AtomicBool = AtomicBool::new(false);
    let listen = || -> std::io::Result<(Runtime, Signal)> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let signal = runtime.block_on(async { signal(SignalKind::user_defined1()) })?;
        Ok((runtime, signal))
    };
    let (runtime, mut signal) = listen().map_err(|e| Error::from_io("cannot listen for SIGUSR1", e))?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            while signal.recv().await.is_some() {
                CUT.store(true, Ordering::Relaxed);
            }
        });
    });
    if keys && std::io::stdin().is_terminal() {
        progress::say("Enter, or SIGUSR1, cuts over after the round that is under way");
        std::thread::spawn(|| {
            if matches!(std::io::stdin().read_line(&mut String::new()), Ok(1..)) {
                CUT.store(true, Ordering::Relaxed);
            }
        });
    }
    Ok(&CUT)
}

/// SIGINT, SIGTERM and SIGHUP, and the runtime to await them on. They are registered when this returns: a signal that
/// comes early must not take the default, and lethal, way.
pub struct Signals {
    pub runtime: Runtime,
    pub int: Signal,
    pub term: Signal,
    pub hup: Signal,
}

pub fn register() -> Result<Signals> {
    let register = || -> std::io::Result<Signals> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let of = |kind| runtime.block_on(async { signal(kind) });
        let (int, term, hup) = (of(SignalKind::interrupt())?, of(SignalKind::terminate())?, of(SignalKind::hangup())?);
        Ok(Signals { runtime, int, term, hup })
    };
    register().map_err(|e| Error::from_io("cannot listen for signals", e))
}

/// As [`listen`], with other words for the first signal and for the second.
pub fn listen_saying(first: &'static str, second: &'static str) -> Result<&'static AtomicBool> {
    let Signals { runtime, mut int, mut term, mut hup } = register()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = int.recv() => {}
                    _ = term.recv() => {}
                    _ = hup.recv() => {}
                }
                if STOP.swap(true, Ordering::Relaxed) {
                    progress::say(second);
                    virt_replica::wiring::end_connections();
                    std::process::exit(130);
                }
                progress::say(first);
            }
        });
    });
    Ok(&STOP)
}
