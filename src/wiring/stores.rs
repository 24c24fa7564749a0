//! Stores: the one of this host that an agent serves, and the one at the other end of a session.

use super::host::{long_id, open_options};
use crate::agent::client::AgentClient;
use crate::agent::server::{ReplicaOpener, Served};
use crate::block::DiskSize;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::releases;
use crate::image::Layer;
use crate::name::{DiskName, DomainName, DomainUuid, Generation, PointId, StoreId};
use crate::replica::root::{self, KnownStore, StoreSeen, StoreWish};
use crate::replica::store::{self, Limits, Store};
use crate::replica::{ReplicaView, adopt, generation, serve_nbd};
use crate::replicate::state::stores;
use crate::transport::target::{ROOT_DEFAULT, TargetUrl};
use jiff::Timestamp;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Creates a store at `root` on this host, or finds that there is one.
pub fn create(root: &Path) -> Result<StoreSeen> {
    let root = absolute(root)?;
    root::create(&root, &StoreId::from_bits(long_id()?), None).inspect(said)
}

/// The store at `root` on this host. [`NotFound`](Kind::NotFound) if nobody has made one there.
pub fn open(root: &Path) -> Result<StoreSeen> {
    let root = absolute(root)?;
    root::open(&root, &StoreId::from_bits(long_id()?)).inspect(said)
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
    let store = Store::within(&open(root)?, uuid, Timestamp::now)?;
    serve_nbd::serve(&store, point, disk, socket, ready, stop)
}

/// Adopts the image at `top`, with all below it in its directory or below `backing`, as the seed of a disk in the store
/// at `root` of this host. Returns its size and the bytes of data copied. Blocks as long as the storage needs.
pub fn seed(
    root: &Path,
    uuid: &DomainUuid,
    disk: &DiskName,
    image: (&Layer, &[PathBuf]),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(DiskSize, u64)> {
    let store = Store::within(&open(root)?, uuid, Timestamp::now)?;
    adopt::adopt(&store, disk, image, &open_options(1), progress)
}

/// The replicas of a store on this host that have a point; as [`store::list`].
pub fn replicas_of(root: &Path) -> Result<Vec<(DomainUuid, DomainName, ReplicaView)>> {
    store::list(root)
}

fn absolute(root: &Path) -> Result<PathBuf> {
    std::path::absolute(root).map_err(|e| Error::io("this cannot be the root of a store", root, e))
}

fn said(seen: &StoreSeen) {
    let (root, id) = (seen.root.display(), seen.id.as_ref().map_or("none", StoreId::as_str));
    if seen.adopted {
        tracing::warn!("the store {root} was made by an earlier version; from now on it has the id {id}");
    } else if seen.created {
        tracing::info!("created the store {root}, with the id {id}");
    }
}

/// What an agent serves: a store of this host.
pub(super) struct LocalStores {
    root: PathBuf,
    limits: Limits,
    /// The operator of this host asks, and no source.
    operator: bool,
    /// What was found at the root; asked when it is first needed, so that a client can wish for a store before.
    seen: RefCell<Option<StoreSeen>>,
}

impl LocalStores {
    pub(super) fn new(root: &Path, limits: Limits, operator: bool) -> LocalStores {
        LocalStores { root: root.to_owned(), limits, operator, seen: RefCell::default() }
    }

    fn seen(&self) -> Result<StoreSeen> {
        if let Some(seen) = self.seen.borrow().as_ref() {
            return Ok(seen.clone());
        }
        let seen = open(&self.root)?;
        *self.seen.borrow_mut() = Some(seen.clone());
        Ok(seen)
    }
}

impl ReplicaOpener for LocalStores {
    fn open(&self, uuid: &DomainUuid) -> Result<Box<dyn Served>> {
        let store = Store::within(&self.seen()?, uuid, Timestamp::now)?.with_limits(self.limits);
        Ok(Box::new(if self.operator { store } else { store.for_source() }))
    }

    fn find(&self, name: &str) -> Result<Vec<(DomainUuid, DomainName)>> {
        let all = store::list(&self.seen()?.root)?;
        Ok(all.into_iter().filter(|(_, n, _)| name.is_empty() || n.as_str() == name).map(|(u, n, _)| (u, n)).collect())
    }

    fn store(&self, wish: &StoreWish) -> Result<StoreSeen> {
        let root = absolute(&self.root)?;
        root::check_root(&root, wish)?;
        let fresh = StoreId::from_bits(long_id()?);
        let seen = match wish.create {
            true => root::create(&root, &fresh, root::known_at(&wish.known, &root))?,
            false => root::open(&root, &fresh)?,
        };
        *self.seen.borrow_mut() = Some(seen.clone());
        Ok(seen)
    }
}

/// The replica in the store at `root` whose generation is to be set, by its domain's name or UUID.
pub fn find_generation(root: &Path, domain: &str) -> Result<generation::Found> {
    let mut found = generation::find(&open(root)?.root, domain)?;
    match found.len() {
        0 => Err(Error::new(Kind::NotFound, format!("there is no replica of '{domain}' here")).path(root)),
        1 => Ok(found.remove(0)),
        many => Err(Error::new(Kind::Conflict, format!("{many} replicas here are of a domain '{domain}'"))
            .hint("name it by its UUID")),
    }
}

/// Sets the generation of a replica on this host.
pub fn set_generation(root: &Path, uuid: &DomainUuid, generation: Generation) -> Result<()> {
    Store::within(&open(root)?, uuid, Timestamp::now)?.set_generation(generation)
}

/// What a source asks of the store that its URL leads to. `state`: where this host remembers which store it has found
/// there.
pub(super) fn greet(
    client: &AgentClient,
    target: &TargetUrl,
    state: Option<&Path>,
    create: bool,
) -> Result<Option<StoreId>> {
    let url = target.to_string();
    // The default root stands for "the store of that host", also where a forced command keeps it elsewhere.
    let root = (target.root() != Path::new(ROOT_DEFAULT)).then(|| target.root().to_owned());
    let known = state.map_or_else(Vec::new, |state| stores::found(state, &url));
    let Some(seen) = client.store(&StoreWish { root, create, known: known.clone() })? else { return Ok(None) };
    said(&seen);
    let Some(id) = seen.id else { return Ok(None) };
    if let Some(known) = root::known_at(&known, &seen.root).filter(|known| **known != id) {
        tracing::warn!("under {url} there is the store {id}, where the store {known} was before");
    }
    if let Some(Err(e)) = state.map(|state| stores::learn(state, &url, &KnownStore { root: seen.root, id: id.clone() }))
    {
        tracing::debug!(error = e.chain(), "the store will not be recognised the next time");
    }
    Ok(Some(id))
}
