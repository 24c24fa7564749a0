//! The only module that names concrete adapters: from a hypervisor's URI and a target's name to ready-made ports.

#[cfg(feature = "libvirt")]
pub mod handover;
#[cfg(feature = "libvirt")]
pub mod local_bringup;
#[cfg(feature = "libvirt")]
pub mod local_target;
pub mod plain;
#[cfg(feature = "libvirt")]
pub mod retire_home_copy;
#[cfg(feature = "libvirt")]
mod source;
pub mod stores;

use crate::agent::client::AgentClient;
use crate::agent::server::{ReplicaOpener, ServeOptions, Served, serve_stdio};
use crate::block::DiskSize;
use crate::error::{Error, Kind, Result, Words, advice};
use crate::hypervisor::releases;
use crate::image::Layer;
use crate::image::chain;
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
use crate::transport::local::LocalTransport;
use crate::transport::ssh::{SshOptions, SshTransport};
use crate::transport::target::TargetUrl;
use crate::transport::{Service, Transport};
use jiff::Timestamp;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stores::LocalStores;

#[cfg(feature = "libvirt")]
use source::start_deadman;
#[cfg(feature = "libvirt")]
pub use source::{Site, SiteOptions};

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
/// `operator`: the client is the operator of this host, and no source. `words`: how this program words an advice.
pub fn serve_agent(root: &Path, limits: Limits, operator: bool, words: Words) -> Result<()> {
    serve_stdio(&LocalStores::new(root, limits, operator), speaking(words))
}

fn speaking(words: Words) -> ServeOptions {
    ServeOptions { words: Some(words), ..ServeOptions::default() }
}

/// The same, and brings up what is in the store where it is asked to: only then `connect` is called, so that runs go on
/// without libvirt, and whatever the mapping says.
#[cfg(feature = "libvirt")]
pub fn serve_failover(
    root: &Path,
    limits: Limits,
    operator: bool,
    words: Words,
    connect: &dyn Fn() -> Result<local_target::Here>,
) -> Result<()> {
    let stores = LocalStores::new(root, limits, operator);
    serve_stdio(&Bringing { stores, connect, here: std::cell::OnceCell::new() }, speaking(words))
}

#[cfg(feature = "libvirt")]
struct Bringing<'a> {
    stores: LocalStores,
    connect: &'a dyn Fn() -> Result<local_target::Here>,
    here: std::cell::OnceCell<local_target::Here>,
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
pub fn serve_images(root: &Path, state: &Path, words: Words) -> Result<()> {
    serve_stdio(&LocalImages { root: root.to_owned(), state: state.to_owned() }, speaking(words))
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
    let chain = chain::resolve_chain_where(top, &chain::named_beside(&top.path, backing))?;
    let opened = open::open_read(&chain, &open_options(1))?;
    let size = opened.image.size();
    let copied = store.adopt(disk, opened.image.as_ref(), progress);
    let closed = opened.close();
    let copied = copied?;
    closed?;
    Ok((size, copied))
}

pub use crate::image::chain::is_block_device;

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
                Kind::NotFound => e.advise(advice::Run::FirstPoint),
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
