//! One domain of this host's store, and how it is brought up here: [`BringUp`], near.

use crate::error::{Error, Kind, Result, advice};
use crate::hypervisor::machine::Machines as _;
use crate::name::{DomainUuid, Generation, PointId};
use crate::recovery::bringup::{BringUp, Coming, Order, Readiness, Standing};
use crate::recovery::failover::{self, FailoverRecord, FailoverState};
use crate::recovery::ready::Finding;
use crate::recovery::retire_home_copy::GaveWay;
use crate::replica::upkeep::Promoting as _;
use crate::replicate::state::generation;
use crate::wiring::local_target::{Found, Here};

/// A domain of this host's store.
pub struct HereDomain<'a> {
    here: &'a Here,
    uuid: DomainUuid,
}

impl Here {
    /// Asks nothing yet.
    pub fn domain(&self, uuid: &DomainUuid) -> HereDomain<'_> {
        HereDomain { here: self, uuid: uuid.clone() }
    }
}

impl HereDomain<'_> {
    fn find(&self, point: Option<&PointId>) -> Result<Found> {
        self.here.find(self.uuid.as_str(), point)
    }

    fn lock(&self) -> Result<FailoverState> {
        FailoverState::open(self.here.state(), &self.uuid)
    }
}

impl BringUp for HereDomain<'_> {
    fn ready(&self, point: Option<&PointId>) -> Result<Readiness> {
        self.here.readiness(&self.find(point)?)
    }

    fn ready_for(&self, coming: &Coming) -> Result<Vec<Finding>> {
        self.here.ready_for(&self.uuid, coming)
    }

    fn state(&self) -> Result<Standing> {
        Ok(Standing {
            promoted: self.here.store(&self.uuid)?.promoted()?,
            failover: failover::peek(self.here.state(), &self.uuid)?,
            power: self.here.hypervisor().power(&self.uuid)?,
        })
    }

    fn bring_up(&self, order: &Order, say: &dyn Fn(&str)) -> Result<FailoverRecord> {
        let state = self.lock()?;
        // Under the lock: an order that comes late finds out here.
        if state.is_called_off(&order.handover)? {
            let what = format!("the handover {} was called off", order.handover);
            return Err(Error::new(Kind::Refused, what).domain(&self.uuid).advise(advice::Failover::BeginAnew));
        }
        self.here.failover_as(&state, &self.find(Some(&order.point))?, &order.wanted, say)
    }

    fn call_off(&self, order: &Order, say: &dyn Fn(&str)) -> Result<()> {
        let state = self.lock()?;
        match state.record()? {
            Some(record) if record.point != order.point => {
                let what =
                    format!("the domain was brought up here from point {}, not from {}", record.point, order.point);
                Err(Error::new(Kind::Conflict, what).domain(&record.domain).hint(
                    "that is another failover: decide on the target which side is right, and undo or commit it there",
                ))
            }
            Some(record) if record.stage.is_committed() => {
                let what =
                    "the failover was committed: what runs here is the domain, and there is no way back by undoing it";
                Err(Error::new(Kind::Refused, what).domain(&record.domain))
            }
            Some(_) => {
                // First the refusal: whatever dies in between, nothing brings it up again.
                state.call_off(&order.handover)?;
                self.here.undo_as(&state, &self.find(None)?, say).map(drop)
            }
            None => {
                state.call_off(&order.handover)?;
                // What is left of a failover whose record is gone, and of one that died before it.
                match self.here.store(&self.uuid)?.promoted()? {
                    Some(promoted) if promoted.point != order.point => {
                        let what = format!("the replica is promoted, from point {}", promoted.point);
                        Err(Error::new(Kind::Conflict, what).domain(&self.uuid))
                    }
                    _ => self.here.store(&self.uuid)?.withdraw(),
                }
            }
        }
    }

    fn undo(&self, say: &dyn Fn(&str)) -> Result<FailoverRecord> {
        self.here.undo_as(&self.lock()?, &self.find(None)?, say)
    }

    fn commit(&self, say: &dyn Fn(&str)) -> Result<Generation> {
        match self.here.commit_failover(self.uuid.as_str(), say) {
            Ok((_, generation)) => Ok(generation),
            // Committed, and given images of its own since: who asks again has lost the answer.
            Err(e) if e.kind() == Kind::NotFound => match generation::generation(self.here.state(), &self.uuid)? {
                known if known > Generation(1) && self.here.hypervisor().power(&self.uuid)?.is_some() => Ok(known),
                _ => Err(e),
            },
            Err(e) => Err(e),
        }
    }

    fn give_way(&self, say: &dyn Fn(&str)) -> Result<GaveWay> {
        self.here.give_way(&self.uuid, say)
    }
}
