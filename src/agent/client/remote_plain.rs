//! A plain image on the agent's host: what goes beyond a disk's patch is a message of its own, the rest is as for a
//! replica.

use super::remote::RemoteReplica;
use crate::agent::client::AgentClient;
use crate::agent::wire::plain::{PlainReply, PlainRequest};
use crate::agent::wire::{Handle, Reply, Request};
use crate::block::BlockIndex;
use crate::block::digest::{BlockPieces, Digest};
use crate::engine::disk_target::{DiskApplied, DiskTarget};
use crate::error::{Kind, Result};
use crate::name::DiskName;
use crate::patch::plain_names;
use crate::plain::tree::Make;
use crate::plain::{Committed, Finish, ImageView, PlainTarget, Whole, Wish};
use std::ops::Range;
use std::sync::Arc;

/// An image on the agent's host.
#[derive(Debug)]
pub struct RemoteImage {
    end: RemoteReplica,
    handle: Handle,
    view: ImageView,
}

impl AgentClient {
    /// Opens an image on the other host. `Refused` where the agent serves none.
    pub fn open_image(self: &Arc<Self>, wish: &Wish) -> Result<RemoteImage> {
        match self.ask_plain(PlainRequest::Open { wish: wish.clone() }, &mut |_, _| {})? {
            PlainReply::Open { image, view } => {
                let end = RemoteReplica::new(Arc::clone(self), image);
                end.set_disks(vec![plain_names().1]);
                Ok(RemoteImage { end, handle: image, view })
            }
            other => Err(self.shared.other_reply("open", &Reply::Plain { told: other })),
        }
    }

    /// Makes a directory or a link on the other host.
    pub fn make(&self, make: &Make) -> Result<()> {
        match self.ask_plain(PlainRequest::Make { make: make.clone() }, &mut |_, _| {}) {
            Ok(PlainReply::Make {}) => Ok(()),
            Ok(other) => Err(self.shared.other_reply("make", &Reply::Plain { told: other })),
            Err(e) if e.kind() == Kind::Protocol => {
                Err(e.hint("its virt-replica is older and makes no directories: update it first"))
            }
            Err(e) => Err(e),
        }
    }

    fn ask_plain(&self, ask: PlainRequest, progress: &mut dyn FnMut(u64, u64)) -> Result<PlainReply> {
        let id = self.shared.ask(&Request::Plain { ask })?;
        match self.shared.reply(id, progress)? {
            Reply::Plain { told } => Ok(told),
            other => Err(self.shared.other_reply("plain", &other)),
        }
    }
}

impl DiskTarget for RemoteImage {
    fn nodes(&self, disk: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        self.end.nodes(disk, level, range)
    }

    fn pieces(&self, disk: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        self.end.pieces(disk, blocks)
    }

    fn apply(&self, disk: &DiskName, patch_bytes: &[u8]) -> Result<()> {
        self.end.apply(disk, patch_bytes)
    }

    fn finish_disk(&self, disk: &DiskName) -> Result<DiskApplied> {
        self.end.finish_disk(disk)
    }
}

impl PlainTarget for RemoteImage {
    fn view(&self) -> Result<ImageView> {
        Ok(self.view.clone())
    }

    fn read(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Whole> {
        let client = self.end.session().0;
        match client.ask_plain(PlainRequest::Read { image: self.handle }, progress)? {
            PlainReply::Read { whole } => Ok(whole),
            other => Err(client.shared.other_reply("read", &Reply::Plain { told: other })),
        }
    }

    fn commit(&self, finish: &Finish) -> Result<Committed> {
        let client = self.end.session().0;
        match client.ask_plain(PlainRequest::Commit { image: self.handle, finish: finish.clone() }, &mut |_, _| {})? {
            PlainReply::Commit { committed } => Ok(committed),
            other => Err(client.shared.other_reply("commit", &Reply::Plain { told: other })),
        }
    }
}
