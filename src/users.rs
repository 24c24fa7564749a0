//! Users and groups of this host, from its name service: local files and network directories alike.
//!
//! A call may block for as long as that service does. An unknown user or group is `None`;
//! [`Kind::Io`](crate::error::Kind::Io) means that the service gave no answer.

use crate::error::{Error, Result};
use nix::errno::Errno;
use nix::unistd::{Group, Uid, User};
use std::path::PathBuf;

/// The home directory of a user; also `None` if it is not an absolute path.
pub fn home(uid: u32) -> Result<Option<PathBuf>> {
    let user = entry("user", &uid.to_string(), || User::from_uid(Uid::from_raw(uid)))?;
    Ok(user.map(|user| user.dir).filter(|dir| dir.is_absolute()))
}

/// The number of a user.
pub fn uid(name: &str) -> Result<Option<u32>> {
    Ok(entry("user", name, || User::from_name(name))?.map(|user| user.uid.as_raw()))
}

/// The number of a group.
pub fn gid(name: &str) -> Result<Option<u32>> {
    Ok(entry("group", name, || Group::from_name(name))?.map(|group| group.gid.as_raw()))
}

/// Asks until the name service answers. A signal may interrupt it, and some services report an unknown name as an
/// error.
///
/// nix enlarges its buffer up to 1 MiB. A larger entry, such as a group of some 100,000 members, is ERANGE: an error
/// here.
fn entry<T>(what: &str, name: &str, ask: impl Fn() -> nix::Result<Option<T>>) -> Result<Option<T>> {
    loop {
        match ask() {
            Ok(entry) => return Ok(entry),
            Err(Errno::EINTR) => {}
            // getpwnam_r(3) lists these four for a name that was not found.
            Err(Errno::ENOENT | Errno::ESRCH | Errno::EBADF | Errno::EPERM) => return Ok(None),
            Err(e) => {
                let context = format!("the name service gave no answer for the {what} {name}");
                return Err(Error::from_io(context, e.into()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use std::cell::Cell;

    #[test]
    fn a_known_name_is_found_and_an_unknown_one_is_none() {
        assert_eq!((uid("root").unwrap(), gid("root").unwrap()), (Some(0), Some(0)));
        assert!(home(0).unwrap().is_some_and(|home| home.is_absolute()));
        assert_eq!((uid("nobody-of-that-name").unwrap(), gid("no-such-group").unwrap()), (None, None));
        assert_eq!((uid("a\0b").unwrap(), home(u32::MAX - 7).unwrap()), (None, None));
    }

    #[test]
    fn an_unknown_name_is_told_apart_from_a_service_that_fails() {
        for unknown in [Errno::ENOENT, Errno::ESRCH, Errno::EBADF, Errno::EPERM] {
            assert_eq!(entry::<u32>("user", "u", || Err(unknown)).unwrap(), None, "{unknown}");
        }
        for failed in [Errno::EIO, Errno::EMFILE, Errno::ENOMEM, Errno::EAGAIN, Errno::ERANGE] {
            let e = entry::<u32>("group", "staff", || Err(failed)).unwrap_err();
            assert!(e.chain().contains("no answer for the group staff"), "{failed}: {}", e.chain());
            assert_ne!(e.kind(), Kind::NotFound, "{failed}");
        }
    }

    #[test]
    fn an_interrupted_question_is_asked_again() {
        let asked = Cell::new(0);
        let ask = || {
            asked.set(asked.get() + 1);
            if asked.get() < 3 { Err(Errno::EINTR) } else { Ok(Some(7)) }
        };
        assert_eq!((entry("user", "u", ask).unwrap(), asked.get()), (Some(7), 3));
    }
}
