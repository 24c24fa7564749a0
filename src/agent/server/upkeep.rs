//! The agent's side of what is done with points that exist. It obeys or refuses: what may be removed is the store's to
//! say.

use crate::agent::server::{Answer, Served, Session};
use crate::agent::wire::upkeep::{StreamId, UpkeepReply, UpkeepRequest};
use crate::agent::wire::{BULK_MAX, FrameKind, Handle, Progress, Reply, encode, protocol};
use crate::error::{Error, Kind, Result};
use crate::replica::upkeep::{PatchStream, Scrubbing, Shortening};
use std::collections::BTreeMap;
use std::io::Write;
use std::time::Instant;

/// Streams that one session may have open.
const STREAMS_MAX: usize = 16;

/// What goes on from one request to the next.
enum Stream {
    Patch(Box<dyn PatchStream>),
    Scrub(Box<dyn Scrubbing>),
    Shorten(Box<dyn Shortening>),
}

impl Stream {
    fn close(self) -> Result<()> {
        match self {
            Stream::Patch(stream) => stream.close(),
            Stream::Scrub(scrub) => scrub.close(),
            Stream::Shorten(shorten) => shorten.close(),
        }
    }
}

/// The streams of a session. They hold leases: whoever drops this without [`Streams::close_all`] leaves them to expire.
#[derive(Default)]
pub(in crate::agent::server) struct Streams {
    open: BTreeMap<StreamId, (Handle, Stream)>,
    opened: StreamId,
}

impl Streams {
    /// Asked before anything is begun.
    fn have_room(&self) -> Result<()> {
        match self.open.len() < STREAMS_MAX {
            true => Ok(()),
            false => {
                let what =
                    format!("one session may have {STREAMS_MAX} exports, scrubs and shortenings under way at once");
                Err(Error::new(Kind::Refused, what))
            }
        }
    }

    fn add(&mut self, of: Handle, stream: Stream) -> Result<StreamId> {
        let id = self.opened;
        self.opened = id.checked_add(1).ok_or_else(|| protocol("a session without end"))?;
        self.open.insert(id, (of, stream));
        Ok(id)
    }

    /// Ends the streams of one replica, or all of them.
    pub(in crate::agent::server) fn close_all(&mut self, of: Option<Handle>) {
        let ending: Vec<StreamId> =
            self.open.iter().filter(|(_, (handle, _))| of.is_none_or(|of| *handle == of)).map(|(id, _)| *id).collect();
        for (_, stream) in ending.iter().filter_map(|id| self.open.remove(id)) {
            if let Err(e) = stream.close() {
                tracing::debug!("a stream did not end in order: {}", e.chain());
            }
        }
    }
}

impl<W: Write> Session<'_, W> {
    pub(in crate::agent::server) fn upkeep(&mut self, id: u64, handle: Handle, ask: UpkeepRequest) -> Result<Answer> {
        let told = match ask {
            UpkeepRequest::Holds {} => UpkeepReply::Holds { holds: self.at(handle)?.replica.holds()? },
            UpkeepRequest::Prune { remove } => {
                let output = self.output;
                let mut last = Instant::now();
                let mut progress = |done_bytes, total_bytes| {
                    if last.elapsed() >= crate::agent::server::PROGRESS_INTERVAL {
                        last = Instant::now();
                        // A client that is gone is noticed by the answer.
                        let _ =
                            output.send(FrameKind::Progress, id, &encode(&Progress::bytes(done_bytes, total_bytes)));
                    }
                };
                UpkeepReply::Prune { report: self.at(handle)?.replica.prune(&remove, &mut progress)? }
            }
            UpkeepRequest::Pin { point, reason } => {
                self.at(handle)?.replica.pin(&point, reason.as_deref())?;
                UpkeepReply::Pin {}
            }
            UpkeepRequest::Export { point, disk } => self.stream(handle, |replica| replica.export(&point, &disk))?,
            UpkeepRequest::Changes { since, point, disk } => {
                self.stream(handle, |replica| replica.changes(&since, &point, &disk))?
            }
            UpkeepRequest::Attachment { point, name } => {
                self.stream(handle, |replica| replica.attachment(&point, name))?
            }
            UpkeepRequest::Chunk { stream } => return self.chunk(stream),
            UpkeepRequest::Close { stream } => {
                let (_, stream) = self.streams.open.remove(&stream).ok_or_else(|| no_stream(stream))?;
                stream.close()?;
                UpkeepReply::Close {}
            }
            UpkeepRequest::Scrub { restart } => {
                self.streams.have_room()?;
                let scrub = self.at(handle)?.replica.scrub(restart)?;
                let start = scrub.start();
                UpkeepReply::Scrub { stream: self.streams.add(handle, Stream::Scrub(scrub))?, start }
            }
            UpkeepRequest::ScrubStep { stream, bytes_max } => match self.streams.open.get_mut(&stream) {
                Some((_, Stream::Scrub(scrub))) => UpkeepReply::ScrubStep { step: scrub.step(bytes_max)? },
                _ => return Err(no_stream(stream)),
            },
            UpkeepRequest::Shorten {} => {
                self.streams.have_room()?;
                let begun = match self.at(handle)?.replica.shorten()? {
                    Some(shorten) => {
                        let start = shorten.start();
                        Some((self.streams.add(handle, Stream::Shorten(shorten))?, start))
                    }
                    None => None,
                };
                UpkeepReply::Shorten { begun }
            }
            UpkeepRequest::ShortenStep { stream, bytes_max } => match self.streams.open.get_mut(&stream) {
                Some((_, Stream::Shorten(shorten))) => UpkeepReply::ShortenStep { step: shorten.step(bytes_max)? },
                _ => return Err(no_stream(stream)),
            },
        };
        Ok(Reply::Upkeep { told }.into())
    }

    fn stream(
        &mut self,
        handle: Handle,
        begin: impl FnOnce(&dyn Served) -> Result<Box<dyn PatchStream>>,
    ) -> Result<UpkeepReply> {
        self.streams.have_room()?;
        let stream = begin(self.at(handle)?.replica.as_ref())?;
        Ok(UpkeepReply::Export { stream: self.streams.add(handle, Stream::Patch(stream))? })
    }

    fn chunk(&mut self, id: StreamId) -> Result<Answer> {
        let Some((_, Stream::Patch(stream))) = self.streams.open.get_mut(&id) else { return Err(no_stream(id)) };
        let bytes = stream.next_chunk()?;
        if bytes.len() > BULK_MAX {
            return Err(Error::new(Kind::Corrupt, format!("the store gave a chunk of {} bytes", bytes.len())));
        }
        Ok(Answer::Message(FrameKind::Data, bytes))
    }
}

fn no_stream(id: StreamId) -> Error {
    protocol(format!("stream {id} is not open"))
}
