//! The other host's points, as seen from here: every method of [`Upkeep`] is one message to the agent. A stream is read
//! ahead, so that the way there and back does not bound its rate.

use super::remote::RemoteReplica;
use crate::agent::client::AgentClient;
use crate::agent::wire::upkeep::{StreamId, UpkeepReply, UpkeepRequest};
use crate::agent::wire::{FrameKind, Handle, Reply, Request, protocol};
use crate::error::Result;
use crate::name::{DiskName, PointId};
use crate::replica::Attachment;
use crate::replica::upkeep::{
    Holds, PatchStream, PruneReport, ScrubStart, ScrubStep, Scrubbing, ShortenStart, ShortenStep, Shortening, Upkeep,
};
use std::collections::VecDeque;
use std::sync::Arc;

/// Chunks asked for ahead: at most some 2 MiB on their way.
const AHEAD: usize = 4;

fn ask(
    client: &AgentClient,
    replica: Handle,
    ask: UpkeepRequest,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<UpkeepReply> {
    let id = client.shared.ask(&Request::Upkeep { replica, ask })?;
    match client.shared.reply(id, progress)? {
        Reply::Upkeep { told } => Ok(told),
        other => Err(client.shared.other_reply("upkeep", &other)),
    }
}

impl RemoteReplica {
    fn told<T>(
        &self,
        ask_for: UpkeepRequest,
        progress: &mut dyn FnMut(u64, u64),
        take: impl FnOnce(UpkeepReply) -> Option<T>,
    ) -> Result<T> {
        let (client, handle) = self.session();
        let told = ask(client, handle, ask_for, progress)?;
        take(told).ok_or_else(|| client.shared.at_host(protocol("the answer is to another question")))
    }

    fn stream(&self, ask: UpkeepRequest) -> Result<Box<dyn PatchStream>> {
        let stream = self.told(ask, &mut |_, _| {}, |told| match told {
            UpkeepReply::Export { stream } => Some(stream),
            _ => None,
        })?;
        let (client, handle) = self.session();
        let (client, asked) = (Arc::clone(client), VecDeque::new());
        Ok(Box::new(RemoteStream { client, handle, stream, asked, ended: false }))
    }
}

impl Upkeep for RemoteReplica {
    fn holds(&self) -> Result<Holds> {
        self.told(UpkeepRequest::Holds {}, &mut |_, _| {}, |told| match told {
            UpkeepReply::Holds { holds } => Some(holds),
            _ => None,
        })
    }

    fn prune(&self, remove: &[PointId], progress: &mut dyn FnMut(u64, u64)) -> Result<PruneReport> {
        self.told(UpkeepRequest::Prune { remove: remove.to_vec() }, progress, |told| match told {
            UpkeepReply::Prune { report } => Some(report),
            _ => None,
        })
    }

    fn pin(&self, point: &PointId, reason: Option<&str>) -> Result<()> {
        let ask = UpkeepRequest::Pin { point: point.clone(), reason: reason.map(str::to_owned) };
        self.told(ask, &mut |_, _| {}, |told| matches!(told, UpkeepReply::Pin {}).then_some(()))
    }

    fn export(&self, point: &PointId, disk: &DiskName) -> Result<Box<dyn PatchStream>> {
        self.stream(UpkeepRequest::Export { point: point.clone(), disk: disk.clone() })
    }

    fn changes(&self, since: &PointId, point: &PointId, disk: &DiskName) -> Result<Box<dyn PatchStream>> {
        self.stream(UpkeepRequest::Changes { since: since.clone(), point: point.clone(), disk: disk.clone() })
    }

    fn attachment(&self, point: &PointId, name: Attachment) -> Result<Box<dyn PatchStream>> {
        self.stream(UpkeepRequest::Attachment { point: point.clone(), name })
    }

    fn scrub(&self, restart: bool) -> Result<Box<dyn Scrubbing>> {
        let (stream, start) = self.told(UpkeepRequest::Scrub { restart }, &mut |_, _| {}, |told| match told {
            UpkeepReply::Scrub { stream, start } => Some((stream, start)),
            _ => None,
        })?;
        let (client, handle) = self.session();
        Ok(Box::new(RemoteScrub { client: Arc::clone(client), handle, stream, start }))
    }

    fn shorten(&self) -> Result<Option<Box<dyn Shortening>>> {
        let begun = self.told(UpkeepRequest::Shorten {}, &mut |_, _| {}, |told| match told {
            UpkeepReply::Shorten { begun } => Some(begun),
            _ => None,
        })?;
        let (client, handle) = self.session();
        Ok(begun.map(|(stream, start)| -> Box<dyn Shortening> {
            Box::new(RemoteShorten { client: Arc::clone(client), handle, stream, start })
        }))
    }
}

struct RemoteStream {
    client: Arc<AgentClient>,
    handle: Handle,
    stream: StreamId,
    /// Requests for chunks, in their order.
    asked: VecDeque<u64>,
    ended: bool,
}

impl RemoteStream {
    fn answer(&mut self) -> Result<Option<Vec<u8>>> {
        let shared = &self.client.shared;
        let Some(id) = self.asked.pop_front() else { return Ok(None) };
        match shared.answer(id, &mut |_| {})? {
            (FrameKind::Data, bytes) => Ok(Some(bytes)),
            (kind, _) => Err(shared.at_host(protocol(format!("{kind} instead of data")))),
        }
    }
}

impl PatchStream for RemoteStream {
    fn next_chunk(&mut self) -> Result<Vec<u8>> {
        while !self.ended && self.asked.len() < AHEAD {
            let ask = UpkeepRequest::Chunk { stream: self.stream };
            self.asked.push_back(self.client.shared.ask(&Request::Upkeep { replica: self.handle, ask })?);
        }
        let bytes = self.answer()?.unwrap_or_default();
        self.ended |= bytes.is_empty();
        Ok(bytes)
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        // What was asked for ahead comes before the answer to this.
        while self.answer().ok().flatten().is_some() {}
        close(&self.client, self.handle, self.stream)
    }
}

/// A scrub on the agent's host: it reads while it is asked to, and so ends by not being asked again.
struct RemoteScrub {
    client: Arc<AgentClient>,
    handle: Handle,
    stream: StreamId,
    start: ScrubStart,
}

impl Scrubbing for RemoteScrub {
    fn start(&self) -> ScrubStart {
        self.start
    }

    fn step(&mut self, bytes_max: u64) -> Result<ScrubStep> {
        let stream = self.stream;
        match ask(&self.client, self.handle, UpkeepRequest::ScrubStep { stream, bytes_max }, &mut |_, _| {})? {
            UpkeepReply::ScrubStep { step } => Ok(step),
            _ => Err(self.client.shared.at_host(protocol("the answer is to another question"))),
        }
    }

    fn close(self: Box<Self>) -> Result<()> {
        close(&self.client, self.handle, self.stream)
    }
}

/// Likewise.
struct RemoteShorten {
    client: Arc<AgentClient>,
    handle: Handle,
    stream: StreamId,
    start: ShortenStart,
}

impl Shortening for RemoteShorten {
    fn start(&self) -> ShortenStart {
        self.start.clone()
    }

    fn step(&mut self, bytes_max: u64) -> Result<ShortenStep> {
        let stream = self.stream;
        match ask(&self.client, self.handle, UpkeepRequest::ShortenStep { stream, bytes_max }, &mut |_, _| {})? {
            UpkeepReply::ShortenStep { step } => Ok(step),
            _ => Err(self.client.shared.at_host(protocol("the answer is to another question"))),
        }
    }

    fn close(self: Box<Self>) -> Result<()> {
        close(&self.client, self.handle, self.stream)
    }
}

fn close(client: &AgentClient, handle: Handle, stream: StreamId) -> Result<()> {
    match ask(client, handle, UpkeepRequest::Close { stream }, &mut |_, _| {})? {
        UpkeepReply::Close {} => Ok(()),
        _ => Err(client.shared.at_host(protocol("the answer is to another question"))),
    }
}
