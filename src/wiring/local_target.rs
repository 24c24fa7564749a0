//! This host as a target that runs what it keeps: its store, its libvirt, and what the operator says of both.

use super::source::{SiteOptions, start_deadman};
use super::stores;
use crate::error::{Error, Kind, Result, advice};
use crate::hypervisor::Power;
use crate::hypervisor::firmware::Firmware;
use crate::hypervisor::libvirt::LibvirtHypervisor;
use crate::hypervisor::machine::Machines as _;
use crate::name::{DiskName, DomainName, DomainUuid, Generation, PointId};
use crate::recovery::bringup::{Coming, Readiness, Wanted, refuse_red};
use crate::recovery::definition::{Definition, Macs, Nics, Wish};
use crate::recovery::failover::{self, FailoverRecord, FailoverState};
use crate::recovery::fitting::{self, Fitted};
use crate::recovery::mapping::{MacPolicy, Mapping};
use crate::recovery::overlays::Overlays;
use crate::recovery::ready::{self, Builds, Color, Finding, Question, Room};
use crate::recovery::{definition_of, detach, drill, drills, overlays, suggest};
use crate::replica::lookup::one_of;
use crate::replica::root::StoreSeen;
use crate::replica::store::{self, Store};
use crate::replica::upkeep::Held;
use crate::replica::{Attachment, PointView, ReplicaView};
use crate::replicate::free_space::{free_bytes, may_make_files};
use crate::replicate::state::generation;
use crate::replicate::state::handover_record::{self, DiskFormat};
use jiff::Timestamp;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Where this host keeps what.
#[derive(Debug, Clone)]
pub struct HereOptions {
    /// libvirt's URI; `None` lets libvirt decide.
    pub uri: Option<String>,
    /// Of the store.
    pub root: PathBuf,
    /// This host's own state.
    pub state: PathBuf,
    /// The mapping of this host, from `recovery.yaml`.
    pub mapping: Mapping,
}

/// This host as a target: an open store and a connection to the local libvirt.
pub struct Here {
    pub(super) options: HereOptions,
    pub(super) opened: StoreSeen,
    pub(super) hypervisor: LibvirtHypervisor,
}

/// A replica of this host's store, and one of its points.
#[derive(Debug, Clone)]
pub struct Found {
    /// UUID of the replica's domain.
    pub uuid: DomainUuid,
    /// Name of the replica's domain.
    pub name: DomainName,
    /// State of the replica when it was looked up.
    pub view: ReplicaView,
    /// The point that was asked for; the head if none was named.
    pub point: PointView,
}

impl Here {
    /// Opens the store, which has to be there, and connects to libvirt, which has to be this host's.
    pub fn connect(options: HereOptions) -> Result<Here> {
        let opened = stores::open(&options.root)?;
        let hypervisor = LibvirtHypervisor::connect(options.uri.as_deref())?;
        hypervisor.must_be_here()?;
        Ok(Here { options, opened, hypervisor })
    }

    /// A replica by its domain's name or UUID, and a point of it; without a name the head.
    pub fn find(&self, name_or_uuid: &str, point: Option<&PointId>) -> Result<Found> {
        let all = store::list(&self.options.root)?;
        let named = all.iter().map(|(uuid, name, _)| (uuid.clone(), name.clone()));
        let host = format!("the store {}", self.options.root.display());
        let (uuid, name) = one_of(named, name_or_uuid, &host).map_err(|e| match e.kind() {
            Kind::NotFound => e.advise(advice::Store::RightStore),
            _ => e,
        })?;
        let view = all.into_iter().find(|(u, ..)| *u == uuid).expect("it was chosen among them").2;
        let chosen = match point {
            Some(id) => view.points.iter().find(|p| p.id == *id),
            None => view.head(),
        };
        let missing = || {
            let e = Error::new(Kind::NotFound, "the store has no such point").domain(&name);
            let root = Some(self.options.root.display().to_string());
            point.iter().fold(e, |e, id| e.point(id)).advise(advice::Store::ListPoints { root })
        };
        let point = chosen.cloned().ok_or_else(missing)?;
        Ok(Found { uuid, name, view, point })
    }

    pub(super) fn state(&self) -> &Path {
        &self.options.state
    }

    pub(super) fn hypervisor(&self) -> &LibvirtHypervisor {
        &self.hypervisor
    }

    pub(super) fn store(&self, uuid: &DomainUuid) -> Result<Store> {
        Store::within(&self.opened, uuid, Timestamp::now)
    }

    fn hold(&self, found: &Found, purpose: &str) -> Result<Box<dyn Held>> {
        Ok(Box::new(self.store(&found.uuid)?.hold(&found.point.id, purpose)?))
    }

    fn room(&self) -> Room {
        let dir = self.options.mapping.images_dir();
        Room { dir: dir.to_owned(), free_bytes: free_bytes(dir) }
    }

    /// Whether the domain could be brought up here from this point. Touches nothing.
    pub fn ready(&self, found: &Found) -> Result<Vec<Finding>> {
        Ok(self.readiness(found)?.findings)
    }

    /// The same, with what an operator may want to write into recovery.yaml.
    pub fn readiness(&self, found: &Found) -> Result<Readiness> {
        let held = self.hold(found, "ready")?;
        let read = self.fitted_here(found, held.as_ref()).and_then(|fitted| {
            let builds = self.builds(&fitted.definition, held.as_ref())?;
            let findings = self.judge(found, &fitted, held.as_ref(), &builds)?;
            Ok(Readiness { point: found.point.id.clone(), findings, suggestion: suggest::lines(&fitted) })
        });
        held.release();
        read.map_err(|e| e.domain(&found.name).point(&found.point.id))
    }

    /// Every question about a failover, with what is known of the point. libvirt has read what would be defined.
    fn judge(&self, found: &Found, fitted: &Fitted, held: &dyn Held, builds: &Builds) -> Result<Vec<Finding>> {
        let mut fitted = fitted.clone();
        if failover::peek(&self.options.state, &found.uuid)?.is_some_and(|record| record.tpm) {
            // It is of a failover that was begun here, and has come from a point itself.
            fitted.host.tpm_states.retain(|uuid| uuid != found.uuid.as_str());
        }
        let room = self.room();
        let mut findings = vec![ready::point(&found.view, &found.point)];
        findings.extend(ready::left_out(&fitted.definition, &found.point, &self.options.mapping));
        findings.extend(ready::chain(&fitted, overlays::to_copy(held, fitted.definition.images_max)?, &room));
        findings.extend(self.judge_fitted(&found.uuid, &found.name, &fitted, builds));
        findings.extend(ready::tpm_programs(&fitted, &found.point));
        Ok(findings)
    }

    /// Every question about a definition that was fitted to this host. Whoever wants to know whether a domain can come
    /// up here asks through this.
    fn judge_fitted(&self, uuid: &DomainUuid, name: &DomainName, fitted: &Fitted, builds: &Builds) -> Vec<Finding> {
        let mut findings = ready::judge(fitted, name, uuid, &self.room(), builds);
        let dir = self.options.mapping.images_dir();
        findings.extend(may_make_files(dir).err().map(|e| ready::no_right(dir, &e)));
        findings
    }

    /// Whether a domain could be brought up here whose point is still to come; see
    /// [`BringUp::ready_for`](crate::recovery::bringup::BringUp::ready_for).
    pub fn ready_for(&self, uuid: &DomainUuid, coming: &Coming) -> Result<Vec<Finding>> {
        let overlays = overlays::to_come(coming, &self.failover_dir(uuid)?);
        let mut fitted = self.fitted(uuid, &coming.name, &coming.definition, &overlays)?;
        fitted.host = fitted.host.without(uuid);
        // The build of the source's firmware travels with the point: until then nothing is known of it.
        let mut findings = self.judge_fitted(uuid, &coming.name, &fitted, &Builds::default());
        findings.retain(|f| f.question != Question::Firmware || f.color != Color::Yellow);
        Ok(findings)
    }

    /// What the source boots from, and what this host would. Of a definition that cannot be used: nothing.
    fn builds(&self, definition: &Definition, held: &dyn Held) -> Result<Builds> {
        let source = held.attachment(Attachment::Firmware)?.map(|json| Firmware::parse(&json)).transpose();
        let here = match definition.xml() {
            Ok(xml) if definition.uefi => self.hypervisor.firmware_for(xml),
            _ => Ok(None),
        };
        let here = here.and_then(|file| file.map_or(Ok(None), |file| Firmware::of(&file)));
        // What cannot be read is not known; a domain is not kept from coming up by that.
        let known = |read: Result<Option<Firmware>>| {
            read.unwrap_or_else(|e| {
                tracing::warn!(error = e.chain(), "a build of the firmware is not known");
                None
            })
        };
        Ok(Builds { source: known(source), here: known(here) })
    }

    /// The definition of a failover, as libvirt here takes it.
    fn fitted_here(&self, found: &Found, held: &dyn Held) -> Result<Fitted> {
        let overlays = overlays::named(held, &self.failover_dir(&found.uuid)?);
        self.fitted(&found.uuid, &found.name, &definition_of(held)?, &overlays)
    }

    fn fitted(&self, uuid: &DomainUuid, name: &DomainName, definition: &str, overlays: &Overlays) -> Result<Fitted> {
        let mapping = &self.options.mapping;
        let wish = Wish {
            name: name.clone(),
            uuid: uuid.clone(),
            disks: &overlays.disks,
            nics: Nics::Mapped,
            macs: match mapping.macs {
                MacPolicy::Keep => Macs::Keep,
                // The same ones each time, and others for each domain.
                MacPolicy::New => Macs::New(u64::from_str_radix(&uuid.as_str()[..8], 16).unwrap_or_default()),
            },
            console: None,
            nvram: overlays.nvram.clone(),
            tpm: overlays.tpm,
        };
        fitting::fit(&self.hypervisor, definition, &wish, mapping)
    }

    /// Where the overlays of this domain's failover lie, or would.
    fn failover_dir(&self, uuid: &DomainUuid) -> Result<PathBuf> {
        let recorded = failover::peek(&self.options.state, uuid)?.map(|record| record.dir);
        Ok(recorded.unwrap_or_else(|| failover::free_dir(self.options.mapping.images_dir(), uuid)))
    }

    /// As [`Here::find`]; without a point it is the one that was promoted, if any was.
    pub fn find_for_failover(&self, name_or_uuid: &str, point: Option<&PointId>) -> Result<Found> {
        let found = self.find(name_or_uuid, point)?;
        match &found.view.promoted {
            Some(promoted) if point.is_none() => self.find(name_or_uuid, Some(&promoted.point)),
            _ => Ok(found),
        }
    }

    /// Brings the domain up here, or goes on with what was begun: see [`failover::run`]. `ask`: URI of the source's
    /// libvirt.
    pub fn failover(&self, found: &Found, ask: Option<&str>, say: &dyn Fn(&str)) -> Result<FailoverRecord> {
        let state = FailoverState::open(&self.options.state, &found.uuid)?;
        if let Some(uri) = ask {
            source_runs(uri, found, say)?;
        }
        self.failover_as(&state, found, &Wanted::of(&found.point), say)
    }

    /// The same, by who holds its lock.
    pub(super) fn failover_as(
        &self,
        state: &FailoverState,
        found: &Found,
        wanted: &Wanted,
        say: &dyn Fn(&str),
    ) -> Result<FailoverRecord> {
        let held = self.hold(found, "failover")?;
        let done = self.failover_from(found, wanted, held.as_ref(), state, say);
        held.release();
        let record = done.map_err(|e| e.domain(&found.name))?;
        // A domain that was handed away and has come home is this host's again.
        handover_record::has_come_home(&self.options.state, &found.uuid)?;
        Ok(record)
    }

    fn failover_from(
        &self,
        found: &Found,
        wanted: &Wanted,
        held: &dyn Held,
        state: &FailoverState,
        say: &dyn Fn(&str),
    ) -> Result<FailoverRecord> {
        let fitted = self.fitted_here(found, held)?;
        // What was begun is found here by its own name.
        if state.record()?.is_none() {
            // Another build of the firmware is for `ready` to say: it keeps nobody from a failover.
            let findings = self.judge(found, &fitted, held, &Builds::default())?;
            refuse_red(&findings, "this host")?;
        }
        overlays::let_qemu_pass(held, fitted.host.qemu_uid)?;
        let dir = self.failover_dir(&found.uuid)?;
        let (domain, uuid, wanted) = (&found.name, &found.uuid, wanted.clone());
        let plan = failover::Plan { domain, uuid, dir, definition: &fitted.definition, wanted };
        let store = self.store(uuid)?;
        failover::run(&self.failover_ports(&store, say), state, &plan, held)
    }

    pub(super) fn failover_ports<'a>(&'a self, store: &'a Store, say: &'a dyn Fn(&str)) -> failover::Ports<'a> {
        let (machines, custody) = (&self.hypervisor, &self.hypervisor);
        failover::Ports { machines, replica: store, custody, clock: &Timestamp::now, say }
    }

    /// See [`failover::undo`].
    pub fn undo_failover(&self, name_or_uuid: &str, say: &dyn Fn(&str)) -> Result<FailoverRecord> {
        let found = self.find(name_or_uuid, None)?;
        self.undo_as(&FailoverState::open(&self.options.state, &found.uuid)?, &found, say)
    }

    /// The same, by who holds its lock.
    pub(super) fn undo_as(&self, state: &FailoverState, found: &Found, say: &dyn Fn(&str)) -> Result<FailoverRecord> {
        let store = self.store(&found.uuid)?;
        failover::undo(&self.failover_ports(&store, say), state).map_err(|e| e.domain(&found.name))
    }

    /// See [`failover::commit`].
    pub fn commit_failover(&self, name_or_uuid: &str, say: &dyn Fn(&str)) -> Result<(FailoverRecord, Generation)> {
        let found = self.find(name_or_uuid, None)?;
        let (state, store) = (FailoverState::open(&self.options.state, &found.uuid)?, self.store(&found.uuid)?);
        failover::commit(&self.failover_ports(&store, say), &state).map_err(|e| e.domain(&found.name))
    }

    /// Gives a domain that was brought up here for good images of its own: see [`detach::run`]. `format`: `None`: as
    /// was asked for when it was handed over.
    pub fn detach(
        &self,
        name_or_uuid: &str,
        rate_bytes: Option<u64>,
        format: Option<DiskFormat>,
        tell: Told<'_>,
        stop: &AtomicBool,
    ) -> Result<detach::Detached> {
        let found = self.find(name_or_uuid, None)?;
        let (state, store) = (FailoverState::open(&self.options.state, &found.uuid)?, self.store(&found.uuid)?);
        let site = SiteOptions { uri: self.options.uri.clone(), state: self.options.state.clone() };
        let ports = detach::Ports {
            flattening: &self.hypervisor,
            relocating: &self.hypervisor,
            guard: &|| start_deadman(&site, &found.uuid),
            replica: &store,
            say: tell.say,
            progress: tell.progress,
        };
        let generation = generation::generation(&self.options.state, &found.uuid)?;
        let mut request = detach::Request { generation, rate_bytes, raw: Vec::new() };
        let record = state.record()?;
        let held = match &record {
            Some(record) if record.stage != failover::Stage::Detached => {
                let held = self.hold(&self.find(name_or_uuid, Some(&record.point))?, "detach")?;
                request.raw = detach::raw::disks(record, format, held.as_ref())?;
                if record.stage == failover::Stage::Committed {
                    overlays::room_for_all(held.as_ref(), &record.dir, free_bytes(&record.dir), &request.raw)?;
                }
                Some(held)
            }
            _ => None,
        };
        let done = detach::run(&ports, &state, held.as_deref(), &request, stop);
        held.into_iter().for_each(Held::release);
        done.map_err(|e| e.domain(&found.name))
    }

    /// Settles what earlier drills left, then drills this point: see [`drill::run`].
    pub fn drill(
        &self,
        found: &Found,
        wish: DrillWish,
        say: &dyn Fn(&str),
        stop: &AtomicBool,
    ) -> Result<drill::Report> {
        for record in self.settle_drills()? {
            say(&format!("removed what the drill {} had left", record.id));
        }
        let request = drill::Request {
            id: wish.id,
            drill_uuid: wish.uuid,
            domain: found.name.clone(),
            uuid: found.uuid.clone(),
            probes: wish.probes,
            within: wish.within,
            state: &self.options.state,
            mapping: &self.options.mapping,
            bits: wish.bits,
        };
        let ports = drill::Ports {
            machines: &self.hypervisor,
            clock: &Timestamp::now,
            room: &|dir: &Path| free_bytes(dir),
            say,
        };
        let mut held = self.hold(found, "drill")?;
        let report = drill::run(&ports, &request, held.as_mut(), stop);
        held.release();
        if let Err(e) = drills::forget_old(&self.options.state) {
            tracing::warn!(error = e.chain(), "reports of old drills stay");
        }
        report
    }

    /// Removes what is left of drills that were cut short.
    pub fn settle_drills(&self) -> Result<Vec<drills::DrillRecord>> {
        drill::settle(&self.hypervisor, &self.options.state, None)
    }
}

/// [`Kind::Conflict`] if the source's libvirt answers and says that it runs the domain. No answer is what was expected.
fn source_runs(uri: &str, found: &Found, say: &dyn Fn(&str)) -> Result<()> {
    let power = LibvirtHypervisor::connect(Some(uri)).and_then(|source| source.power(&found.uuid));
    match power {
        Ok(Some(Power::Running | Power::Paused)) => {
            let what = format!("the source answers ({uri}), and the domain runs there: two of them would write");
            Err(Error::new(Kind::Conflict, what)
                .domain(&found.name)
                .hint("shut it off there first (`virsh shutdown`), and make a last run if you can"))
        }
        Ok(_) => Ok(()),
        Err(e) => {
            say(&format!("the source does not answer: {}", e.chain()));
            Ok(())
        }
    }
}

/// Who is told how it goes on.
#[derive(Clone, Copy)]
pub struct Told<'a> {
    /// What is done now, in words.
    pub say: &'a dyn Fn(&str),
    /// Of a disk: bytes done, bytes in all.
    pub progress: &'a dyn Fn(&DiskName, u64, u64),
}

/// What is asked of a drill beside its point.
#[derive(Debug, Clone)]
pub struct DrillWish {
    /// Id of the new drill.
    pub id: crate::name::RunId,
    /// UUID for the throw-away copy.
    pub uuid: DomainUuid,
    /// Random bits for the MAC addresses of the copy.
    pub bits: u64,
    /// Evidence to wait for.
    pub probes: Vec<crate::recovery::probe::Probe>,
    /// How long the evidence may take, from the start of the copy.
    pub within: std::time::Duration,
}
