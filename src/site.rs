//! The only module that names concrete adapters: from a hypervisor's URI and a target's name to ready-made ports.

use crate::agent::client::AgentClient;
use crate::agent::{ReplicaOpener, ServeOptions, Served, serve_stdio};
use crate::block::DiskSize;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::releases;
use crate::image::Layer;
use crate::image::open::{self, OpenOptions};
use crate::image::qemu_nbd::QemuNbd;
use crate::name::{DiskName, DomainName, DomainUuid, PointId, RunId, StoreId};
use crate::plain::target::{LocalOptions, LocalTarget};
use crate::plain::tree::{self, Make};
use crate::plain::{PlainTarget, Wish};
#[cfg(feature = "libvirt")]
use crate::recovery::bringup::BringUp;
use crate::replica::ReplicaView;
#[cfg(feature = "libvirt")]
use crate::replica::root::{StoreSeen, StoreWish};
use crate::replica::store::{self, Limits, Store};
use crate::replica::upkeep::Held as _;
use crate::replicate::offline;
use crate::transport::local::LocalTransport;
use crate::transport::ssh::{SshOptions, SshTransport};
use crate::transport::target::TargetUrl;
use crate::transport::{Service, Transport};
use jiff::Timestamp;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[cfg(feature = "libvirt")]
pub mod give_way;
#[cfg(feature = "libvirt")]
pub mod handover;
#[cfg(feature = "libvirt")]
pub mod here;
#[cfg(feature = "libvirt")]
pub mod near;

use stores::LocalStores;

#[cfg(feature = "libvirt")]
use source::start_deadman;
#[cfg(feature = "libvirt")]
pub use source::{Site, SiteOptions};

pub mod plain;
pub mod stores;

/// Directory for sockets of this process; short, private, gone with a reboot.
pub fn runtime_dir() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !rustix::process::geteuid().is_root() => PathBuf::from(dir).join("virt-replica"),
        _ => PathBuf::from("/run/virt-replica"),
    }
}

/// How chains are opened for reading on this host.
pub fn open_options(readers: usize) -> OpenOptions {
    OpenOptions { runtime_dir: runtime_dir(), force_share: false, readers }
}

/// Threads that read, hash and compress: one a core, up to eight; beyond, one ssh stream is narrower than they are.
pub fn workers() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get()).clamp(1, 8)
}

/// The name of a new run: 64 random bits.
pub fn new_run() -> Result<RunId> {
    Ok(RunId::from_bits(u64::from_le_bytes(random_bytes()?)))
}

/// 128 random bits: what an id is made of that nobody else may have.
fn long_id() -> Result<u128> {
    Ok(u128::from_le_bytes(random_bytes()?))
}

fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bits = [0u8; N];
    let got = rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::from_io("cannot draw random bits", e.into()))?;
    // The kernel never cuts a request this short once its pool is ready, and waits until it is.
    assert_eq!(got, bits.len(), "getrandom gives up to 256 bytes whole");
    Ok(bits)
}

/// The way to a target: one ssh master and one session with its agent, shared by everything that is done there.
///
/// Connects when it is first needed. What needs no target, such as settling what an earlier run left, must not wait for
/// one: the production guest comes first, and the target may be what broke that run.
pub struct Connection {
    target: TargetUrl,
    ssh: SshOptions,
    /// Make a store where there is none.
    create_store: bool,
    /// Where this host remembers the stores that it has found; `None`: this is not for a source.
    state: Option<PathBuf>,
    session: Mutex<Option<Session>>,
}

struct Session {
    /// `None`: the agent is of a version that cannot tell, or serves no store.
    store: Option<StoreId>,
    client: Arc<AgentClient>,
    // Dropped after the client: it carries the client's channel.
    _transport: Box<dyn Transport>,
}

impl Connection {
    /// Nothing is sent yet.
    pub fn new(target: TargetUrl, ssh: SshOptions) -> Connection {
        Connection { target, ssh, create_store: false, state: None, session: Mutex::new(None) }
    }

    /// Makes a store where there is none, if that is wished.
    pub fn creating(self, create_store: bool) -> Connection {
        Connection { create_store, ..self }
    }

    /// For a source, that keeps its own state in `state`.
    pub fn of_source(self, state: &Path) -> Connection {
        Connection { state: Some(state.to_owned()), ..self }
    }

    /// The session with the target's agent. The first call connects: it blocks, at most the connect timeout.
    pub fn client(&self) -> Result<Arc<AgentClient>> {
        let mut session = self.session.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(session) = session.as_ref() {
            return Ok(session.client.clone());
        }
        let transport: Box<dyn Transport> = match &self.target {
            TargetUrl::Ssh(host) => Box::new(SshTransport::connect(host, self.ssh.clone())?),
            TargetUrl::Local { root } => Box::new(LocalTransport::new(root, None)?.serving(self.ssh.service)),
        };
        let client = Arc::new(AgentClient::connect(transport.as_ref())?);
        let store = match self.ssh.service {
            Service::Images => None,
            Service::Store | Service::Failover => {
                stores::greet(&client, &self.target, self.state.as_deref(), self.create_store)?
            }
        };
        *session = Some(Session { store, client: client.clone(), _transport: transport });
        Ok(client)
    }

    /// The store at the other end; connects. `None`: its agent is of a version that cannot tell.
    pub fn store(&self) -> Result<Option<StoreId>> {
        self.client()?;
        let session = self.session.lock().unwrap_or_else(|e| e.into_inner());
        Ok(session.as_ref().and_then(|session| session.store.clone()))
    }

    /// The same; a session that has died meanwhile is replaced by a new one.
    pub fn client_again(&self) -> Result<Arc<AgentClient>> {
        let client = self.client()?;
        if client.is_open() {
            return Ok(client);
        }
        *self.session.lock().unwrap_or_else(|e| e.into_inner()) = None;
        self.client()
    }

    /// Ends the session, if there is one, in order, and waits for the agent.
    pub fn close(self) -> Result<()> {
        let session = self.session.into_inner().unwrap_or_else(|e| e.into_inner());
        session.map_or(Ok(()), |session| session.client.close())
    }
}

/// How many images a disk of the newest point may consist of in a store on this host, unless somebody says otherwise:
/// as many as its libvirt starts below an overlay. No connection is made for it.
pub fn depth_max() -> u64 {
    let most = Limits::default().depth_max;
    #[cfg(feature = "libvirt")]
    let libvirt = crate::hypervisor::libvirt::library_version();
    #[cfg(not(feature = "libvirt"))]
    let libvirt = None;
    releases::images_max(libvirt).map_or(most, |images| most.min(images - 1))
}

/// Runs the agent for the store at `root` on this process's stdin and stdout, until the client's end or its silence.
/// `limits` are what this host demands, whoever asks.
/// `operator`: the client is the operator of this host, and no source.
pub fn serve_agent(root: &Path, limits: Limits, operator: bool) -> Result<()> {
    serve_stdio(&LocalStores::new(root, limits, operator), ServeOptions::default())
}

/// The same, and brings up what is in the store where it is asked to: only then `connect` is called, so that runs go on
/// without libvirt, and whatever the mapping says.
#[cfg(feature = "libvirt")]
pub fn serve_failover(
    root: &Path,
    limits: Limits,
    operator: bool,
    connect: &dyn Fn() -> Result<here::Here>,
) -> Result<()> {
    let stores = LocalStores::new(root, limits, operator);
    serve_stdio(&Bringing { stores, connect, here: std::cell::OnceCell::new() }, ServeOptions::default())
}

#[cfg(feature = "libvirt")]
struct Bringing<'a> {
    stores: LocalStores,
    connect: &'a dyn Fn() -> Result<here::Here>,
    here: std::cell::OnceCell<here::Here>,
}

#[cfg(feature = "libvirt")]
impl ReplicaOpener for Bringing<'_> {
    fn open(&self, uuid: &DomainUuid) -> Result<Box<dyn Served>> {
        self.stores.open(uuid)
    }

    fn find(&self, name: &str) -> Result<Vec<(DomainUuid, DomainName)>> {
        self.stores.find(name)
    }

    fn store(&self, wish: &StoreWish) -> Result<StoreSeen> {
        self.stores.store(wish)
    }

    fn bring_up(&self, uuid: &DomainUuid) -> Result<Box<dyn BringUp + '_>> {
        let here = match self.here.get() {
            Some(here) => here,
            None => {
                let here = (self.connect)()?;
                self.here.get_or_init(|| here)
            }
        };
        Ok(Box::new(here.domain(uuid)))
    }
}

/// Runs the agent for the images below `root` on this process's stdin and stdout, until the client's end or its silence.
/// `state` is this host's own state.
pub fn serve_images(root: &Path, state: &Path) -> Result<()> {
    serve_stdio(&LocalImages { root: root.to_owned(), state: state.to_owned() }, ServeOptions::default())
}

struct LocalImages {
    root: PathBuf,
    state: PathBuf,
}

impl ReplicaOpener for LocalImages {
    fn open(&self, _: &DomainUuid) -> Result<Box<dyn Served>> {
        Err(Error::new(Kind::Refused, "this agent serves images, and no store"))
    }

    fn find(&self, _: &str) -> Result<Vec<(DomainUuid, DomainName)>> {
        Ok(Vec::new())
    }

    fn image(&self, wish: &Wish) -> Result<Box<dyn PlainTarget>> {
        let within = Some(self.root.clone());
        Ok(Box::new(LocalTarget::open(wish, &LocalOptions { within, ..plain::local_options(&self.state, None) })?))
    }

    fn make(&self, make: &Make) -> Result<()> {
        tree::make(make, Some(&self.root))
    }
}

/// Serves a disk of a point in the store at `root` on this host over NBD, read-only, on a unix socket, until `stop` is
/// set or the server ends. Blocks. The point is leased meanwhile. `ready` is told when it serves.
pub fn serve_nbd(
    root: &Path,
    uuid: &DomainUuid,
    point: &PointId,
    disk: &DiskName,
    socket: &Path,
    ready: &dyn Fn() -> Result<()>,
    stop: &AtomicBool,
) -> Result<()> {
    let store = Store::within(&stores::open(root)?, uuid, Timestamp::now)?;
    let mut held = Box::new(store.hold(point, "nbd")?);
    let served = held.images(disk).and_then(|images| QemuNbd::start_at(&images, socket)).and_then(|mut server| {
        let mut serving = ready();
        while serving.is_ok() && !stop.load(Ordering::Relaxed) {
            if !server.is_running()? {
                serving = Err(Error::new(Kind::Interrupted, "qemu-nbd ended").path(socket));
                break;
            }
            serving = held.renew();
            std::thread::sleep(Duration::from_millis(200));
        }
        serving.and(server.stop())
    });
    held.release();
    served
}

/// Adopts the image at `top`, with all below it in its directory or below `backing`, as the seed of a disk in the store at `root` of this host. Returns its size
/// and the bytes of data copied. Blocks as long as the storage needs.
pub fn seed(
    root: &Path,
    uuid: &DomainUuid,
    disk: &DiskName,
    (top, backing): (&Layer, &[PathBuf]),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(DiskSize, u64)> {
    let store = Store::within(&stores::open(root)?, uuid, Timestamp::now)?;
    // A copy of a source's image names what the source wants.
    let chain = offline::resolve_chain_where(top, &offline::named_beside(&top.path, backing))?;
    let opened = open::open_read(&chain, &open_options(1))?;
    let size = opened.image.size();
    let copied = store.adopt(disk, opened.image.as_ref(), progress);
    let closed = opened.close();
    let copied = copied?;
    closed?;
    Ok((size, copied))
}

pub use crate::replicate::offline::is_block_device;

/// The replicas of a store on this host that have a point; as [`store::list`].
pub fn replicas_of(root: &Path) -> Result<Vec<(DomainUuid, DomainName, ReplicaView)>> {
    store::list(root)
}

/// A replica of the target by its domain's name or UUID; its source may be gone. `here`: asked for the UUID of this
/// host's domain of that name. Also what the name alone would not have told, in words.
pub fn find_replica(
    client: &AgentClient,
    name_or_uuid: &str,
    here: &dyn Fn() -> Option<DomainUuid>,
) -> Result<((DomainUuid, DomainName), Option<String>)> {
    meant(&client.find("")?, name_or_uuid, client.host(), here)
}

/// Which of `all` that `host` has is meant.
fn meant(
    all: &[(DomainUuid, DomainName)],
    name_or_uuid: &str,
    host: &str,
    here: &dyn Fn() -> Option<DomainUuid>,
) -> Result<((DomainUuid, DomainName), Option<String>)> {
    let by_name: Vec<_> = all.iter().filter(|(_, name)| name.as_str() == name_or_uuid).collect();
    let here = if by_name.is_empty() { None } else { here() };
    let others = |of: &DomainUuid| -> Vec<String> {
        by_name.iter().filter(|(uuid, _)| uuid != of).map(|(uuid, _)| uuid.to_string()).collect()
    };
    match here {
        Some(here) if by_name.iter().any(|(uuid, _)| *uuid == here) => {
            let others = others(&here).join(", ");
            let note = (!others.is_empty()).then(|| {
                format!("{host} has more than one replica named '{name_or_uuid}': this is that of the domain here, {here}; name another by its UUID: {others}")
            });
            let name = by_name.into_iter().find(|(uuid, _)| *uuid == here).expect("it was looked for").1.clone();
            Ok(((here, name), note))
        }
        other => {
            let found = one_of(all.iter().cloned(), name_or_uuid, host).map_err(|e| match e.kind() {
                Kind::NotFound => e.hint("`virt-replica sync DOMAIN --to TARGET` makes the first point"),
                _ => e,
            })?;
            let note = other.map(|here| {
                format!("the domain '{name_or_uuid}' here is another one, {here}, without a replica on {host}: this is that of {}", found.0)
            });
            Ok((found, note))
        }
    }
}

/// The one replica of this name or UUID among `all` that `holder` has.
fn one_of(
    all: impl Iterator<Item = (DomainUuid, DomainName)>,
    name_or_uuid: &str,
    holder: &str,
) -> Result<(DomainUuid, DomainName)> {
    let mut found: Vec<_> = all.filter(|(u, n)| u.as_str() == name_or_uuid || n.as_str() == name_or_uuid).collect();
    match found.len() {
        0 => Err(Error::new(Kind::NotFound, format!("{holder} has no replica of a domain '{name_or_uuid}'"))),
        1 => Ok(found.remove(0)),
        count => {
            let uuids: Vec<_> = found.iter().map(|(uuid, _)| uuid.to_string()).collect();
            let what =
                format!("{holder} has replicas of {count} domains named '{name_or_uuid}': {}", uuids.join(" and "));
            Err(Error::new(Kind::Usage, what).hint("name one of them by its UUID"))
        }
    }
}

#[cfg(feature = "libvirt")]
mod source {
    use super::*;
    use crate::hypervisor::libvirt::LibvirtHypervisor;
    use crate::hypervisor::stored::StoredBitmaps;
    use crate::image::open;
    use crate::name::RunId;
    use crate::recovery::drills::DrillRecord;
    use crate::recovery::failover::{self, FailoverRecord};
    use crate::recovery::{detach, drill, drills};
    use crate::replica::Replica;
    use crate::replica::source::Claim;
    use crate::replicate::cycle::{Ports, Request, Watch};
    use crate::replicate::deadman::{self, Charge, Deadman};
    use crate::replicate::report::Report;
    use crate::replicate::settle::PauseGuard;
    use crate::replicate::source as source_id;
    use crate::replicate::{compare, cycle, demoted, doctor, generation, journal, plan, stores, survey};
    use std::process::Command;

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

        pub fn hypervisor(&self) -> &LibvirtHypervisor {
            &self.hypervisor
        }

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
            let done = self.with_ports(Some((target, Some(Run::Real(request)))), |ports| {
                cycle::run(ports, request, watch, stop)
            })?;
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
            repair: Option<&crate::replicate::settle::SettleOptions>,
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
            let same = |record: &demoted::HandoverRecord| {
                let named = [record.domain.as_str(), record.uuid.as_str()].contains(&request.domain.as_str());
                named && spellings.contains(&record.to)
            };
            // A record that cannot be read is for the run to refuse, if it is this domain's.
            if let Some(record) = demoted::all(&self.options.state).unwrap_or_default().into_iter().find(same) {
                respelled.target = record.to;
            }
            respelled
        }

        /// Finds out which URLs of earlier runs lead to the store that this one leads to: their points are in it.
        fn recognise(
            &self,
            uuid: &DomainUuid,
            target: &Connection,
            run: &Request,
            replica: &dyn Replica,
        ) -> Result<()> {
            let (state, Some(store)) = (&self.options.state, target.store()?) else { return Ok(()) };
            // It was remembered when the session began.
            let found = stores::found(state, &run.target).into_iter().find(|found| found.id == store);
            let Some(found) = found else { return Ok(()) };
            let reports = journal::recent_reports::<Report>(state, uuid).unwrap_or_default();
            let others = reports.iter().filter(|r| r.target != run.target && stores::known(state, &r.target).is_none());
            let others: Vec<_> =
                others.filter_map(|r| Some((r.target.clone(), r.point.as_ref()?.run.clone()))).collect();
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest was deleted and made again under its name: the store has a replica of each.
    #[test]
    fn the_domain_here_says_which_replica_of_its_name_is_meant() {
        let uuid = |n: u8| DomainUuid::new(format!("00000000-0000-4000-8000-0000000000{n:02}")).unwrap();
        let of = |n: u8, name: &str| (uuid(n), DomainName::new(name).unwrap());
        let all = [of(1, "web"), of(2, "web"), of(3, "db")];
        let meant = |name: &str, here: Option<u8>| meant(&all, name, "b", &|| here.map(uuid));
        let (found, note) = meant("web", Some(2)).unwrap();
        assert_eq!(found, all[1]);
        assert!(note.unwrap().ends_with(&uuid(1).to_string()), "how to name the other");
        // By its UUID any of them is meant, whatever is here.
        assert_eq!(meant(uuid(1).as_str(), Some(2)).unwrap(), (all[0].clone(), None));
        // Nobody here tells them apart.
        for here in [None, Some(9)] {
            let e = meant("web", here).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage);
            assert!(e.what().contains(uuid(1).as_str()) && e.what().contains(uuid(2).as_str()), "{e}");
        }
        assert_eq!(meant("db", Some(3)).unwrap(), (all[2].clone(), None));
        let (found, note) = meant("db", Some(9)).unwrap();
        assert!(found == all[2] && note.unwrap().contains("is another one"));
        assert_eq!(meant("db", None).unwrap().1, None);
        assert_eq!(meant("none", Some(1)).unwrap_err().kind(), Kind::NotFound);
    }
}
