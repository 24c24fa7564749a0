//! The reader's side of a session: banner, frames, and the inquest when it broke.

use super::super::patience::Patient;
use super::{Phase, Shared, lock};
use crate::agent::wire::{
    Banner, Failed, FrameKind, Head, JUNK_MAX, PROTOCOL, REPLY_MAX, Role, WireError, decode, protocol, read_banner,
    read_frame,
};
use crate::error::{Error, Kind, Result};
use std::io::{self, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Shared {
    /// The reader thread: banner, frames, and the inquest.
    pub(super) fn read_until_end(self: Arc<Self>, output: Box<dyn Read + Send>) {
        let (silence, dead) = (self.options.silence, Arc::clone(&self.dead));
        let output = Patient::new(output, move |quiet| match quiet < silence && !dead.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(io::ErrorKind::TimedOut.into()),
        });
        let mut input = BufReader::with_capacity(64 << 10, Heard { inner: output, shared: &self });
        match self.greet(&mut input).and_then(|()| self.dispatch(&mut input)) {
            Ok(()) => {
                lock(&self.state).phase = Phase::Ended;
                self.changed.notify_all();
            }
            Err(error) => self.inquest(error),
        }
    }

    fn greet(&self, input: &mut impl io::BufRead) -> Result<()> {
        let theirs = read_banner(input, Role::Agent, JUNK_MAX)?;
        if theirs.protocol != PROTOCOL {
            let ours = Banner::ours();
            let what = format!(
                "the agent is virt-replica {} (protocol {}), this is virt-replica {} (protocol {})",
                theirs.version, theirs.protocol, ours.version, ours.protocol
            );
            let hint = format!("install the same virt-replica on {}", self.host);
            return Err(Error::new(Kind::Protocol, what).hint(hint));
        }
        let mut state = lock(&self.state);
        state.agent_version = theirs.version;
        if matches!(state.phase, Phase::Greeting) {
            state.phase = Phase::Open;
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Hands each frame to who waits for it, until the agent's last word.
    fn dispatch(&self, input: &mut impl Read) -> Result<()> {
        let mut payload = Vec::new();
        while let Some(head) = read_frame(input, &mut payload)? {
            if head.kind != FrameKind::Ping {
                lock(&self.state).moved = Instant::now();
            }
            match head.kind {
                FrameKind::Ping => {}
                FrameKind::Error if head.id == 0 => {
                    let error: WireError = decode("error", &payload)?;
                    return Err(error.into_error(None));
                }
                FrameKind::Reply | FrameKind::Nodes | FrameKind::Pieces | FrameKind::Data | FrameKind::Error => {
                    self.take_answer(head, &payload)?;
                }
                FrameKind::Progress => {
                    let progress = decode("progress", &payload)?;
                    if let Some(slot) = lock(&self.state).slots.get_mut(&head.id) {
                        slot.progress = Some(progress);
                    }
                    self.changed.notify_all();
                }
                FrameKind::Failed => {
                    let failed: Failed = decode("failure", &payload)?;
                    let mut state = lock(&self.state);
                    if state.failed.len() < 1024 {
                        state.failed.insert(failed.replica, failed.error);
                    }
                }
                FrameKind::End => {
                    return match lock(&self.state).phase {
                        Phase::Closing => Ok(()),
                        _ => Err(protocol("the agent ended the session unasked")),
                    };
                }
                other => return Err(protocol(format!("{other} is not for a client"))),
            }
        }
        Err(Error::new(Kind::Unavailable, "the agent ended without a goodbye"))
    }

    fn take_answer(&self, head: Head, payload: &[u8]) -> Result<()> {
        let mut state = lock(&self.state);
        let slot = state
            .slots
            .get_mut(&head.id)
            .filter(|slot| !slot.complete)
            .ok_or_else(|| protocol(format!("an answer to request {}, which nobody made", head.id)))?;
        let (kind, answer) = slot.answer.get_or_insert_with(|| (head.kind, Vec::new()));
        if *kind != head.kind || payload.len() > REPLY_MAX - answer.len() {
            return Err(protocol("an answer that changes its kind, or never ends"));
        }
        answer.extend_from_slice(payload);
        slot.complete = !head.more;
        self.changed.notify_all();
        Ok(())
    }

    /// The session broke: tell everybody why. An end without a word is explained by the transport, which knows how the
    /// program ended; what explains itself is told before that, since ending a program may take seconds.
    fn inquest(&self, error: Error) {
        let quiet = lock(&self.state).heard.elapsed();
        let silent = quiet >= self.options.silence;
        let error = if silent { self.silent(quiet) } else { self.at_host(error) };
        if silent || error.kind() != Kind::Unavailable {
            self.die(&error);
        }
        // Its end of file, so that a live agent ends too. Somebody who is stuck in a write holds the lock; he is freed
        // by the closer, which cuts the pipe.
        if let Ok(mut writer) = self.writer.try_lock() {
            writer.take();
        }
        let closer = lock(&self.closer).take();
        let explained = match closer.map(|closer| closer.close()) {
            Some(Err(explained)) if std::error::Error::source(&explained).is_none() => explained.source(error),
            Some(Err(explained)) => explained,
            _ => error,
        };
        self.die(&explained);
    }
}

/// Counts what is read, and remembers when.
struct Heard<'a, R> {
    inner: R,
    shared: &'a Shared,
}

impl<R: Read> Read for Heard<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        if n > 0 {
            self.shared.received_bytes.fetch_add(n as u64, Ordering::Relaxed);
            lock(&self.shared.state).heard = Instant::now();
        }
        Ok(n)
    }
}
