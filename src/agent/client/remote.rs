//! The other host's replica, as seen from here: every method of [`Replica`] is one message to the agent.
//!
//! Patch bytes are not answered. Once the agent has refused some, it says so unasked, and later calls of
//! [`DiskTarget::apply`] fail with the same error instead of sending more for nothing.
//!
//! Protocol: docs/formats/wire.md.

use crate::agent::client::{AgentClient, Shared, head, lock};
use crate::agent::wire::{
    BULK_MAX, FrameKind, Handle, Head, Reply, Request, Stream, decode_nodes, decode_pieces, protocol,
};
use crate::block::BlockIndex;
use crate::block::digest::{BlockPieces, Digest};
use crate::engine::disk_target::{DiskApplied, DiskTarget, NODES_MAX, check_blocks};
use crate::error::{Error, Kind, Result};
use crate::name::{DiskName, PointId};
use crate::replica::source::{Claim, Claimed, How};
use crate::replica::{
    ATTACHMENT_MAX, Attachment, BeginPoint, Begun, PointView, Replica, ReplicaView, SealPoint, VerifyReport,
};
use std::ops::Range;
use std::sync::{Arc, RwLock};

/// A replica on the agent's host.
#[derive(Debug)]
pub struct RemoteReplica {
    client: Arc<AgentClient>,
    handle: Handle,
    /// The disks of the point being written: their order is their number on the wire.
    disks: RwLock<Vec<DiskName>>,
}

impl RemoteReplica {
    pub(in crate::agent) fn new(client: Arc<AgentClient>, handle: Handle) -> Self {
        Self { client, handle, disks: RwLock::default() }
    }

    pub(in crate::agent) fn session(&self) -> (&Arc<AgentClient>, Handle) {
        (&self.client, self.handle)
    }

    fn shared(&self) -> &Shared {
        &self.client.shared
    }

    pub(in crate::agent) fn set_disks(&self, disks: Vec<DiskName>) {
        *self.disks.write().expect("nothing panics under this lock") = disks;
        self.shared().forget_failure(self.handle);
    }

    fn unexpected<T>(&self, asked: &str, reply: Reply) -> Result<T> {
        Err(self.shared().other_reply(asked, &reply))
    }
}

impl DiskTarget for RemoteReplica {
    fn nodes(&self, disk: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        let count = range.end.saturating_sub(range.start);
        if count > NODES_MAX {
            return Err(Error::new(Kind::Usage, format!("{count} nodes in one call; at most {NODES_MAX} are allowed")));
        }
        if count == 0 {
            return Ok(Vec::new());
        }
        let (start, end) = (range.start, range.end);
        let shared = self.shared();
        let id = shared.ask(&Request::Nodes { replica: self.handle, disk: disk.clone(), level, start, end })?;
        match shared.answer(id, &mut |_| {})? {
            (FrameKind::Nodes, payload) => {
                decode_nodes(&payload, count as usize).map_err(|e| shared.at_host(e).disk(disk))
            }
            (kind, _) => Err(shared.at_host(protocol(format!("{kind} instead of nodes")))),
        }
    }

    fn pieces(&self, disk: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        check_blocks(blocks).map_err(|e| e.disk(disk))?;
        if blocks.is_empty() {
            return Ok(Vec::new());
        }
        let shared = self.shared();
        let request = Request::Pieces { replica: self.handle, disk: disk.clone(), blocks: blocks.to_vec() };
        let id = shared.ask(&request)?;
        match shared.answer(id, &mut |_| {})? {
            (FrameKind::Pieces, payload) => {
                decode_pieces(&payload, blocks.len()).map_err(|e| shared.at_host(e).disk(disk))
            }
            (kind, _) => Err(shared.at_host(protocol(format!("{kind} instead of pieces")))),
        }
    }

    fn apply(&self, disk: &DiskName, patch_bytes: &[u8]) -> Result<()> {
        let shared = self.shared();
        let position = self.disks.read().expect("nothing panics under this lock").iter().position(|d| d == disk);
        let disk_number =
            position.ok_or_else(|| Error::new(Kind::Usage, "patch bytes for a disk that was not begun").disk(disk))?;
        let prefix = Stream { replica: self.handle, disk: disk_number as u32 }.to_bytes();
        for chunk in patch_bytes.chunks(BULK_MAX) {
            shared.check_sound(self.handle)?;
            shared.send(head(FrameKind::Apply, shared.take_id()), &prefix, chunk)?;
        }
        Ok(())
    }

    fn finish_disk(&self, disk: &DiskName) -> Result<DiskApplied> {
        match self.shared().call(&Request::FinishDisk { replica: self.handle, disk: disk.clone() })? {
            Reply::FinishDisk { applied } => Ok(applied),
            other => self.unexpected("finish_disk", other),
        }
    }
}

impl Replica for RemoteReplica {
    fn describe(&self) -> Result<ReplicaView> {
        match self.shared().call(&Request::Describe { replica: self.handle })? {
            Reply::Describe { view } => Ok(view),
            other => self.unexpected("describe", other),
        }
    }

    fn claim(&self, claim: &Claim) -> Result<Claimed> {
        match self.shared().call(&Request::Claim { replica: self.handle, claim: claim.clone() }) {
            Ok(Reply::Claim { claimed }) => Ok(claimed),
            Ok(other) => self.unexpected("claim", other),
            // An agent of an earlier version cannot tell sources apart; the session goes on.
            Err(e) if e.kind() == Kind::Protocol && self.shared().is_open() => {
                Ok(Claimed { how: How::Same, before: None })
            }
            Err(e) => Err(e),
        }
    }

    fn begin(&self, request: &BeginPoint) -> Result<Begun> {
        match self.shared().call(&Request::Begin { replica: self.handle, request: request.clone() })? {
            Reply::Begin { begun } => {
                self.set_disks(request.disks.iter().map(|disk| disk.name.clone()).collect());
                Ok(begun.unwrap_or_default())
            }
            other => self.unexpected("begin", other),
        }
    }

    fn attach(&self, name: Attachment, content: &[u8]) -> Result<()> {
        if content.len() > ATTACHMENT_MAX {
            let what =
                format!("{} has {} bytes; at most {ATTACHMENT_MAX} are allowed", name.file_name(), content.len());
            return Err(Error::new(Kind::Usage, what));
        }
        let shared = self.shared();
        let _turn = lock(&self.client.attaching);
        let id = shared.ask(&Request::Attach { replica: self.handle, name, length: content.len() as u64 })?;
        let mut rest = content;
        loop {
            let (now, later) = rest.split_at(rest.len().min(BULK_MAX));
            shared.send(Head { kind: FrameKind::Attach, more: !later.is_empty(), id }, &[], now)?;
            if later.is_empty() {
                break;
            }
            rest = later;
        }
        match shared.reply(id, &mut |_, _| {})? {
            Reply::Attach {} => Ok(()),
            other => self.unexpected("attach", other),
        }
    }

    fn seal(&self, request: &SealPoint) -> Result<PointView> {
        match self.shared().call(&Request::Seal { replica: self.handle, request: request.clone() })? {
            Reply::Seal { point } => Ok(point),
            other => self.unexpected("seal", other),
        }
    }

    fn abandon(&self) -> Result<()> {
        match self.shared().call(&Request::Abandon { replica: self.handle })? {
            Reply::Abandon {} => {
                self.set_disks(Vec::new());
                Ok(())
            }
            other => self.unexpected("abandon", other),
        }
    }

    fn verify(&self, point: &PointId, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        let id = self.shared().ask(&Request::Verify { replica: self.handle, point: point.clone() })?;
        match self.shared().reply(id, progress)? {
            Reply::Verify { report } => Ok(report),
            other => self.unexpected("verify", other),
        }
    }
}

impl Drop for RemoteReplica {
    /// Lets the agent drop its side. If that cannot be said the session is dead or closing, which does the same.
    fn drop(&mut self) {
        self.shared().forget_failure(self.handle);
        if self.shared().is_open() {
            let _ = self.shared().send(head(FrameKind::Release, 0), &self.handle.to_bytes(), &[]);
        }
    }
}
