//! The agent's side of bringing a domain up, where its host has it do so. It obeys or refuses: what may run there is
//! [`crate::agent::server::ReplicaOpener::bring_up`]'s to say.

use crate::agent::server::{Answer, Session};
use crate::agent::wire::bringup::{BringUpReply, BringUpRequest};
use crate::agent::wire::{FrameKind, Progress, Reply, encode};
use crate::error::Result;
use crate::name::DomainUuid;
use std::io::Write;

impl<W: Write> Session<'_, W> {
    pub(in crate::agent::server) fn bring_up(
        &mut self,
        id: u64,
        uuid: &DomainUuid,
        ask: BringUpRequest,
    ) -> Result<Answer> {
        let domain = self.opener.bring_up(uuid)?;
        let output = self.output;
        let say = |words: &str| {
            // A client that is gone is noticed by the answer; what was begun comes to its end all the same.
            let _ = output.send(FrameKind::Progress, id, &encode(&Progress::words(words)));
        };
        let told = match ask {
            BringUpRequest::Ready { point } => {
                BringUpReply::Ready { readiness: domain.ready(point.as_ref())?.spoken(self.words) }
            }
            BringUpRequest::ReadyFor { coming } => {
                let findings = domain.ready_for(&coming)?;
                BringUpReply::ReadyFor { findings: findings.into_iter().map(|f| f.spoken(self.words)).collect() }
            }
            BringUpRequest::State {} => BringUpReply::State { standing: domain.state()? },
            BringUpRequest::BringUp { order } => BringUpReply::BringUp { record: domain.bring_up(&order, &say)? },
            BringUpRequest::CallOff { order } => {
                domain.call_off(&order, &say)?;
                BringUpReply::CallOff {}
            }
            BringUpRequest::Undo {} => BringUpReply::Undo { record: domain.undo(&say)? },
            BringUpRequest::GiveWay {} => BringUpReply::GiveWay { gave_way: domain.give_way(&say)? },
            BringUpRequest::Commit {} => BringUpReply::Commit { generation: domain.commit(&say)? },
        };
        Ok(Reply::BringUp { told }.into())
    }
}

#[cfg(test)]
#[path = "bringup_tests.rs"]
mod tests;
