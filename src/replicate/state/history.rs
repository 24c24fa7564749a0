//! The reports of a domain's runs, one a line, oldest first. Bookkeeping for people and for forecasts: nothing in
//! here decides about data, and no run fails because it cannot be written.
//!
//! The file is bounded. When it has grown to [`HISTORY_MAX`], it becomes `history.old.jsonl`, in the place of an
//! older one, and a new file begins with the newest lines, so that forecasts go on. A name is there at every
//! instant.
//!
//! Format: docs/formats/journal.md.

use crate::durable::{replace, sync_dir};
use crate::error::{Error, Kind, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub(in crate::replicate) const HISTORY: &str = "history.jsonl";
const OLD: &str = "history.old.jsonl";

/// Largest history, in bytes: some thousand runs. With the old one, twice that is kept.
const HISTORY_MAX: u64 = 4 << 20;

/// How much of a history is looked at, in bytes: hundreds of runs.
pub(in crate::replicate) const HISTORY_TAIL: u64 = 256 << 10;

/// Appends a line. If a crash or a full file system cut the last line short, the new one begins behind it on a line
/// of its own.
pub(in crate::replicate) fn append(dir: &Path, report: &[u8]) -> Result<()> {
    let path = dir.join(HISTORY);
    let fail = |e| Error::io("cannot append to the history", &path, e);
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path).map_err(fail)?;
    let len = file.metadata().map_err(fail)?.len();
    let cut = len > 0 && last_byte(&mut file, len).map_err(fail)? != b'\n';
    let line = [if cut { b"\n".as_slice() } else { b"" }, report, b"\n"].concat();
    file.write_all(&line).map_err(fail)?;
    match len + line.len() as u64 >= HISTORY_MAX {
        true => turn_over(dir, &path),
        false => Ok(()),
    }
}

fn last_byte(file: &mut File, len: u64) -> io::Result<u8> {
    let mut byte = [0];
    file.seek(SeekFrom::Start(len - 1))?;
    file.read_exact(&mut byte)?;
    Ok(byte[0])
}

/// The old file gets a second name first, and the new one takes the first name last: a crash in between loses nothing.
fn turn_over(dir: &Path, path: &Path) -> Result<()> {
    let fail = |e| Error::io("cannot turn the history over", path, e);
    let newest = tail(path).map_err(fail)?;
    let aside = dir.join(".history.old");
    match fs::remove_file(&aside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    fs::hard_link(path, &aside).and_then(|()| fs::rename(&aside, dir.join(OLD))).map_err(fail)?;
    sync_dir(dir)?;
    replace(dir, HISTORY, &newest)
}

/// The newest whole lines, at most [`HISTORY_TAIL`] bytes of them.
pub(in crate::replicate) fn tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(HISTORY_TAIL);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(HISTORY_TAIL).read_to_end(&mut tail)?;
    if start > 0 {
        let first = tail.iter().position(|b| *b == b'\n').map_or(tail.len(), |at| at + 1);
        tail.drain(..first);
    }
    Ok(tail)
}

/// Least room in the state directory for a run that freezes: its record is written anew at every step of the commit.
const ROOM_MIN: u64 = 1 << 20;

/// Refuses a freeze whose commit could not be recorded: without room for the record the guest would stay on its
/// overlay.
pub(in crate::replicate) fn check_room(dir: &Path) -> Result<()> {
    let free_bytes = crate::replicate::free_space::free_bytes(dir).unwrap_or(u64::MAX);
    if free_bytes >= ROOM_MIN {
        return Ok(());
    }
    let what =
        format!("only {} KiB are free for the record of the run; it needs {} KiB", free_bytes >> 10, ROOM_MIN >> 10);
    Err(Error::new(Kind::Space, what).path(dir).hint("free space there; nothing was frozen"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<String> {
        fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_line_that_was_cut_short_spoils_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(HISTORY);
        append(dir.path(), b"1").unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"cut\": ").unwrap();
        append(dir.path(), b"2").unwrap();
        append(dir.path(), b"3").unwrap();
        assert_eq!(lines(&path), ["1", "{\"cut\": ", "2", "3"]);
    }

    #[test]
    fn a_history_is_bounded_and_keeps_its_newest_lines() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join(HISTORY), dir.path().join(OLD));
        let report = |n: u64| format!("{n:>1000}").into_bytes();
        let runs = 3 * HISTORY_MAX / 1000;
        for n in 0..runs {
            append(dir.path(), &report(n)).unwrap();
            assert!(fs::metadata(&path).unwrap().len() < HISTORY_MAX + 2000);
        }
        let (kept, before) = (lines(&path), lines(&old));
        assert!(before.len() > 4000 && fs::metadata(&old).unwrap().len() < HISTORY_MAX + 2000);
        let numbers: Vec<u64> = kept.iter().map(|l| l.trim().parse().unwrap()).collect();
        assert_eq!(*numbers.last().unwrap(), runs - 1);
        assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "no line is lost, and none is there twice");
        // The new file begins with what the old one ends with.
        assert!(before.contains(&kept[0]) && before.len() > kept.len().min(200));
        assert!(!dir.path().join(".history.old").exists());
    }

    #[test]
    fn a_freeze_needs_room_for_its_record() {
        let dir = tempfile::tempdir().unwrap();
        check_room(dir.path()).unwrap();
        // A file system of the kernel's that never has room.
        let e = check_room(Path::new("/proc")).unwrap_err();
        assert_eq!(e.kind(), Kind::Space);
        assert!(e.hint_text().unwrap().contains("nothing was frozen"), "{e}");
    }
}
