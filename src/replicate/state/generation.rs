//! The generation that this host replicates a domain as: 1, until a domain was brought up here for good.
//!
//! A target refuses a source of an older generation than its replica is of (I15): that is how a host that lost its
//! domain is kept from writing over what came after. So a generation that was given must not be forgotten, and never
//! falls.

use crate::durable::{read_json, replace_json, sync_dir};
use crate::error::{Error, Kind, Result, advice};
use crate::name::{DomainUuid, Generation};
use crate::replicate::state::journal::domain_dir;
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

const FILE: &str = "generation.json";

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    /// Version of this document: 1.
    format: u32,
    generation: Generation,
}

/// Of a domain that was never brought up here for good: 1.
pub fn generation(state: &Path, uuid: &DomainUuid) -> Result<Generation> {
    let path = domain_dir(state, uuid).join(FILE);
    match read_json::<Stored>(&path)? {
        None => Ok(Generation(1)),
        Some(Stored { format: 1, generation }) => Ok(generation),
        Some(Stored { format, .. }) => {
            let what = format!("the generation's document has version {format}, this program reads version 1");
            Err(Error::new(Kind::Protocol, what).path(path).hint("use the version of virt-replica that wrote it"))
        }
    }
}

/// From now on this host replicates the domain as `generation` at least; durable when it returns.
pub fn raise(state: &Path, uuid: &DomainUuid, generation: Generation) -> Result<()> {
    let dir = domain_dir(state, uuid);
    let known = self::generation(state, uuid)?;
    if known >= generation {
        return match known {
            // Of a host that never raised it there is no document.
            Generation(1) => Ok(()),
            // Whoever raised it may have died before that was durable.
            _ => sync_dir(&dir),
        };
    }
    // The number may be a peer's word. One that lies must not lock this host out of every honest target.
    if !known.may_step_to(generation) {
        let what = format!(
            "the other host says generation {generation}, this host knows {known}: one step is at most {}",
            Generation::STEP_MAX
        );
        return Err(Error::new(Kind::Conflict, what).domain(uuid).advise(advice::Store::SetGenerationThere));
    }
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|e| Error::io("cannot create the directory of the domain's state", &dir, e))?;
    replace_json(&dir, FILE, &Stored { format: 1, generation })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_with_one_and_never_falls() {
        let temp = tempfile::tempdir().unwrap();
        let uuid = DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap();
        let now = || generation(temp.path(), &uuid).unwrap();
        assert_eq!(now(), Generation(1));
        raise(temp.path(), &uuid, Generation(3)).unwrap();
        raise(temp.path(), &uuid, Generation(2)).unwrap();
        assert_eq!(now(), Generation(3));
        let e = raise(temp.path(), &uuid, Generation::MAX).unwrap_err();
        assert_eq!((e.kind(), now()), (Kind::Conflict, Generation(3)), "a peer's lie");
    }

    #[test]
    fn a_document_that_is_not_understood_is_an_error_and_not_the_first_generation() {
        let temp = tempfile::tempdir().unwrap();
        let uuid = DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap();
        raise(temp.path(), &uuid, Generation(2)).unwrap();
        let path = domain_dir(temp.path(), &uuid).join(FILE);
        for (text, kind) in [("{\"format\":2,\"generation\":9}", Kind::Protocol), ("{}", Kind::Corrupt)] {
            fs::write(&path, text).unwrap();
            assert_eq!(generation(temp.path(), &uuid).unwrap_err().kind(), kind, "{text}");
        }
    }
}
