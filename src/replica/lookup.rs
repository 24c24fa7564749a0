//! Which replica is meant by a name or a UUID. Pure.

use crate::error::{Error, Kind, Result, advice};
use crate::name::{DomainName, DomainUuid};

/// Which of `all` that `host` has is meant.
pub(crate) fn meant(
    all: &[(DomainUuid, DomainName)],
    name_or_uuid: &str,
    host: &str,
    here: &dyn Fn() -> Option<DomainUuid>,
) -> Result<((DomainUuid, DomainName), Option<String>)> {
    let by_name: Vec<_> = all.iter().filter(|(_, name)| name.as_str() == name_or_uuid).collect();
    let here = if by_name.is_empty() { None } else { here() };
    let others = |of: &DomainUuid| -> Vec<String> {
        by_name.iter().filter(|(uuid, _)| uuid != of).map(|(uuid, _)| uuid.to_string()).collect()
    };
    match here {
        Some(here) if by_name.iter().any(|(uuid, _)| *uuid == here) => {
            let others = others(&here).join(", ");
            let note = (!others.is_empty()).then(|| {
                format!("{host} has more than one replica named '{name_or_uuid}': this is that of the domain here, {here}; name another by its UUID: {others}")
            });
            let name = by_name.into_iter().find(|(uuid, _)| *uuid == here).expect("it was looked for").1.clone();
            Ok(((here, name), note))
        }
        other => {
            let found = one_of(all.iter().cloned(), name_or_uuid, host).map_err(|e| match e.kind() {
                Kind::NotFound => e.advise(advice::Run::FirstPoint),
                _ => e,
            })?;
            let note = other.map(|here| {
                format!("the domain '{name_or_uuid}' here is another one, {here}, without a replica on {host}: this is that of {}", found.0)
            });
            Ok((found, note))
        }
    }
}

/// The one replica of this name or UUID among `all` that `holder` has.
pub(crate) fn one_of(
    all: impl Iterator<Item = (DomainUuid, DomainName)>,
    name_or_uuid: &str,
    holder: &str,
) -> Result<(DomainUuid, DomainName)> {
    let mut found: Vec<_> = all.filter(|(u, n)| u.as_str() == name_or_uuid || n.as_str() == name_or_uuid).collect();
    match found.len() {
        0 => Err(Error::new(Kind::NotFound, format!("{holder} has no replica of a domain '{name_or_uuid}'"))),
        1 => Ok(found.remove(0)),
        count => {
            let uuids: Vec<_> = found.iter().map(|(uuid, _)| uuid.to_string()).collect();
            let what =
                format!("{holder} has replicas of {count} domains named '{name_or_uuid}': {}", uuids.join(" and "));
            Err(Error::new(Kind::Usage, what).hint("name one of them by its UUID"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest was deleted and made again under its name: the store has a replica of each.
    #[test]
    fn the_domain_here_says_which_replica_of_its_name_is_meant() {
        let uuid = |n: u8| DomainUuid::new(format!("00000000-0000-4000-8000-0000000000{n:02}")).unwrap();
        let of = |n: u8, name: &str| (uuid(n), DomainName::new(name).unwrap());
        let all = [of(1, "web"), of(2, "web"), of(3, "db")];
        let meant = |name: &str, here: Option<u8>| meant(&all, name, "b", &|| here.map(uuid));
        let (found, note) = meant("web", Some(2)).unwrap();
        assert_eq!(found, all[1]);
        assert!(note.unwrap().ends_with(&uuid(1).to_string()), "how to name the other");
        // By its UUID any of them is meant, whatever is here.
        assert_eq!(meant(uuid(1).as_str(), Some(2)).unwrap(), (all[0].clone(), None));
        // Nobody here tells them apart.
        for here in [None, Some(9)] {
            let e = meant("web", here).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage);
            assert!(e.what().contains(uuid(1).as_str()) && e.what().contains(uuid(2).as_str()), "{e}");
        }
        assert_eq!(meant("db", Some(3)).unwrap(), (all[2].clone(), None));
        let (found, note) = meant("db", Some(9)).unwrap();
        assert!(found == all[2] && note.unwrap().contains("is another one"));
        assert_eq!(meant("db", None).unwrap().1, None);
        assert_eq!(meant("none", Some(1)).unwrap_err().kind(), Kind::NotFound);
    }
}
