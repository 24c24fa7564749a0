//! The agent's side of plain images, where its host has it serve them. It obeys or refuses: what lies where, and may be
//! touched, is [`crate::agent::server::ReplicaOpener::image`]'s to say.

use crate::agent::server::{Answer, Session};
use crate::agent::wire::plain::{PlainReply, PlainRequest};
use crate::agent::wire::{FrameKind, Handle, Progress, Reply, WireError, encode, protocol};
use crate::engine::disk_target::DiskTarget;
use crate::error::Result;
use crate::patch::plain_names;
use crate::plain::PlainTarget;
use std::io::Write;
use std::time::Instant;

/// An open image, and why patches for it are no longer applied.
pub(in crate::agent::server) struct Image {
    target: Box<dyn PlainTarget>,
    failed: Option<WireError>,
}

impl Image {
    /// Gives once what has to be told of a failure; what comes behind it is dropped.
    pub(in crate::agent::server) fn apply(&mut self, patch: &[u8]) -> Option<WireError> {
        if self.failed.is_some() {
            return None;
        }
        let error = self.target.apply(&plain_names().1, patch).err()?;
        self.failed = Some(WireError::from(&error));
        self.failed.clone()
    }

    /// The image, unless an earlier patch failed: then that failure.
    pub(in crate::agent::server) fn sound(&mut self) -> Result<&dyn DiskTarget> {
        match &self.failed {
            Some(error) => Err(error.clone().into_error(None)),
            None => Ok(self.target.as_ref()),
        }
    }
}

impl<W: Write> Session<'_, W> {
    pub(in crate::agent::server) fn plain(&mut self, id: u64, ask: PlainRequest) -> Result<Answer> {
        let told = match ask {
            PlainRequest::Open { wish } => {
                self.have_room()?;
                let target = self.opener.image(&wish)?;
                let view = target.view()?;
                let image = self.next_handle()?;
                self.images.insert(image, Image { target, failed: None });
                PlainReply::Open { image, view }
            }
            PlainRequest::Read { image } => {
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
                PlainReply::Read { whole: self.open_image(image)?.target.read(&mut progress)? }
            }
            PlainRequest::Make { make } => {
                self.opener.make(&make)?;
                PlainReply::Make {}
            }
            PlainRequest::Commit { image, finish } => {
                let image = self.open_image(image)?;
                image.sound()?;
                PlainReply::Commit { committed: image.target.commit(&finish)? }
            }
        };
        Ok(Reply::Plain { told }.into())
    }

    fn open_image(&mut self, image: Handle) -> Result<&mut Image> {
        self.images.get_mut(&image).ok_or_else(|| protocol(format!("image {} is not open", image.0)))
    }
}
