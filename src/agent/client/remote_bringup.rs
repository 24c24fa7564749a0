//! Bringing a domain up on the agent's host: every method of [`BringUp`] is one message to the agent.

use crate::agent::client::AgentClient;
use crate::agent::wire::bringup::{BringUpReply, BringUpRequest};
use crate::agent::wire::{Reply, Request, protocol};
use crate::error::{Kind, Result, printable};
use crate::name::{DomainUuid, Generation, PointId};
use crate::recovery::bringup::{BringUp, Coming, Order, Readiness, Standing};
use crate::recovery::failover::FailoverRecord;
use crate::recovery::ready::Finding;
use crate::recovery::retire_home_copy::GaveWay;
use std::sync::Arc;

/// One domain on the agent's host.
#[derive(Debug)]
pub struct RemoteBringUp {
    client: Arc<AgentClient>,
    uuid: DomainUuid,
}

impl AgentClient {
    /// Asks nothing yet.
    pub fn bring_up(self: &Arc<Self>, uuid: &DomainUuid) -> RemoteBringUp {
        RemoteBringUp { client: Arc::clone(self), uuid: uuid.clone() }
    }
}

impl RemoteBringUp {
    fn ask<T>(
        &self,
        ask: BringUpRequest,
        say: &dyn Fn(&str),
        take: impl FnOnce(BringUpReply) -> Option<T>,
    ) -> Result<T> {
        let shared = &self.client.shared;
        let id = shared.ask(&Request::BringUp { uuid: self.uuid.clone(), ask })?;
        let reply = shared.reply_told(id, &mut |progress| {
            if let Some(words) = &progress.words {
                say(&printable(words, 500));
            }
        });
        match reply? {
            Reply::BringUp { told } => {
                take(told).ok_or_else(|| shared.at_host(protocol("the answer is to another question")))
            }
            other => Err(shared.other_reply("bring_up", &other)),
        }
    }
}

impl BringUp for RemoteBringUp {
    fn ready(&self, point: Option<&PointId>) -> Result<Readiness> {
        self.ask(BringUpRequest::Ready { point: point.cloned() }, &|_| {}, |told| match told {
            BringUpReply::Ready { readiness } => Some(readiness),
            _ => None,
        })
    }

    fn ready_for(&self, coming: &Coming) -> Result<Vec<Finding>> {
        self.ask(BringUpRequest::ReadyFor { coming: coming.clone() }, &|_| {}, |told| match told {
            BringUpReply::ReadyFor { findings } => Some(findings),
            _ => None,
        })
        .map_err(|e| match e.kind() {
            Kind::Protocol => e.hint("its virt-replica is older and does not know this question: update it first"),
            _ => e,
        })
    }

    fn state(&self) -> Result<Standing> {
        self.ask(BringUpRequest::State {}, &|_| {}, |told| match told {
            BringUpReply::State { standing } => Some(standing),
            _ => None,
        })
    }

    fn bring_up(&self, order: &Order, say: &dyn Fn(&str)) -> Result<FailoverRecord> {
        self.ask(BringUpRequest::BringUp { order: order.clone() }, say, |told| match told {
            BringUpReply::BringUp { record } => Some(record),
            _ => None,
        })
    }

    fn call_off(&self, order: &Order, say: &dyn Fn(&str)) -> Result<()> {
        self.ask(BringUpRequest::CallOff { order: order.clone() }, say, |told| {
            matches!(told, BringUpReply::CallOff {}).then_some(())
        })
    }

    fn undo(&self, say: &dyn Fn(&str)) -> Result<FailoverRecord> {
        self.ask(BringUpRequest::Undo {}, say, |told| match told {
            BringUpReply::Undo { record } => Some(record),
            _ => None,
        })
    }

    fn commit(&self, say: &dyn Fn(&str)) -> Result<Generation> {
        self.ask(BringUpRequest::Commit {}, say, |told| match told {
            BringUpReply::Commit { generation } => Some(generation),
            _ => None,
        })
    }

    fn give_way(&self, say: &dyn Fn(&str)) -> Result<GaveWay> {
        self.ask(BringUpRequest::GiveWay {}, say, |told| match told {
            BringUpReply::GiveWay { gave_way } => Some(gave_way),
            _ => None,
        })
    }
}
