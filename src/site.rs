//! The only module that names concrete adapters: from a hypervisor's URI and a target's name to ready-made ports.

use crate::agent::client::AgentClient;
use crate::agent::{ReplicaOpener, ServeOptions, Served, serve_stdio};
use crate::block::DiskSize;
use crate::error::{Error, Kind, Result};
use crate::image::Layer;
use crate::image::open::{self, OpenOptions};
use crate::image::qemu_nbd::QemuNbd;
use crate::name::{DiskName, DomainName, DomainUuid, PointId, RunId};
use crate::plain::target::{LocalOptions, LocalTarget};
use crate::plain::tree::{self, Make};
use crate::plain::{PlainTarget, Wish};
#[cfg(feature = "libvirt")]
use crate::recovery::bringup::BringUp;
use crate::replica::ReplicaView;
use crate::replica::store::{self, Limits, Store};
use crate::replica::upkeep::Held as _;
use crate::replicate::offline;
use crate::transport::Transport;
use crate::transport::local::LocalTransport;
use crate::transport::ssh::{SshOptions, SshTransport};
use crate::transport::target::TargetUrl;
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

#[cfg(feature = "libvirt")]
use source::start_deadman;
#[cfg(feature = "libvirt")]
pub use source::{Site, SiteOptions};

pub mod plain;

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
    let mut bits = [0u8; 8];
    let got = rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::from_io("cannot draw random bits", e.into()))?;
    // The kernel never cuts a request this short once its pool is ready, and waits until it is.
    assert_eq!(got, bits.len(), "getrandom gives up to 256 bytes whole");
    Ok(RunId::from_bits(u64::from_le_bytes(bits)))
}

/// The way to a target: one ssh master and one session with its agent, shared by everything that is done there.
///
/// Connects when it is first needed. What needs no target, such as settling what an earlier run left, must not wait for
/// one: the production guest comes first, and the target may be what broke that run.
pub struct Connection {
    target: TargetUrl,
    ssh: SshOptions,
    session: Mutex<Option<Session>>,
}

struct Session {
    client: Arc<AgentClient>,
    // Dropped after the client: it carries the client's channel.
    _transport: Box<dyn Transport>,
}

impl Connection {
    /// Nothing is sent yet.
    pub fn new(target: TargetUrl, ssh: SshOptions) -> Connection {
        Connection { target, ssh, session: Mutex::new(None) }
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
        *session = Some(Session { client: client.clone(), _transport: transport });
        Ok(client)
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

/// Runs the agent for the store at `root` on this process's stdin and stdout, until the client's end or its silence.
/// `limits` are what this host demands, whoever asks.
pub fn serve_agent(root: &Path, limits: Limits) -> Result<()> {
    serve_stdio(&LocalStores { root: root.to_owned(), limits }, ServeOptions::default())
}

/// The same, and brings up what is in the store where it is asked to: only then `connect` is called, so that runs go on
/// without libvirt, and whatever the mapping says.
#[cfg(feature = "libvirt")]
pub fn serve_failover(root: &Path, limits: Limits, connect: &dyn Fn() -> Result<here::Here>) -> Result<()> {
    let stores = LocalStores { root: root.to_owned(), limits };
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

struct LocalStores {
    root: PathBuf,
    limits: Limits,
}

impl ReplicaOpener for LocalStores {
    fn open(&self, uuid: &DomainUuid) -> Result<Box<dyn Served>> {
        Ok(Box::new(Store::open(&self.root, uuid, Timestamp::now)?.with_limits(self.limits)))
    }

    fn find(&self, name: &str) -> Result<Vec<(DomainUuid, DomainName)>> {
        let all = store::list(&self.root)?;
        Ok(all.into_iter().filter(|(_, n, _)| name.is_empty() || n.as_str() == name).map(|(u, n, _)| (u, n)).collect())
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
    let store = Store::open(root, uuid, Timestamp::now)?;
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

/// Adopts the image at `top`, with all below it, as the seed of a disk in the store at `root` of this host. Returns its size
/// and the bytes of data copied. Blocks as long as the storage needs.
pub fn seed(
    root: &Path,
    uuid: &DomainUuid,
    disk: &DiskName,
    top: &Layer,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(DiskSize, u64)> {
    let opened = open::open_read(&offline::resolve_chain(top)?, &open_options(1))?;
    let size = opened.image.size();
    let copied = Store::open(root, uuid, Timestamp::now)?.adopt(disk, opened.image.as_ref(), progress);
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
    use crate::replicate::cycle::{Ports, Request, Watch};
    use crate::replicate::deadman::{self, Charge, Deadman};
    use crate::replicate::report::Report;
    use crate::replicate::settle::PauseGuard;
    use crate::replicate::{compare, cycle, doctor, plan, survey};
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
        /// Connects to libvirt.
        pub fn connect(options: SiteOptions) -> Result<Site> {
            let hypervisor = LibvirtHypervisor::connect(options.uri.as_deref())?;
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
            self.with_ports(Some(target), |ports| cycle::run(ports, request, watch, stop))
        }

        /// What [`Site::sync`] would do. Touches nothing.
        pub fn plan(&self, target: &Connection, request: &Request) -> Result<plan::Plan> {
            self.with_ports(Some(target), |ports| survey::plan_only(ports, request))
        }

        /// Compares the live domain with the head; see [`compare::compare`].
        pub fn compare(
            &self,
            target: &Connection,
            request: &Request,
            watch: &dyn Watch,
            stop: &AtomicBool,
        ) -> Result<compare::Comparison> {
            self.with_ports(Some(target), |ports| compare::compare(ports, request, watch, stop))
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

        fn with_ports<T>(&self, target: Option<&Connection>, f: impl FnOnce(&Ports) -> Result<T>) -> Result<T> {
            let replica = |uuid: &DomainUuid| -> Result<Box<dyn Replica>> {
                let target = target.ok_or_else(|| Error::new(Kind::Usage, "this needs a target"))?;
                Ok(Box::new(target.client()?.open(uuid)?))
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
