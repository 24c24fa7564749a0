//! A replica that runs: its domain was brought up on this host from a point. No source writes to it meanwhile (I16),
//! and that point stays with the images below it, for as long as it takes.
//!
//! Invariants
//! - From the return of [`Promoting::promote`] every run is refused, durably, whatever its generation; one that was
//!   under way keeps the lock, and so keeps the promotion from happening.
//! - The point's lease is there before the manifest says that it is promoted, and until it says so no more.
//! - A promotion that is withdrawn, or over, has changed nothing of any point.
//! - A source of an older generation than the one that a promotion was committed or concluded with is refused for ever.

use super::begin;
use super::lease::Leases;
use super::store::Store;
use super::upkeep::Promoting;
use crate::error::advice::{self, Advice};
use crate::error::{Error, Kind, Result};
use crate::name::{Generation, PointId};
use crate::replica::Promoted;
use crate::replica::manifest_file::publish;

impl Promoting for Store {
    fn promoted(&self) -> Result<Option<Promoted>> {
        let manifest =
            self.replica_dir()?.map(|dir| super::store::read_manifest(&dir, &self.uuid)).transpose()?.flatten();
        Ok(manifest.and_then(|m| m.promotion))
    }

    fn promote(&self, point: &PointId) -> Result<()> {
        let (dir, _lock, mut manifest) = self.to_change().map_err(alive)?;
        match &manifest.promotion {
            Some(promotion) if promotion.point == *point => return Ok(()),
            Some(promotion) => {
                let what =
                    format!("the domain was brought up here from point {} at {:.0}", promotion.point, promotion.since);
                return Err(Error::new(Kind::Conflict, what).hint("undo or commit that failover first"));
            }
            None => {}
        }
        if manifest.point(point).is_none() {
            return Err(Error::new(Kind::NotFound, "the replica has no such point").point(point));
        }
        let now = (self.clock)();
        Leases::keep(&dir, point, now)?;
        manifest.promotion = Some(Promoted { point: point.clone(), since: now, committed: false });
        publish(&dir, &manifest)
    }

    fn withdraw(&self) -> Result<()> {
        let (dir, _lock, mut manifest) = self.to_change()?;
        match &manifest.promotion {
            Some(promotion) if promotion.committed => {
                let what =
                    format!("the failover to point {} was committed: it is what the domain is now", promotion.point);
                return Err(Error::new(Kind::Refused, what));
            }
            Some(_) => {
                manifest.promotion = None;
                publish(&dir, &manifest)?;
            }
            None => {}
        }
        Leases::let_go(&dir)
    }

    fn commit(&self) -> Result<Generation> {
        let (dir, _lock, mut manifest) = self.to_change()?;
        let Some(promotion) = &mut manifest.promotion else {
            return Err(Error::new(
                Kind::NotFound,
                "the domain was not brought up here: there is no failover to commit",
            ));
        };
        if !promotion.committed {
            promotion.committed = true;
            manifest.generation = manifest.generation.next().ok_or_else(begin::at_the_end)?;
            publish(&dir, &manifest)?;
        }
        Ok(manifest.generation)
    }

    fn conclude(&self, generation: Generation) -> Result<()> {
        let (dir, _lock, mut manifest) = self.to_change()?;
        if generation < manifest.generation {
            let what = format!(
                "the replica is of generation {}: a domain of generation {generation} is older",
                manifest.generation
            );
            return Err(Error::new(Kind::Refused, what));
        }
        if !manifest.generation.may_step_to(generation) {
            return Err(begin::too_far(manifest.generation, generation));
        }
        if manifest.promotion.take().is_some() || manifest.generation < generation {
            manifest.generation = generation;
            publish(&dir, &manifest)?;
        }
        Leases::let_go(&dir)
    }
}

/// Whoever writes now is alive, whatever the operator believes.
fn alive(e: Error) -> Error {
    match e.kind() {
        Kind::Busy => Error::new(
            Kind::Busy,
            "somebody writes to the replica just now, so its source may well be alive",
        )
        .source(e)
        .hint("look at the source again; a prune ends by itself, a run whose source has died ends within a minute"),
        _ => e,
    }
}

impl Promoted {
    /// Why no run is accepted, to be read at 3 a.m.
    pub fn why(&self) -> String {
        let (since, point) = (self.since, &self.point);
        match self.committed {
            false => format!(
                "the domain was brought up on the target at {since:.0}, from point {point}: what runs there now may be ahead of this host"
            ),
            true => format!(
                "the domain lives on the target since {since:.0}, and that was committed: this host has an old copy of it"
            ),
        }
    }

    /// What to do about it, at the source.
    pub fn advice(&self) -> Advice {
        match self.committed {
            false => advice::Failover::LeaveOffOrUndo.into(),
            true => {
                "leave the domain here shut off, and do not start it: nothing here is newer than what the target has"
                    .into()
            }
        }
    }
}
