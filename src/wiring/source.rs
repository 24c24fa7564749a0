//! This host as a source: the ports of its runs, over its libvirt and its own state.

use super::connection::Connection;
use super::host::{long_id, runtime_dir};
use crate::error::{Error, Kind, Result};
use crate::hypervisor::libvirt::LibvirtHypervisor;
use crate::hypervisor::stored_bitmaps::StoredBitmaps;
use crate::image::open;
use crate::name::{DomainUuid, RunId};
use crate::recovery::drills::DrillRecord;
use crate::recovery::failover::{self, FailoverRecord};
use crate::recovery::{detach, drill, drills};
use crate::replica::Replica;
use crate::replica::source::Claim;
use crate::replicate::cycle::{Ports, Request, Watch};
use crate::replicate::plan::survey;
use crate::replicate::settle::deadman::{self, Charge, Deadman};
use crate::replicate::settle::guard::PauseGuard;
use crate::replicate::state::report::Report;
use crate::replicate::state::source as source_id;
use crate::replicate::state::{generation, handover_record, journal, stores};
use crate::replicate::{compare, cycle, doctor, plan};
use jiff::Timestamp;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// How the source side of this host is set up.
#[derive(Debug, Clone)]
pub struct SiteOptions {
    /// libvirt's URI; `None` lets libvirt decide.
    pub uri: Option<String>,
    /// Where this host keeps its own state.
    pub state: PathBuf,
}

/// The source side of this host.
pub struct Site {
    options: SiteOptions,
    hypervisor: LibvirtHypervisor,
}

impl Site {
    /// Connects to libvirt, which has to be this host's.
    pub fn connect(options: SiteOptions) -> Result<Site> {
        let hypervisor = LibvirtHypervisor::connect(options.uri.as_deref())?;
        hypervisor.must_be_here()?;
        Ok(Site { options, hypervisor })
    }

    /// Gives the connection to this host's libvirt.
    pub fn hypervisor(&self) -> &LibvirtHypervisor {
        &self.hypervisor
    }

    /// Gives the state directory of the program on this host.
    pub fn state(&self) -> &Path {
        &self.options.state
    }

    /// Runs one domain once: see [`cycle::run`].
    pub fn sync(
        &self,
        target: &Connection,
        request: &Request,
        watch: &dyn Watch,
        stop: &AtomicBool,
    ) -> Result<(Report, Option<Error>)> {
        let request = &self.respelled(request);
        let done =
            self.with_ports(Some((target, Some(Run::Real(request)))), |ports| cycle::run(ports, request, watch, stop))?;
        // From now on this host knows the generation that it took over, and needs not be told again.
        if let (Some(point), true) = (&done.0.point, request.plan.take_over && !request.gives_way) {
            generation::raise(&self.options.state, &done.0.uuid, point.generation)?;
        }
        Ok(done)
    }

    /// What [`Site::sync`] would do. Touches nothing.
    pub fn plan(&self, target: &Connection, request: &Request) -> Result<plan::Plan> {
        let request = &self.respelled(request);
        self.with_ports(Some((target, Some(Run::Thought(request)))), |ports| survey::plan_only(ports, request))
    }

    /// Compares the live domain with the head; see [`compare::compare`].
    pub fn compare(
        &self,
        target: &Connection,
        request: &Request,
        watch: &dyn Watch,
        stop: &AtomicBool,
    ) -> Result<compare::Comparison> {
        self.with_ports(Some((target, None)), |ports| compare::compare(ports, request, watch, stop))
    }

    /// Looks at (and with `repair` mends) one domain; see [`doctor::examine`].
    pub fn examine(
        &self,
        uuid: &DomainUuid,
        repair: Option<&crate::replicate::settle::options::SettleOptions>,
    ) -> Result<doctor::Finding> {
        self.with_ports(None, |ports| doctor::examine(ports, &self.options.state, uuid, repair))
    }

    /// Drills on this host that were cut short.
    pub fn abandoned_drills(&self) -> Result<Vec<DrillRecord>> {
        drills::left_behind(&self.options.state)
    }

    /// Failovers on this host that have not come to their end.
    pub fn unfinished_failovers(&self) -> Result<Vec<FailoverRecord>> {
        failover::left_behind(&self.options.state)
    }

    /// Removes what is left of one of them.
    pub fn settle_drill(&self, id: &RunId) -> Result<()> {
        drill::settle(&self.hypervisor, &self.options.state, Some(id)).map(drop)
    }

    /// The dead-man's process: guards the domain until the driver's end of file.
    pub fn guard(&self, uuid: &DomainUuid, driver: Option<std::os::fd::OwnedFd>) -> Result<()> {
        let charge = Charge {
            hypervisor: &self.hypervisor,
            guest: &self.hypervisor,
            backups: &self.hypervisor,
            state: &self.options.state,
            uuid: uuid.clone(),
            others: &|| detach::raw::release(&self.hypervisor, &self.options.state, uuid),
            driver,
        };
        deadman::serve(std::io::stdin(), std::io::stdout(), &charge)
    }

    /// `target`: where to, and the run that is to write there, if one is.
    fn with_ports<T>(
        &self,
        target: Option<(&Connection, Option<Run>)>,
        f: impl FnOnce(&Ports) -> Result<T>,
    ) -> Result<T> {
        let replica = |uuid: &DomainUuid| -> Result<Box<dyn Replica>> {
            let (target, run) = target.ok_or_else(|| Error::new(Kind::Usage, "this needs a target"))?;
            let replica = target.client()?.open(uuid)?;
            // A host that gives way claims nothing.
            if let (Some(Run::Real(run) | Run::Thought(run)), Some(store)) = (run, target.store()?) {
                // It is the same for the whole run, whatever others find under this URL meanwhile.
                let _ = run.store.set(store);
            }
            match run {
                None => {}
                Some(Run::Real(run) | Run::Thought(run)) if run.gives_way => {}
                Some(Run::Thought(run)) => self.claim(uuid, run, &replica, false)?,
                Some(Run::Real(run)) => {
                    self.claim(uuid, run, &replica, true)?;
                    self.recognise(uuid, target, run, &replica)?;
                }
            }
            Ok(Box::new(replica))
        };
        let guard = |uuid: &DomainUuid| start_deadman(&self.options, uuid);
        f(&Ports {
            hypervisor: &self.hypervisor,
            tracking: &self.hypervisor,
            guest: &self.hypervisor,
            backups: &self.hypervisor,
            custody: &self.hypervisor,
            stored: &StoredBitmaps::new(runtime_dir()),
            replica: &replica,
            guard: &guard,
            open_image: &open::open_read,
            open_export: &open::open_export,
            explain_image: &open::explain,
            clock: &Timestamp::now,
        })
    }
}

/// What is to write to the target: a run, or one that is only thought through and leaves nothing behind.
#[derive(Clone, Copy)]
enum Run<'a> {
    Real(&'a Request),
    Thought(&'a Request),
}

impl Site {
    /// The request in the words of a handover that is on record, if that went to the same store by another URL.
    fn respelled(&self, request: &Request) -> Request {
        let mut respelled = Request { store: Arc::default(), ..request.clone() };
        let spellings = stores::spellings(&self.options.state, &request.target);
        let same = |record: &handover_record::HandoverRecord| {
            let named = [record.domain.as_str(), record.uuid.as_str()].contains(&request.domain.as_str());
            named && spellings.contains(&record.to)
        };
        // A record that cannot be read is for the run to refuse, if it is this domain's.
        if let Some(record) = handover_record::all(&self.options.state).unwrap_or_default().into_iter().find(same) {
            respelled.target = record.to;
        }
        respelled
    }

    /// Finds out which URLs of earlier runs lead to the store that this one leads to: their points are in it.
    fn recognise(&self, uuid: &DomainUuid, target: &Connection, run: &Request, replica: &dyn Replica) -> Result<()> {
        let (state, Some(store)) = (&self.options.state, target.store()?) else { return Ok(()) };
        // It was remembered when the session began.
        let found = stores::found(state, &run.target).into_iter().find(|found| found.id == store);
        let Some(found) = found else { return Ok(()) };
        let reports = journal::recent_reports::<Report>(state, uuid).unwrap_or_default();
        let others = reports.iter().filter(|r| r.target != run.target && stores::known(state, &r.target).is_none());
        let others: Vec<_> = others.filter_map(|r| Some((r.target.clone(), r.point.as_ref()?.run.clone()))).collect();
        if others.is_empty() {
            return Ok(());
        }
        let points = replica.describe()?.points;
        for (url, _) in others.iter().filter(|(_, run)| points.iter().any(|point| point.run == *run)) {
            if stores::known(state, url).is_none() && stores::learn(state, url, &found).is_ok() {
                let target = &run.target;
                tracing::warn!(
                    "{url} and {target} are the same store, {store}: its dirty bitmaps and reports are put together"
                );
            }
        }
        Ok(())
    }

    /// Says to the replica whose the points are, and to people what changes by that.
    /// `keeps`: a state directory without an id gets one.
    fn claim(&self, uuid: &DomainUuid, run: &Request, replica: &dyn Replica, keeps: bool) -> Result<()> {
        let state = &self.options.state;
        let generation = generation::generation(state, uuid)?;
        let source = source_id::source(state, &source_id::Machine::here(), long_id()?, keeps)?;
        let claim = Claim { source, generation, take_over: run.plan.take_over };
        if let Some(words) = replica.claim(&claim)?.words(generation) {
            tracing::warn!("{words}");
        }
        Ok(())
    }
}

/// A process of this program that guards the domain; see [`Site::guard`].
pub(super) fn start_deadman(options: &SiteOptions, uuid: &DomainUuid) -> Result<Box<dyn PauseGuard>> {
    let program = std::env::current_exe().map_err(|e| Error::from_io("cannot find this program's file", e))?;
    let mut command = Command::new(program);
    if let Some(uri) = &options.uri {
        command.arg("--connect").arg(uri);
    }
    command.arg("--state-dir").arg(&options.state).arg("deadman").arg(uuid.as_str());
    Ok(Box::new(Deadman::start(command)?))
}
