//! Users and groups of this host, as its name service knows them: also those of a directory of the network, which no file lists.
//!
//! May block for as long as that service does. [`Kind::Io`](crate::error::Kind::Io) where it could not be asked; whom it does not
//! know is `None`.

use crate::error::{Error, Result};
use std::ffi::{CStr, CString, OsStr, c_char, c_int};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::ptr;

/// Room for an entry at first. A group with many members needs more, and is given it up to [`ROOM_MAX`].
const ROOM: usize = 4 << 10;
const ROOM_MAX: usize = 16 << 20;

/// The home of a user; `None` also where it is no absolute path.
pub fn home(uid: u32) -> Result<Option<PathBuf>> {
    let home = |entry: &libc::passwd| {
        if entry.pw_dir.is_null() {
            return None;
        }
        // SAFETY: the entry was filled in, and its strings lie in the buffer, which lives as long as this call.
        let dir = unsafe { CStr::from_ptr(entry.pw_dir) };
        Some(PathBuf::from(OsStr::from_bytes(dir.to_bytes()))).filter(|dir| dir.is_absolute())
    };
    // SAFETY: all pointers are valid for the call, and the length is the buffer's.
    let ask = |entry, room: &mut [c_char], found| unsafe {
        libc::getpwuid_r(uid, entry, room.as_mut_ptr(), room.len(), found)
    };
    Ok(entry("user", &uid.to_string(), ask, home)?.flatten())
}

/// The number of a user.
pub fn uid(name: &str) -> Result<Option<u32>> {
    let Ok(text) = CString::new(name) else { return Ok(None) };
    // SAFETY: all pointers are valid for the call, the name ends with a zero, and the length is the buffer's.
    let ask = |entry, room: &mut [c_char], found| unsafe {
        libc::getpwnam_r(text.as_ptr(), entry, room.as_mut_ptr(), room.len(), found)
    };
    entry("user", name, ask, |entry: &libc::passwd| entry.pw_uid)
}

/// The number of a group.
pub fn gid(name: &str) -> Result<Option<u32>> {
    let Ok(text) = CString::new(name) else { return Ok(None) };
    // SAFETY: all pointers are valid for the call, the name ends with a zero, and the length is the buffer's.
    let ask = |entry, room: &mut [c_char], found| unsafe {
        libc::getgrnam_r(text.as_ptr(), entry, room.as_mut_ptr(), room.len(), found)
    };
    entry("group", name, ask, |entry: &libc::group| entry.gr_gid)
}

/// Asks with as much room as it takes. `ask` fills in the entry and points `found` at it, or at nothing; `read` takes from it what
/// is wanted.
fn entry<E, T>(
    what: &str,
    whom: &str,
    ask: impl Fn(*mut E, &mut [c_char], *mut *mut E) -> c_int,
    read: impl FnOnce(&E) -> T,
) -> Result<Option<T>> {
    let mut room: Vec<c_char> = vec![0; ROOM];
    loop {
        let (mut entry, mut found) = (MaybeUninit::<E>::uninit(), ptr::null_mut());
        match ask(entry.as_mut_ptr(), &mut room, &mut found) {
            0 if found.is_null() => return Ok(None),
            // SAFETY: `found` is `entry`, which was filled in; the strings that it points to lie in `room`.
            0 => return Ok(Some(read(unsafe { &*found }))),
            libc::EINTR => {}
            libc::ERANGE if room.len() < ROOM_MAX => room.resize(room.len() * 4, 0),
            // getpwnam_r(3): some services say so of whom they do not know.
            libc::ENOENT | libc::ESRCH | libc::EBADF | libc::EPERM => return Ok(None),
            error => {
                let e = std::io::Error::from_raw_os_error(error);
                return Err(Error::from_io(format!("the name service cannot be asked for the {what} {whom}"), e));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_known_is_found_and_who_is_not_is_nobody() {
        assert_eq!((uid("root").unwrap(), gid("root").unwrap()), (Some(0), Some(0)));
        assert!(home(0).unwrap().is_some_and(|home| home.is_absolute()));
        assert_eq!((uid("nobody-of-that-name").unwrap(), gid("no-such-group").unwrap()), (None, None));
        assert_eq!((uid("a\0b").unwrap(), home(u32::MAX - 7).unwrap()), (None, None));
    }

    /// A group with thousands of members does not fit at first.
    #[test]
    fn an_entry_is_given_the_room_that_it_takes() {
        let ask = |entry: *mut u32, room: &mut [c_char], found: *mut *mut u32| {
            if room.len() < 100_000 {
                return libc::ERANGE;
            }
            // SAFETY: both are valid, by the caller.
            unsafe {
                entry.write(7);
                found.write(entry);
            }
            0
        };
        assert_eq!(super::entry("group", "g", ask, |n| *n).unwrap(), Some(7));
        let never = |_: *mut u32, _: &mut [c_char], _: *mut *mut u32| libc::ERANGE;
        assert!(super::entry("group", "g", never, |n| *n).unwrap_err().chain().contains("the group g"));
    }
}
