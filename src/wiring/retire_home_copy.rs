//! A run of a domain of this host into this host's own store: how it gives way to the domain that lives elsewhere.

use super::{Connection, Site, SiteOptions, new_run, open_options, workers};
use crate::engine::pump::Progress;
use crate::engine::stats::Mode;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::Hypervisor as _;
use crate::hypervisor::machine::Machines as _;
use crate::name::{DiskName, DomainUuid, Generation};
use crate::recovery::failover::{self, FailoverState};
use crate::recovery::hand_back;
use crate::recovery::retire_home_copy::{self, GaveWay, Ports};
use crate::replica::upkeep::Upkeep as _;
use crate::replicate::capture::freeze_hooks::FreezeHooks;
use crate::replicate::cycle::{Request, Watch};
use crate::replicate::plan::PlanOptions;
use crate::replicate::settle::options::SettleOptions;
use crate::transport::ssh::SshOptions;
use crate::transport::target::TargetUrl;
use crate::wiring::local_target::Here;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// The steps of such a run are not told: what counts is in its report.
struct Quiet;

impl Watch for Quiet {
    fn step(&self, _: u8, _: &str) {}
    fn disk(&self, _: &DiskName, _: u64, _: Mode, _: &Arc<Progress>) {}
    fn tick(&self) {}
    fn warn(&self, text: &str) {
        tracing::warn!("{text}");
    }
}

impl Here {
    /// See [`retire_home_copy::run`].
    pub fn give_way(&self, uuid: &DomainUuid, say: &dyn Fn(&str)) -> Result<GaveWay> {
        let site = Site::connect(SiteOptions { uri: self.options.uri.clone(), state: self.options.state.clone() })?;
        let connection = Connection::new(TargetUrl::Local { root: self.options.root.clone() }, SshOptions::default());
        let run = || {
            let (report, error) = site.sync(&connection, &self.own_run(uuid)?, &Quiet, &AtomicBool::new(false))?;
            match (report.point, error) {
                (_, Some(e)) => Err(e),
                (Some(point), None) => Ok(point.id),
                (None, None) => Err(Error::new(Kind::Refused, "the run made no point")),
            }
        };
        let store = self.store(uuid)?;
        let ports = Ports {
            power: &|| self.hypervisor.power(uuid),
            memory_saved: &|| Ok(self.hypervisor.observe(uuid)?.managed_save),
            run: &run,
            pin: &|point, reason| store.pin(point, Some(reason)),
            undefine: &|| self.hypervisor.undefine(uuid),
            say,
        };
        let done = retire_home_copy::run(&ports, uuid, failover::peek(&self.options.state, uuid)?.as_ref());
        connection.close()?;
        done
    }

    /// See [`hand_back::run`].
    pub fn hand_back(&self, uuid: &DomainUuid, generation: Generation, say: &dyn Fn(&str)) -> Result<()> {
        let (state, store) = (FailoverState::open(&self.options.state, uuid)?, self.store(uuid)?);
        hand_back::run(&self.failover_ports(&store, say), &state, generation)
    }

    /// A run of all disks of a domain that is off.
    fn own_run(&self, uuid: &DomainUuid) -> Result<Request> {
        let workers = workers();
        Ok(Request {
            domain: uuid.as_str().to_owned(),
            target: TargetUrl::Local { root: self.options.root.clone() }.to_string(),
            store: Default::default(),
            run: new_run()?,
            state: self.options.state.clone(),
            plan: PlanOptions {
                block_overlay_dir: self.options.mapping.images_dir().to_owned(),
                // What is here is old by definition, and the replica may have points of the new home already: it gets
                // one more, that belongs to nobody, and the next source adopts it.
                take_over: true,
                ..PlanOptions::default()
            },
            settle: SettleOptions::default(),
            open: open_options(workers),
            with_secrets: false,
            workers,
            compression: Default::default(),
            throttle: None,
            hooks: FreezeHooks::default(),
            handover: None,
            gives_way: true,
        })
    }
}
