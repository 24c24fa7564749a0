//! Whether a point may begin: by whom, with what, and upon which head.

use super::BeginPoint;
use super::files::Dir;
use super::manifest::{self, MANIFEST_FILE, Manifest};
use super::source::{self, Claim, Claimed};
use crate::error::{Error, Kind, Result, advice};
use crate::name::{DomainUuid, Generation, PointId};

/// Whether a source may add to the replica; `None`: there is no manifest.
pub(super) fn judge_claim(manifest: Option<&Manifest>, claim: &Claim) -> Result<Claimed> {
    source::judge(
        source::Standing {
            owner: manifest.and_then(|m| m.owner.as_ref()),
            generation: manifest.map_or(Generation(1), |m| m.generation),
            has_points: manifest.is_some_and(|m| m.head().is_some()),
        },
        claim,
    )
}

/// What can be refused without looking at the store.
pub(super) fn check_request(request: &BeginPoint, uuid: &DomainUuid) -> Result<()> {
    let usage = |what: String| Err(Error::new(Kind::Usage, what).domain(&request.name));
    if request.uuid != *uuid {
        return usage(format!("a point of domain {} cannot go into the replica of {uuid}", request.uuid));
    }
    if request.disks.is_empty() || request.disks.len() > manifest::DISKS_MAX {
        return usage(format!("a point has between 1 and {} disks, not {}", manifest::DISKS_MAX, request.disks.len()));
    }
    for (i, disk) in request.disks.iter().enumerate() {
        if request.disks[..i].iter().any(|d| d.name == disk.name) {
            return usage(format!("disk '{}' is named twice", disk.name));
        }
        if disk.size.0 > manifest::DISK_SIZE_MAX {
            return usage(format!("disk '{}' has {} bytes, more than any disk", disk.name, disk.size));
        }
    }
    // The memory of an open point grows with the size of its disks.
    let all = request.disks.iter().fold(0u64, |sum, disk| sum.saturating_add(disk.size.0));
    if all > manifest::POINT_SIZE_MAX {
        return usage(format!("the disks have {all} bytes together, at most {} are taken", manifest::POINT_SIZE_MAX));
    }
    Ok(())
}

/// Whether the manifest has room for the point: better said now than when all of it was sent.
pub(super) fn check_room(request: &BeginPoint, dir: &Dir) -> Result<()> {
    /// A record of a point and of a disk with all that they may say, at most.
    const RECORD_MAX: u64 = 4096;
    let Some(file) = dir.open(MANIFEST_FILE)? else { return Ok(()) };
    let used = file.metadata().map_err(|e| Error::io("cannot inspect the file", dir.join(MANIFEST_FILE), e))?.len();
    match used + (1 + request.disks.len() as u64) * RECORD_MAX <= manifest::SOURCE_MAX as u64 {
        true => Ok(()),
        false => Err(manifest::no_room().domain(&request.name)),
    }
}

/// Whether the run builds on what is here (I14, I15, I16).
pub(super) fn check_head(request: &BeginPoint, manifest: &Manifest) -> Result<()> {
    if let Some(promotion) = &manifest.promotion {
        let e = Error::new(Kind::Conflict, promotion.why()).domain(&request.name);
        return Err(e.advise(promotion.advice()));
    }
    if !manifest.generation.may_step_to(request.generation) {
        return Err(too_far(manifest.generation, request.generation).domain(&request.name));
    }
    if request.generation < manifest.generation {
        return Err(Error::new(
            Kind::Conflict,
            format!(
                "the replica is of generation {}, this source of generation {}: the domain was brought up on the target since, or replicated from elsewhere",
                manifest.generation, request.generation
            ),
        )
        .domain(&request.name)
        .advise(advice::TakeOver::IfThisSideCounts));
    }
    let head = manifest.head().map(|p| &p.id);
    if head != request.expected_head.as_ref() {
        let name = |id: Option<&PointId>| id.map_or("no point".to_owned(), |id| format!("point {id}"));
        return Err(Error::new(
            Kind::Conflict,
            format!(
                "the replica's head is {}, this run builds on {}",
                name(head),
                name(request.expected_head.as_ref())
            ),
        )
        .domain(&request.name)
        .hint("run again: the next run asks for the head first"));
    }
    Ok(())
}

/// A peer would go further at once than any peer may.
pub(super) fn too_far(from: Generation, to: Generation) -> Error {
    let what = format!(
        "a step from generation {from} to generation {to} is refused: one step is at most {}, and the last generation is {}",
        Generation::STEP_MAX,
        Generation::MAX
    );
    Error::new(Kind::Conflict, what).advise(advice::Store::SetGeneration)
}

pub(super) fn at_the_end() -> Error {
    let what = format!("the replica is of the last generation there is, {}", Generation::MAX);
    Error::new(Kind::Refused, what).advise(advice::Store::SetGeneration)
}
