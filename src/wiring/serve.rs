//! What an agent serves: the store of this host, with or without the right to bring domains up, or its images.

#[cfg(feature = "libvirt")]
use super::local_target;
use super::plain;
use super::stores::LocalStores;
use crate::agent::server::{ReplicaOpener, ServeOptions, Served, serve_stdio};
use crate::error::{Error, Kind, Result, Words};
use crate::name::{DomainName, DomainUuid};
use crate::plain::target::{LocalOptions, LocalTarget};
use crate::plain::tree::{self, Make};
use crate::plain::{PlainTarget, Wish};
#[cfg(feature = "libvirt")]
use crate::recovery::bringup::BringUp;
#[cfg(feature = "libvirt")]
use crate::replica::root::{StoreSeen, StoreWish};
use crate::replica::store::Limits;
use std::path::{Path, PathBuf};

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

/// Runs the agent for the images below `root` on this process's stdin and stdout, until the client's end or its
/// silence. `state` is this host's own state.
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
