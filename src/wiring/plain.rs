//! Plain images on this host and on others.

use super::connection::Connection;
use super::host::{open_options, workers};
use crate::error::Result;
use crate::image::open::OpenOptions;
use crate::plain::source::ReadOptions;
use crate::plain::target::{LocalOptions, LocalTarget};
use crate::plain::tree::{self, Make};
use crate::plain::{PlainTarget, Wish};
use crate::transport::Service;
use crate::transport::ssh::SshOptions;
use crate::transport::target::{SshTarget, TargetUrl};
use std::path::{Path, PathBuf};

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Absolute.
    Here(PathBuf),
    /// An image on another host, reached by ssh.
    There {
        /// Host, user and port of the ssh connection.
        host: SshTarget,
        /// Absolute path of the image on that host.
        path: PathBuf,
    },
}

impl Place {
    /// `ssh://[user@]host[:port]/path`, or a path of this host. Blocks no longer than the current directory takes.
    pub fn parse(text: &str) -> Result<Place> {
        if !text.starts_with("ssh://") {
            let path = Path::new(text);
            let absolute = std::path::absolute(path);
            return absolute.map(Place::Here).map_err(|e| crate::error::Error::io("this is no path", path, e));
        }
        match TargetUrl::parse(text)? {
            TargetUrl::Ssh(host) => {
                let path = host.root.clone();
                Ok(Place::There { host: SshTarget { root: PathBuf::from("/"), ..host }, path })
            }
            TargetUrl::Local { root } => Ok(Place::Here(root)),
        }
    }

    /// Gives the path of the image, on its own host.
    pub fn path(&self) -> &Path {
        match self {
            Place::Here(path) | Place::There { path, .. } => path,
        }
    }

    /// Gives the host that has the image. `None`: this host.
    pub fn host(&self) -> Option<&SshTarget> {
        match self {
            Place::Here(_) => None,
            Place::There { host, .. } => Some(host),
        }
    }
}

/// A session with a host that serves images. Nothing is sent yet.
pub fn images_on(host: &SshTarget, ssh: &SshOptions) -> Connection {
    Connection::new(TargetUrl::Ssh(host.clone()), SshOptions { service: Service::Images, ..ssh.clone() })
}

/// What this host allows and has, where nothing is restricted. `state` is this host's own state.
pub fn local_options(state: &Path, undo: Option<PathBuf>) -> LocalOptions {
    let (workers, backing) = (workers(), Vec::new());
    LocalOptions { open: open_options(workers), workers, within: None, backing, redo_dir: redo_dir(state), undo }
}

/// How an image of this host is read. `backing`: where files that it names may lie, beside its own directory.
pub fn read_options(state: &Path, force_share: bool, backing: &[PathBuf]) -> ReadOptions {
    ReadOptions {
        open: OpenOptions { force_share, ..open_options(workers()) },
        exact: true,
        device_max: None,
        redo_dir: redo_dir(state),
        within: None,
        backing: backing.to_owned(),
    }
}

/// Where redo files of block devices lie.
pub fn redo_dir(state: &Path) -> PathBuf {
    state.join("redo")
}

/// Makes a directory or a link on this host, or on that of the connection.
pub fn make(what: &Make, connection: Option<&Connection>) -> Result<()> {
    match connection {
        None => tree::make(what, None),
        Some(connection) => connection.client()?.make(what),
    }
}

/// Opens an image on this host, or on that of the connection.
pub fn open_image(
    wish: &Wish,
    connection: Option<&Connection>,
    options: &LocalOptions,
) -> Result<Box<dyn PlainTarget>> {
    match connection {
        None => Ok(Box::new(LocalTarget::open(wish, options)?)),
        Some(connection) => Ok(Box::new(connection.client()?.open_image(wish)?)),
    }
}
