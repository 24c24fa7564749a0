//! The way to a target: which transport it is, and the one session that everything done there shares.

use super::stores;
use crate::agent::client::AgentClient;
use crate::error::{Error, Kind, Result};
use crate::name::{DomainName, DomainUuid, StoreId};
use crate::replica::lookup;
use crate::transport::local::LocalTransport;
use crate::transport::ssh::{SshOptions, SshTransport, end_masters};
use crate::transport::target::TargetUrl;
use crate::transport::{Channel, Service, Transport};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

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
    transport: Box<dyn Transport>,
}

/// A transport whose channels lead to another service than its own.
#[derive(Debug)]
struct Serving<'a>(&'a dyn Transport, Service);

impl Transport for Serving<'_> {
    fn host(&self) -> &str {
        self.0.host()
    }

    fn open(&self) -> Result<Channel> {
        self.0.open_as(self.1)
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}

/// Ends what this process has left of its connections to targets. For the very end of the program; blocks for at most
/// two seconds.
pub fn end_connections() {
    end_masters();
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
        *session = Some(Session { store, client: client.clone(), transport });
        Ok(client)
    }

    /// A second agent of the target beside the session, over the same connection: one that answers whether the domain
    /// could be brought up there. Connects; blocks as [`Connection::client`] does. The caller closes it.
    pub fn bring_up_client(&self) -> Result<AgentClient> {
        self.client()?;
        let session = self.session.lock().unwrap_or_else(|e| e.into_inner());
        match session.as_ref() {
            Some(session) => AgentClient::connect(&Serving(session.transport.as_ref(), Service::Failover)),
            None => Err(Error::new(Kind::Unavailable, "the session with the target has ended")),
        }
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
        let Some(session) = session else { return Ok(()) };
        let said = session.client.close();
        drop(session.client);
        said.and(session.transport.close())
    }
}

/// A replica of the target by its domain's name or UUID; its source may be gone. `here`: asked for the UUID of this
/// host's domain of that name. Also what the name alone would not have told, in words.
pub fn find_replica(
    client: &AgentClient,
    name_or_uuid: &str,
    here: &dyn Fn() -> Option<DomainUuid>,
) -> Result<((DomainUuid, DomainName), Option<String>)> {
    lookup::meant(&client.find("")?, name_or_uuid, client.host(), here)
}
